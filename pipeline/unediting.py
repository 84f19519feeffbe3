"""Take named edits out of a finished run again: solve without them, from what the run keeps."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.applying import check_shapes, require_round
from pipeline.cluster.calls.base import TOKENS_PER_BATCH
from pipeline.cluster.forgetting import Forgetting
from pipeline.cluster.plan import cut_probes
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.removal import Remainder, Removal, recorded_covariances
from pipeline.cluster.resume import earlier_spec
from pipeline.editing.update import Change, EditedWeights
from pipeline.errors import FingerprintMismatchError, InputError
from pipeline.evaluation.asking import scores_of
from pipeline.evaluation.comparing import compare, recorded_probes
from pipeline.evaluation.metrics import Score
from pipeline.evaluation.probes import Probe
from pipeline.methods import build_method
from pipeline.model_card import write_model_card
from pipeline.models.editable import resolve_device
from pipeline.models.encoder_decoder import editable_model
from pipeline.models.kernels import choose_kernels
from pipeline.models.loading import (
    fingerprint,
    load_model,
    load_tokenizer,
    save_model,
)
from pipeline.places import is_url
from pipeline.results.atomic import whole_directory, write_atomically
from pipeline.results.encoding import to_json, to_parquet
from pipeline.results.manifest import read_begun
from pipeline.results.reading import Run
from pipeline.results.remote import open_run
from pipeline.results.store import RunStore
from pipeline.results.updates import read_update
from pipeline.serac_files import save_serac
from pipeline.sources.files import writing
from pipeline.spec import ModelSpec

_ASKED = ["edit_round", "case_id", "probe", "probe_index", "prompt"]
_ASKED += ["target_new", "target_true", "aspect"]


@dataclass(frozen=True)
class UneditResult:
    """What `unedit` leaves.

    Attributes:
        path: the directory with `model/`, `unedit.json` and `unedit.parquet`.
        summary: what unedit.json holds.
    """

    path: Path
    summary: dict[str, Any]


def unedit(
    run: str | Path,
    case_ids: Iterable[str],
    output: str | Path,
    *,
    covariance: str | Path | None = None,
    allow_pickle: bool = False,
    console: Console | None = None,
) -> UneditResult:
    """Take edits out of a finished run: solve again without them, say what changed, save the model.

    From a memory their entries are taken, which is exact. For other methods keys and residuals of
    the edits that stay are those that the run measured; see docs/unedit.md for when that is exact.
    The run itself stays as it is.

    Args:
        run: the directory or URL of a finished run that kept its keys (`output.keep_keys`) or has a
            memory.
        case_ids: the edits to take out.
        output: where to write; must not exist, and is there whole or not at all.
        covariance: where the run's covariances are now; null is where they were.
        allow_pickle: load the unedited weights from .bin files where there are no safetensors.
        console: where to show progress; null is silent.

    Raises:
        InputError: the run is not finished or kept no keys, its covariances or its editor are gone,
            an edit is not in it, or the directory exists or cannot be written.
        FingerprintMismatchError: the model at the run's path is not the one that was edited.
        ResultsDamagedError: the run is damaged.
        DivergedError: what is left has no finite update.
    """
    target, progress = Path(output), PhaseProgress(console)
    if target.exists():
        raise InputError(f"{target} exists already; choose another directory")
    store = _finished(run)
    removal = Removal.of(store, earlier_spec(store), list(case_ids))
    source = removal.spec.model.model_copy(update={"allow_pickle": allow_pickle})
    weights, tokenizer = _unedited(store, removal.layers, source), load_tokenizer(source)
    method = build_method(removal.spec.method)

    def bound(change: Change) -> Change:
        return method.bound(change, weights.model, tokenizer)

    remainder: Remainder | Forgetting
    if removal.spec.method.is_memory:
        remainder = Forgetting(removal, weights, bound)
    else:
        remainder = Remainder(removal, weights, _covariances(removal, weights, covariance))
    asked = _asked(Run(store), removal)

    def scores(name: str) -> list[Score]:
        return _scores(weights, tokenizer, [probe for probe, _ in asked], progress, name)

    norms = _apply_all(removal, weights, bound)
    before = scores("before")
    weights.revert()
    with progress.phase("solving", len(removal.edits) * len(removal.layers)) as ticker:
        for _ in remainder.apply():
            ticker.advance(1)
    table, compared = compare(asked, before, scores("after"), removal.removed)
    summary = {**_described(removal), "layers": _changes(remainder, norms), **compared}
    with writing(str(target)), whole_directory(target) as temporary:
        _save(removal, weights, tokenizer, temporary / "model")
        recorded = Run(store).recorded
        write_model_card(temporary / "model", removal.spec, recorded, removal.num_left)
        write_atomically(temporary / "unedit.parquet", to_parquet(table))
        write_atomically(temporary / "unedit.json", to_json(summary))
    return UneditResult(target, summary)


def _finished(run: str | Path) -> RunStore:
    """Open a run that is finished, with all its files whole."""
    store = open_run(run)
    begun = read_begun(store)
    if begun.status != "finished":
        raise InputError(
            f"{store.place} is not finished (status {begun.status!r}); resume it first"
        )
    require_round(Run(store), begun.plan.rounds - 1)
    store.verify()
    return store


def _unedited(store: RunStore, layers: tuple[int, ...], source: ModelSpec) -> EditedWeights:
    """Load the model that a run edited, where there is one to load it to."""
    model = load_model(source, resolve_device()[0])
    found, expected = fingerprint(model), read_begun(store).model.fingerprint
    if found != expected:
        raise FingerprintMismatchError(
            f"{store.place}: it edited the model with fingerprint {expected[:12]}, the one at"
            f" {source.path} has {found[:12]}; restore the unedited model"
        )
    choose_kernels(model)
    return EditedWeights(editable_model(model), layers)


def _covariances(
    removal: Removal, weights: EditedWeights, directory: str | Path | None
) -> dict[int, Tensor]:
    if not removal.needs_covariances:
        return {}
    place = None if directory is None else Path(directory)
    return recorded_covariances(removal.store, weights.model, removal.layers, place)


def _asked(run: Run, removal: Removal) -> list[tuple[Probe, int]]:
    """Probes with the rounds of their edits, equal prompts side by side."""
    applied = {case_id for members in removal.edits for case_id in members}
    metrics = run.dataset("metrics").to_table(columns=_ASKED)
    asked = recorded_probes(run.edits(), metrics, applied)
    return sorted(asked, key=lambda pair: pair[0].prompt)


def _apply_all(
    removal: Removal, weights: EditedWeights, bound: Callable[[Change], Change]
) -> dict[int, tuple[float, float]]:
    """Apply a run's own updates; layer -> norms of the weight and of all that was added to it."""
    for round in range(len(removal.edits)):
        paths = removal.store.layers("update", round)
        for layer in removal.layers:
            update = bound(read_update(paths[layer])[1])
            check_shapes(weights.model, [(layer, update)], removal.store.place)
            weights.apply(layer, update)
    return {layer: weights.norms(layer) for layer in removal.layers}


