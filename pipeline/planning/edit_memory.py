"""What an edit memory beside a model costs (SERAC): embedding edits, looking up, answering by h.

A prompt that is asked of the edited model is embedded by the classifier, whoever answers it; those
of rewrites and paraphrases are taken to be in an edit's scope, and h reads them behind an edit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForTextEncoding, PreTrainedTokenizerBase

from pipeline.evaluation.probes import Probe
from pipeline.models.answers import is_encoder_decoder
from pipeline.models.first_blocks import shorter_config, shorter_encoder_config
from pipeline.models.loading import (
    auto_class,
    encoder_class,
    load_config,
    load_encoder_config,
)
from pipeline.planning.flops import ModelSize, matrix_entries, scoring_flops
from pipeline.planning.outline import ModelOutline, as_outline, outline
from pipeline.prompts import EditPrompts, token_ids
from pipeline.spec import ModelSpec
from pipeline.spec.trained import SeracSpec

IN_SCOPE = ("rewrite", "paraphrase")
_WIDE = 4
_TEXT_BYTES = 100
"""Prompt, answer and name of an edit; an assumption."""


@dataclass(frozen=True)
class EditMemorySize:
    """Sizes of the models beside the edited one, and tokens of an edit.

    Attributes:
        classifier: entries of the matrices that a token of a text is multiplied by.
        answering: h.
        embedding: entries of an embedding.
        edit_tokens: of a prompt with its answer, on average.
        target_tokens: of the answer alone.
    """

    classifier: int
    answering: ModelSize
    embedding: int
    edit_tokens: float
    target_tokens: float

    @classmethod
    def of(
        cls, spec: SeracSpec, model: ModelOutline, edits: Sequence[EditPrompts]
    ) -> "EditMemorySize":
        """Count what a resolved spec names, or copies of the edited model.

        Raises:
            InputError: a model that is named cannot be found.
        """
        own = ModelSize.of(model)
        read = own.encoder_blocks or own.blocks
        classifier, embedding = sum(read[: spec.classifier_blocks]), spec.embedding_size
        if spec.classifier is not None:
            classifier, embedding = _encoder(spec.classifier)
        answering = own.first(spec.counterfactual_blocks)
        if spec.counterfactual is not None:
            named = ModelSpec(path=spec.counterfactual, dtype="float32")
            answering = ModelSize.of(outline(named, device=torch.device("cpu")))
        targets = sum(len(edit.target) for edit in edits) / len(edits)
        prompts = sum(len(edit.rewrites[0].ids) for edit in edits) / len(edits)
        return cls(classifier, answering, embedding, prompts + targets, targets)

    @property
    def weight_bytes(self) -> int:
        """Of both models in float32; an embedding of tokens is counted as large as h's."""
        of_blocks = sum(self.answering.blocks) + self.answering.source
        return (self.classifier + of_blocks + 2 * self.answering.unembedding) * _WIDE

    @property
    def edit_bytes(self) -> int:
        """Of an edit in the memory, on its way, or in a run."""
        return self.embedding * _WIDE + _TEXT_BYTES

    @property
    def embedding_flops(self) -> float:
        """FLOP of putting an edit into the memory."""
        return 2.0 * self.classifier * self.edit_tokens

    def lookup_flops(self, probes: Sequence[Probe], tokenizer: PreTrainedTokenizerBase) -> float:
        """FLOP of asking probes beyond what the edited model takes for them."""
        prompts = list(dict.fromkeys(probe.prompt for probe in probes))
        lengths = dict(zip(prompts, map(len, token_ids(tokenizer, prompts)), strict=True))
        inside = [lengths[probe.prompt] for probe in probes if probe.kind in IN_SCOPE]
        # A probe has two answers, the new one and the old.
        answers = 2 * self.target_tokens * len(inside)
        behind = sum(inside) + self.edit_tokens * len(inside)
        rows, source = (answers, behind) if self.answering.encoder else (behind + answers, 0.0)
        looked_up = 2.0 * self.classifier * sum(lengths.values())
        return looked_up + scoring_flops(self.answering, rows, answers, source)


@dataclass(frozen=True)
class EditorOutline:
    """Classifier and h as they are trained, in float32.

    Attributes:
        module: both, without their numbers.
        classifier: entries of the matrices that a token of a text is multiplied by.
        head: of the one that a text's state is multiplied by.
        answering: h.
    """

    module: nn.Module
    classifier: int
    head: int
    answering: ModelSize


def editor_outline(spec: SeracSpec, model: ModelOutline) -> EditorOutline:
    """Build what a resolved spec names, or copies of the edited model.

    Raises:
        InputError: a model that is named cannot be found, or there are fewer blocks.
    """
    config, own = model.model.config, ModelSize.of(model)
    with torch.device("meta"):
        if spec.classifier is not None:
            named = load_encoder_config(ModelSpec(path=spec.classifier))
            classifier, head = encoder_class(named).from_config(named), None
            read, _ = _encoder(spec.classifier)
        else:
            kind, cut = AutoModelForTextEncoding, shorter_encoder_config
            if not is_encoder_decoder(config):
                kind, cut = auto_class(config), shorter_config
            classifier = kind.from_config(cut(config, spec.classifier_blocks))
            head = nn.Linear(model.hidden_size, spec.embedding_size, bias=False)
            read = sum((own.encoder_blocks or own.blocks)[: spec.classifier_blocks])
        if spec.counterfactual is None:
            shorter = shorter_config(config, spec.counterfactual_blocks)
        else:
            shorter = load_config(ModelSpec(path=spec.counterfactual))
        answering = auto_class(shorter).from_config(shorter)
    module = nn.ModuleDict({"classifier": classifier, "answering": answering})
    if head is not None:
        module["head"] = head
    entries = 0 if head is None else head.weight.numel()
    return EditorOutline(module.float(), read, entries, ModelSize.of(as_outline(answering)))


def _encoder(path: str) -> tuple[int, int]:
    """Entries of an encoder's matrices without its embedding of tokens, and its hidden size."""
    config = load_encoder_config(ModelSpec(path=path))
    with torch.device("meta"):
        model = encoder_class(config).from_config(config)
    embedding = model.get_input_embeddings().weight.numel()
    return matrix_entries(model) - embedding, int(config.get_text_config().hidden_size)
