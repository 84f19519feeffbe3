"""Update files: what is written is what is read, and nothing else passes for one."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.editing.adapters import NeuronBank
from pipeline.editing.update import Update
from pipeline.errors import ResultsDamagedError
from pipeline.results import RunStore
from pipeline.results.updates import read_update, write_update

NAME = "model.layers.3.mlp.down_proj.weight"


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _write(store: RunStore, update: Update, layer: int = 3) -> Path:
    metadata = {"method": "memit", "fingerprint": "f" * 64}
    name = write_update(
        store, round=0, layer=layer, weight_name=NAME, update=update, metadata=metadata
    )
    return store.path / name


@given(outputs=st.integers(1, 9), inputs=st.integers(1, 9), rank=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_an_update_comes_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, outputs: int, inputs: int, rank: int
) -> None:
    store = RunStore.create(tmp_path_factory.mktemp("run") / "run", {"name": "test"})
    update = Update.of(_draw(outputs, rank), _draw(rank, inputs, seed=1))
    path = _write(store, update)
    layer, found, metadata = read_update(path)
    assert layer == 3 and set(found.parts) == set(update.parts)
    assert all(torch.equal(found.parts[name], part) for name, part in update.parts.items())
    assert torch.equal(found.matrix(), update.matrix())
    assert metadata["weight"] == NAME and metadata["round"] == "0"
    # The smaller of the two forms is the one that is kept.
    stored = sum(part.numel() for part in found.parts.values())
    assert stored == min(outputs * inputs, rank * (outputs + inputs))
    store.verify()


def test_tensors_are_named_after_the_parameter(store: RunStore) -> None:
    names = set(load_file(_write(store, Update.of(_draw(8, 2), _draw(2, 16)))))
    assert names == {f"{NAME}.left", f"{NAME}.right"}
    path = _write(store, Update.of(_draw(8, 16)), layer=4)
    assert {name: part.dtype for name, part in load_file(path).items()} == {
        f"{NAME}.dense": torch.float32
    }
    with safe_open(path, framework="pt") as file:
        assert set(file.metadata()) == {"method", "fingerprint", "weight", "layer", "round"}


def test_the_same_update_gives_the_same_bytes(store: RunStore, tmp_path: Path) -> None:
    first = _write(store, Update.of(_draw(8, 16))).read_bytes()
    other = RunStore.create(tmp_path / "other", {"name": "test"})
    assert _write(other, Update.of(_draw(8, 16))).read_bytes() == first


def test_updates_are_listed_in_ascending_layers(store: RunStore) -> None:
    for layer in (7, 3, 5):
        _write(store, Update.of(_draw(4, 4, seed=layer)), layer)
    assert [part.layer for part in store.parts("update")] == [3, 5, 7]
    assert store.parts("update")[0].name == "updates/round=00000/layer-00003.safetensors"


def test_an_adapter_comes_back_to_the_bit(store: RunStore) -> None:
    parts = [_draw(3, 8), _draw(3, seed=1), _draw(3, 8, seed=2)]
    bank = NeuronBank.of(*parts, "gelu_new")
    metadata = {"method": "t_patcher", "fingerprint": "f" * 64}
    name = write_update(store, round=2, layer=3, weight_name=NAME, update=bank, metadata=metadata)
    layer, found, described = read_update(store.path / name)
    assert layer == 3 and isinstance(found, NeuronBank) and found.settings == bank.settings
    assert found.parts.keys() == bank.parts.keys()
    assert all(torch.equal(found.parts[name], part) for name, part in bank.parts.items())
    assert described["adapter"] == "neurons" and described["round"] == "2"
    assert set(load_file(store.path / name)) == {"keys", "biases", "values"}


_NEURONS = {"keys": torch.zeros(2, 4), "biases": torch.zeros(2), "values": torch.zeros(2, 4)}
_BANK = {"adapter": "neurons", "settings": '{"activation": "relu"}', "layer": "3", "round": "0"}


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        ({}, {"adapter": "spell"}, "unknown kind 'spell'"),
        ({}, {"settings": "[]"}, "its settings are"),
        ({}, {"settings": "{"}, "holds no adapter"),
        ({}, {"settings": "{}"}, "unknown activation None"),
        ({"biases": torch.zeros(3)}, {}, "do not fit each other"),
        ({"biases": torch.tensor([0.0, torch.inf])}, {}, "holds infinities"),
    ],
)
def test_files_that_are_no_adapters(
    tmp_path: Path, change: dict[str, Tensor], metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "layer-00003.safetensors"
    save_file(_NEURONS | change, path, metadata=_BANK | metadata)
    with pytest.raises(ResultsDamagedError, match=message):
        read_update(path)


_SOUND = {"weight": NAME, "layer": "3", "round": "0"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({f"{NAME}.dense": torch.zeros(2, 2)}, {"layer": "3"}, "is not an update file.*weight"),
        ({f"{NAME}.dense": torch.zeros(2, 2)}, {**_SOUND, "layer": "x"}, "is not an update file"),
        ({f"{NAME}.left": torch.zeros(2, 2)}, _SOUND, r"unexpected tensors: .*\.left"),
        ({"other.dense": torch.zeros(2, 2)}, _SOUND, "unexpected tensors: other.dense"),
        ({f"{NAME}.dense": torch.zeros(2, 2).half()}, _SOUND, "not float32"),
    ],
)
def test_files_that_are_no_updates(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "layer-00003.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ResultsDamagedError, match=message):
        read_update(path)


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 100])
def test_bytes_that_are_no_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "layer-00003.safetensors"
    path.write_bytes(content)
    with pytest.raises(ResultsDamagedError, match="layer-00003"):
        read_update(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsDamagedError, match="layer-00009"):
        read_update(tmp_path / "layer-00009.safetensors")
