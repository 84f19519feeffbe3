"""FLOP of the matrix products that torch really makes, one by one."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten


class CountedProducts(TorchDispatchMode):
    """Counts products of two matrices while it is entered, by their type; attention's have more
    dimensions and are left out, as `pipeline.planning.flops` leaves them out.

    Solves with a triangular factor count as products, factors n^3 / 3, inverses 2 n^3 / 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        kind = func.overloadpacket
        if kind in (_ATEN.mm, _ATEN.addmm):
            left, right = args[-2:]
            self._add(left, 2 * left.shape[0] * left.shape[1] * right.shape[1])
        elif func.name() == "mkldnn::_linear_pointwise":
            self._add(args[0], 2 * args[0].numel() * args[1].shape[0])
        elif kind is _ATEN.linalg_cholesky_ex:
            self._add(args[0], args[0].shape[0] ** 3 / 3)
        elif kind is _ATEN.cholesky_inverse:
            self._add(args[0], 2 * args[0].shape[0] ** 3 / 3)
        elif kind is _ATEN.cholesky_solve:
            self._add(args[0], 2 * args[1].shape[0] ** 2 * args[0].shape[1])
        elif kind is _ATEN.mkldnn_rnn_layer:
            words, inputs, hidden = args[0], args[1], args[2]
            self._add(words, 2 * len(words) * (inputs.numel() + hidden.numel()))
        elif kind is _ATEN.mkldnn_rnn_layer_backward:
            words, inputs, hidden = args[0], args[1], args[2]
            self._add(words, 4 * len(words) * (inputs.numel() + hidden.numel()))
        return found

    def _add(self, tensor: torch.Tensor, flops: float) -> None:
        self.flops[tensor.dtype] += flops
