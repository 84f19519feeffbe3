"""One model over several devices: which block is where, by accelerate's device maps and hooks.

accelerate's hooks let every module fetch what it is called with from another device. So a hidden
state goes over once where two devices meet, and masks and positions go to every block of another
device than theirs; what attention has cached stays with its block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import InputError
from pipeline.models.anatomy import family_of

DeviceMap = dict[str, torch.device]
"""Name of a module -> where it is, for modules that hold all weights and buffers between them."""


def device_map(model: PreTrainedModel, devices: Sequence[torch.device]) -> DeviceMap:
    """Cut a model between blocks so that the fullest device holds as little as possible.

    Devices follow each other as blocks do. An unembedding that is tied to the embedding is with it
    on the first device, as is all that stands before the blocks; what stands behind them is on the
    last one. (`accelerate.infer_auto_device_map` fills one device after the other, and keeps room
    on the first one for blocks that it leaves to the processor.)

    Args:
        model: the model; one on the `meta` device does.
        devices: where to put it; no more than it has blocks.

    Raises:
        InputError: there are more devices than blocks.
    """
    blocks = list(_blocks(model))
    if len(devices) > len(blocks):
        raise InputError(
            f"cluster.gpus_per_worker: {len(devices)} GPUs for a model of {len(blocks)} blocks; a"
            " block is never split, so take one GPU a block at most"
        )
    before, behind = _around_blocks(model)
    sizes = [num_bytes(block) for block in blocks]
    sizes[0] += _bytes_of(model, before)
    sizes[-1] += _bytes_of(model, behind)
    family = family_of(model)
    bounds = _cut(sizes, len(devices))
    found = dict.fromkeys(before, devices[0])
    for device, (start, stop) in zip(devices, pairwise(bounds), strict=True):
        found |= {f"{family.blocks}.{block}": device for block in range(start, stop)}
    return found | dict.fromkeys(behind, devices[-1])


def place(model: PreTrainedModel, devices: Sequence[torch.device]) -> None:
    """Put a model onto a device, or spread it over several.

    Raises:
        InputError: there are more devices than blocks, or accelerate is not installed.
    """
    if len(devices) == 1:
        nn.Module.to(model, devices[0])
        return
    try:
        # Only a model on several devices needs it.
        from accelerate import dispatch_model
    except ImportError as error:
        raise InputError(
            "cluster.gpus_per_worker: a model on several GPUs needs accelerate; install it (pip"
            " install accelerate), or take 1"
        ) from error
    where = device_map(model, devices)
    # Caches hold every layer's states where the layer is.
    skipped = model._skip_keys_device_placement
    keys = [skipped] if isinstance(skipped, str) else list(skipped or ())
    dispatch_model(
        model, where, main_device=devices[0], skip_keys=[*keys, "past_key_values"], force_hooks=True
    )


def num_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights and buffers; tied ones count once."""
    tensors: set[Tensor] = {*module.parameters(), *module.buffers()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Part:
    """What one of several devices holds of a model.

    Attributes:
        blocks: its blocks.
        weight_bytes: of all weights and buffers there.
        has_logits: whether the unembedding is there.
    """

    blocks: range
    weight_bytes: int
    has_logits: bool


def parts_of(model: PreTrainedModel, count: int) -> list[Part]:
    """How `device_map` cuts a model over so many devices.

    Raises:
        InputError: there are more devices than blocks.
    """
    devices = [torch.device("meta", number) for number in range(count)]
    where, path = device_map(model, devices), f"{family_of(model).blocks}."
    found = []
    for device in devices:
        names = [name for name, at in where.items() if at == device]
        blocks = [int(name.removeprefix(path)) for name in names if name.startswith(path)]
        has_logits = model.get_output_embeddings() in map(model.get_submodule, names)
        span = range(blocks[0], blocks[-1] + 1)
        found.append(Part(span, _bytes_of(model, names), has_logits))
    return found


def _bytes_of(model: PreTrainedModel, names: Sequence[str]) -> int:
    return num_bytes(nn.ModuleList(map(model.get_submodule, names)))


def _blocks(model: PreTrainedModel) -> Iterator[nn.Module]:
    return model.get_submodule(family_of(model).blocks).children()


def _around_blocks(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the modules beside the blocks: of those for the first device, and for the last."""
    path = family_of(model).blocks
    embedding = model.get_input_embeddings().weight
    before: list[str] = []
    behind: list[str] = []
    side = before

    def walk(module: nn.Module, prefix: str) -> None:
        nonlocal side
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            if name == path:
                side = behind
            elif path.startswith(f"{name}."):
                walk(child, f"{name}.")
            else:
                # Rotary positions have no weights, and are what every block is called with.
                is_first = not any(True for _ in child.parameters()) or any(
                    weight is embedding for weight in child.parameters()
                )
                (before if is_first else side).append(name)

    walk(model, "")
    return before, behind


def _cut(sizes: Sequence[int], parts: int) -> list[int]:
    """Bounds of contiguous parts, none empty, whose largest sum is the least possible."""
    sums = [0, *accumulate(sizes)]
    count = len(sizes)
    # best[stop]: the least largest sum of the first `stop` sizes in so many parts, and its bounds.
    best = {stop: (sums[stop], [0, stop]) for stop in range(1, count + 1)}
    for made in range(2, parts + 1):
        best = {
            stop: min(
                (max(best[start][0], sums[stop] - sums[start]), [*best[start][1], stop])
                for start in range(made - 1, stop)
            )
            for stop in range(made, count + 1)
        }
    return best[count][1]
