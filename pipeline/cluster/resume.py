"""Going on with a run: what must be as it was, what is kept, and what is computed again."""

import logging
from collections.abc import Container, Mapping

import numpy as np

from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.covariance import Covariances
from pipeline.cluster.general import held_out_entry
from pipeline.cluster.outcomes import shards_left
from pipeline.cluster.plan import Plan, cut_probes
from pipeline.cluster.queries import digest
from pipeline.cluster.record import package_versions, plan_entries
from pipeline.cluster.rounds import BASELINE_ROUND
from pipeline.errors import FingerprintMismatchError, InputError, ResultsDamagedError
from pipeline.methods import build_adapter_method, build_method
from pipeline.places import below
from pipeline.results.listing import KINDS, Kind, Part, TensorKind, in_order
from pipeline.results.manifest import Begun, Cut, HeldOut, Requests, read_begun
from pipeline.results.place import MANIFEST, is_run
from pipeline.results.store import RunStore
from pipeline.spec import JobSpec, parse_spec

log = logging.getLogger(__name__)

_ANEW = "or begin anew in another directory with --restart (restart=True)"
_REMEDY = f"restore the file from a copy, {_ANEW}"


def open_earlier(spec: JobSpec) -> RunStore | None:
    """Open the run that has begun in a job's directory; None if none has.

    Raises:
        ResultsDamagedError: a manifest is damaged.
    """
    return RunStore.open(spec.run_path, spec.place) if is_run(spec.run_path) else None


def require_same_job(store: RunStore, plan: Plan) -> None:
    """Check that a plan is the one that a run was begun with.

    Raises:
        InputError: settings that decide the result, or the requests, are others; each is named.
        ResultsDamagedError: the manifest was changed.
    """
    begun, earlier = read_begun(store), earlier_spec(store)
    method = plan.spec.method
    if method.contexts is None and begun.contexts_source == "generated":
        method = method.model_copy(update={"contexts": earlier.method.contexts})
    anchor = earlier.method.nas.anchor_norm
    if method.measures_anchor and begun.anchor_source == "measured" and anchor is not None:
        method = method.with_anchor(anchor)
    now = plan.spec.model_copy(update={"method": method})
    if differences := now.differences(earlier):
        raise InputError(
            f"{store.place} holds a run with other settings: {'; '.join(differences)}. Set them as"
            f" they were to resume it, {_ANEW}"
        )
    entries, before = plan_entries(plan), begun.requests
    if before != Requests(**entries["requests"]):
        what = "their content is another"
        if before.count != len(plan.rows):
            what = f"{before.count} were read then and {len(plan.rows)} now"
        raise InputError(
            f"{store.place}: the requests ({plan.spec.requests.path}) have changed since the run"
            f" began: {what}. Restore them to resume the run, {_ANEW}"
        )
    if begun.held_out != _held_out(plan):
        raise InputError(
            f"{store.place}: the texts of evaluation.general.corpus"
            f" ({plan.spec.evaluation.general.corpus}) have changed since the run began; restore"
            f" them to resume the run, {_ANEW}"
        )
    if begun.plan != Cut(**entries["plan"]):
        raise InputError(
            f"{store.place}: another version of editfleet cut the requests into other shards;"
            f" resume the run with that one, {_ANEW}"
        )
    _warn_of_other_versions(store, begun)


def earlier_spec(store: RunStore) -> JobSpec:
    """The spec of a run, with the contexts that it drew and the norm anchor that it measured.

    Raises:
        ResultsDamagedError: it does not have the hash that the manifest records.
    """
    begun, where = read_begun(store), f"{below(store.place, MANIFEST)}: spec"
    try:
        spec = parse_spec(begun.spec, where)
    except InputError as error:
        raise ResultsDamagedError(f"{error}; {_REMEDY}") from error
    if spec.digest() != begun.spec_sha256:
        raise ResultsDamagedError(
            f"{where} has SHA-256 {spec.digest()[:12]}, expected {begun.spec_sha256[:12]}: it was"
            f" changed, or written by another version of editfleet; {_REMEDY}"
        )
    return spec


def require_same_model(store: RunStore, worker: WorkerDescription) -> None:
    """Check that the workers hold the model that a run was begun with.

    Raises:
        FingerprintMismatchError: weights or type are others.
    """
    begun = read_begun(store)
    for name in ("fingerprint", "dtype"):
        before, found = getattr(begun.model, name), getattr(worker, name)
        if before != found:
            raise FingerprintMismatchError(
                f"{store.place}: the run was begun with a model of {name} {before[:12]}, the one at"
                f" {begun.model.path} has {found[:12]}; restore it to resume the run, {_ANEW}"
            )
    if begun.workers.device.partition(":")[0] != worker.device.partition(":")[0]:
        log.warning(
            "%s was begun on %s and goes on on %s: its last bits will not be those of one run",
            store.place,
            begun.workers.device,
            worker.device,
        )


