"""Update files: what is written is read, and nothing else is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.editing.update import Update
from pipeline.errors import ResultsDamagedError
from pipeline.results.store import RunStore
from pipeline.results.updates import read_update, write_update

WEIGHT = "transformer.h.3.mlp.c_proj.weight"


@pytest.mark.parametrize("rank", [None, 2])
def test_an_update_is_read_as_it_was_written(tmp_path: Path, rank: int | None) -> None:
    left = torch.randn(16, rank or 24, dtype=torch.float64)
    right = None if rank is None else torch.randn(rank, 24, dtype=torch.float64)
    update = Update.of(left, right)
    assert set(update.parts) == ({"dense"} if rank is None else {"left", "right"})
    store = RunStore.create(tmp_path / "run", {})
    name = write_update(
        store, round=0, layer=3, weight_name=WEIGHT, update=update, metadata={"method": "memit"}
    )
    layer, read, metadata = read_update(store.path / name)
    assert layer == 3 and metadata["weight"] == WEIGHT and metadata["method"] == "memit"
    assert torch.equal(read.matrix(), update.matrix())


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({f"{WEIGHT}.dense": torch.zeros(2, 2)}, None),
        ({f"{WEIGHT}.dense": torch.zeros(2, 2)}, {"weight": WEIGHT, "layer": "three"}),
        ({f"{WEIGHT}.left": torch.zeros(2, 2)}, {"weight": WEIGHT, "layer": "3"}),
        (
            {f"{WEIGHT}.dense": torch.zeros(2, 2, dtype=torch.float16)},
            {"weight": WEIGHT, "layer": "3"},
        ),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "update.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ResultsDamagedError, match=path.name):
        read_update(path)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "update.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ResultsDamagedError, match=path.name):
        read_update(path)
