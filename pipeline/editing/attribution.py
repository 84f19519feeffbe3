"""Knowledge attribution: integrated gradients of an answer's probability in every neuron.

Method: Dai et al., "Knowledge Neurons in Pretrained Transformers" (arXiv 2104.08696, equation 2). A
neuron is one input of a block's down-projection (of a gated MLP: act(gate) * up) at the position
that predicts a token of the answer. All neurons of a block are scaled jointly by alpha, from 0 to
1, and

    Attr_i = w_i * (integral over alpha of dP(alpha w) / dw_i).

What the scaling changes lies at that one position of this block and those above it. So the tokens
before it are attention keys and values of the unscaled run, and a pass carries one token a step,
from the middle of the scaled block on; the steps of a row lie side by side and do not see each
other.

An answer of several tokens is teacher-forced: each token has its own position, its own probability
and its own attributions, and the answer has their mean, whose sum is the mean of what the tokens'
probabilities lose without the block's neurons. (The paper has answers of one token.)

Shapes: P prompts, L blocks, F neurons of a block, A answer tokens of all rows, M steps, T tokens, d
hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.editing.batching import TokenBatch, make_batch
from pipeline.errors import InputError
from pipeline.models.caches import PrefixCache, RecordingCache
from pipeline.models.editable import EditableModel
from pipeline.models.halfway import Halfway, attention_states, finish_block, recorded_halfway
from pipeline.prompts import FactPrompts

Quadrature = Literal["midpoint", "right", "left", "linspace"]
"""Where the integral is sampled: (k - 1/2) / m, k / m (the paper), (k - 1) / m (its code), for k =
1 .. m, or m points from 0 to 1 with both ends (the code of EleutherAI and EasyEdit); each weighs 1
/ m. The error of the first goes with 1 / m^2, that of the others with 1 / m."""
Measure = Literal["probability", "logit"]

_LOGIT_NUMBERS = 1 << 25


@dataclass(frozen=True)
class AttributionSettings:
    """How to attribute; names and meaning as in the job spec's `method.kn`."""

    steps: int = 20
    quadrature: Quadrature = "midpoint"
    measure: Measure = "probability"


@dataclass(frozen=True)
class Attributions:
    """What was found for one fact.

    Attributes:
        scores: (P, L, F) float32 (float64 of a float64 model) on the CPU, of each prompt.
        answer: the token ids that they are of.
    """

    scores: Tensor
    answer: tuple[int, ...]


def scales(steps: int, quadrature: Quadrature) -> Tensor:
    """The alphas of a quadrature: (M,) float64."""
    if quadrature == "linspace":
        return torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    shift = {"midpoint": 0.5, "right": 1.0, "left": 0.0}[quadrature]
    return (torch.arange(steps, dtype=torch.float64) + shift) / steps


def attribute(
    model: EditableModel,
    facts: Sequence[FactPrompts],
    layers: Sequence[int],
    settings: AttributionSettings,
    *,
    max_tokens: int,
) -> Iterator[Attributions]:
    """Attribute the answers of facts to the neurons of some blocks, in the order of the facts.

    Args:
        model: the model, with its weights as they are.
        facts: tokenised facts; one without an old answer has the likeliest token behind its first
            prompt.
        layers: blocks, ascending, whose keys are of one size.
        settings: how.
        max_tokens: tokens in one pass; it decides a result's last bits.

    Raises:
        InputError: the model is spread over several devices.
    """
    if len(model.devices) > 1:
        raise InputError(
            f"knowledge neurons are looked for on one device, and the model is on"
            f" {len(model.devices)}; set cluster.gpus_per_worker to 1"
        )
    for start, stop in _batches(facts, max_tokens):
        answered = _answered(model, facts[start:stop])
        rows = [_Row(prompt, answer) for fact, answer in answered for prompt in fact.prompts]
        scores = _RowScores(model, rows, layers, settings, max_tokens).scores()
        counts = [len(fact.prompts) for fact, _ in answered]
        for (_, answer), found in zip(answered, scores.split(counts), strict=True):
            yield Attributions(found, answer)


