"""Write a run's edited model with save_pretrained, from the updates on disk."""

import shutil
from pathlib import Path

import torch

from pipeline.applying import apply_updates
from pipeline.errors import InputError
from pipeline.model_card import write_model_card
from pipeline.models.loading import load_model, load_tokenizer, save_model
from pipeline.results import read
from pipeline.results.recorded import RecordedSummary, check_recorded
from pipeline.sources.files import writing
from pipeline.spec import parse_spec


def export_model(run: str | Path, directory: str | Path, *, allow_pickle: bool = False) -> None:
    """Load the unedited model, apply the run's updates, and save it with tokenizer and card.

    The directory is there whole or not at all.

    Args:
        run: a finished run directory.
        directory: where to write; must not exist.
        allow_pickle: load the unedited weights from .bin files where there are no safetensors; what
            the run's own spec says of it does not count, since a run may come from anyone.

    Raises:
        InputError: the run is not finished, or the directory exists or cannot be written.
        FingerprintMismatchError: the model at the run's path is not the one that was edited.
    """
    opened, target = read(run), Path(directory)
    if target.exists():
        raise InputError(f"{target} exists already; choose another directory")
    recorded = opened.recorded
    spec = parse_spec(recorded.spec, f"{run}/manifest.json: spec")
    summary = check_recorded(opened.summary, RecordedSummary, f"{run}/summary.json")
    source = spec.model.model_copy(update={"allow_pickle": allow_pickle})
    model = load_model(source, torch.device("cpu"))
    apply_updates(model, run)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(str(target)):
            save_model(model, load_tokenizer(source), temporary)
            write_model_card(temporary, spec, recorded, summary.requests.get("applied", 0))
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
