"""How many floating point operations a phase cannot do without.

A matrix of p entries costs 2 p a token forward. Backward through activations only (no gradient of
weights is taken) costs 2 p more. Attention scores, norms and activation functions are left out:
they are a few per cent here. Padding, and passes over edits that have finished, do not count, so
that a rate in FLOP/s falls with waste.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pipeline.editing.values import FoundValue
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts


@dataclass(frozen=True)
class ModelSize:
    """Entries of the matrices that a token is multiplied by.

    Attributes:
        blocks: of every block.
        last_mlp: of the last block's MLP alone; 0 where it is no module of its own.
        unembedding: d x v.
    """

    blocks: tuple[int, ...]
    last_mlp: int
    unembedding: int

    @classmethod
    def of(cls, model: EditableModel) -> "ModelSize":
        """Count a model's matrices; vectors (norms, biases) are left out."""
        mlp = model.mlp(model.num_blocks - 1)
        return cls(
            tuple(_entries(block) for block in model.blocks),
            0 if mlp is None else _entries(mlp),
            model.hidden_size * model.vocab_size,
        )

    def up_to(self, layer: int) -> int:
        """Blocks 0 to `layer`, that one included."""
        return sum(self.blocks[: layer + 1])

    def above(self, layer: int) -> int:
        """Blocks above `layer`."""
        return sum(self.blocks[layer + 1 :])


def _entries(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.ndim >= 2)


@dataclass(frozen=True)
class EditTokens:
    """Tokens of one edit: all its rows with the target, split at the lookup token.

    Attributes:
        prefix: before the lookup tokens; they run once.
        suffix: from the lookup tokens on; they run in every pass.
        read: positions at which the vocabulary is read: target tokens, and the essence row's.
    """

    prefix: int
    suffix: int
    read: int

    @classmethod
    def of(cls, edit: EditPrompts) -> "EditTokens":
        """Count the tokens of an edit."""
        target = len(edit.target)
        return cls(
            prefix=sum(row.lookup for row in (*edit.rewrites, edit.essence)),
            suffix=sum(len(row.ids) - row.lookup + target - 1 for row in edit.rewrites) + 1,
            read=len(edit.rewrites) * target + 1,
        )


def value_flops(
    size: ModelSize, edits: Sequence[EditPrompts], found: Sequence[FoundValue], layer: int
) -> float:
    """FLOP of the value search at block L = `layer`, summed over edits.

    2 below (prefix + suffix) + 2 above prefix
        + (2 (n + 1) + 2 n) (above suffix - last_mlp (suffix - read) + d v read)
    with n gradient steps, n + 1 forward passes, `below` the matrices of blocks 0..L and `above`
    those of the blocks above. The last block's MLP is needed only where the vocabulary is read.
    """
    below, above = size.up_to(layer), size.above(layer)
    total = 0.0
    for edit, value in zip(edits, found, strict=True):
        tokens = EditTokens.of(edit)
        once = below * (tokens.prefix + tokens.suffix) + above * tokens.prefix
        unread = tokens.suffix - tokens.read
        a_pass = above * tokens.suffix - size.last_mlp * unread + size.unembedding * tokens.read
        total += 2.0 * once + (4.0 * value.steps + 2.0) * a_pass
    return total


def key_flops(size: ModelSize, edits: Sequence[EditPrompts], layers: Sequence[int]) -> float:
    """FLOP of keys and residuals: all prompts to the last layer once, bare ones again a layer.

    The floor counts every block once for the prompts with contexts, and for the bare prompts, at
    whose end the residual is measured anew for each layer l, the blocks from l to the last again.
    """
    last = layers[-1]
    all_tokens = sum(row.lookup + 1 for edit in edits for row in edit.rewrites)
    bare_tokens = sum(edit.rewrites[0].lookup + 1 for edit in edits)
    tails = sum(sum(size.blocks[layer : last + 1]) for layer in layers[1:])
    return 2.0 * (size.up_to(last) * all_tokens + tails * bare_tokens)


def covariance_flops(
    size: ModelSize, key_sizes: Sequence[int], tokens: int, last_layer: int
) -> float:
    """FLOP of the covariance of several layers: blocks 0..L once, and f x f a token and layer.

    A Gram product is counted in full, 2 f^2 a token, though it is symmetric: that is what a matrix
    product does.
    """
    return 2.0 * tokens * (size.up_to(last_layer) + sum(f * f for f in key_sizes))
