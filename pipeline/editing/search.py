"""Adam on the deltas of many edits at once, each with its own gradient, clock and end.

A place in the batch that an edit has left is taken by the next one, so that shapes stay full where
edits end after unlike numbers of steps.

Edits may be merged: those of one group share one delta, and their losses are averaged.

Shapes: G searches in the batch, B edits of all of them, n states that the loss reads, d hidden
size, v vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.members import Members
from pipeline.editing.replay import Recorder, Replay
from pipeline.editing.search_batch import Ended, SearchBatch, ValueSettings
from pipeline.editing.suffixes import Reads, SuffixBatch, encode_suffixes
from pipeline.models.caches import PrefixCache
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
# Edits that have reached their stop rule leave the batch at these intervals; in between nothing
# waits for the device.
_STEPS_BETWEEN_LOOKS = 4
# Places are filled again once so large a part of them is free: an edit that joins others at work
# costs a copy of them all, and one backward pass more for those that end before it.
_FREE_PART = 0.5
# PMET's published code: once the target is predicted its likelihood counts less in the next pass,
# and the search ends if the weighted divergence is this small too.
_WEIGHT_ONCE_PREDICTED = 0.1
_LITTLE_DIVERGENCE = 0.01


class Search:
    """The search of a queue of groups of edits, `size` edits of them at a time.

    Args:
        model: the model; its weights stay as they are.
        groups: tokenised requests; those of one group get one value. A group of more than `size`
            is searched alone.
        layer: the block L whose output is searched.
        settings: the search's settings.
        size: edits at work at once.
        recorder: records passes as CUDA graphs, on a GPU where that is wanted.
    """

    def __init__(
        self,
        model: EditableModel,
        groups: Sequence[Sequence[EditPrompts]],
        layer: int,
        settings: ValueSettings,
        size: int,
        recorder: Recorder | None = None,
    ) -> None:
        self.model, self.groups, self.layer = model, groups, layer
        self.settings, self.size = settings, size
        self._next = 0
        # Which group is at each place, and how many passes it has done; known without a look.
        self._numbers: list[int] = []
        self._passes: list[int] = []
        self._batch: SearchBatch | None = None
        self._reads: Reads
        self._members: Members
        self._no_masks: Any = None
        # Relation -> the last delta found for it, in lengths of its h0.
        self._known: dict[str, Tensor] = {}
        self._recorder = recorder or Recorder(False)
        self._replay: Replay | None = None

    def run(self) -> Iterator[Ended]:
        """Search all groups; yields each as it ends."""
        since_look = 0
        self._fill()
        while self._batch is not None:
            self._pass()
            since_look += 1
            if since_look < _STEPS_BETWEEN_LOOKS and max(self._passes) < self.settings.steps:
                continue
            since_look = 0
            yield from self._let_go()
            self._fill()

    def _fill(self) -> None:
        """Take the next groups into the free places, once there are enough of both."""
        chosen = self._next_groups()
        if not chosen:
            return
        groups = [self.groups[number] for number in chosen]
        with torch.no_grad():
            edits = [edit for group in groups for edit in group]
            halved = self.settings.inside_block
            suffixes = encode_suffixes(self.model, edits, self.layer, halved=halved)
        entering = SearchBatch.of(suffixes, [len(group) for group in groups], self.model.vocab_size)
        if self.settings.warm_start:
            self._start_from_known(entering, [_relation(group) for group in groups])
        self._batch = entering if self._batch is None else self._batch.join(entering)
        self._arrange()
        self._numbers += chosen
        self._passes += [0] * len(chosen)
        self._next = chosen.stop

    def _next_groups(self) -> range:
        """The next groups that there is room for; empty while that is not worth a copy."""
        free = self.size - (0 if self._batch is None else sum(self._batch.sizes))
        start = stop = self._next
        if free < max(1.0, self.size * _FREE_PART):
            return range(start, start)
        while stop < len(self.groups) and len(self.groups[stop]) <= free:
            free -= len(self.groups[stop])
            stop += 1
        if self._batch is None and stop == start < len(self.groups):
            stop += 1  # larger than all the room there is
        return range(start, stop)

    def _arrange(self) -> None:
        """Prepare the passes of a batch that has other edits now; waits for the device."""
        assert self._batch is not None
        self._reads, self._members = self._batch.suffixes.reads(), self._batch.members()
        halves = self._batch.suffixes.halves
        self._no_masks = None if halves is None else halves.masks(self.model)
        self._replay = None

    @torch.no_grad()
    def _start_from_known(self, batch: SearchBatch, relations: Sequence[str | None]) -> None:
        """Let edits begin at what an edit of their relation ended with."""
        reads, members = batch.suffixes.reads(), batch.members()
        log_p = self._log_p(batch.suffixes, reads, members.spread(batch.delta))
        batch.reference = log_p[members.first(reads.essence)]
        for place, relation in enumerate(relations):
            if relation in self._known:
                length = batch.anchor[place].norm(dim=-1, keepdim=True)
                batch.delta[place] = self._known[relation] * length

    def _pass(self) -> None:
        """One forward pass of the edits at work, and a step of those that go on."""
        batch = self._batch
        assert batch is not None
        if min(self._passes) < self.settings.steps - 1:
            *measured, gradient = self._with_gradient(batch)
            self._record(batch, *measured)
            self._step(batch, gradient)
        else:
            with torch.no_grad():
                self._record(batch, *self._losses(batch, batch.delta))
        batch.passes += 1
        self._passes = [count + 1 for count in self._passes]

    def _with_gradient(self, batch: SearchBatch) -> tuple[Tensor, ...]:
        """What `_losses` returns, and d loss / d delta."""

        def compute(given: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                delta = given.detach().requires_grad_()
                measured = self._losses(batch, delta)
                gradient = torch.autograd.grad(measured[0].sum(), delta)[0]
            return *(measure.detach() for measure in measured), gradient

        # The first pass of an edit is unlike the others (see _divergence).
        if self._replay is None and min(self._passes) > 0:
            self._replay = self._recorder.record(compute, batch.delta)
        if self._replay is None:
            return compute(batch.delta)
        return self._replay(batch.delta)

    def _losses(self, batch: SearchBatch, delta: Tensor) -> tuple[Tensor, ...]:
        """Loss, target probability, whether the target is predicted, weighted KL: (G,) each."""
        suffixes, members, here = batch.suffixes, self._members, delta.device
        log_p = self._log_p(suffixes, self._reads, members.spread(delta))
        log_likelihood = log_p[self._reads.targets, suffixes.target_ids]
        predicted = torch.zeros_like(batch.searching)
        if self.settings.stop_when_predicted or self.settings.inside_block:
            right = self._argmax_is_target(suffixes, log_p.detach())
            predicted = members.every(right).to(here)
        nll = members.mean(-(log_likelihood * suffixes.target_weight).sum(dim=(1, 2))).to(here)
        decay = (delta.norm(dim=-1) / batch.anchor.norm(dim=-1) ** 2).sum(dim=-1)
        if self.settings.inside_block:
            nll = nll * batch.likelihood_weight
        divergence = self.settings.kl_weight * self._divergence(batch, log_p).to(here)
        loss = nll + divergence + self.settings.weight_decay * decay
        probability = members.mean(_probability(log_likelihood, suffixes.target_weight)).to(here)
        return loss, probability, predicted, divergence

    def _log_p(self, suffixes: SuffixBatch, reads: Reads, delta: Tensor) -> Tensor:
        """Log-probabilities where the loss reads them, with delta (B, V, d) in place: (n, v)."""
        if suffixes.halves is None:
            hidden = suffixes.hidden + suffixes.is_lookup[..., None] * delta
        else:
            given = self.model, self.layer, self._no_masks
            hidden = suffixes.halves.with_deltas(*given, delta, suffixes.hidden)
        final = self.model.final(
            hidden.to(self.model.dtype),
            first=self.layer + 1,
            masks=suffixes.masks,
            position_ids=suffixes.positions,
            cache=PrefixCache(suffixes.prefix),
            read=reads.tokens,
        )
        return self.model.logits(final).log_softmax(dim=-1)

    def _argmax_is_target(self, suffixes: SuffixBatch, log_p: Tensor) -> Tensor:
        """Whether every target token is the likeliest in every context: (B,) bool."""
        right = log_p.argmax(dim=-1)[self._reads.targets] == suffixes.target_ids
        return (right | (suffixes.target_weight == 0)).all(dim=(1, 2))

    def _divergence(self, batch: SearchBatch, log_p: Tensor) -> Tensor:
        """KL(p_delta || p_0) at the essence row's lookup token: (G,)."""
        # Edits that are merged are of one subject, so that the row is the same for all of them.
        log_p = log_p[self._members.first(self._reads.essence)]
        if 0 in self._passes and not self.settings.warm_start:
            # At delta = 0, an edit's first pass, this is the unedited model's own prediction.
            is_first = (batch.passes == 0)[:, None].to(log_p.device)
            batch.reference = torch.where(is_first, log_p.detach(), batch.reference)
        return (log_p.exp() * (log_p - batch.reference)).sum(dim=-1)

    def _record(
        self,
        batch: SearchBatch,
        loss: Tensor,
        probability: Tensor,
        predicted: Tensor,
        divergence: Tensor,
    ) -> None:
        """Write down where the edits that are still searching stand; stop those that are done."""
        searching = batch.searching
        batch.best_delta = torch.where(searching[:, None, None], batch.delta, batch.best_delta)
        batch.steps = torch.where(searching, batch.passes, batch.steps)
        batch.loss = torch.where(searching, loss, batch.loss)
        batch.probability = torch.where(searching, probability, batch.probability)
        goes_on = loss >= self.settings.stop_loss
        if self.settings.stop_when_predicted:
            goes_on = goes_on & ~predicted
        if self.settings.inside_block:
            goes_on = goes_on & ~(predicted & (divergence <= _LITTLE_DIVERGENCE))
            # In place, where a recorded pass reads it.
            batch.likelihood_weight.fill_(1.0).masked_fill_(predicted, _WEIGHT_ONCE_PREDICTED)
        batch.searching = searching & goes_on & (batch.passes < self.settings.steps - 1)

    def _step(self, batch: SearchBatch, gradient: Tensor) -> None:
        """One step of Adam (arXiv 1412.6980, algorithm 1), then back into the ball around h0."""
        beta1, beta2 = _BETAS
        batch.first_moment.lerp_(gradient, 1 - beta1)
        batch.second_moment.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        count = (batch.passes + 1).to(torch.float64)
        size = self.settings.learning_rate / (1 - beta1**count)
        share = 1 - beta2**count
        scale = (batch.second_moment / share.to(gradient)[:, None, None]).sqrt_().add_(_EPSILON)
        moved = batch.delta - size.to(gradient)[:, None, None] * batch.first_moment / scale
        limit = self.settings.clamp_norm * batch.anchor.norm(dim=-1)
        norm = moved.norm(dim=-1)
        shrink = torch.where(norm > limit, limit / norm, torch.ones_like(norm))
        goes_on = batch.searching[:, None, None]
        batch.delta = torch.where(goes_on, moved * shrink[..., None], batch.delta)

    def _let_go(self) -> Iterator[Ended]:
        """Take the edits that have ended out of the batch; waits for the device."""
        batch = self._batch
        assert batch is not None
        searching = batch.searching.tolist()
        ended = [place for place, goes_on in enumerate(searching) if not goes_on]
        if not ended:
            return
        yield from self._report(batch.select(ended), ended)
        kept = [place for place, goes_on in enumerate(searching) if goes_on]
        self._numbers = [self._numbers[place] for place in kept]
        self._passes = [self._passes[place] for place in kept]
        self._batch = batch.select(kept) if kept else None
        if self._batch is not None:
            self._arrange()

    def _report(self, ended: SearchBatch, places: Sequence[int]) -> Iterator[Ended]:
        anchors, deltas = ended.anchor, ended.best_delta
        if self.settings.warm_start:
            for place, anchor, delta in zip(places, anchors, deltas, strict=True):
                relation = _relation(self.groups[self._numbers[place]])
                if relation is not None and bool(delta.isfinite().all()):
                    self._known[relation] = delta / anchor.norm(dim=-1, keepdim=True)
        columns = zip(
            [self._numbers[place] for place in places],
            ended.hidden.cpu(),
            anchors.cpu(),
            deltas.cpu(),
            ended.steps.tolist(),
            ended.loss.tolist(),
            ended.probability.tolist(),
            strict=True,
        )
        yield from (Ended(*column) for column in columns)


def _relation(group: Sequence[EditPrompts]) -> str | None:
    """What an edit's search may begin from; edits that are merged are of several relations."""
    return group[0].relation if len(group) == 1 else None


def _probability(log_likelihood: Tensor, weight: Tensor) -> Tensor:
    """Mean over contexts of exp(mean log-likelihood of the target's tokens): (B,)."""
    per_token = weight / weight.sum(dim=-1, keepdim=True)
    return (log_likelihood * per_token).sum(dim=-1).exp().mean(dim=-1)
