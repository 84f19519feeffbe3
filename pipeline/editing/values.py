"""Values: for every edit the hidden state z that makes the model say the new object.

The search variable delta is added to the output of block L at the subject's last token (MEMIT,
arXiv 2210.07229, section 4.3; the loss is ROME's, arXiv 2202.05262, equation 4). Blocks 0..L run
once; tokens before the subject's last token run once above L and stay as attention keys and values;
the loop carries only the tokens from there on, of many edits at once. One batch row is one edit:
its contexts lie side by side and do not see each other.

Shapes: d hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.editing.memory import is_out_of_memory
from pipeline.editing.replay import Recorder
from pipeline.editing.search import Search
from pipeline.editing.search_batch import Ended, ValueSettings
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts

__all__ = ["FoundValue", "ValueSettings", "find_merged_values", "find_values"]


@dataclass(frozen=True)
class FoundValue:
    """The outcome of one search; where edits were merged, of all of them together.

    Attributes:
        z: (d,) float32 (float64 for a float64 model), on the CPU; of a search inside the block,
            what its down-projection shall put out.
        initial_norm: ||h0||, the clean hidden state at the (first) bare prompt's lookup token.
        delta_norm: ||z - h0||; of a search inside the block, of its down-projection's delta.
        steps: gradient steps taken.
        loss: the loss at z.
        target_probability: mean over contexts of exp(mean log-probability of the target's tokens).
    """

    z: Tensor
    initial_norm: float
    delta_norm: float
    steps: int
    loss: float
    target_probability: float

    @classmethod
    def of(cls, ended: Ended) -> "FoundValue":
        """What is reported of a search that has ended."""
        return cls(
            ended.anchor[0] + ended.delta[0],
            float(ended.hidden.norm()),
            float(ended.delta[0].norm()),
            ended.steps,
            ended.loss,
            ended.probability,
        )

    @property
    def is_finite(self) -> bool:
        """False when the search ran into an infinity or a NaN."""
        return bool(torch.isfinite(self.z).all()) and self.loss - self.loss == 0.0


def find_values(
    model: EditableModel,
    edits: Sequence[EditPrompts],
    layer: int,
    settings: ValueSettings,
    batch_size: int,
    *,
    cuda_graphs: bool = False,
) -> list[FoundValue]:
    """Search the values of many edits at once.

    Args:
        model: the model; its weights stay as they are.
        edits: tokenised requests.
        layer: the block L whose output is searched.
        settings: the search's settings.
        batch_size: edits searched at once; halved whenever memory runs out.
        cuda_graphs: replay passes as CUDA graphs where the model is on one GPU.

    Returns:
        One value an edit, in the order of `edits`.

    Raises:
        torch.OutOfMemoryError: not even one edit fits (RuntimeError on a processor).
    """
    groups = [[edit] for edit in edits]
    return find_merged_values(model, groups, layer, settings, batch_size, cuda_graphs=cuda_graphs)


def find_merged_values(
    model: EditableModel,
    groups: Sequence[Sequence[EditPrompts]],
    layer: int,
    settings: ValueSettings,
    batch_size: int,
    *,
    cuda_graphs: bool = False,
) -> list[FoundValue]:
    """Search one value for each group of edits of one subject.

    The loss is the mean of the edits' own, the values' norms are taken relative to h0 of the
    group's first edit (MEMIT-Merge, arXiv 2502.07322).

    Args:
        model: the model; its weights stay as they are.
        groups: tokenised requests.
        layer: the block L whose output is searched.
        settings: the search's settings.
        batch_size: edits searched at once; a larger group is searched alone.
        cuda_graphs: replay passes as CUDA graphs where the model is on one GPU.

    Returns:
        One value a group, in the order of `groups`.

    Raises:
        torch.OutOfMemoryError: not even one group fits (RuntimeError on a processor).
    """
    # Edits of like length share a batch, so that little of it is padding.
    left = sorted(range(len(groups)), key=lambda i: (*max(map(_token_counts, groups[i])), i))
    found: dict[int, FoundValue] = {}
    recorder = Recorder(cuda_graphs and model.input_device.type == "cuda")
    if recorder.is_wanted and len(model.devices) > 1:
        recorder.give_up("the model is on several GPUs")
    while left:
        search = Search(model, [groups[i] for i in left], layer, settings, batch_size, recorder)
        try:
            for ended in search.run():
                found[left[ended.number]] = FoundValue.of(ended)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
            batch_size //= 2
            del search
            torch.cuda.empty_cache()
        left = [i for i in left if i not in found]
    return [found[i] for i in range(len(groups))]


def _token_counts(edit: EditPrompts) -> tuple[int, int]:
    """Tokens of an edit from its lookup tokens on, and before them."""
    suffix = sum(len(row.ids) - row.lookup + len(edit.target) - 1 for row in edit.rewrites)
    return suffix, sum(row.lookup for row in edit.rewrites)
