"""A block stopped before its down-projection, and finished later with another weight.

What stands before the down-projection does not depend on its weight, so a block that is edited runs
once: up to its key before the update, and on from there after it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.models.editable import EditableModel, forward_replaced


@dataclass
class Halfway:
    """What it takes to finish a block.

    Attributes:
        hidden: (rows, tokens, d) the block's input.
        attentions: what its attention modules returned, in their order.
        key: (rows, tokens, f) the down-projection's input (some architectures flatten rows and
            tokens; fewer tokens where the MLP was asked for those only).
    """

    hidden: Tensor
    attentions: list[Any]
    key: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether the block can be finished from here; else it has to run again from its input."""
        return bool(self.attentions)

    def keep_input(self) -> None:
        """Forget all but the block's input, which takes a fraction of the memory."""
        self.attentions, self.key = [], torch.empty(0)

    @classmethod
    def empty(cls) -> "Halfway":
        """One to be filled by `recorded_halfway`."""
        nothing = torch.empty(0)
        return cls(nothing, [], nothing)


@contextmanager
def recorded_halfway(model: EditableModel, layer: int) -> Iterator[Halfway]:
    """Record a block's way to its key while the context is open; the last call counts."""
    half = Halfway.empty()
    attentions = model.attentions(layer)
    half.attentions = [None] * len(attentions)

    # After the block, since the state that enters may itself be put in by a hook before it.
    def block_input(_module: object, inputs: tuple[Any, ...], _output: object) -> None:
        # A block fetches its input from another device only once it has begun.
        half.hidden = inputs[0].to(model.device_of(layer))

    def attention_output(number: int) -> Any:
        def record(_module: object, _inputs: object, output: Any) -> None:
            half.attentions[number] = output

        return record

    def key(_module: object, inputs: tuple[Any, ...]) -> None:
        half.key = inputs[0]

    with ExitStack() as stack:
        for handle in (
            model.blocks[layer].register_forward_hook(block_input),
            *(
                attention.register_forward_hook(attention_output(number))
                for number, attention in enumerate(attentions)
            ),
            model.down_projection(layer).register_forward_pre_hook(key),
        ):
            stack.callback(handle.remove)
        yield half


@contextmanager
def without_down_projection(model: EditableModel, layer: int) -> Iterator[None]:
    """Let a block end at its key: its down-projection gives zeros while the context is open."""

    def zeros(key: Tensor) -> Tensor:
        return key.new_zeros(*key.shape[:-1], model.hidden_size)

    with forward_replaced(model.down_projection(layer), zeros):
        yield


def finish_block(
    model: EditableModel, layer: int, half: Halfway, *, masks: Any, position_ids: Tensor
) -> Tensor:
    """Run the rest of a block with its weight as it is now: (rows, tokens, d), the block's output.

    The bits are those of the whole block: the same operations on the same numbers. (Architectures
    without a module around their MLP compute its up-projection again.)
    """
    down_projection, mlp = model.down_projection(layer), model.mlp(layer)
    whole = down_projection.forward

    def finish(*_args: Any, **_kwargs: Any) -> Tensor:
        output: Tensor = whole(half.key)
        return output

    with ExitStack() as stack:
        stack.enter_context(attentions_given(model, layer, half.attentions))
        stack.enter_context(forward_replaced(mlp or down_projection, finish))
        return model.run(
            half.hidden, first=layer, stop=layer + 1, masks=masks, position_ids=position_ids
        )


def attention_states(half: Halfway) -> Tensor:
    """What a block's attention to its own tokens put out: (rows, tokens, d)."""
    return _states(half.attentions[0])


def attentions_at(half: Halfway, place: Tensor) -> list[Any]:
    """What a block's attention modules return for some tokens, each in a row of its own.

    Args:
        half: the block.
        place: (n,) int64 indices into rows * tokens.
    """
    return [_at(output, place) for output in half.attentions]


def _at(output: Any, place: Tensor) -> Any:
    chosen = _states(output).flatten(0, 1)[place][:, None]
    # What attention modules return besides (weights, biases) is not used by their blocks.
    return (chosen, *[None] * (len(output) - 1)) if isinstance(output, tuple) else chosen


def _states(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@contextmanager
def attentions_given(model: EditableModel, layer: int, outputs: Sequence[Any]) -> Iterator[None]:
    """Let a block's attention modules return these while the context is open, in their order."""

    def giving(output: Any) -> Any:
        return lambda *_args, **_kwargs: output

    with ExitStack() as stack:
        for attention, output in zip(model.attentions(layer), outputs, strict=True):
            stack.enter_context(forward_replaced(attention, giving(output)))
        yield


def run_from_attention(
    model: EditableModel,
    layer: int,
    hidden: Tensor,
    attention: Tensor,
    added: Tensor,
    *,
    masks: Any,
    position_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run a block from its attention on, and add something to its down-projection's output.

    Args:
        model: the model.
        layer: the block.
        hidden: (rows, tokens, d) the block's input.
        attention: (rows, tokens, d) what its attention puts out.
        added: (rows, tokens, d) what its down-projection's output is changed by.
        masks: of the right shape; nothing attends.
        position_ids: (rows, tokens) int64.

    Returns:
        The block's output, and its down-projection's with the change: (rows, tokens, d) each.
    """
    down_projection = model.down_projection(layer)
    changed: list[Tensor] = []

    def change(_module: object, _inputs: object, output: Tensor) -> Tensor:
        changed.append(output + added.reshape(output.shape))
        return changed[0]

    with ExitStack() as stack:
        stack.enter_context(attentions_given(model, layer, [(attention, None)]))
        stack.callback(down_projection.register_forward_hook(change).remove)
        output = model.run(
            hidden, first=layer, stop=layer + 1, masks=masks, position_ids=position_ids
        )
    return output, changed[0].view_as(hidden)
