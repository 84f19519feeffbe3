"""Devices that are none: on a processor, but kept apart as GPUs are.

Inside `stand_ins()` a tensor is on the device that it was made on, or moved to, and says so:
`torch.device("cpu", 1)`, `torch.device("cpu", 2)`, ... or the host, `torch.device("cpu")`. Every
operation that torch carries out, those of a backward pass among them, is looked at: one whose
tensors are on different devices raises `DevicesMixedError`, as CUDA would. As there, numbers
without dimensions may be on the host, indices too, and `copy_` may cross.

The numbers are those of the processor, so what a split model computes can be compared to the bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

HOST = torch.device("cpu")
FIRST, SECOND, THIRD = (torch.device("cpu", number) for number in (1, 2, 3))


class DevicesMixedError(RuntimeError):
    """An operation was given tensors on different devices."""


class Move(NamedTuple):
    """A copy from one device to another."""

    shape: tuple[int, ...]
    came_from: torch.device
    device: torch.device


class _Places:
    """Where storages are; those that nobody has put anywhere are on the host."""

    def __init__(self) -> None:
        # The weak reference keeps a storage's address from being used again.
        self._found: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self._added = 0
        self.moves: list[Move] = []

    def of(self, tensor: Tensor) -> torch.device:
        found = self._found.get(tensor.untyped_storage()._cdata)
        return HOST if found is None else found[1]

    def put(self, tensor: Tensor, device: torch.device) -> None:
        storage = tensor.untyped_storage()
        if device == HOST:
            self._found.pop(storage._cdata, None)
            return
        self._found[storage._cdata] = (StorageWeakRef(storage), device)
        self._added += 1
        if self._added % 10_000 == 0:
            alive = {key: pair for key, pair in self._found.items() if not pair[0].expired()}
            self._found = alive


class _Moved(torch.autograd.Function):
    """A copy on another device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: _Places, device: torch.device) -> Tensor:
        ctx.places, ctx.came_from = places, places.of(tensor)
        copy = tensor.detach().clone(memory_format=torch.preserve_format)
        places.put(copy, device)
        return copy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        copy = gradient.clone()
        ctx.places.put(copy, ctx.came_from)
        return copy, None, None


_FREE = ("aten::copy_", "aten::_has_compatible", "aten::set_", "aten::is_same_size")
_INDEXING = ("aten::index", "aten::_unsafe_index", "aten::_index_put")


class _Operations(TorchDispatchMode):
    """Checks what every operation is given, and puts what it makes where its tensors are."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, given = function.name(), (args, kwargs or {})
        made = function(*args, **(kwargs or {}))
        if name.startswith(_FREE):
            return made
        device = self._common(name, given)
        before = {id(part) for part in tree_iter(given) if isinstance(part, Tensor)}
        for part in tree_iter(made):
            if isinstance(part, Tensor) and id(part) not in before:
                self._places.put(part, device)
        return made

    def _common(self, name: str, given: Any) -> torch.device:
        may_be_free = name.startswith(_INDEXING)
        found: dict[torch.device, Tensor] = {}
        for part in tree_iter(given):
            if not isinstance(part, Tensor):
                continue
            device = self._places.of(part)
            is_index = may_be_free and part.dtype in (torch.int64, torch.bool)
            if device == HOST and (part.dim() == 0 or is_index):
                continue
            found.setdefault(device, part)
        if len(found) > 1:
            shapes = ", ".join(f"{tuple(part.shape)} on {at}" for at, part in found.items())
            raise DevicesMixedError(f"{name}: {shapes}")
        return next(iter(found), HOST)


class _Calls(TorchFunctionMode):
    """Gives tensors their device, moves them, and makes them where it is asked for."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(function, "__self__", None) is torch.Tensor.device:
            return self._places.of(args[0])
        if function is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if function is torch.Tensor.cpu:
            return self._moved(args[0], HOST)
        if function is torch.Tensor.numpy and self._places.of(args[0]) != HOST:
            raise DevicesMixedError("numpy: the tensor is not on the host")
        if function is torch._C._nn._parse_to or kwargs.get("device") is None:
            return function(*args, **kwargs)
        # Made on the host, and then put where it belongs.
        device = torch.device(kwargs.pop("device"))
        made = function(*args, **kwargs)
        return tree_map(lambda p: self._moved(p, device) if isinstance(p, Tensor) else p, made)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            other, *rest = args
            args, kwargs = (self._places.of(other), other.dtype, *rest), kwargs
        copies = kwargs.pop("copy", False)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        made = tensor if dtype is None else torch.Tensor.type(tensor, dtype)
        if copies and made is tensor:
            made = tensor.clone()
        return made if device is None else self._moved(made, device)

    def _moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        came_from = self._places.of(tensor)
        if came_from == device:
            return tensor
        self._places.moves.append(Move(tuple(tensor.shape), came_from, device))
        return _Moved.apply(tensor, self._places, device)


@contextmanager
def stand_ins() -> Iterator[list[Move]]:
    """Let devices be told apart while the context is open; gives the list of what was moved."""
    places = _Places()
    with _Calls(places), _Operations(places):
        yield places.moves
