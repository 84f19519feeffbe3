"""A run's updates as they would be without some of its edits, solved from its stored keys.

No value is searched and no key measured: those of the edits that stay are the run's own.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pipeline.cluster.covariance import Covariances
from pipeline.cluster.engine import compute_threads
from pipeline.cluster.past import PastGrams
from pipeline.cluster.reducer import Reducer
from pipeline.covariances import CovarianceIdentity, load_covariances
from pipeline.editing.update import EditedWeights, Update
from pipeline.errors import (
    DivergedError,
    FingerprintMismatchError,
    InputError,
    ResultsDamagedError,
)
from pipeline.methods import build_closed_form, wraps_updates
from pipeline.models.editable import EditableModel
from pipeline.requests import quote
from pipeline.results.keys import StoredKeys, read_case_ids, read_keys
from pipeline.results.manifest import read_begun
from pipeline.results.store import RunStore
from pipeline.results.updates import read_update
from pipeline.spec import JobSpec

_MOST_NAMED = 10


@dataclass(frozen=True)
class Removal:
    """Which edits are taken out of a finished run, and what has to be solved again for that.

    Attributes:
        store: the run.
        spec: its spec.
        removed: case_ids.
        edits: the case_ids of each round, in the order of its equations or of its memory; with
            `merge`, one row of equations stands for all edits of a subject.
    """

    store: RunStore
    spec: JobSpec
    removed: frozenset[str]
    edits: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, store: RunStore, spec: JobSpec, case_ids: Collection[str]) -> "Removal":
        """Check that the run holds what it takes.

        Raises:
            InputError: it kept no keys, or edits are not in it; up to ten are named.
        """
        if not (spec.method.is_closed_form or spec.method.is_memory):
            raise InputError(
                f"{store.place}: the edits of a round by {spec.method.name} cannot be told apart;"
                " `unedit` is for methods that solve for values or keep a memory (docs/methods.md)"
            )
        if spec.rolls_back:
            raise InputError(
                f"{store.place}: every round was rolled back, so no model holds several edits; the"
                " unedited model is the one without them"
            )
        of_round = _remembered if spec.method.is_memory else _with_keys
        rounds = range(read_begun(store).plan.rounds)
        edits = [of_round(store, spec, round) for round in rounds]
        subjects = _merged_subjects(store) if "merge" in spec.method.wrappers else {}
        edits = [_with_merged(members, subjects) for members in edits]
        known = {case_id for members in edits for case_id in members}
        removed = dict.fromkeys(map(str, case_ids))
        if not removed:
            raise InputError("no case_id is given; name the edits to take out")
        if strangers := [case_id for case_id in removed if case_id not in known]:
            raise InputError(f"{store.place} holds no such edits: {_why(store, strangers)}")
        for case_id in removed:
            if apart := [other for other in subjects.get(case_id, ()) if other not in removed]:
                raise InputError(
                    f"{store.place}: the edit {quote(case_id)} has one value with others of its"
                    f" subject (method.wrappers: merge); name {', '.join(map(quote, apart))} too"
                )
        return cls(store, spec, frozenset(removed), tuple(edits))

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, ascending."""
        return _layers(self.spec)

    @property
    def num_left(self) -> int:
        """How many edits stay."""
        return sum(map(len, self.edits)) - len(self.removed)

    @cached_property
    def solved(self) -> frozenset[int]:
        """Rounds whose updates become others.

        Those with an edit that goes, and after the first of these also those whose equations hold
        its key, or whose update depends on the weights before it. A memory is not solved for.
        """
        if self.spec.method.is_memory:
            return frozenset()
        own = {r for r, members in enumerate(self.edits) if not self.removed.isdisjoint(members)}
        if build_closed_form(self.spec.method).remembers or wraps_updates(self.spec.method):
            return frozenset(range(min(own), len(self.edits)))
        return frozenset(own)

    @property
    def needs_covariances(self) -> bool:
        """Whether equations are left to be solved."""
        return any(not self.removed.issuperset(self.edits[round]) for round in self.solved)


