"""A SERAC editor: the two trained models and how they are used, without any edit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.editing.serac.counterfactual import Counterfactual
from pipeline.editing.serac.encoder import TextEncoder
from pipeline.editing.serac.memory import EditMemory, Index, MemoryEntry, Recall


@dataclass(frozen=True)
class SeracEditor:
    """What training makes and every edit uses.

    Attributes:
        encoder: of the scope classifier.
        counterfactual: h.
        scale: of the squared distance of embeddings.
    """

    encoder: TextEncoder
    counterfactual: Counterfactual
    scale: float = 1.0

    @property
    def module(self) -> nn.Module:
        """Both models' parameters as one module, which is trained and saved."""
        return _Both(self.encoder, self.counterfactual.model.model)

    def new_memory(self, index: Index | None = None, exact_below: int = 0) -> EditMemory:
        """An empty memory for this classifier's embeddings."""
        return EditMemory(self.encoder.size, scale=self.scale, index=index, exact_below=exact_below)

    def embed_edits(self, entries: Sequence[MemoryEntry], max_tokens: int) -> Tensor:
        """Embeddings of edits, (M, E) float32."""
        rows = self.encoder.edit_ids([e.prompt for e in entries], [e.target for e in entries])
        return self.encoder.embed(rows, max_tokens)

    def recall(self, memory: EditMemory, queries: Sequence[str], max_tokens: int) -> Recall:
        """The nearest edit of every query, a text; nothing is embedded for an empty memory."""
        if not len(memory):
            return memory.recall(torch.zeros(len(queries), self.encoder.size))
        return memory.recall(self.encoder.embed(self.encoder.query_ids(queries), max_tokens))


class _Both(nn.Module):
    """Published, both are trained without dropout: they are never in training mode."""

    def __init__(self, classifier: nn.Module, counterfactual: nn.Module) -> None:
        super().__init__()
        self.classifier, self.counterfactual = classifier, counterfactual
        self.requires_grad_(True).eval()

    def train(self, mode: bool = True) -> "_Both":
        super().train(False)
        return self
