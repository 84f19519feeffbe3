"""All restored runs of one token of some facts, on one way up through the model.

A run joins where it first differs from the corrupted one. Tokens before t never differ, so they are
attention keys and values of the corrupted run; in the block where only t's own output differs, the
other tokens are not computed again. The wave carries (runs, F * N, tokens from t on, d).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.caches import PrefixCache
from pipeline.models.editable import EditableModel
from pipeline.tracing.names import Module
from pipeline.tracing.recording import Recorded, causal_masks, module_of
from pipeline.tracing.runs import Run

_MODULES: tuple[Module, ...] = ("mlp", "attention")
_LOGIT_BYTES = 32 << 20
# Rows that stand beside one another in one row of a call: attention's kernels cost by the row, and
# a row of few tokens leaves them idle.
_BESIDE = 2
_MOST_TOKENS_BESIDE = 64


class Wave:
    """Restored runs at token t of the recorded facts.

    Args:
        model: the model, with the weights of the recording.
        recorded: both unrestored runs.
        token: t.
    """

    def __init__(self, model: EditableModel, recorded: Recorded, token: int) -> None:
        self.model, self.recorded, self.token = model, recorded, token
        self.suffix = recorded.tokens - token
        self.rows = len(recorded.corrupted) * recorded.samples
        fits = self.rows % _BESIDE == 0 and recorded.tokens <= _MOST_TOKENS_BESIDE
        self._beside = _BESIDE if fits else 1
        self._masks = causal_masks(model, recorded.tokens, token, self._beside)
        self._own_masks = causal_masks(model, token + 1, token, self._beside)

    @torch.no_grad()
    def probabilities(self, units: Sequence[Sequence[Run]]) -> dict[Run, Tensor]:
        """Probability of each fact's answer in each noise sample, (F, N), for every run.

        Args:
            units: runs in groups that share work, as `runs.units` makes them.
        """
        live: list[Run] = []
        hidden = self._nothing()
        last = self.model.num_blocks - 1
        for block in range(min(unit[0].entry for unit in units), last + 1):
            hidden = self._join(block, units, live, hidden)
            if block == last:
                return dict(zip(live, self._answers(live, hidden), strict=True))
            if live:
                hidden = self._advance(block, live, hidden, self._masks)
            hidden = self._branch(block, units, live, hidden)
        raise AssertionError("the loop ends in the last block")

    def _join(
        self, block: int, units: Sequence[Sequence[Run]], live: list[Run], hidden: Tensor
    ) -> Tensor:
        """Add the runs that differ in all tokens from this block on, and windows that end here.

        The states go to where the block is.
        """
        hidden = hidden.to(self.model.device_of(block))
        joined = [hidden]
        for unit in units:
            first, *rest = unit
            if first.entry == block and (first.restores_state or self.suffix == 1):
                members = unit if self.suffix == 1 and first.restores_state else [first]
                joined += [self._entering(first)] * len(members)
                live += members
            if not first.restores_state:
                for run in rest:
                    if run.stop == block:
                        joined.append(hidden[live.index(first), None])
                        live.append(run)
        return torch.cat(joined) if len(joined) > 1 else hidden

    def _branch(
        self, block: int, units: Sequence[Sequence[Run]], live: list[Run], hidden: Tensor
    ) -> Tensor:
        """Add the runs that differ in this block in token t alone."""
        if self.suffix == 1:
            return hidden
        heads: list[Run] = []
        rests: list[Tensor] = []
        for unit in units:
            first, *severed = unit
            if first.entry != block:
                continue
            if first.restores_state:
                heads += severed
                rests += [hidden[live.index(first), :, 1:]] * len(severed)
            else:
                heads.append(first)
                above = self.recorded.states[block + 1][1][:, self.token + 1 :]
                rests.append(above.to(hidden.device))
        if not heads:
            return hidden
        entering = torch.cat([self._entering(run)[:, :, :1] for run in heads])
        own = self._advance(block, heads, entering, self._own_masks)
        live += heads
        return torch.cat([hidden, torch.cat([own, torch.stack(rests)], dim=2)])

    def _entering(self, run: Run) -> Tensor:
        """(1, F * N, suffix, d): what enters a run's first block."""
        clean, corrupted = self.recorded.states[run.entry]
        state = corrupted[:, self.token :]
        if run.restores_state:
            own = clean[:, self.token].repeat_interleave(self.recorded.samples, dim=0)
            state = torch.cat([own[:, None], state[:, 1:]], dim=1)
        return state[None]

    def _advance(self, block: int, runs: Sequence[Run], hidden: Tensor, masks: Any) -> Tensor:
        """Run one block."""
        with self._held(block, runs):
            output = self.model.run(
                self._packed(hidden),
                first=block,
                stop=block + 1,
                masks=masks,
                position_ids=self._positions(hidden),
                cache=self._prefix(block, len(runs)),
            )
        return output.view_as(hidden)

    def _answers(self, runs: Sequence[Run], hidden: Tensor) -> Tensor:
        """Run the last block and read the answers' probabilities: (runs, F, N)."""
        last = self.model.num_blocks - 1
        count = len(runs) * self.rows
        read = torch.arange(1, count + 1, device=hidden.device) * self.suffix - 1
        with self._held(last, runs):
            final = self.model.final(
                self._packed(hidden),
                first=last,
                masks=self._masks,
                position_ids=self._positions(hidden),
                cache=self._prefix(last, len(runs)),
                read=read,
            )
        answers = self.recorded.answers.repeat_interleave(self.recorded.samples).repeat(len(runs))
        step = max(1, _LOGIT_BYTES // (4 * self.model.vocab_size))
        found = []
        for start in range(0, count, step):
            logits = self.model.logits(final[start : start + step])
            own = logits.gather(-1, answers[start : start + step, None])[:, 0]
            found.append((own - logits.logsumexp(-1)).exp())
        return torch.cat(found).view(len(runs), -1, self.recorded.samples)

    @contextmanager
    def _held(self, block: int, runs: Sequence[Run]) -> Iterator[None]:
        """Hold the modules' outputs at token t as the runs say."""
        with ExitStack() as stack:
            for module in _MODULES:
                which = [i for i, run in enumerate(runs) if run.holds(module, block)]
                if not which:
                    continue
                values = torch.stack(
                    [
                        self.recorded.held(
                            module, block, self.token, clean=not runs[i].restores_state
                        )
                        for i in which
                    ]
                )
                place = module_of(self.model, module, block)
                handle = place.register_forward_hook(_first_token_hook(len(runs), which, values))
                stack.callback(handle.remove)
            yield

    def _packed(self, hidden: Tensor) -> Tensor:
        """The rows of all runs, so many beside one another: (runs * F * N / b, b * tokens, d)."""
        return hidden.reshape(-1, self._beside * hidden.shape[2], hidden.shape[3])

    def _positions(self, hidden: Tensor) -> Tensor:
        start, count = self.token, hidden.shape[2]
        positions = torch.arange(start, start + count, device=hidden.device).repeat(self._beside)
        return positions.expand(hidden.shape[0] * hidden.shape[1] // self._beside, -1)

    def _prefix(self, block: int, count: int) -> PrefixCache | None:
        if self.token == 0:
            return None
        keys, values = (
            _side_by_side(part[:, :, : self.token], self._beside).repeat(count, 1, 1, 1)
            for part in self.recorded.keys[block]
        )
        return PrefixCache({block: (keys, values)})

    def _nothing(self) -> Tensor:
        corrupted = self.recorded.states[0][1]
        return corrupted.new_empty(0, self.rows, self.suffix, corrupted.shape[-1])


def _side_by_side(rows: Tensor, beside: int) -> Tensor:
    """Attention keys or values (rows, heads, tokens, h) as (rows / b, heads, b * tokens, h)."""
    return rows.unflatten(0, (-1, beside)).transpose(1, 2).flatten(2, 3)


def _first_token_hook(count: int, which: list[int], values: Tensor) -> Any:
    """A hook that puts values (len(which), rows, d) in the place of those runs' first token."""

    def hold(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        # A view, which fails loudly where it cannot be one: it is written through.
        by_run = tensor.view(count, values.shape[1], -1, values.shape[2])
        by_run[which, :, 0] = values

    return hold
