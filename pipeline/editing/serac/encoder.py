"""The scope classifier's encoder: texts to embeddings (SERAC, arXiv 2206.06520, section 3.2).

Published, it is DistilBERT with the state of its first token. Any encoder of transformers can be
named; where none is, the edited model's own embeddings and first blocks are copied, and a linear
map of the mean state of a text is the embedding. That needs no download, and the names in a fact
are already read together by these blocks. Of an encoder-decoder model they are the encoder's.

Shapes: N texts, E size of an embedding.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.editing.batching import token_batches
from pipeline.errors import InputError
from pipeline.models.anatomy import FAMILIES
from pipeline.models.answers import is_encoder_decoder
from pipeline.models.editable import EditableModel
from pipeline.models.first_blocks import first_blocks, first_encoder_blocks
from pipeline.prompts import encode_targets, pad_token_id, token_ids

Trunk = Literal["causal", "encoder", "bidirectional"]


class TextEncoder(nn.Module):
    """Embeddings of texts; one text's does not depend on the others in its batch.

    Args:
        trunk: a causal LM of a known family, of which all blocks run, or the encoder of an
            encoder-decoder model of one, whose states are averaged; or another bidirectional
            encoder, whose first token's state is read. It is in evaluation mode, so without
            dropout.
        tokenizer: the trunk's.
        head: maps the state to the embedding; None takes the state itself, as published.
    """

    def __init__(
        self,
        trunk: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.trunk = trunk.eval()
        self.head = head
        self.kind: Trunk = _kind(trunk)
        self._editable = EditableModel(trunk) if self.kind == "causal" else None

    @classmethod
    def from_first_blocks(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        blocks: int,
        size: int,
        seed: int,
    ) -> "TextEncoder":
        """Copy the first blocks of the edited model, in float32; the head's weights are drawn.

        Args:
            blocks: how many, at most those that there are.
            size: E.
            seed: of the head.
        """
        copied = first_encoder_blocks if is_encoder_decoder(model.config) else first_blocks
        trunk = copied(model, blocks).float()
        hidden = trunk.config.get_text_config().hidden_size
        drawn = torch.randn(size, hidden, generator=torch.Generator().manual_seed(seed))
        head = nn.Linear(hidden, size, bias=False)
        head.weight.data = drawn / hidden**0.5
        return cls(trunk, tokenizer, head.to(trunk.device))

    @property
    def size(self) -> int:
        """E, the entries of an embedding."""
        if self.head is not None:
            return self.head.out_features
        return int(self.trunk.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    def query_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of queries.

        Raises:
            InputError: one has no token.
        """
        rows = token_ids(self.tokenizer, texts)
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise InputError(f"the query {text!r} has no token for the scope classifier")
        return rows

    def edit_ids(self, prompts: Sequence[str], targets: Sequence[str]) -> list[list[int]]:
        """Token ids of edits: "prompt [SEP] target", and what the tokenizer ends every text with.

        A causal trunk's are the prompt's and the target's, side by side; so are those of an
        encoder of an encoder-decoder model, to which both are whole texts.
        """
        if self.kind == "encoder":
            texts = [target.strip() for target in targets]
            pairs = zip(self.query_ids(prompts), self.query_ids(texts), strict=True)
            return [[*prompt, *target] for prompt, target in pairs]
        if self.kind == "causal":
            answers = encode_targets(self.tokenizer, targets)
            rows = self.query_ids(prompts)
            return [[*row, *answer] for row, answer in zip(rows, answers, strict=True)]
        separator = self.tokenizer.sep_token or ""
        texts = [
            f"{prompt} {separator} {target}"
            for prompt, target in zip(prompts, targets, strict=True)
        ]
        return token_ids(self.tokenizer, texts)

    def forward(self, rows: Sequence[Sequence[int]], max_tokens: int) -> Tensor:
        """Embed texts given as token ids, (N, E) float32, in their order.

        Args:
            max_tokens: tokens of a batch at most, padding counted.

        Raises:
            InputError: a text is longer than the encoder has positions for.
        """
        if not rows:
            return torch.zeros(0, self.size, device=self.device)
        self._check_fit(rows)
        states = self._causal(rows, max_tokens) if self._editable else self._both(rows, max_tokens)
        return states.float() if self.head is None else self.head(states.float())

    @torch.inference_mode()
    def embed(self, rows: Sequence[Sequence[int]], max_tokens: int) -> Tensor:
        """The same without a graph."""
        return self(rows, max_tokens)

    def _causal(self, rows: Sequence[Sequence[int]], max_tokens: int) -> Tensor:
        model = self._editable
        assert model is not None
        order, means = [], []
        for batch in token_batches(model, rows, max_tokens):
            states = model.run(
                None,
                first=0,
                stop=model.num_blocks,
                masks=batch.masks,
                position_ids=batch.positions,
                input_ids=batch.ids,
            )
            kept = states.masked_fill(~batch.real[..., None], 0)
            means.append(kept.sum(dim=1) / batch.lengths[:, None])
            order.append(batch.index)
        return torch.cat(means)[torch.cat(order).argsort().to(self.device)]

    def _both(self, rows: Sequence[Sequence[int]], max_tokens: int) -> Tensor:
        """Of trunks whose tokens see those before and behind them."""
        longest = max(len(row) for row in rows)
        step = max(1, max_tokens // longest)
        pad = pad_token_id(self.tokenizer)
        states = []
        for start in range(0, len(rows), step):
            some = [torch.tensor(row) for row in rows[start : start + step]]
            ids = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad)
            real = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in some])[:, None]
            real = real.to(self.device)
            output = self.trunk(input_ids=ids.to(self.device), attention_mask=real.long())
            found = output.last_hidden_state
            if self.kind == "encoder":
                total = found.masked_fill(~real[..., None], 0).sum(dim=1)
                states.append(total / real.sum(dim=1, keepdim=True))
            else:
                states.append(found[:, 0])
        return torch.cat(states)

    def _check_fit(self, rows: Sequence[Sequence[int]]) -> None:
        limit = getattr(self.trunk.config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(row) for row in rows)
        if limit is not None and longest > limit:
            raise InputError(
                f"a text of {longest} tokens is longer than the scope classifier's {limit}"
                " positions; shorten the prompt or leave it out"
            )


def _kind(trunk: PreTrainedModel) -> Trunk:
    family = FAMILIES.get(trunk.config.model_type)
    if family is None:
        return "bidirectional"
    return "causal" if family.encoder is None else "encoder"
