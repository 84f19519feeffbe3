"""Causal tracing as it is published: one restored state at a time, through the whole model.

Each restoration is one forward pass over a clean row and N corrupted ones (arXiv 2202.05262,
appendix B, and the code published with it), with logits at every position. A severed state takes
two passes, the first one to see what to hold; one first pass a fact would serve all of them.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.editable import EditableModel
from pipeline.tracing.facts import Fact
from pipeline.tracing.names import Kind, Module
from pipeline.tracing.recording import draw_noise, module_of
from pipeline.tracing.runs import window_of
from pipeline.tracing.trace import TraceSettings

Action = tuple[nn.Module, Callable[[Tensor], None]]


@torch.no_grad()
def plain_map(
    model: EditableModel,
    fact: Fact,
    kind: Kind,
    settings: TraceSettings,
    *,
    shares_first_pass: bool = False,
) -> list[list[float]]:
    """Probability of the clean run's answer for every token and layer: T lists of L numbers.

    Args:
        shares_first_pass: let all severed states of the fact have one first pass, as nobody has
            published it.
    """
    is_severed = kind.startswith("severed")
    shared = _corrupted_outputs(model, fact, settings) if is_severed and shares_first_pass else None
    answer = int(_logits(model, fact, settings, [])[0, -1].argmax())

    def restored(token: int, layer: int) -> float:
        held = shared or (_corrupted_outputs(model, fact, settings) if is_severed else {})
        logits = _logits(model, fact, settings, _actions(model, kind, token, layer, settings, held))
        return float(logits[1:, -1].softmax(dim=-1)[:, answer].mean())

    layers = range(model.num_blocks)
    return [[restored(token, layer) for layer in layers] for token in range(len(fact.ids))]


def _actions(
    model: EditableModel,
    kind: Kind,
    token: int,
    layer: int,
    settings: TraceSettings,
    held: dict[tuple[Module, int], Tensor],
) -> list[Action]:
    """What to do to which module's output."""

    def take_clean(rows: Tensor) -> None:
        rows[1:, token] = rows[0, token]

    def put(values: Tensor) -> Callable[[Tensor], None]:
        def hold(rows: Tensor) -> None:
            rows[:, token] = values[:, token]

        return hold

    if kind == "mlp" or kind == "attention":
        window = window_of(layer, settings.window, model.num_blocks)
        return [(module_of(model, kind, block), take_clean) for block in window]
    actions: list[Action] = [(model.blocks[layer], take_clean)]
    if kind != "state":
        module: Module = "mlp" if kind == "severed_mlp" else "attention"
        actions += [
            (module_of(model, module, block), put(held[module, block]))
            for block in range(layer + 1, model.num_blocks)
        ]
    return actions


def _corrupted_outputs(
    model: EditableModel, fact: Fact, settings: TraceSettings
) -> dict[tuple[Module, int], Tensor]:
    """What the modules give in the corrupted run, (rows, T, d) each."""
    found: dict[tuple[Module, int], Tensor] = {}

    def keep(module: Module, block: int) -> Callable[[Tensor], None]:
        def note(rows: Tensor) -> None:
            found[module, block] = rows.clone()

        return note

    modules: Sequence[Module] = ("mlp", "attention")
    actions = [
        (module_of(model, module, block), keep(module, block))
        for module in modules
        for block in range(model.num_blocks)
    ]
    _logits(model, fact, settings, actions)
    return found


def _logits(
    model: EditableModel, fact: Fact, settings: TraceSettings, actions: list[Action]
) -> Tensor:
    """(1 + N, T, v): one pass, with noise on the subject of all rows but the first."""
    rows, tokens = settings.samples + 1, len(fact.ids)
    ids = torch.tensor([fact.ids] * rows, device=model.input_device)

    def corrupt(states: Tensor) -> None:
        drawn = draw_noise(
            settings.samples, fact.end - fact.begin, states.shape[-1], settings.seed
        )  # fmt: skip
        states[1:, fact.begin : fact.end] += (settings.noise * drawn).to(states)

    embed: Any = model.model.get_input_embeddings()
    with ExitStack() as stack:
        for module, action in [(embed, corrupt), *actions]:

            def hook(_module: Any, _inputs: Any, output: Any, action: Any = action) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                action(tensor.view(rows, tokens, -1))

            stack.callback(module.register_forward_hook(hook).remove)
        logits: Tensor = model.model(input_ids=ids).logits
    return logits.float()