def _batches(facts: Sequence[FactPrompts], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Consecutive facts whose rows have about `max_tokens` tokens together."""
    start, tokens = 0, 0
    for number, fact in enumerate(facts):
        own = sum(map(len, fact.prompts)) + len(fact.prompts) * len(fact.old or ())
        if number > start and tokens + own > max_tokens:
            yield start, number
            start, tokens = number, 0
        tokens += own
    if facts:
        yield start, len(facts)


@torch.no_grad()
def _answered(
    model: EditableModel, facts: Sequence[FactPrompts]
) -> list[tuple[FactPrompts, tuple[int, ...]]]:
    """Facts with their answers; where none is given, the model's own."""
    open_prompts = [fact.prompts[0] for fact in facts if fact.old is None]
    likeliest: Iterator[int] = iter(())
    if open_prompts:
        batch = make_batch(model, open_prompts, range(len(open_prompts)))
        states = model.final(
            None,
            first=0,
            masks=batch.masks,
            position_ids=batch.positions,
            input_ids=batch.ids,
            read=batch.last,
        )
        likeliest = iter(model.logits(states).argmax(-1).tolist())
    return [(f, (next(likeliest),) if f.old is None else f.old) for f in facts]


@dataclass(frozen=True)
class _Row:
    """One prompt with its answer behind it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.prompt, *self.answer[:-1])


@dataclass
class _Middle:
    """A block's middle at the answer's positions: its input and attention (A, d), its key (A, F).

    `is_flat` says that this architecture hands its MLP rows and tokens in one dimension.
    """

    hidden: Tensor
    attention: Tensor
    key: Tensor
    is_flat: bool


class _RowScores:
    """The attributions of some rows.

    Args:
        model: the model.
        rows: prompts with their answers.
        layers: the blocks.
        settings: how.
        max_tokens: tokens in one pass with gradients.
    """

    def __init__(
        self,
        model: EditableModel,
        rows: Sequence[_Row],
        layers: Sequence[int],
        settings: AttributionSettings,
        max_tokens: int,
    ) -> None:
        self.model, self.layers, self.settings = model, tuple(layers), settings
        device = model.input_device
        lengths = [len(row.answer) for row in rows]
        self._row = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths)).to(device)
        places = [len(row.prompt) - 1 + j for row in rows for j in range(len(row.answer))]
        self._place = torch.tensor(places, device=device)
        self._label = torch.tensor([token for row in rows for token in row.answer], device=device)
        self._share = 1.0 / torch.tensor(lengths, dtype=torch.float64).to(device)[self._row]
        self._alphas = scales(settings.steps, settings.quadrature).to(device)
        self._num_rows = len(rows)
        most = min(max_tokens, _LOGIT_NUMBERS // model.vocab_size)
        self._reads_at_once = max(1, most // settings.steps)
        self._middles: dict[int, _Middle] = {}
        self._cache = RecordingCache()
        self._record(make_batch(model, [row.ids for row in rows], range(len(rows))))

    def scores(self) -> Tensor:
        """(rows, L, F), on the CPU."""
        first = self._middles[self.layers[0]].key
        wide = torch.promote_types(first.dtype, torch.float32)
        found = torch.zeros(
            self._num_rows, len(self.layers), first.shape[-1], dtype=wide, device=first.device
        )
        for reads in torch.arange(len(self._row), device=first.device).split(self._reads_at_once):
            prefix, masks = self._before(reads)
            for number, layer in enumerate(self.layers):
                of_tokens = self._integrated(layer, reads, prefix, masks)
                of_tokens *= self._share[reads, None].to(wide)
                found[:, number].index_add_(0, self._row[reads], of_tokens)
        return found.cpu()

    @torch.no_grad()
    def _record(self, batch: TokenBatch) -> None:
        """Run the rows once, and keep every block's middle where a token of an answer is read."""
        hidden: Tensor | None = None
        rows, width = batch.ids.shape
        for layer in range(self.model.num_blocks):
            with recorded_halfway(self.model, layer) as half:
                hidden = self.model.run(
                    hidden,
                    first=layer,
                    stop=layer + 1,
                    masks=batch.masks,
                    position_ids=batch.positions,
                    input_ids=batch.ids if layer == 0 else None,
                    cache=self._cache,
                )
            if layer in self.layers:
                key = half.key.reshape(rows, width, -1)
                self._middles[layer] = _Middle(
                    half.hidden[self._row, self._place],
                    attention_states(half)[self._row, self._place],
                    key[self._row, self._place],
                    half.key.ndim == 2,
                )

    def _before(self, reads: Tensor) -> tuple[dict[int, tuple[Tensor, Tensor]], object]:
        """What the steps of some reads attend to: keys and values by block, and the masks."""
        place, steps = self._place[reads], self.settings.steps
        width = int(place.max())
        prefix = {
            layer: (keys[self._row[reads], :, :width], values[self._row[reads], :, :width])
            for layer, (keys, values) in self._cache.recorded.items()
            if layer > self.layers[0]
        }
        positions = torch.arange(width, device=place.device).expand(len(reads), -1)
        earlier = torch.where(positions < place[:, None], 0, -1)
        # Every step is a text of its own that continues the row.
        own = torch.arange(1, steps + 1, device=place.device).expand(len(reads), -1)
        segments = torch.cat(
            [
                torch.stack([earlier, earlier], dim=-1),
                torch.stack([own, torch.zeros_like(own)], dim=-1),
            ],
            dim=1,
        )
        at = place[:, None].expand(-1, steps)
        return prefix, self.model.masks(torch.cat([positions, at], dim=1), segments, width)

    def _integrated(
        self,
        layer: int,
        reads: Tensor,
        prefix: dict[int, tuple[Tensor, Tensor]],
        masks: object,
    ) -> Tensor:
        """Attributions of a block's neurons at some reads: (reads, F)."""
        middle, steps = self._middles[layer], self.settings.steps
        key, at = middle.key[reads], self._place[reads, None].expand(-1, steps)
        scaled = self._alphas.to(key.dtype)[:, None] * key[:, None]
        with torch.enable_grad():
            scaled.requires_grad_()
            half = Halfway(
                middle.hidden[reads, None].expand(-1, steps, -1),
                [(middle.attention[reads, None].expand(-1, steps, -1), None)],
                scaled.flatten(0, 1) if middle.is_flat else scaled,
            )
            hidden = finish_block(self.model, layer, half, masks=masks, position_ids=at)
            final = self.model.final(
                hidden,
                first=layer + 1,
                masks=masks,
                position_ids=at,
                cache=PrefixCache(prefix),
            )
            measured = self._measured(final, self._label[reads])
            (slopes,) = torch.autograd.grad(measured.sum(), scaled)
        wide = torch.promote_types(key.dtype, torch.float32)
        return slopes.to(wide).mean(dim=1) * key.to(wide)

    def _measured(self, final: Tensor, label: Tensor) -> Tensor:
        """What is attributed of the answer's token at every step: (reads, M)."""
        logits = self.model.logits(final)
        own = logits.gather(-1, label[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]
        return own if self.settings.measure == "logit" else (own - logits.logsumexp(-1)).exp()
