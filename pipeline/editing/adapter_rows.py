"""The rows that adapters are trained on: prompts with their targets, up to the first adapted block.

In the last block each position that a token is read at is a row of its own: nothing after the
feed-forward network looks at another position, so its attention's output is kept and only the
network, the final norm and the vocabulary run again. Below it whole rows run on from the block.

Shapes: N tokens that run again, n of them that are read, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.editing.adapters.neurons import add_to_ffn
from pipeline.editing.batching import token_batches
from pipeline.editing.keys import inputs_of
from pipeline.editing.targets import TargetBatch, TargetRow, sources_of, target_rows
from pipeline.models.editable import EditableModel
from pipeline.models.halfway import attentions_at, attentions_given, recorded_halfway
from pipeline.prompts import EditPrompts


@dataclass(frozen=True)
class WrongTokens:
    """An edit's target tokens that the model does not predict, behind its first context.

    Attributes:
        queries: (wrong, D) inputs of the adapted network where they are read, at most so many.
        loss: the mean negative log-likelihood of all the target's tokens, nats.
    """

    queries: Tensor
    loss: float


@dataclass(frozen=True)
class TargetLosses:
    """How edits stand: (edits,) each, 0 and True for edits that were dropped.

    Attributes:
        smoothed: the label-smoothed loss, the mean over an edit's contexts and tokens, nats.
        plain: the same without smoothing.
        predicted: whether every target token is the likeliest, behind every context.
    """

    smoothed: Tensor
    plain: Tensor
    predicted: Tensor


@dataclass
class _Pack:
    """What of a batch of rows runs again at every step.

    Attributes:
        targets: the rows.
        hidden: what enters the adapted block; None for the first block, which begins with tokens.
        attentions: what its attention modules return, where that is kept.
        masks: as the model takes them.
        positions: of its tokens.
        owners: (tokens,) the edit that each token belongs to.
        edits: (rows of targets,) the edit of each row.
        read: places in `hidden` that are read; None for all of them.
    """

    targets: TargetBatch
    hidden: Tensor | None
    attentions: list[Any] | None
    masks: Any
    positions: Tensor
    owners: Tensor
    edits: Tensor
    read: Tensor | None


Added = Callable[[Tensor], Tensor]
"""(N, D) inputs of a feed-forward network -> what is added to its output."""
Beside = Callable[[Tensor], Mapping[int, Added]]
"""(N,) the edits that tokens belong to -> block -> what is beside it for these tokens."""


class AdapterRows:
    """The rows of some edits, whose losses are taken again and again while an adapter changes.

    Args:
        model: the model; every call sees its weights and adapters as they are at that time.
        layer: the lowest block beside which something changes.
        rows: the rows, `target_rows` or others.
        num_edits: how many edits they are numbered by.
        max_tokens: tokens in one pass.
    """

    def __init__(
        self,
        model: EditableModel,
        layer: int,
        rows: Sequence[TargetRow],
        num_edits: int,
        max_tokens: int,
    ) -> None:
        self.model, self.layer, self.max_tokens = model, layer, max_tokens
        self.num_edits = num_edits
        self.keeps = True
        self._rows = list(rows)
        self._kept: list[_Pack] = []

    @classmethod
    def of(
        cls, model: EditableModel, layer: int, edits: Sequence[EditPrompts], max_tokens: int
    ) -> "AdapterRows":
        """The prompts of edits, behind all their contexts, with their targets."""
        rows = target_rows(edits, "target_tokens")
        return cls(model, layer, rows, len(edits), max_tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept between calls, once it is."""
        if not self.keeps:
            return 0
        if self.layer == self.model.num_blocks - 1:
            states = 1 + len(self.model.attentions(self.layer))
            tokens = sum(states * len(row.places) for row in self._rows)
        else:
            tokens = sum(len(row.ids) + len(row.source or ()) for row in self._rows)
        return tokens * self.model.hidden_size * self.model.dtype.itemsize

    def keep_only(self, edits: set[int]) -> None:
        """Drop the rows of the other edits."""
        self._rows = [row for row in self._rows if row.edit in edits]
        self._kept = []

    def losses(self, beside: Beside, label_smoothing: float = 0.0) -> TargetLosses:
        """Run all rows with something beside blocks.

        Args:
            beside: what.
            label_smoothing: share of the loss that all tokens of the vocabulary have alike.
        """
        device = self.model.output_device
        wide = torch.promote_types(self.model.dtype, torch.float32)
        smoothed = torch.zeros(self.num_edits, dtype=wide, device=device)
        plain, predicted = smoothed.clone(), torch.ones(self.num_edits, dtype=torch.bool)
        for pack in self._packs():
            targets, edits = pack.targets, pack.edits[pack.targets.rows]
            states = self._states(pack, beside)
            likely = self.model.logits(states)[targets.slots].log_softmax(-1)
            weight = targets.weight.to(wide)
            loss = -likely.gather(1, targets.labels[:, None])[:, 0].to(wide)
            plain.index_add_(0, edits, loss.detach() * weight)
            if label_smoothing:
                of_all = -likely.mean(1).to(wide)
                loss = (1 - label_smoothing) * loss + label_smoothing * of_all
            smoothed.index_add_(0, edits, loss * weight)
            is_wrong = likely.argmax(1) != targets.labels
            predicted[edits[is_wrong].cpu()] = False
        return TargetLosses(smoothed, plain, predicted)

    @torch.no_grad()
    def wrong_tokens(self, most: int) -> list[WrongTokens]:
        """Each edit's first wrong tokens behind its first context, so many at most."""
        queries: list[list[Tensor]] = [[] for _ in range(self.num_edits)]
        losses = torch.zeros(self.num_edits, dtype=torch.float64)
        for pack in self._packs():
            targets = pack.targets
            with inputs_of(self.model.up_projection(self.layer)) as seen:
                states = self._states(pack)
            of_tokens = seen[0].reshape(-1, self.model.hidden_size)
            at_read = of_tokens if pack.read is None else of_tokens[pack.read.to(of_tokens.device)]
            slots = targets.slots.tolist()
            logits = self.model.logits(states)[targets.slots]
            loss = cross_entropy(logits, targets.labels, reduction="none").double()
            edits = pack.edits[targets.rows].cpu()
            losses.index_add_(0, edits, (loss * targets.weight).cpu())
            is_wrong = (logits.argmax(1) != targets.labels).tolist()
            lines = targets.rows.tolist()
            for place, (edit, line) in enumerate(zip(edits.tolist(), lines, strict=True)):
                is_first = self._is_first(int(targets.batch.index[line]))
                if is_wrong[place] and is_first and len(queries[edit]) < most:
                    queries[edit].append(at_read[slots[place]])
        nothing = torch.zeros(0, self.model.hidden_size)
        wide = torch.promote_types(self.model.dtype, torch.float32)
        return [
            WrongTokens((torch.stack(found) if found else nothing).to(wide), float(losses[edit]))
            for edit, found in enumerate(queries)
        ]

    def divergences(self, beside: Beside) -> Tensor:
        """KL(P || P') at the tokens that rows read, (edits,): their weighted means, nats.

        P is the model's distribution without what is beside it, P' with it.
        """
        wide = torch.promote_types(self.model.dtype, torch.float32)
        found = torch.zeros(self.num_edits, dtype=wide, device=self.model.output_device)
        for pack in self._packs():
            targets, edits = pack.targets, pack.edits[pack.targets.rows]
            with torch.no_grad():
                before = self.model.logits(self._states(pack)).log_softmax(-1)
            after = self.model.logits(self._states(pack, beside)).log_softmax(-1)
            of_read = (before.exp() * (before - after)).sum(1)
            found.index_add_(0, edits, (of_read[targets.slots] * targets.weight).to(wide))
        return found

    def _is_first(self, row: int) -> bool:
        return row == 0 or self._rows[row - 1].edit != self._rows[row].edit

    def _packs(self) -> Iterator[_Pack]:
        """What runs again, made when it is first asked for, or every time."""
        if self._kept:
            yield from self._kept
            return
        made, ids = [], [row.ids for row in self._rows]
        sources = sources_of(self._rows)
        for batch in token_batches(self.model, ids, self.max_tokens, sources):
            pack = self._pack(TargetBatch.of(batch, self._rows, self.model.output_device))
            yield pack
            made += [pack] if self.keeps else []
        self._kept = made

    @torch.no_grad()
    def _pack(self, targets: TargetBatch) -> _Pack:
        batch, model = targets.batch, self.model
        of_row = [self._rows[row].edit for row in batch.index.tolist()]
        edits = torch.tensor(of_row, device=model.output_device)
        device = model.device_of(self.layer)
        owners = edits.to(device).repeat_interleave(batch.ids.shape[1])
        masks = model.ready(batch.masks)
        given = {
            "masks": masks,
            "position_ids": batch.positions,
            "input_ids": batch.ids,
        }
        if self.layer < model.num_blocks - 1:
            hidden = None
            if self.layer:
                hidden = model.run(None, first=0, stop=self.layer, **given).to(device)
            return _Pack(targets, hidden, None, masks, batch.positions, owners, edits, targets.read)
        with recorded_halfway(model, self.layer) as half:
            model.run(None, first=0, stop=self.layer + 1, **given)
        read = targets.read.to(device)
        hidden = half.hidden.flatten(0, 1)[read][:, None]
        attentions = attentions_at(half, read)
        positions = batch.positions.flatten()[read.to(batch.positions.device)][:, None]
        alone, owners = model.masks_alone(positions), owners[read]
        return _Pack(targets, hidden, attentions, alone, positions, owners, edits, None)

    def _states(self, pack: _Pack, beside: Beside | None = None) -> Tensor:
        """Normed hidden states at the positions that are read, (n, D)."""
        with ExitStack() as stack:
            for layer, added in ({} if beside is None else beside(pack.owners)).items():
                stack.callback(add_to_ffn(self.model, layer, added))
            if pack.attentions is not None:
                stack.enter_context(attentions_given(self.model, self.layer, pack.attentions))
            states = self.model.final(
                pack.hidden,
                first=self.layer,
                masks=pack.masks,
                position_ids=pack.positions,
                input_ids=pack.targets.batch.ids if pack.hidden is None else None,
                read=pack.read,
            )
        return states.flatten(0, -2)
