"""An exported SERAC model: the unedited LM, the trained editor and the edit memory in a directory.

`memory.parquet` is the memory as a table, `editor/` what `editfleet train` made, `serac.json` the
settings; the LM lies beside them as save_pretrained writes it.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.editing.serac.memory import MemoryEntry
from pipeline.editing.serac.serving import SeracModel, serac_model
from pipeline.editors import CARD, WEIGHTS, read_card
from pipeline.errors import FingerprintMismatchError, InputError
from pipeline.methods.serac import load_editor, make_router
from pipeline.models.editable import resolve_device
from pipeline.models.encoder_decoder import editable_model
from pipeline.models.loading import fingerprint, load_model, load_tokenizer, save_model
from pipeline.results.damage import first_problem
from pipeline.results.schemas import check_schema
from pipeline.spec import ModelSpec
from pipeline.spec.trained import SeracSpec

MEMORY, SETTINGS, EDITOR = "memory.parquet", "serac.json", "editor"


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    serac: SeracSpec


def save_serac(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: SeracSpec,
    memory: pa.Table,
) -> None:
    """Write an unedited model with its editor and its memory.

    Args:
        directory: an empty one.
        model: the unedited LM.
        tokenizer: the LM's.
        spec: the resolved settings, with the editor.
        memory: rows of memory/.

    Raises:
        OSError: the disk is full or not writable.
    """
    assert spec.editor is not None
    save_model(model, tokenizer, directory)
    (directory / EDITOR).mkdir()
    for name in (CARD, WEIGHTS):
        shutil.copyfile(Path(spec.editor) / name, directory / EDITOR / name)
    pq.write_table(memory, directory / MEMORY)
    described = _Described(format=1, fingerprint=fingerprint(model), serac=spec)
    text = json.dumps(described.model_dump(mode="json"), indent=2)
    (directory / SETTINGS).write_text(text + "\n", encoding="utf-8")


def load_serac(directory: str | Path, model: PreTrainedModel | None = None) -> SeracModel:
    """Load what `editfleet export` wrote of a SERAC run, ready to be called and generated with.

    Args:
        directory: it.
        model: the unedited LM, if it is in memory already; null loads the one in the directory.

    Raises:
        InputError: the directory holds no SERAC model, or a damaged one.
        FingerprintMismatchError: the LM is another one than that of the run.
        ResultsDamagedError: the editor is damaged.
    """
    place = Path(directory)
    described, memory = _read(place)
    named = ModelSpec(path=str(place))
    if model is None:
        model = load_model(named, resolve_device()[0])
    if (found := fingerprint(model)) != described.fingerprint:
        raise FingerprintMismatchError(
            f"{place}: its edits are for the model with fingerprint {described.fingerprint[:12]},"
            f" this one has {found[:12]}"
        )
    tokenizer = load_tokenizer(named)
    card = read_card(place / EDITOR, f"{place}: {EDITOR}")
    editable = editable_model(model)
    editor = load_editor(described.serac, place / EDITOR, card.sha256, editable, tokenizer)
    router = make_router(editor, described.serac)
    rows = memory.select(["case_id", "prompt", "target"]).to_pylist()
    entries = [MemoryEntry(row["case_id"], row["prompt"], row["target"]) for row in rows]
    router.memory.add(entries, torch.tensor(memory["embedding"].to_pylist()))
    return serac_model(editable, router, tokenizer)


def _read(place: Path) -> tuple[_Described, pa.Table]:
    try:
        described = _Described.model_validate_json((place / SETTINGS).read_bytes())
        memory = pq.read_table(place / MEMORY)
        check_schema("memory", memory)
    except ValidationError as error:
        raise InputError(f"{place / SETTINGS} is damaged: {first_problem(error)}") from error
    except (OSError, TypeError, pa.ArrowException) as error:
        raise InputError(f"{place} holds no SERAC model that can be read: {error}") from error
    return described, memory
