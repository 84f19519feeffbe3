"""SERAC (arXiv 2206.06520): edits go into a memory, and the model's weights stay as they are.

A round embeds its edits with the trained scope classifier; its change is a `MemoryAdapter`. Queries
that an edit holds are answered by the counterfactual model h (`pipeline.editing.serac`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.editing.adapters import MemoryAdapter
from pipeline.editing.serac.counterfactual import Counterfactual
from pipeline.editing.serac.editor import SeracEditor
from pipeline.editing.serac.encoder import TextEncoder
from pipeline.editing.serac.index import InvertedFile
from pipeline.editing.serac.memory import MemoryEntry
from pipeline.editing.serac.router import SeracRouter
from pipeline.editing.update import Change
from pipeline.editors import read_tensors
from pipeline.errors import InputError
from pipeline.methods.base import Method
from pipeline.models.editable import EditableModel
from pipeline.models.first_blocks import first_blocks
from pipeline.models.loading import load_encoder, load_model, load_tokenizer
from pipeline.requests import EditRequest
from pipeline.spec import MethodSpec, ModelSpec
from pipeline.spec.trained import SeracSpec

_MAX_TOKENS = 2048


class MemoryMethod(Method):
    """A method whose rounds add to a memory beside the model, and are made of requests alone."""

    def prepare(self, model: EditableModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load what is used beside the model, so that no edit has to wait for it.

        Raises:
            InputError: it does not fit the model, or is another than when it was trained.
            ResultsDamagedError: it is damaged.
        """
        raise NotImplementedError

    def remember(
        self,
        model: EditableModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        round: int,
    ) -> list[dict[str, Any]]:
        """Rows of memory/, one a request.

        Raises:
            InputError: a request cannot be remembered; which one is found by asking for fewer.
        """
        raise NotImplementedError

    def change(self, rows: Sequence[dict[str, Any]]) -> Change:
        """The round's change, of its rows, which may be none."""
        raise NotImplementedError


class Serac(MemoryMethod):
    """Its editor is loaded when it is first needed."""

    def __init__(self, spec: MethodSpec) -> None:
        super().__init__(spec)
        self._router: tuple[EditableModel, SeracRouter] | None = None

    def router(self, model: EditableModel, tokenizer: PreTrainedTokenizerBase) -> SeracRouter:
        """The trained models with an empty memory, for the unedited model."""
        if self._router is None or self._router[0] is not model:
            own = self.spec.serac
            assert own.editor is not None and own.editor_sha256 is not None
            editor = load_editor(own, own.editor, own.editor_sha256, model, tokenizer)
            self._router = model, make_router(editor, own)
        return self._router[1]

    def prepare(self, model: EditableModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.router(model, tokenizer)

    def remember(
        self,
        model: EditableModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        round: int,
    ) -> list[dict[str, Any]]:
        entries = [MemoryEntry(r.case_id, r.text, r.target_new) for r in requests]
        editor = self.router(model, tokenizer).editor
        embedded = editor.embed_edits(entries, _MAX_TOKENS)
        if not bool(embedded.isfinite().all()):
            raise InputError("its embedding is not finite")
        return [
            {
                "round": round,
                "case_id": entry.key,
                "prompt": entry.prompt,
                "target": entry.target,
                "embedding": embedding,
            }
            for entry, embedding in zip(entries, embedded.tolist(), strict=True)
        ]

    def change(self, rows: Sequence[dict[str, Any]]) -> MemoryAdapter:
        entries = [MemoryEntry(row["case_id"], row["prompt"], row["target"]) for row in rows]
        embeddings = [torch.tensor(row["embedding"]) for row in rows]
        return MemoryAdapter.of(entries, torch.stack(embeddings) if rows else torch.zeros(0, 0))

    def bound(
        self, change: Change, model: EditableModel, tokenizer: PreTrainedTokenizerBase
    ) -> Change:
        if not isinstance(change, MemoryAdapter):
            return change
        return replace(change, router=self.router(model, tokenizer))


def new_editor(
    spec: SeracSpec, model: EditableModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> SeracEditor:
    """The two models as they are before training, in float32 on the edited model's device.

    Raises:
        InputError: a model that the spec names cannot be loaded, or h has another tokenizer.
    """
    if spec.classifier is None:
        encoder = TextEncoder.from_first_blocks(
            model.model,
            tokenizer,
            blocks=spec.classifier_blocks,
            size=spec.embedding_size,
            seed=seed,
        )
    else:
        named = ModelSpec(path=spec.classifier, dtype="float32")
        encoder = TextEncoder(load_encoder(named, model.output_device), load_tokenizer(named))
    if spec.counterfactual is None:
        small = first_blocks(model.model, spec.counterfactual_blocks).float()
    else:
        named = ModelSpec(path=spec.counterfactual, dtype="float32")
        if load_tokenizer(named).get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"method.serac.counterfactual: {spec.counterfactual} has another tokenizer than the"
                " edited model; take a small model of the same family"
            )
        small = load_model(named, model.output_device)
    return SeracEditor(encoder, Counterfactual.of(small, tokenizer, model.vocab_size), spec.scale)


def load_editor(
    spec: SeracSpec,
    directory: str | Path,
    sha256: str,
    model: EditableModel,
    tokenizer: PreTrainedTokenizerBase,
) -> SeracEditor:
    """The two models as they were trained.

    Args:
        spec: the settings that they were trained with.
        directory: the editor's.
        sha256: digest of its parameters.
        model: the unedited model.
        tokenizer: its tokenizer.

    Raises:
        InputError: a model that the spec names is another one by now.
        ResultsDamagedError: the editor is damaged.
    """
    editor = new_editor(spec, model, tokenizer)
    try:
        editor.module.load_state_dict(read_tensors(directory, sha256))
    except RuntimeError as error:
        raise InputError(
            f"method.serac.editor: {directory} does not fit the models that method.serac names:"
            f" {str(error).splitlines()[0]}"
        ) from error
    return editor


def make_router(editor: SeracEditor, spec: SeracSpec) -> SeracRouter:
    """An editor with an empty memory, used as the spec says."""
    index = None
    if spec.index is not None:
        index = InvertedFile(
            editor.encoder.size, exact_below=spec.exact_below, probes=spec.index_probes
        )
    return SeracRouter(
        editor,
        editor.new_memory(index, spec.exact_below),
        mode=spec.mode,
        threshold=spec.threshold,
        max_tokens=_MAX_TOKENS,
    )
