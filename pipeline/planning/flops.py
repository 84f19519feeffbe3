"""How many floating point operations a phase cannot do without.

A matrix of p entries costs 2 p a token forward. Backward through activations only (no gradient of
weights is taken) costs 2 p more. Attention scores, norms and activation functions are left out:
they are a few per cent here. Padding, and passes over edits that have finished, do not count, so
that a rate in FLOP/s falls with waste.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pipeline.models.editable import EditableModel
from pipeline.models.encoder_decoder import EncoderDecoderModel
from pipeline.prompts import EditPrompts, FactPrompts


@dataclass(frozen=True)
class ModelSize:
    """Entries of the matrices that a token is multiplied by.

    Attributes:
        blocks: of every block.
        mlps: of every block's MLP alone; 0 where it is no module of its own.
        downs: of every block's down-projection alone.
        unembedding: d x v.
        encoder_blocks: of every block of an encoder, for a token that it reads.
        crossing: of every decoder block's maps of what the encoder has read, for a token of that;
            not among those of `blocks`.
    """

    blocks: tuple[int, ...]
    mlps: tuple[int, ...]
    downs: tuple[int, ...]
    unembedding: int
    encoder_blocks: tuple[int, ...] = ()
    crossing: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: EditableModel) -> "ModelSize":
        """Count a model's matrices; vectors (norms, biases) are left out."""
        mlps = [model.mlp(layer) for layer in range(model.num_blocks)]
        encoder, crossing = [], [0] * model.num_blocks
        if isinstance(model, EncoderDecoderModel):
            encoder = [matrix_entries(block) for block in model.encoder_blocks]
            # Keys and values; queries and output are of the decoder's own tokens.
            crossing = [matrix_entries(attention) // 2 for attention in model.cross_attentions]
        return cls(
            tuple(
                matrix_entries(block) - m for block, m in zip(model.blocks, crossing, strict=True)
            ),
            tuple(0 if mlp is None else matrix_entries(mlp) for mlp in mlps),
            tuple(
                matrix_entries(model.down_projection(layer)) for layer in range(model.num_blocks)
            ),
            model.hidden_size * model.vocab_size,
            tuple(encoder),
            tuple(crossing),
        )

    def first(self, count: int | None) -> "ModelSize":
        """The first so many blocks, of an encoder too; None is all of them."""
        return ModelSize(
            self.blocks[:count],
            self.mlps[:count],
            self.downs[:count],
            self.unembedding,
            self.encoder_blocks[:count],
            self.crossing[:count],
        )

    @property
    def encoder(self) -> int:
        """Entries of all of an encoder's blocks."""
        return sum(self.encoder_blocks)

    def up_to(self, layer: int) -> int:
        """Blocks 0 to `layer`, that one included."""
        return sum(self.blocks[: layer + 1])

    def above(self, layer: int) -> int:
        """Blocks above `layer`."""
        return sum(self.blocks[layer + 1 :])

    def source_up_to(self, layer: int) -> int:
        """What a token that the encoder reads is multiplied by, for blocks 0 to `layer`."""
        return self.encoder + sum(self.crossing[: layer + 1])

    @property
    def source(self) -> int:
        """What a token that the encoder reads is multiplied by."""
        return self.source_up_to(len(self.crossing) - 1)


def matrix_entries(module: nn.Module) -> int:
    """Entries of a module's matrices; vectors (norms, biases) are left out."""
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
    size: ModelSize, edits: Sequence[EditPrompts], steps: Sequence[float], layer: int
) -> float:
    """FLOP of the value search at block L = `layer`, summed over edits of so many steps each.

    2 below (prefix + suffix) + 2 above prefix
        + (2 (n + 1) + 2 n) (above suffix - mlp (suffix - read) + d v read)
    with n gradient steps, n + 1 forward passes, `below` the matrices of blocks 0..L and `above`
    those of the blocks above. The last block's MLP, `mlp`, is needed only where the vocabulary is
    read.
    """
    below, above = size.up_to(layer), size.above(layer)
    total = 0.0
    for edit, taken in zip(edits, steps, strict=True):
        tokens = EditTokens.of(edit)
        once = below * (tokens.prefix + tokens.suffix) + above * tokens.prefix
        unread = tokens.suffix - tokens.read
        a_pass = above * tokens.suffix - size.mlps[-1] * unread + size.unembedding * tokens.read
        total += 2.0 * once + (4.0 * taken + 2.0) * a_pass
    return total


