"""Queries: the inputs of a block's feed-forward network, behind the norm that stands before it.

Shapes: n tokens, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.editing.batching import token_batches
from pipeline.editing.keys import inputs_of
from pipeline.models.answers import AnswerForm
from pipeline.models.editable import EditableModel
from pipeline.prompts import split_text


@torch.no_grad()
def ffn_queries(
    model: EditableModel, layer: int, rows: Sequence[Sequence[int]], max_tokens: int
) -> Tensor:
    """The queries of all tokens of some texts but each one's first: (n, D), by text, on the CPU.

    A text's first token attends to itself alone, and is left out (T-Patcher, arXiv 2301.09785). A
    decoder's start token attends to the encoder, and is what most answers are read at: it is there,
    with the tokens of a text that its decoder reads (`split_text`).

    Args:
        layer: the block.
        rows: token ids, one text each.
        max_tokens: tokens in one batch.

    Returns:
        float32, or float64 for a float64 model.
    """
    wide = torch.promote_types(model.dtype, torch.float32)
    split = [split_text(ids, model.answers) for ids in rows]
    sources = [source for _, source in split if source is not None]
    first = 0 if sources else 1
    by_row: dict[int, Tensor] = {}
    for batch in token_batches(model, [ids for ids, _ in split], max_tokens, sources or None):
        with inputs_of(model.up_projection(layer)) as seen:
            model.run(
                None,
                first=0,
                stop=layer + 1,
                masks=batch.masks,
                position_ids=batch.positions,
                input_ids=batch.ids,
            )
        queries = seen[0].reshape(*batch.ids.shape, -1).to(wide).cpu()
        for row, found, length in zip(batch.index.tolist(), queries, batch.lengths, strict=True):
            by_row[row] = found[first:length]
    if not by_row:
        return torch.zeros(0, model.hidden_size, dtype=wide)
    return torch.cat([by_row[row] for row in range(len(rows))])


def queries_of(tokens: float, answers: AnswerForm) -> float:
    """How many queries a text of so many tokens makes."""
    return (tokens + 1) / 2 if answers.is_apart else tokens - 1
