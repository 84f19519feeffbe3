"""The covariance of keys against plain sums over tokens."""

import pytest
import torch

from pipeline.editing.covariance import GramSums, gram_sums
from tests.cases import ALL_FAMILIES, case, relative_error, token_rows
from tests.oracles.memit import compute_covariance, module_input

ROWS = token_rows(12)
LAYERS = [0, 1, 2]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_covariances_are_those_of_the_oracle(family: str) -> None:
    tiny = case(family)
    sums = gram_sums(tiny.editable, LAYERS, ROWS, max_tokens=70)
    expected = compute_covariance(tiny.model, tiny.down_projections[:3], ROWS)
    assert sums.tokens == sum(map(len, ROWS))
    covariances = sums.covariances()
    assert list(covariances) == LAYERS
    for layer in LAYERS:
        assert covariances[layer].dtype == torch.float64
        assert relative_error(covariances[layer], expected[layer]) < tiny.tolerance


@pytest.mark.parametrize("max_tokens", [1, 50, 10_000])
def test_batching_changes_nothing(max_tokens: int) -> None:
    tiny = case("opt")  # its MLP sees rows and tokens flattened
    expected = gram_sums(tiny.editable, LAYERS, ROWS, max_tokens=64)
    actual = gram_sums(tiny.editable, LAYERS, ROWS, max_tokens=max_tokens)
    assert actual.tokens == expected.tokens
    for layer in LAYERS:
        assert relative_error(actual.sums[layer], expected.sums[layer]) < 1e-12


def test_shards_add_up() -> None:
    tiny = case("gpt2")
    whole = gram_sums(tiny.editable, LAYERS, ROWS, max_tokens=64)
    total = gram_sums(tiny.editable, LAYERS, ROWS[:5], max_tokens=64)
    total.add(gram_sums(tiny.editable, LAYERS, ROWS[5:], max_tokens=64))
    assert total.tokens == whole.tokens
    for layer in LAYERS:
        assert relative_error(total.covariances()[layer], whole.covariances()[layer]) < 1e-12


def test_adding_is_plain_addition() -> None:
    left = GramSums({3: torch.eye(2, dtype=torch.float64)}, 5)
    right = GramSums({3: torch.full((2, 2), 2.0, dtype=torch.float64)}, 3)
    left.add(right)
    assert left.tokens == 8
    assert left.covariances()[3].tolist() == [[3 / 8, 2 / 8], [2 / 8, 3 / 8]]
    assert right.sums[3].tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_any_layers_in_any_order_in_one_pass() -> None:
    tiny = case("llama")
    all_layers = gram_sums(tiny.editable, [0, 1, 2, 3], ROWS, max_tokens=64)
    some = gram_sums(tiny.editable, [3, 1], ROWS, max_tokens=64)
    assert list(some.sums) == [3, 1]
    for layer in (3, 1):
        assert torch.equal(some.sums[layer], all_layers.sums[layer])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.002)],
)
def test_half_precision_keys_are_summed_in_float64(dtype: torch.dtype, tolerance: float) -> None:
    """The keys are as rough as the model; what is made of them is not."""
    tiny = case("gpt2", dtype)
    alone = gram_sums(tiny.editable, [1], ROWS, max_tokens=1)  # each row as the oracle sees it
    assert alone.sums[1].dtype == torch.float64
    keys = torch.cat([module_input(tiny.model, tiny.down_projections[1], row) for row in ROWS])
    assert relative_error(alone.sums[1], keys.double().T @ keys.double()) < 1e-6
    exact = gram_sums(case("gpt2").editable, [1], ROWS, max_tokens=64)
    together = gram_sums(tiny.editable, [1], ROWS, max_tokens=64)
    assert relative_error(together.sums[1], exact.sums[1]) < tolerance