@dataclass(frozen=True)
class RowTokens:
    """Tokens of some rows.

    Attributes:
        tokens: that the model runs; of an encoder-decoder model the decoder's.
        read: those at which the vocabulary is read.
        source: that an encoder reads.
    """

    tokens: int
    read: int
    source: int = 0

    def __add__(self, other: "RowTokens") -> "RowTokens":
        return RowTokens(
            self.tokens + other.tokens, self.read + other.read, self.source + other.source
        )

    @classmethod
    def of_target(cls, edit: EditPrompts, *, at_prompt: bool = False) -> "RowTokens":
        """Of an edit's rows with its target, which may be read at the prompt's last token alone."""
        target = 1 if at_prompt else len(edit.target)
        tokens = sum(stem + target - 1 for stem in edit.stems)
        return cls(tokens, target * len(edit.rewrites), sum(edit.sources))


def entering_flops(size: ModelSize, rows: RowTokens, layer: int) -> float:
    """FLOP of what enters block `layer`: the blocks below it, and an encoder."""
    below = size.up_to(layer - 1) * rows.tokens
    return 2.0 * (below + size.source_up_to(layer - 1) * rows.source)


def leaving_flops(size: ModelSize, rows: RowTokens, layer: int, *, backward: bool) -> float:
    """FLOP of a pass from block `layer` on, and of one back to its down-projection's output.

    The last MLP and the vocabulary run where the loss is read only; what the blocks make of the
    encoder's states goes forwards only. Backwards the block itself has no part.
    """
    read = (size.mlps[-1] + size.unembedding) * rows.read
    forward = (size.above(layer - 1) - size.mlps[-1]) * rows.tokens + read
    forward += sum(size.crossing[layer:]) * rows.source
    if not backward:
        return 2.0 * forward
    if layer == len(size.blocks) - 1:
        return 2.0 * (forward + size.unembedding * rows.read)
    return 2.0 * (forward + (size.above(layer) - size.mlps[-1]) * rows.tokens + read)


def gradient_flops(
    size: ModelSize, edits: Sequence[EditPrompts], layer: int, passes: float, *, at_prompt: bool
) -> float:
    """FLOP of so many gradients of the target's loss, summed over edits.

    What lies below the lowest edited block runs once, and so does an encoder.

    Args:
        size: the model's.
        edits: tokenised requests.
        layer: the lowest edited block.
        passes: gradients of every edit.
        at_prompt: whether the target is predicted at the prompt's last token, and not run itself.
    """
    total = 0.0
    for edit in edits:
        rows = RowTokens.of_target(edit, at_prompt=at_prompt)
        a_pass = leaving_flops(size, rows, layer, backward=True)
        total += entering_flops(size, rows, layer) + passes * a_pass
    return total


def attribution_flops(
    size: ModelSize, facts: Sequence[FactPrompts], layers: Sequence[int], steps: int
) -> float:
    """FLOP of attributing facts to neurons: L m passes a token of the answer, forwards and back.

    Rows run once. A pass is of one token, from the scaled block's down-projection on. A fact
    without an answer counts one token for it.
    """
    pass_entries = sum(size.downs[layer] + size.above(layer) + size.unembedding for layer in layers)
    total = 0.0
    for fact in facts:
        answer = len(fact.old or (0,))
        tokens = sum(len(prompt) + answer - 1 for prompt in fact.prompts)
        total += 2.0 * sum(size.blocks) * tokens
        total += 4.0 * steps * pass_entries * answer * len(fact.prompts)
    return total


