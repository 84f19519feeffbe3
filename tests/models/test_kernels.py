"""The chosen kernels compute the same functions, by the kernels that they are chosen for."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pipeline.models import kernels
from pipeline.models.kernels import (
    WideConv1D,
    WideLinear,
    choose_kernels,
    fused_networks,
    has_wide_products,
    wide_product,
)
from tests.cases import ALL_FAMILIES, Case, fresh

WIDE = "mkldnn::_linear_pointwise"
needs_wide = pytest.mark.skipif(
    not has_wide_products(), reason="this processor has no AVX-512, so torch's own kernels stay"
)
UNGATED = ["gpt2", "gptj", "gpt_neox", "gpt_neox_sequential"]


@pytest.fixture
def wide_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_LEAST_PRODUCTS", 1)


def _ids(tiny: Case) -> Tensor:
    return torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(5))


def _kernels_in(run: object) -> set[str]:
    assert callable(run)
    with torch.profiler.profile() as profile:
        run()
    return {event.key for event in profile.key_averages()}


# --- one product --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(2,), (5, 3), (2, 1, 40), (300,), (64, 9), (0,)]),
    width=st.sampled_from([1, 7, 64, 200]),
    height=st.sampled_from([1, 5, 96, 320]),
    has_bias=st.booleans(),
    is_turned=st.booleans(),
    learns=st.tuples(st.booleans(), st.booleans()),
)
def test_product_and_its_gradients_are_those_of_float64(
    shape: tuple[int, ...],
    width: int,
    height: int,
    has_bias: bool,
    is_turned: bool,
    learns: tuple[bool, bool],
) -> None:
    """Of all sizes, so on both sides of the least size; weights in both orders."""
    random = torch.Generator().manual_seed(width * height)
    rows = torch.randn(*shape, width, generator=random, dtype=torch.float64)
    stored = torch.randn(height, width, generator=random, dtype=torch.float64)
    weight = stored.T.contiguous().T if is_turned else stored
    bias = torch.randn(height, generator=random, dtype=torch.float64) if has_bias else None
    outer = torch.randn(*shape, height, generator=random, dtype=torch.float64)

    def run(dtype: torch.dtype) -> list[Tensor]:
        given = rows.to(dtype).requires_grad_(learns[0]), weight.to(dtype).requires_grad_(learns[1])
        added = None if bias is None else bias.to(dtype).requires_grad_(learns[1])
        exact = given[0] @ given[1].T + (0 if added is None else added)
        product = wide_product(*given, added) if dtype == torch.float32 else exact
        wanted = [tensor for tensor in (*given, added) if tensor is not None]
        wanted = [tensor for tensor in wanted if tensor.requires_grad]
        if not wanted:
            return [product]
        return [product, *torch.autograd.grad(product, wanted, outer.to(dtype))]

    found, exact = run(torch.float32), run(torch.float64)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in exact]
    scale = 1e-5 * (width + height + rows.numel()) ** 0.5
    for mine, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), wanted, atol=scale, rtol=1e-4)


@needs_wide
def test_large_products_are_onednns_and_small_ones_torchs_own() -> None:
    weight = torch.randn(256, 64)
    assert WIDE in _kernels_in(lambda: wide_product(torch.randn(64, 64), weight, None))
    assert WIDE not in _kernels_in(lambda: wide_product(torch.randn(63, 64), weight, None))
    double = torch.randn(64, 64, dtype=torch.float64)
    assert WIDE not in _kernels_in(lambda: wide_product(double, weight.double(), None))


def test_without_avx512_all_products_are_torchs_own() -> None:
    """Also those of a caller that asks for no model, as a plan's measurement of the rate."""
    code = (
        "import torch; from pipeline.models.kernels import wide_product as product\n"
        "left, right = torch.ones(64, 64), torch.ones(256, 64)\n"
        "with torch.profiler.profile() as profile: product(left, right, None)\n"
        "print(*(event.key for event in profile.key_averages()))"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "aten::linear" in said and "mkldnn" not in said


@needs_wide
def test_gradients_of_a_gradient_are_refused() -> None:
    rows = torch.randn(64, 64, requires_grad=True)
    product = wide_product(rows, torch.randn(256, 64), None)
    (gradient,) = torch.autograd.grad(product.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- a model ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("wide_at_any_size")
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_model_computes_the_same_and_keeps_its_parts(family: str, tmp_path: Path) -> None:
    exact, chosen = fresh(family, torch.float64), fresh(family, torch.float32)
    chosen.model.load_state_dict(exact.model.state_dict())
    choose_kernels(chosen.model)
    ids = _ids(chosen)

    assert list(chosen.model.state_dict()) == list(exact.model.state_dict())
    for module in chosen.model.modules():
        assert type(module) is not Conv1D or not has_wide_products()
        assert type(module) is not nn.Linear or not has_wide_products()
    with torch.no_grad():
        found, wanted = chosen.model(input_ids=ids).logits, exact.model(input_ids=ids).logits
    torch.testing.assert_close(found.double(), wanted, atol=2e-4, rtol=1e-3)

    # A copy has weights of its own, and what is saved is plain.
    twin = copy.deepcopy(chosen.model)
    with torch.no_grad():
        chosen.down_projections[0].weight.mul_(3)
        assert torch.equal(twin(input_ids=ids).logits, found)
    twin.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, found, atol=2e-4, rtol=1e-3)


@needs_wide
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_plain_maps_are_replaced(family: str) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = fresh(family, torch.float32).model
    model.extra = Scaled(3, 3)
    choose_kernels(model)
    kinds = {type(module) for module in model.modules()}
    assert Scaled in kinds and WideLinear in kinds
    assert (WideConv1D in kinds) == (family == "gpt2")


# --- fused networks -----------------------------------------------------------------------------


@needs_wide
@pytest.mark.usefixtures("wide_at_any_size")
@pytest.mark.parametrize("family", UNGATED)
def test_fused_networks_compute_the_same(family: str) -> None:
    tiny = fresh(family, torch.float32)
    choose_kernels(tiny.model)
    ids = _ids(tiny)
    keys: list[Tensor] = []
    down = tiny.down_projections[1]
    with torch.no_grad():
        plain = tiny.model(input_ids=ids).logits
        down.register_forward_pre_hook(lambda _module, inputs: keys.append(inputs[0]))
        tiny.model(input_ids=ids)
        with fused_networks(tiny.editable):
            fused = tiny.model(input_ids=ids).logits
            names = _kernels_in(lambda: tiny.model(input_ids=ids))
            assert "aten::gelu" not in names and WIDE in names
        assert "aten::gelu" in _kernels_in(lambda: tiny.model(input_ids=ids))
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(keys[1], keys[0], atol=1e-5, rtol=1e-4)
    assert all("forward" not in module.__dict__ for module in tiny.model.modules())


@needs_wide
@pytest.mark.usefixtures("wide_at_any_size")
def test_hooks_inside_and_gradients_have_the_network_as_it_was() -> None:
    tiny = fresh("gpt2", torch.float32)
    choose_kernels(tiny.model)
    ids, seen = _ids(tiny), []
    up = tiny.editable.up_projection(0)
    with fused_networks(tiny.editable):
        tiny.model.requires_grad_(True)
        tiny.model(input_ids=ids).logits.sum().backward()
        assert up.weight.grad is not None and up.weight.grad.abs().sum() > 0
        with torch.no_grad():
            up.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
            tiny.model(input_ids=ids)
    assert len(seen) == 1


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_other_networks_are_left_alone(family: str) -> None:
    """Gated ones, and ones that are no module of their own."""
    tiny = fresh(family, torch.float32)
    with fused_networks(tiny.editable):
        assert all("forward" not in module.__dict__ for module in tiny.model.modules())