def require_same_covariances(store: RunStore, covariances: Covariances) -> None:
    """Check that the covariances are those that a run was begun with.

    Raises:
        FingerprintMismatchError: one is not; it is named.
    """
    begun = read_begun(store).covariance
    before = {} if begun is None else begun.sha256
    found = covariances.digests()
    if other := [layer for layer, now in found.items() if before.get(layer) != now]:
        raise FingerprintMismatchError(
            f"{store.place}: the covariances of layers {', '.join(other)} in"
            f" {covariances.directory} are not those that the run was begun with; restore them to"
            f" resume the run, {_ANEW}"
        )


def require_same_queries(store: RunStore, queries: np.ndarray) -> None:
    """Note the queries that a run's method remembers, or check that they are those noted before.

    Raises:
        FingerprintMismatchError: they are others.
    """
    found, before = digest(queries), read_begun(store).queries
    if before is None:
        store.update_manifest(queries={"count": len(queries), "sha256": found})
    elif before.sha256 != found:
        raise FingerprintMismatchError(
            f"{store.place}: the queries of covariance.corpus are not those that the run was begun"
            f" with; restore the corpus to resume the run, {_ANEW}"
        )


def drop_unsound(store: RunStore, plan: Plan) -> int:
    """Unlist the parts that are damaged, and those that came from such a part; return how many.

    All values of a stage go into every update of it, an update into those after it, into the later
    stages and rounds, and all of them into the scores of the edited model: without the one, the
    other is computed again. Rounds that are rolled back have nothing from one another.
    """
    damaged = store.damaged()
    for _, error in damaged:
        log.warning("%s", error)
    lost = {part.name: part for part, _ in damaged}
    stands = True
    for round in range(len(plan.rounds.shards)):
        came_from, stands = _unsound(store, lost, round, plan, stands or plan.spec.rolls_back)
        lost |= {part.name: part for part in came_from}
    if len(lost) > len(damaged):
        names = ", ".join(list(lost)[len(damaged) :])
        log.warning("%s: computed again, since it came from what is lost: %s", store.place, names)
    # What was computed from others goes first: a crash in between leaves the reason for the rest.
    for part in reversed(in_order(lost.values())):
        store.withdraw(part)
    return len(lost)


def _unsound(
    store: RunStore,
    lost: Mapping[str, Part],
    round: int,
    plan: Plan,
    stands: bool,
) -> tuple[list[Part], bool]:
    """The parts of a round that came from lost ones, and whether what follows it still stands."""

    def sound(kind: Kind, shards: Container[int] | None = None) -> list[Part]:
        return [part for part in store.parts(kind, round, shards) if part.name not in lost]

    if plan.spec.method.is_locating:
        return _unsound_locating(store, lost, round, plan, stands)
    if plan.spec.method.is_piecewise:
        return _unsound_adapting(store, lost, round, plan, stands)
    if not plan.spec.method.is_closed_form:
        return _unsound_training(store, lost, round, plan, stands)
    gone: list[Part] = []
    kinds: tuple[TensorKind, ...] = ("update", "keys")
    by_layer = {kind: {part.layer: part for part in sound(kind)} for kind in kinds}
    damaged = {part.layer for part in lost.values() if part.round == round}
    for stage, layers in enumerate(plan.stages):
        shards = {shard.index for shard in plan.value_shards(round, stage)}
        values = sound("values", shards)
        gone += [] if stands else values
        stands = stands and len(values) == len(shards)
        for layer in layers:
            found = {kind: parts[layer] for kind, parts in by_layer.items() if layer in parts}
            # A batch may have been told not to keep keys; those that were kept are made again.
            wanted = {"update"} if plan.spec.rounds is None and layer not in damaged else set(kinds)
            stands = stands and wanted <= found.keys()
            gone += [] if stands else found.values()
    gone += [] if stands else [*sound("metrics"), *sound("general")]
    is_whole = stands and not any(part.round == round for part in lost.values())
    return gone + ([] if is_whole else sound("edits")), stands


