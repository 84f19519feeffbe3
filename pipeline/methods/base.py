"""What all methods share: settings, layers, and the wrappers on their updates."""

from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.editing.update import Change, Update
from pipeline.methods.prune import prune
from pipeline.methods.rect import rect
from pipeline.models.editable import EditableModel
from pipeline.spec import MethodSpec


class Method:
    """An editing method: a `ClosedForm`, `GradientMethod`, `MemoryMethod` or `KnowledgeNeurons`.

    Args:
        spec: the method's settings, resolved.
    """

    remembers = False
    """Whether what is known of earlier rounds goes into the updates of later ones."""

    def __init__(self, spec: MethodSpec) -> None:
        assert spec.layers is not None, "resolve the spec first"
        self.spec, self.layers = spec, spec.layers

    def bound(
        self, change: Change, model: EditableModel, tokenizer: PreTrainedTokenizerBase
    ) -> Change:
        """A change with what the method keeps beside it, ready to be applied to a model."""
        return change

    def wrap(self, update: Update, weight_DF: Tensor, pristine_DF: Tensor) -> Update:
        """Pass an update through the wrappers that act on updates, in the spec's order.

        Args:
            update: what the method gave.
            weight_DF: the weight that it will be added to, float64.
            pristine_DF: the unedited model's, float64.
        """
        matrix = solved = update.matrix(weight_DF.device)
        for wrapper in self.spec.wrappers:
            if wrapper == "rect":
                matrix = rect(matrix, weight_DF, self.spec.rect.keep)
            elif wrapper == "prune":
                matrix = prune(matrix, weight_DF, pristine_DF, self.spec.prune.base)
        if matrix is solved:
            return update
        return replace(update, parts=Update.of(matrix).parts)