class Remainder:
    """The updates that a removal leaves, one after another.

    Args:
        removal: what is taken out.
        weights: the unedited model's; every update is applied to them.
        covariances: layer -> C, (F, F) float64, if the removal `needs_covariances`.
    """

    def __init__(
        self, removal: Removal, weights: EditedWeights, covariances: dict[int, Tensor]
    ) -> None:
        self.removal, self.weights, self.covariances = removal, weights, covariances
        self.changes: dict[int, Tensor] = {}
        """Layer -> what was applied minus what the run itself applied, (D, F) float64."""
        method, self._threads = removal.spec.method, removal.spec.cluster.reducer_threads
        with compute_threads(self._threads):
            self._reducer = Reducer(method, self._threads)
        self._method = build_closed_form(method)
        self._past = PastGrams(self._threads) if self._method.remembers else None

    def apply(self) -> Iterator[tuple[int, int]]:
        """Apply the updates of all rounds in their order; yield (round, layer) after each.

        Raises:
            DivergedError: an update without the removed edits is not finite.
            InputError: a layer's equations cannot be solved.
            ResultsDamagedError: a file of keys or an update is not what its name says.
        """
        removal = self.removal
        for round in range(len(removal.edits)):
            paths = removal.store.layers("update", round)
            for layer in removal.layers:
                stored, is_solved = _read(paths[layer]), round in removal.solved
                if is_solved or self._past is not None:
                    keys = self._keys(round, layer)
                if is_solved:
                    self._apply_solved(round, layer, keys, stored)
                else:
                    self.weights.apply(layer, stored)
                if self._past is not None:
                    self._past.add(layer, keys.keys_NF)
                yield round, layer

    def _apply_solved(self, round: int, layer: int, keys: StoredKeys, stored: Update) -> None:
        change = -stored.matrix().double()
        # Nothing is added where no edit is left: even a 0 would turn a weight of -0 into 0.
        if keys.case_ids:
            update = self._solve(round, layer, keys)
            change += update.matrix().double()
            self.weights.apply(layer, update)
        earlier = self.changes.get(layer)
        self.changes[layer] = change if earlier is None else earlier + change

    def _solve(self, round: int, layer: int, keys: StoredKeys) -> Update:
        past = None if self._past is None else self._past.of(layer)
        try:
            with compute_threads(self._threads), torch.no_grad():
                self._reducer.begin(layer, self.covariances[layer], len(keys.case_ids), past)
                self._reducer.add(0, (keys.keys_NF, keys.residuals_ND))
                update = self._reducer.solve(1)
        except ValueError as error:
            raise InputError(f"round {round}, layer {layer}: {error}") from error
        if wraps_updates(self.removal.spec.method):
            update = self._method.wrap(update, *self.weights.masters(layer))
        if not all(bool(part.isfinite().all()) for part in update.parts.values()):
            raise DivergedError(
                f"round {round}, layer {layer}: the update without the removed edits holds"
                " infinities or NaNs"
            )
        return update

    def _keys(self, round: int, layer: int) -> StoredKeys:
        """What is stored of the edits that stay."""
        path = self.removal.store.layers("keys", round)[layer]
        stored, weight = read_keys(path), self.weights.model.oriented_weight(layer)
        widths = stored.residuals_ND.shape[1], stored.keys_NF.shape[1]
        # ROME's original form has two keys side by side.
        if widths[0] != weight.shape[0] or widths[1] not in (weight.shape[1], 2 * weight.shape[1]):
            raise ResultsDamagedError(
                f"{path}: residuals and keys have {widths} entries, the weight is"
                f" {tuple(weight.shape)}"
            )
        kept = [i for i, name in enumerate(stored.case_ids) if name not in self.removal.removed]
        return StoredKeys(
            tuple(stored.case_ids[i] for i in kept),
            stored.keys_NF[kept],
            stored.residuals_ND[kept],
        )