def _unsound_training(
    store: RunStore, lost: Mapping[str, Part], round: int, plan: Plan, stands: bool
) -> tuple[list[Part], bool]:
    """The same for a method whose round is one piece of work: all of its parts stand, or none."""
    found = {
        kind: [part for part in store.parts(kind, round) if part.name not in lost] for kind in KINDS
    }
    wanted: dict[Kind, int] = {"update": len(plan.layers), plan.spec.method.round_table: 1}
    if build_method(plan.spec.method).remembers and not plan.spec.rolls_back:
        wanted["state"] = 1
    damaged = {part.kind for part in lost.values() if part.round == round}
    if not stands or damaged & wanted.keys():
        return [part for parts in found.values() for part in parts], False
    # A round that was interrupted goes on with what it holds.
    is_done = all(len(found[kind]) == count for kind, count in wanted.items())
    return found["edits"] if damaged else [], is_done


def _unsound_locating(
    store: RunStore, lost: Mapping[str, Part], round: int, plan: Plan, stands: bool
) -> tuple[list[Part], bool]:
    """The same for a method whose updates come from neurons, and those from attributions."""
    wanted: dict[Kind, int] = {
        "attributions": len(plan.rounds.shards[round]),
        "neurons": 1,
        "update": len(plan.layers),
    }
    scores: tuple[Kind, ...] = ("metrics", "general")
    gone: list[Part] = []
    for kind in (*wanted, *scores):
        found = [part for part in store.parts(kind, round) if part.name not in lost]
        gone += [] if stands else found
        stands = stands and (kind in scores or len(found) == wanted[kind])
    is_whole = stands and not any(part.round == round for part in lost.values())
    edits = [part for part in store.parts("edits", round) if part.name not in lost]
    return gone + ([] if is_whole else edits), stands


def _unsound_adapting(
    store: RunStore, lost: Mapping[str, Part], round: int, plan: Plan, stands: bool
) -> tuple[list[Part], bool]:
    """The same for adapters: a piece is its tensors and its rows, an update is joined of pieces."""
    found = {
        kind: [part for part in store.parts(kind, round) if part.name not in lost] for kind in KINDS
    }
    everything = [part for parts in found.values() for part in parts]
    if not stands:
        return everything, False
    table = build_adapter_method(plan.spec.method).table
    damaged = {
        part.shard if part.kind == table else part.layer
        for part in lost.values()
        if part.round == round and part.kind in (table, "piece")
    }
    if damaged:
        kept = [
            part
            for part in (*found[table], *found["piece"])
            if (part.shard if part.kind == table else part.layer) not in damaged
        ]
        return [part for part in everything if part not in kept], False
    is_done = len(found["update"]) == len(plan.layers)
    of_round = [part for part in lost.values() if part.round == round]
    if is_done or not of_round:
        return found["edits"] if of_round else [], is_done
    # Its update is lost and is joined again, to the same bits; scores are taken again all the same.
    return [*found["metrics"], *found["general"], *found["edits"]], False


def holds_all_updates(store: RunStore, plan: Plan) -> bool:
    """Whether no update is left to be solved for."""
    rounds = range(len(plan.rounds.shards))
    return all(set(plan.layers) <= store.layers("update", round).keys() for round in rounds)


def is_complete(store: RunStore, plan: Plan) -> bool:
    """Whether nothing is left to do of what the plan asks for."""
    if read_begun(store).status != "finished":
        return False
    rounds, output = plan.rounds, plan.spec.output
    baseline = [BASELINE_ROUND] if plan.spec.evaluation.baseline else []
    left = [
        shard
        for round in (*baseline, *rounds.evaluated)
        for shard in shards_left(store, "metrics", round, cut_probes(rounds.probes(round)))
    ]
    measured = (*baseline, *rounds.evaluated) if plan.held_out else ()
    for round, shards in enumerate(rounds.shards):
        if plan.spec.method.is_locating:
            left += shards_left(store, "attributions", round, shards)
            left += shards_left(store, "neurons", round, shards[:1])
        elif not (plan.spec.method.is_closed_form or plan.spec.method.is_piecewise):
            left += shards_left(store, plan.spec.method.round_table, round, shards[:1])
        for stage in range(len(plan.stages)):
            left += shards_left(store, "values", round, plan.value_shards(round, stage))
        left += shards_left(store, "edits", round, shards[:1])
    return (
        not left
        and all(store.has_part("general", round, 0) for round in measured)
        and holds_all_updates(store, plan)
        and (store.path / "summary.json").is_file()
        and (not output.save_model or store.holds_model)
    )


def _held_out(plan: Plan) -> HeldOut | None:
    entry = held_out_entry(plan.held_out)
    return None if entry is None else HeldOut.model_validate(entry)


def _warn_of_other_versions(store: RunStore, begun: Begun) -> None:
    before, now = begun.versions, package_versions()
    if others := [name for name in now if before.get(name) != now[name]]:
        log.warning(
            "%s was begun with other versions: %s; its last bits may not be those of one run",
            store.place,
            ", ".join(f"{name} {before.get(name)} (now {now[name]})" for name in others),
        )
