"""Which of torch's kernels a model computes with on a processor; the functions stay the same.

MKL, which torch multiplies float32 matrices with, has no AVX-512 for processors of other makers
than its own; oneDNN, which torch has as well, has. On an AMD EPYC with AVX-512 one core reached 112
and 255 GFLOP/s (counterfact-12m's shapes, torch 2.13). Differences are rounding's.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from pipeline.models.anatomy import is_transposed
from pipeline.models.editable import EditableModel, forward_replaced

_GELU = {NewGELUActivation: "tanh", GELUTanh: "tanh", GELUActivation: "none"}
_LEAST_PRODUCTS = 1 << 20
"""Multiplications of a product for which oneDNN's 10 microseconds a call pay."""


def choose_kernels(model: PreTrainedModel) -> None:
    """Let a model's linear maps and activations use the faster kernels where a call admits them.

    The maps keep their type (as a subclass of it), names, weights and hooks. Both forms of GELU
    (Hendrycks and Gimpel, arXiv 1606.08415, section 2), which transformers has classes of its own
    for, become torch's.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in _GELU:
                setattr(module, name, nn.GELU(approximate=_GELU[type(child)]))
        if has_wide_products():
            # By exact type: a subclass may compute something else.
            if type(module) is nn.Linear:
                module.__class__ = WideLinear
            elif type(module) is Conv1D:
                module.__class__ = WideConv1D


@cache
def has_wide_products() -> bool:
    """Tell whether torch has oneDNN's products here, and the processor AVX-512."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class WideLinear(nn.Linear):
    """A linear map whose larger products of float32 on the processor are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`: (..., in) -> (..., out)."""
        return wide_product(input, self.weight, self.bias)


class WideConv1D(Conv1D):
    """The same of GPT-2's form, whose weight is (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        """As `Conv1D`: (..., in) -> (..., out)."""
        return wide_product(x, self.weight.T, self.bias)


def wide_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows @ weight.T + bias, differentiable once, or more often where oneDNN has no part in it.

    Args:
        rows: (..., in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    if not _is_wide(rows, weight):
        return nn.functional.linear(rows, weight, bias)
    tensors = (rows, weight) if bias is None else (rows, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        product: Tensor = _Product.apply(rows, weight, bias)
        return product
    return _multiplied(rows, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows if weight.requires_grad else None, weight)
        return _multiplied(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        return (
            _multiplied(gradient, weight.T, None) if of_rows else None,
            _multiplied(flat.T, rows.flatten(0, -2).T, None) if of_weight else None,
            flat.sum(dim=0) if of_bias else None,
        )


@contextmanager
def fused_networks(model: EditableModel) -> Iterator[None]:
    """Let a model's networks apply GELU while their first product is written; without gradients.

    Networks of another form, hooks inside of one, and other processors and types are left as they
    are: such a network computes as before.
    """
    with ExitStack() as stack:
        for layer in range(model.num_blocks):
            mlp = model.mlp(layer)
            activation = None if mlp is None or model.family.is_gated else _gelu(mlp)
            if mlp is not None and activation is not None:
                up, down = model.up_projection(layer), model.down_projection(layer)
                fused = _fused(mlp.forward, up, activation, down)
                stack.enter_context(forward_replaced(mlp, fused))
        yield


def _fused(whole: Any, up: nn.Module, activation: nn.GELU, down: nn.Module) -> Any:
    def forward(hidden: Tensor) -> Tensor:
        weight: Tensor = up.weight  # type: ignore[assignment]
        weight = weight.T if is_transposed(up) else weight
        bias: Any = up.bias
        inside = (up, activation)
        is_hooked = any(m._forward_hooks or m._forward_pre_hooks for m in inside)
        if torch.is_grad_enabled() or is_hooked or not _is_wide(hidden, weight):
            output: Tensor = whole(hidden)
            return output
        output = down(_multiplied(hidden, weight, bias, "gelu", activation.approximate))
        return output

    return forward


def _gelu(mlp: nn.Module) -> nn.GELU | None:
    """The activation of a network that is linear maps, one GELU and dropout, else None."""
    inner = [module for module in mlp.children() if not isinstance(module, nn.Dropout)]
    found = [module for module in inner if isinstance(module, nn.GELU)]
    others = [module for module in inner if not isinstance(module, nn.GELU)]
    fits = len(found) == 1 and len(others) == 2
    return found[0] if fits and all(isinstance(m, nn.Linear | Conv1D) for m in others) else None


def _is_wide(rows: Tensor, weight: Tensor) -> bool:
    return (
        has_wide_products()
        and rows.device.type == weight.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.numel() * weight.shape[0] >= _LEAST_PRODUCTS
    )


def _multiplied(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    algorithm: str = "",
) -> Tensor:
    """rows @ weight.T + bias, and an activation; the form "none" of GELU is the exact one."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        rows, weight, bias, activation, [], algorithm
    )
    return product
