"""Write a run's edited model with save_pretrained, from the updates and adapters on disk."""

from pathlib import Path

import pyarrow.compute as pc
import torch

from pipeline.adapter_files import save_edited
from pipeline.applying import apply_updates, require_fingerprint, require_round, spec_of
from pipeline.errors import InputError
from pipeline.model_card import write_model_card
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.results import Run, read
from pipeline.results.atomic import whole_directory
from pipeline.results.recorded import RecordedSummary, check_recorded
from pipeline.serac_files import save_serac
from pipeline.sources.files import writing
from pipeline.spec import JobSpec, ModelSpec


def export_model(
    run: str | Path,
    directory: str | Path,
    *,
    round: int | None = None,
    merge: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Load the unedited model, apply the run's updates, and save it with tokenizer and card.

    Adapters are written beside it, for `pipeline.load_adapter`; an edit memory with its trained
    models for `pipeline.load_serac`. The directory is there whole or not
    at all.

    Args:
        run: the directory or URL of a finished run, or with `round` also a study under way.
        directory: where to write; must not exist.
        round: write the model as it was after this round of a study, counted from 0; null: after
            all, of which there is none where every round was rolled back.
        merge: write adapters into the model's own weights, where its architecture allows that.
        allow_pickle: load the unedited weights from .bin files where there are no safetensors; what
            the run's own spec says of it does not count, since a run may come from anyone.

    Raises:
        InputError: the run, or the round, is not finished, adapters cannot be merged, or the
            directory exists or cannot be written.
        FingerprintMismatchError: the model at the run's path is not the one that was edited.
    """
    opened, target = read(run), Path(directory)
    if target.exists():
        raise InputError(f"{target} exists already; choose another directory")
    recorded = opened.recorded
    spec = spec_of(opened)
    require_round(opened, round)
    applied = _applied(opened, round)
    source = spec.model.model_copy(update={"allow_pickle": allow_pickle})
    if spec.method.is_memory:
        _export_memory(opened, target, spec, source, round, applied)
        return
    model = load_model(source, torch.device("cpu"))
    weights = apply_updates(model, run, round=round).weights
    if merge:
        weights.merge()
    with writing(str(target)), whole_directory(target) as temporary:
        save_edited(weights, load_tokenizer(source), temporary)
        write_model_card(temporary, spec, recorded, applied, merged=merge)


def _export_memory(
    run: Run, target: Path, spec: JobSpec, source: ModelSpec, round: int | None, applied: int
) -> None:
    """Write the unedited model with the memory and what it is used with."""
    model = load_model(source, torch.device("cpu"))
    require_fingerprint(model, run)
    memory = run.memory()
    if round is not None:
        held = pc.equal if spec.rolls_back else pc.less_equal
        memory = memory.filter(held(memory["round"], round))
    with writing(str(target)), whole_directory(target) as temporary:
        save_serac(temporary, model, load_tokenizer(source), spec.method.serac, memory)
        write_model_card(temporary, spec, run.recorded, applied)


def _applied(run: Run, round: int | None) -> int:
    """How many facts were rewritten, up to a round."""
    if round is None:
        summary = check_recorded(run.summary, RecordedSummary, f"{run.place}/summary.json")
        return summary.requests.get("applied", 0)
    edits = run.edits()
    of_it = pc.equal if spec_of(run).rolls_back else pc.less_equal
    until = edits.filter(of_it(edits["round"], round))
    return int(pc.sum(pc.equal(until["status"], "applied")).as_py() or 0)