def recorded_covariances(
    store: RunStore, model: EditableModel, layers: Sequence[int], directory: Path | None = None
) -> dict[int, Tensor]:
    """Read the covariances that a run was solved with: layer -> C, (F, F) float64.

    Args:
        store: the run.
        model: the unedited model.
        layers: the layers.
        directory: where they are now; null is where they were then.

    Raises:
        InputError: one is not there any more.
        FingerprintMismatchError: one is another than it was.
        ResultsDamagedError: one is damaged.
    """
    begun = read_begun(store)
    if begun.covariance is None:
        raise ResultsDamagedError(f"{store.place}: the manifest names no covariances")
    place = Path(begun.covariance.directory) if directory is None else directory
    # What they were made from, the digests say.
    identity = CovarianceIdentity(
        fingerprint=begun.model.fingerprint,
        corpus=None,
        corpus_digest=None,
        samples=None,
        max_tokens=None,
        dtype=begun.model.dtype,
    )
    names = {layer: model.weight_name(layer) for layer in layers}
    sizes = {layer: model.key_size(layer) for layer in layers}
    found, tokens, missing = load_covariances(place, layers, sizes, names, identity)
    remedy = "restore them there, or say with --covariance (covariance=) where a copy is"
    if missing:
        raise InputError(
            f"{store.place}: the covariances of layers {missing} that it was solved with are not in"
            f" {place}; {remedy}"
        )
    now, then = Covariances(found, tokens, place).digests(), begun.covariance.sha256
    if other := [layer for layer in layers if then.get(str(layer)) != now[str(layer)]]:
        raise FingerprintMismatchError(
            f"{store.place}: the covariances of layers {other} in {place} are not those that it was"
            f" solved with; {remedy}"
        )
    return found


def _with_keys(store: RunStore, spec: JobSpec, round: int) -> tuple[str, ...]:
    """The edits of a round whose keys a run has kept.

    Raises:
        InputError: it kept none.
    """
    layers, kept = _layers(spec), store.layers("keys", round)
    if missing := [str(layer) for layer in layers if layer not in kept]:
        raise InputError(
            f"{store.place} kept no keys of round {round}, layer {', '.join(missing)}, to"
            " solve from; make the run again with output.keep_keys: true"
        )
    return read_case_ids(kept[layers[0]])


def _remembered(store: RunStore, spec: JobSpec, round: int) -> tuple[str, ...]:
    """The edits that a round has put into the memory."""
    return tuple(store.read_parts("memory", round)["case_id"].to_pylist())


def _merged_subjects(store: RunStore) -> dict[str, tuple[str, ...]]:
    """case_id -> all edits of its round that its value is for."""
    rows = store.read_parts("edits").select(["round", "subject", "case_id", "status"]).to_pylist()
    groups: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    for row in rows:
        if row["status"] == "applied":
            groups[row["round"], row["subject"]].append(row["case_id"])
    return {case_id: tuple(members) for members in groups.values() for case_id in members}


def _with_merged(members: tuple[str, ...], subjects: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The edits of a round, each subject's after the first one, which alone has a key."""
    return tuple(dict.fromkeys(other for one in members for other in subjects.get(one, (one,))))


def _layers(spec: JobSpec) -> tuple[int, ...]:
    assert spec.method.layers is not None, "the spec of a run is resolved"
    return spec.method.layers


def _why(store: RunStore, case_ids: Sequence[str]) -> str:
    """Why each of these requests is not in a run's weights."""
    rows = store.read_parts("edits").select(["case_id", "status", "reason"]).to_pylist()
    known = {row["case_id"]: f"{row['status']}: {row['reason']}" for row in rows}
    reasons = [
        f"{quote(case_id)} ({known.get(case_id, 'no request of this name was edited')})"
        for case_id in case_ids[:_MOST_NAMED]
    ]
    hidden = len(case_ids) - len(reasons)
    return "; ".join(reasons) + (f"; and {hidden} more" if hidden else "")


def _read(path: Path) -> Update:
    """Read an update of a method that solves for it.

    Raises:
        ResultsDamagedError: the file holds something else.
    """
    update = read_update(path)[1]
    if not isinstance(update, Update):
        raise ResultsDamagedError(f"{path} holds an adapter, expected an update of a weight")
    return update
