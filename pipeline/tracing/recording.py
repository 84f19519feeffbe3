"""The clean and the corrupted run of some facts, and everything that restored runs need of them.

Shapes: F facts of T tokens each, N noise samples, d hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.caches import RecordingCache
from pipeline.models.editable import EditableModel
from pipeline.tracing.facts import Fact
from pipeline.tracing.names import Module


@dataclass
class Recorded:
    """Both runs of facts with equally many tokens; what is of a block is where the block is.

    Attributes:
        states: for each block its input: clean (F, T, d) and corrupted (F * N, T, d).
        outputs: for each block its modules' outputs, in the same two parts; in the last block
            the MLP's are there for the last token only.
        keys: for each block the corrupted runs' attention keys and values, (F * N, heads, T, h).
        answers: (F,) int64 the likeliest next token of the clean run.
        clean: (F,) its probability there; `corrupted`: (F, N) in each corrupted run.
    """

    samples: int
    tokens: int
    states: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    outputs: dict[Module, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    answers: Tensor = field(default_factory=lambda: torch.empty(0))
    clean: Tensor = field(default_factory=lambda: torch.empty(0))
    corrupted: Tensor = field(default_factory=lambda: torch.empty(0))

    def held(self, module: Module, block: int, token: int, *, clean: bool) -> Tensor:
        """A module's output at a token in a run, for every corrupted row: (F * N, d)."""
        clean_output, corrupted_output = self.outputs[module][block]
        if clean:
            return clean_output[:, token].repeat_interleave(self.samples, dim=0)
        return corrupted_output[:, token]


def draw_noise(samples: int, tokens: int, width: int, seed: int) -> Tensor:
    """Standard normal noise (samples, tokens, width), float32 on the CPU, the same on every call.

    So every fact whose subject has as many tokens, and every restored run of it, has this noise.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, tokens, width, generator=generator)


@torch.no_grad()
def embedding_deviation(model: EditableModel, rows: Sequence[Sequence[int]]) -> float:
    """Standard deviation over all entries of the token embeddings of some texts.

    Three times that of all subjects is the published noise (arXiv 2202.05262, section 2.1).
    """
    embed = model.model.get_input_embeddings()
    count, total, squares = 0, 0.0, 0.0
    for ids in rows:
        vectors = embed(torch.tensor(ids, device=model.input_device)).double()
        count += vectors.numel()
        total += float(vectors.sum())
        squares += float(vectors.square().sum())
    if count < 2:
        return 0.0
    return max(0.0, (squares - total * total / count) / (count - 1)) ** 0.5


@torch.no_grad()
def record(
    model: EditableModel, facts: Sequence[Fact], *, samples: int, noise: float, seed: int
) -> Recorded:
    """Run facts of equally many tokens cleanly and with noise on their subjects' embeddings.

    Args:
        noise: standard deviation of the noise.
    """
    tokens = len(facts[0].ids)
    assert all(len(fact.ids) == tokens for fact in facts)
    found = Recorded(samples, tokens)
    ids = torch.tensor([fact.ids for fact in facts], device=model.input_device)
    ids = ids.repeat_interleave(samples + 1, dim=0)
    positions = torch.arange(tokens, device=ids.device)[None]
    last = torch.arange(len(ids), device=ids.device) * tokens + tokens - 1
    cache = RecordingCache()
    with ExitStack() as stack:
        stack.enter_context(_noisy_embeddings(model, facts, samples, noise, seed))
        stack.enter_context(_recorded(model, found))
        hidden = model.final(
            None,
            first=0,
            masks=causal_masks(model, tokens),
            position_ids=positions.expand_as(ids),
            input_ids=ids,
            cache=cache,
            read=last,
        )
    for block, (keys, values) in cache.recorded.items():
        found.keys[block] = (_parts(keys, samples)[1], _parts(values, samples)[1])
    log_p = model.logits(hidden).log_softmax(dim=-1).unflatten(0, (len(facts), samples + 1))
    found.answers = log_p[:, 0].argmax(dim=-1)
    chosen = log_p.gather(-1, found.answers[:, None, None].expand(-1, samples + 1, 1))[..., 0]
    found.clean, found.corrupted = chosen[:, 0].exp(), chosen[:, 1:].exp()
    return found


def causal_masks(model: EditableModel, tokens: int, first: int = 0, beside: int = 1) -> Any:
    """Masks for the queries `first` .. `tokens - 1` of one text, for any number of rows alike.

    Args:
        beside: texts in a row; the tokens before `first` of all of them come first.
    """
    index = torch.arange(tokens, device=model.input_device)
    seen, queries = index[:first].repeat(beside), index[first:].repeat(beside)
    texts = torch.arange(beside, device=index.device)
    segment = torch.cat(
        [texts.repeat_interleave(first), texts.repeat_interleave(tokens - first)]
    )  # fmt: skip
    segments = torch.stack([segment, segment], dim=-1)
    return model.masks(torch.cat([seen, queries])[None], segments[None], beside * first)


def module_of(model: EditableModel, module: Module, block: int) -> nn.Module:
    """The module whose output is held; else the down-projection's."""
    if module == "attention":
        return model.attention(block)
    return model.mlp(block) or model.down_projection(block)


@contextmanager
def _noisy_embeddings(
    model: EditableModel, facts: Sequence[Fact], samples: int, noise: float, seed: int
) -> Iterator[None]:
    """Add noise to the subjects' token embeddings in all rows of a fact but its first."""

    def corrupt(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        rows = output.clone().unflatten(0, (len(facts), samples + 1))
        for row, fact in zip(rows, facts, strict=True):
            drawn = draw_noise(samples, fact.end - fact.begin, output.shape[-1], seed)
            row[1:, fact.begin : fact.end] += (noise * drawn).to(output)
        return rows.flatten(0, 1)

    handle = model.model.get_input_embeddings().register_forward_hook(corrupt)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _recorded(model: EditableModel, found: Recorded) -> Iterator[None]:
    """Keep every block's input and its modules' outputs while the context is open."""
    samples, tokens = found.samples, found.tokens
    outputs: dict[Module, list[tuple[Tensor, Tensor]]] = {"mlp": [], "attention": []}
    found.outputs = outputs

    def keep_input(_module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        # Blocks run in their order, and fetch their input from another device once they have begun.
        device = model.device_of(len(found.states))
        found.states.append(_parts(inputs[0].to(device), samples))

    def keeper(module: Module) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor: Tensor = output[0] if isinstance(output, tuple) else output
            # Some architectures flatten rows and tokens inside their blocks.
            tensor = tensor.view(-1, tokens, tensor.shape[-1])
            outputs[module].append(_parts(tensor, samples))

        return keep

    with ExitStack() as stack:
        for block in range(model.num_blocks):
            handles = [model.blocks[block].register_forward_hook(keep_input)]
            for module in outputs:
                place = module_of(model, module, block)
                handles.append(place.register_forward_hook(keeper(module)))
            for handle in handles:
                stack.callback(handle.remove)
        yield


def _parts(rows: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Rows of facts, a clean one before N corrupted ones each: (F, ...) and (F * N, ...)."""
    by_fact = rows.unflatten(0, (-1, samples + 1))
    return by_fact[:, 0], by_fact[:, 1:].flatten(0, 1)
