"""Write a run's edited model with save_pretrained, from the updates on disk."""

import shutil
from pathlib import Path

import torch

from pipeline.applying import apply_updates
from pipeline.errors import InputError
from pipeline.model_card import write_model_card
from pipeline.models.loading import load_model, load_tokenizer, save_model
from pipeline.results import read
from pipeline.spec import parse_spec


def export_model(run: str | Path, directory: str | Path) -> None:
    """Load the unedited model, apply the run's updates, and save it with tokenizer and card.

    The directory is there whole or not at all.

    Args:
        run: a finished run directory.
        directory: where to write; must not exist.

    Raises:
        InputError: the run is not finished, or the directory exists or cannot be written.
        FingerprintMismatchError: the model at the run's path is not the one that was edited.
    """
    opened, target = read(run), Path(directory)
    if target.exists():
        raise InputError(f"{target} exists already; choose another directory")
    spec = parse_spec(opened.manifest["spec"], f"{run}/manifest.json: spec")
    model = load_model(spec.model, torch.device("cpu"))
    apply_updates(model, run)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_model(model, load_tokenizer(spec.model), temporary)
        write_model_card(temporary, opened.manifest, opened.summary["requests"]["applied"])
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{target}: cannot write the model ({error})") from error
