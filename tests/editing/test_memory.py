"""How many edits fit into memory: the estimate against what a backward pass really keeps."""

import pytest
import torch
from torch import Tensor

from pipeline.editing.memory import edits_that_fit, free_bytes, is_out_of_memory, value_bytes
from pipeline.editing.search import Search, ValueSettings
from pipeline.editing.values import find_values
from tests.cases import ALL_FAMILIES, EDITS, SETTINGS, case

CPU = torch.device("cpu")


def _kept_bytes(family: str, layer: int) -> int:
    """Bytes of all distinct tensors that one edit's forward pass keeps for the backward pass."""
    tiny = case(family)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in tiny.model.parameters()}
    settings = ValueSettings(**SETTINGS | {"steps": 2, "stop_loss": 0.0})
    search = Search(tiny.editable, [tiny.prompts(EDITS[:1])], layer, settings, 1)
    search._fill()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        search._pass()
    return sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_estimate_is_above_what_a_pass_keeps(family: str) -> None:
    tiny = case(family)
    for layer in (0, 1):
        estimate = value_bytes(tiny.editable, tiny.prompts(EDITS[:1])[0], layer)
        assert estimate / 8 < _kept_bytes(family, layer) < estimate


def test_a_power_of_two_fits_into_half_the_memory() -> None:
    tiny = case("gpt2")
    prompts = tiny.prompts(EDITS)
    each = max(value_bytes(tiny.editable, prompt, 1) for prompt in prompts)
    fitting = {
        free: edits_that_fit(tiny.editable, prompts, 1, 256, {CPU: free * each})
        for free in (0, 1, 2, 4, 15, 16, 100, 10_000)
    }
    assert fitting == {0: 1, 1: 1, 2: 1, 4: 2, 15: 4, 16: 8, 100: 32, 10_000: 256}
    assert free_bytes(torch.device("cpu")) > 1 << 20


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What had ended by then is kept; the rest is searched again, half as many at once."""
    tiny = case("gpt2")
    settings = ValueSettings(**SETTINGS | {"steps": 6})
    prompts = tiny.prompts(EDITS)
    expected = find_values(tiny.editable, prompts, 1, settings, 2)
    whole, sizes = Search._pass, []

    def short_of_memory(search: Search) -> None:
        sizes.append(len(search._numbers))
        if len(search._numbers) > 2:
            # What torch says when malloc fails; asking for 1 EB does it for real.
            torch.empty(1 << 60, dtype=torch.uint8)
        whole(search)

    monkeypatch.setattr(Search, "_pass", short_of_memory)
    found = find_values(tiny.editable, prompts, 1, settings, 5)
    assert sizes[0] == 5 and max(sizes[1:]) == 2
    for ours, other in zip(found, expected, strict=True):
        assert torch.equal(ours.z, other.z)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