def patch_flops(
    size: ModelSize,
    edits: Sequence[EditPrompts],
    layer: int,
    steps: float,
    patches: Sequence[int],
    query_entries: int,
) -> float:
    """FLOP of training patches beside a block (T-Patcher), summed over edits.

    What lies below the block runs once. Every step goes forwards and backwards from there; in the
    last block only its MLP and the vocabulary run, where the loss is read.

    Args:
        size: the model's.
        edits: tokenised requests.
        layer: the block.
        steps: steps of an edit.
        patches: of each edit.
        query_entries: numbers in all remembered queries together.
    """
    total, is_last = 0.0, layer == len(size.blocks) - 1
    for edit, count in zip(edits, patches, strict=True):
        tokens = sum(stem + len(edit.target) - 1 for stem in edit.stems)
        source, read = sum(edit.sources), len(edit.target) * len(edit.rewrites)
        inside = 0.0 if is_last else (size.above(layer - 1) - size.mlps[-1]) * tokens
        again = 0.0 if is_last else 2.0 * source * sum(size.crossing[layer:])
        a_step = inside + (size.mlps[-1] + size.unembedding) * read + count * query_entries
        once = size.up_to(layer) * tokens + size.source_up_to(layer) * source
        total += 2.0 * once + steps * (4.0 * a_step + again)
    return total


def key_flops(size: ModelSize, edits: Sequence[EditPrompts], layers: Sequence[int]) -> float:
    """FLOP of keys and residuals: all prompts to the last layer once, bare ones again a layer.

    Every block counts once for every prompt, and for the bare prompts, at whose end the residual is
    measured anew for each layer l, the down-projection of l and the blocks above it again. The last
    layer's MLP is needed at the lookup tokens only.
    """
    last = layers[-1]
    rows = [row.lookup + 1 for edit in edits for row in edit.rewrites]
    bare = [edit.rewrites[0].lookup + 1 for edit in edits]
    mlp = size.mlps[last]
    total = (size.up_to(last) - mlp) * sum(rows) + mlp * len(rows)
    for layer in layers[:-1]:
        tail = size.downs[layer] + size.up_to(last) - size.up_to(layer) - mlp
        total += tail * sum(bare) + mlp * len(bare)
    return 2.0 * total


def covariance_flops(
    size: ModelSize, key_sizes: Sequence[int], tokens: int, last_layer: int
) -> float:
    """FLOP of the covariance of several layers: up to the last key once, f x f a token and layer.

    A Gram product is counted in full, 2 f^2 a token, though it is symmetric: that is what a matrix
    product does.
    """
    forward = size.up_to(last_layer) - size.downs[last_layer]
    return 2.0 * tokens * (forward + sum(f * f for f in key_sizes))


def reduce_flops(edits: int, key_size: int, hidden_size: int) -> float:
    """FLOP of one layer's update, its penalty's factor left out where edits are few."""
    n, f, d = edits, key_size, hidden_size
    if n < f:
        # Push-through: two triangular solves, the N x N system, and the product of the factors.
        return 2.0 * f * f * n + 2.0 * n * n * f + n**3 / 3 + 2.0 * n * n * d + 2.0 * n * f * d
    # Normal equations: both sums, a Cholesky factor, two triangular solves.
    return 2.0 * f * f * n + 2.0 * f * n * d + f**3 / 3 + 2.0 * f * f * d


def factor_flops(key_size: int, *, has_basis: bool) -> float:
    """FLOP of the Cholesky factor of a layer's penalty, and of the eigenvectors behind a basis.

    F^3 / 3, and about 9 F^3 for a symmetric eigendecomposition (Golub and Van Loan, "Matrix
    Computations", 4th edition, section 8.3).
    """
    return key_size**3 * (1 / 3 + (9.0 if has_basis else 0.0))


def scoring_flops(size: ModelSize, tokens: float, read: float, source: float = 0.0) -> float:
    """FLOP of scoring rows of so many tokens: the last MLP and the vocabulary where it is read.

    `source` tokens are read by an encoder.
    """
    whole = (sum(size.blocks) - size.mlps[-1]) * tokens
    read_out = (size.mlps[-1] + size.unembedding) * read
    return 2.0 * (whole + read_out + size.source * source)


def continuation_flops(size: ModelSize, prompt: int, new: int) -> float:
    """FLOP of continuing a prompt by so many tokens, each of which runs once."""
    tokens, source = (new, prompt) if size.encoder else (prompt + new, 0)
    return 2.0 * (sum(size.blocks) * tokens + size.unembedding * new + size.source * source)
