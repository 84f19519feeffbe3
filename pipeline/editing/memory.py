"""How many edits may be searched at once in the memory that is free."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts

# Numbers a token and block that a backward pass needs, in hidden sizes d and inner sizes f: norms,
# queries, keys, values, attention's output and two residual streams; the MLP's inner states, gates
# among them. Rounded up, since families differ.
_HIDDEN_STATES, _INNER_STATES = 16, 6
# Attention's weights and masks, and logits with their softmax and gradients, live together.
_ATTENTION_COPIES, _LOGIT_COPIES = 4, 4
# The rest is for the copies that batches cost when they change, and for a fragmented pool.
_USED_PART = 0.5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class ValueBytes(NamedTuple):
    """Bytes that one edit takes while its value is searched, an upper estimate.

    Attributes:
        layer: the block L whose output is searched.
        block: of each block from L on, where the block is.
        logits: where the model puts out its logits.
    """

    layer: int
    block: int
    logits: int

    def over(self, blocks: Iterable[int], *, with_logits: bool) -> int:
        """Bytes on a device that holds these blocks."""
        searched = sum(block >= self.layer for block in blocks)
        return searched * self.block + (self.logits if with_logits else 0)


def value_bytes(model: EditableModel, edit: EditPrompts, layer: int) -> int:
    """Bytes that one edit takes while its value is searched, on all devices together.

    Args: as of `value_parts`.
    """
    parts = value_parts(model, edit, layer)
    return parts.over(range(model.num_blocks), with_logits=True)


def value_parts(model: EditableModel, edit: EditPrompts, layer: int) -> ValueBytes:
    """Bytes that one edit takes while its value is searched, by what takes them.

    Args:
        model: the model.
        edit: the tokenised request.
        layer: the block L whose output is searched.
    """
    rows = [(len(row.ids) - row.lookup + len(edit.target) - 1, row.lookup) for row in edit.rewrites]
    suffix = sum(after for after, _ in rows) + 1
    prefix = sum(before for _, before in rows) + edit.essence.lookup
    heads = int(model.config.num_attention_heads)
    widths = _HIDDEN_STATES * model.hidden_size + _INNER_STATES * model.key_size(layer)
    states = suffix * widths + 4 * (prefix + suffix) * model.hidden_size
    attention = _ATTENTION_COPIES * heads * suffix * (prefix + suffix)
    reads = len(edit.rewrites) * len(edit.target) + 1
    wide = torch.promote_types(model.dtype, torch.float32).itemsize
    logits = _LOGIT_COPIES * reads * model.vocab_size * wide
    return ValueBytes(layer, (states + attention) * model.dtype.itemsize, logits)


def pass_bytes(model: EditableModel, tokens: int, read: int, blocks: int) -> int:
    """Bytes that a pass with gradients over some tokens takes, an upper estimate.

    Args:
        model: the model.
        tokens: of a batch.
        read: those at which the vocabulary is read.
        blocks: through which there are gradients.
    """
    widths = _HIDDEN_STATES * model.hidden_size + _INNER_STATES * model.key_size(0)
    wide = torch.promote_types(model.dtype, torch.float32).itemsize
    logits = _LOGIT_COPIES * read * model.vocab_size * wide
    return blocks * tokens * widths * model.dtype.itemsize + logits


def edits_that_fit(
    model: EditableModel,
    edits: Sequence[EditPrompts],
    layer: int,
    most: int,
    free: Mapping[torch.device, int],
) -> int:
    """Edits to search at once: the largest power of two up to `most` that half the memory holds.

    A power of two, and by an estimate rather than a trial, so that a little more or less of free
    memory leaves the batches, and with them a result's last bits, as they are.

    Args:
        free: bytes that are free on every device of the model.
    """
    parts = [value_parts(model, edit, layer) for edit in edits]
    room = []
    for device in model.devices:
        blocks = [block for block in range(model.num_blocks) if model.device_of(block) == device]
        is_last = device == model.output_device
        longest = max(part.over(blocks, with_logits=is_last) for part in parts)
        room.append(_USED_PART * free[device] / max(1, longest))
    count = 1
    while 2 * count <= min(most, *room):
        count *= 2
    return count


def free_bytes(device: torch.device, share: float = 1.0) -> int:
    """Bytes that are free on a device, or on this machine (all it has, where it does not say).

    Args:
        device: the device.
        share: the part of a GPU that this process may take.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return int(min(free + held - used, share * total - used))
    available = Path("/proc/meminfo")
    if not available.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":", 1) for line in available.read_text("ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