def _save(
    removal: Removal, weights: EditedWeights, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write the model without the removed edits; a memory beside the unedited one."""
    model = weights.model.model
    if not removal.spec.method.is_memory:
        save_model(model, tokenizer, directory)
        return
    memory = removal.store.read_parts("memory")
    gone = pc.is_in(memory["case_id"], pa.array(sorted(removal.removed)))
    left = memory.filter(pc.invert(gone))
    save_serac(directory, model, tokenizer, removal.spec.method.serac, left)


def _scores(
    weights: EditedWeights,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    progress: PhaseProgress,
    name: str,
) -> list[Score]:
    """Score probes that are in the order of their prompts."""
    max_tokens = TOKENS_PER_BATCH[weights.model.input_device.type]
    found: list[Score] = []
    with progress.phase(name, len(probes)) as ticker:
        for shard in cut_probes(probes):
            found += scores_of(weights, tokenizer, shard.items, max_tokens=max_tokens)
            ticker.advance(len(shard.items))
    return found


def _described(removal: Removal) -> dict[str, Any]:
    begun = read_begun(removal.store)
    return {
        "run": _where(removal.store),
        "fingerprint": begun.model.fingerprint,
        "case_ids": sorted(removal.removed),
        "edits_left": removal.num_left,
        "rounds_solved_again": sorted(removal.solved),
    }


def _where(store: RunStore) -> str:
    return store.place if is_url(store.place) else str(store.path.resolve())


def _changes(
    remainder: Remainder | Forgetting, norms: dict[int, tuple[float, float]]
) -> dict[str, dict[str, float]]:
    """Layer, as text, -> how much its weight changed, relative to it and to all that was added."""
    changes = {layer: float(change.norm()) for layer, change in remainder.changes.items()}
    return {
        str(layer): {
            "weight_change": changes[layer] / norms[layer][0],
            "update_change": changes[layer] / norms[layer][1],
        }
        for layer in sorted(changes)
    }
