"""The store of covariances; run with `pytest tests/test_covariances.py`."""

import json
import logging
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.covariances import (
    CovarianceIdentity,
    covariance_path,
    default_directory,
    find_covariances,
    find_public_covariance,
    load_covariances,
    read_covariance,
    read_public_covariance,
    write_covariance,
)
from pipeline.errors import FingerprintMismatchError, InputError, ResultsDamagedError

F = 6
IDENTITY = CovarianceIdentity(
    fingerprint="f" * 64,
    corpus="corpus.txt",
    corpus_digest="d" * 64,
    samples=400,
    max_tokens=None,
    dtype="float32",
)
NO_CORPUS = replace(IDENTITY, corpus=None, corpus_digest=None, samples=None)
NAMES = {layer: f"transformer.h.{layer}.mlp.c_proj.weight" for layer in (3, 4, 33)}
SIZES = dict.fromkeys(NAMES, F)
PUBLIC = "transformer.h.3.mlp.c_proj_float32_mom2_100000.npz"


def some_covariance(seed: int = 0, size: int = F) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    return keys.T @ keys / len(keys)


def write_public(path: Path, keys: np.ndarray[Any, Any], **changes: object) -> Path:
    """What SecondMoment in a CombinedStat leaves behind, entries changed or (None) left out."""
    entries: dict[str, Any] = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": len(keys),
        "mom2.mom2": keys.T @ keys,
        "sample_size": 100000,
    }
    entries |= {name.replace("_", ".", 1): value for name, value in changes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: value for name, value in entries.items() if value is not None})
    return path


def some_keys(count: int = 40, size: int = F) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((count, size)).astype(np.float32)


# Our own files


@settings(max_examples=25, deadline=None)
@given(
    exponents=st.lists(st.integers(-30, 30), min_size=1, max_size=9),
    tokens=st.integers(1, 2**62),
    seed=st.integers(0, 2**30),
)
def test_round_trip_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, exponents: list[int], tokens: int, seed: int
) -> None:
    scale = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    covariance = some_covariance(seed, len(exponents)) * scale * scale[:, None]
    directory = tmp_path_factory.mktemp("store")
    path = write_covariance(directory, 7, covariance, tokens=tokens, identity=IDENTITY)
    assert path == directory / "layer-00007.safetensors"
    assert find_covariances(directory, [6, 7], IDENTITY) == {7: path}
    found, count = read_covariance(path, key_size=len(exponents))
    assert count == tokens
    assert found.dtype == torch.float64
    assert torch.equal(found, covariance)
    shutil.rmtree(directory)


def test_a_transposed_view_is_stored_as_it_is(tmp_path: Path) -> None:
    view = (some_covariance() + torch.randn(F, F, dtype=torch.float64) * 1e-9).T
    path = write_covariance(tmp_path, 0, view, tokens=1, identity=IDENTITY)
    assert torch.equal(read_covariance(path, key_size=F)[0], view)


def test_metadata_says_where_it_came_from(tmp_path: Path) -> None:
    path = write_covariance(tmp_path, 3, some_covariance(), tokens=12, identity=IDENTITY)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "1",
            "layer": "3",
            "tokens": "12",
            "fingerprint": "f" * 64,
            "corpus": "corpus.txt",
            "corpus_digest": "d" * 64,
            "samples": "400",
            "max_tokens": "null",
            "dtype": "float32",
        }


def test_writing_again_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for seed in (1, 2):
        path = write_covariance(tmp_path, 3, some_covariance(seed), tokens=9, identity=IDENTITY)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(read_covariance(path, key_size=F)[0], some_covariance(2))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"layer-00003\.safetensors: cannot be written: "):
        write_covariance(tmp_path / "file" / "c", 3, some_covariance(), tokens=9, identity=IDENTITY)


CHANGES: dict[str, object] = {
    "fingerprint": "e" * 64,
    "corpus_digest": "c" * 64,
    "samples": 401,
    "max_tokens": 128,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    write_covariance(tmp_path, 3, some_covariance(), tokens=9, identity=IDENTITY)
    wanted = replace(IDENTITY, **{name: CHANGES[name]})  # type: ignore[arg-type]
    old = "null" if name == "max_tokens" else getattr(IDENTITY, name)
    with pytest.raises(FingerprintMismatchError) as caught:
        find_covariances(tmp_path, [3], wanted)
    assert str(caught.value) == (
        f"{covariance_path(tmp_path, 3)}: was made with {name} {old}, this job has "
        f"{CHANGES[name]}; set another covariance.path, or delete the file to compute it again"
    )
    with pytest.raises(FingerprintMismatchError):
        load_covariances(tmp_path, [3], SIZES, NAMES, wanted)


def test_the_name_of_the_corpus_decides_nothing(tmp_path: Path) -> None:
    write_covariance(tmp_path, 3, some_covariance(), tokens=9, identity=IDENTITY)
    elsewhere = replace(IDENTITY, corpus="/mnt/corpus.txt")
    assert list(find_covariances(tmp_path, [3], elsewhere)) == [3]
    assert elsewhere.key() == IDENTITY.key()


def test_without_a_corpus_only_the_model_has_to_fit(tmp_path: Path) -> None:
    write_covariance(tmp_path, 3, some_covariance(), tokens=9, identity=IDENTITY)
    other = replace(NO_CORPUS, max_tokens=5, dtype="bfloat16")
    assert list(find_covariances(tmp_path, [3], other)) == [3]
    with pytest.raises(FingerprintMismatchError, match="was made with fingerprint fff"):
        find_covariances(tmp_path, [3], replace(NO_CORPUS, fingerprint="0" * 64))


def test_files_under_the_wrong_name_or_version(tmp_path: Path) -> None:
    path = write_covariance(tmp_path, 3, some_covariance(), tokens=9, identity=IDENTITY)
    shutil.copy(path, covariance_path(tmp_path, 4))
    with pytest.raises(FingerprintMismatchError, match=r"was made with layer 3, this job has 4;"):
        find_covariances(tmp_path, [4], IDENTITY)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"format": "2"}
    save_file({"covariance": some_covariance()}, path, metadata=metadata)
    with pytest.raises(FingerprintMismatchError, match=r"was made with format 2, this job has 1;"):
        find_covariances(tmp_path, [3], IDENTITY)


def test_other_files_of_that_name(tmp_path: Path) -> None:
    path = covariance_path(tmp_path, 3)
    save_file({"weight": some_covariance()}, path)
    with pytest.raises(ResultsDamagedError, match=r"is not a covariance: it records no format; de"):
        find_covariances(tmp_path, [3], IDENTITY)
    with pytest.raises(ResultsDamagedError, match="cannot be read: "):
        read_covariance(path, key_size=F)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    path = write_covariance(tmp_path, 3, some_covariance(), tokens=9, identity=IDENTITY)
    path.write_bytes(path.read_bytes()[:keep])
    for read in (
        lambda: find_covariances(tmp_path, [3], IDENTITY),
        lambda: read_covariance(path, key_size=F),
    ):
        with pytest.raises(ResultsDamagedError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: cannot be read: ")
        assert str(caught.value).endswith("; delete the file to compute it again")


def changed(row: int, column: int, value: float) -> Tensor:
    covariance = some_covariance(size=F)
    covariance[row, column] = value
    return covariance


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (some_covariance(size=5), "has shape 5 x 5, the model's keys need 6 x 6"),
        (some_covariance()[0], "has shape 6, the model's keys need 6 x 6"),
        (changed(4, 4, float("nan")), "holds infinities or NaNs"),
        (changed(5, 0, float("inf")), "holds infinities or NaNs"),
        (changed(1, 4, 0.9), "is not symmetric"),
        (changed(4, 1, -0.9), "is not symmetric"),
        (some_covariance().float(), "holds torch.float32, expected torch.float64"),
    ],
)
def test_matrices_that_are_no_covariance(tmp_path: Path, covariance: Tensor, message: str) -> None:
    path = tmp_path / "c.safetensors"
    save_file({"covariance": covariance.clone()}, path, metadata={"tokens": "9"})
    with pytest.raises(ResultsDamagedError) as caught:
        read_covariance(path, key_size=F)
    assert str(caught.value).startswith(f"{path}: {message}; delete")


def test_symmetry_is_checked_in_every_block_of_rows(tmp_path: Path) -> None:
    covariance = torch.eye(1500, dtype=torch.float64)
    path = write_covariance(tmp_path, 3, covariance, tokens=9, identity=IDENTITY)
    assert torch.equal(read_covariance(path, key_size=1500)[0], covariance)
    covariance[1400, 1300] = 0.01
    write_covariance(tmp_path, 3, covariance, tokens=9, identity=IDENTITY)
    with pytest.raises(ResultsDamagedError, match="is not symmetric"):
        read_covariance(path, key_size=1500)


@pytest.mark.parametrize("tokens", [None, "0", "-3", "nine", ""])
def test_counts_of_tokens_that_are_none(tmp_path: Path, tokens: str | None) -> None:
    metadata = {} if tokens is None else {"tokens": tokens}
    save_file({"covariance": some_covariance()}, tmp_path / "c", metadata=metadata)
    with pytest.raises(ResultsDamagedError, match="as its count of tokens; delete"):
        read_covariance(tmp_path / "c", key_size=F)


# Where they are kept


def test_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITFLEET_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/ana")
    leaf = f"covariance/gpt-j-6b-{IDENTITY.key()}"
    assert default_directory(IDENTITY, "gpt-j-6b") == Path("/own") / leaf
    monkeypatch.setenv("EDITFLEET_CACHE", "")
    assert default_directory(IDENTITY, "gpt-j-6b") == Path("/xdg/editfleet") / leaf
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_directory(IDENTITY, "gpt-j-6b") == Path("/home/ana/.cache/editfleet") / leaf
    assert default_directory(IDENTITY, "../a b").name == f"..-a-b-{IDENTITY.key()}"


def test_no_default_directory_without_a_corpus() -> None:
    with pytest.raises(InputError, match="neither corpus nor path is set; give covariance"):
        default_directory(NO_CORPUS, "gpt-j-6b")


def test_keys_tell_apart_what_differs() -> None:
    identities = [replace(IDENTITY, **{name: new}) for name, new in CHANGES.items()]  # type: ignore[arg-type]
    keys = {identity.key() for identity in [IDENTITY, *identities]}
    assert len(keys) == 1 + len(CHANGES)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


# Files of the public code


@pytest.mark.parametrize(
    "name",
    [
        PUBLIC,
        f"gpt2-xl/wikipedia_stats/{PUBLIC}",
        "transformer.h.3.mlp.c_proj_float64_mom2.npz",
        "transformer.h.3.mlp.c_proj_float16_mom2_t512_1000.npz",
        "transformer.h.3.mlp.c_proj_float32_mom2_t{batch_tokens}_100000.npz",
        "transformer.h.3.mlp.c_proj_float32_mean-mom2-norm_mean_100000.npz",
    ],
)
def test_public_files_are_found(tmp_path: Path, name: str) -> None:
    path = write_public(tmp_path / name, some_keys())
    assert find_public_covariance(tmp_path, NAMES[3]) == path
    assert find_public_covariance(tmp_path, NAMES[33]) is None


@pytest.mark.parametrize(
    "name",
    [
        PUBLIC.replace("h.3", "h.33"),
        PUBLIC.replace("h.3", "hx3"),
        PUBLIC.replace("c_proj", "c_proj_2"),
        "model." + PUBLIC,
        PUBLIC.replace("mom2", "mean"),
        PUBLIC.replace("npz", "npz.tmp"),
    ],
)
def test_files_of_other_modules_and_statistics_are_not(tmp_path: Path, name: str) -> None:
    write_public(tmp_path / "x.npz", some_keys()).rename(tmp_path / name)
    assert find_public_covariance(tmp_path, NAMES[3]) is None


def test_several_public_files_are_not_chosen_from(tmp_path: Path) -> None:
    for folder in ("b", "a"):
        write_public(tmp_path / folder / PUBLIC, some_keys())
    with pytest.raises(InputError) as caught:
        find_public_covariance(tmp_path, NAMES[3])
    assert str(caught.value) == (
        f"{tmp_path}: holds more than one covariance for {NAMES[3]}: a/{PUBLIC}, b/{PUBLIC}; "
        "point covariance.path at a folder with only the one to use"
    )


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 300),
    size=st.integers(1, 9),
    dtype=st.sampled_from(["float16", "float32", "float64", ">f4"]),
    seed=st.integers(0, 2**30),
)
def test_public_files_hold_a_sum_and_a_count(
    tmp_path_factory: pytest.TempPathFactory, count: int, size: int, dtype: str, seed: int
) -> None:
    keys = np.random.default_rng(seed).standard_normal((count, size)).astype(np.float64)
    sums = (keys.T @ keys).astype(dtype)
    directory = tmp_path_factory.mktemp("public")
    path = write_public(directory / PUBLIC, keys, mom2_mom2=sums)
    covariance, tokens = read_public_covariance(path, size)
    assert tokens == count
    assert covariance.dtype == torch.float64
    assert np.array_equal(covariance.numpy(), sums.astype(np.float64) / count)
    tolerance = 2e-3 if dtype == "float16" else 1e-6
    mean = np.mean([np.outer(k, k) for k in keys], axis=0)
    assert np.allclose(covariance.numpy(), mean, rtol=tolerance, atol=tolerance)
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mom2_mom2": None}, "has no mom2.mom2, as covariances of the public MEMIT code have"),
        ({"mom2_count": None}, "has no mom2.count, as covariances of the public MEMIT code have"),
        ({"mom2_count": 0}, "mom2.count is array(0), expected the number of tokens"),
        ({"mom2_count": 40.0}, "mom2.count is array(40.), expected the number of tokens"),
        ({"mom2_count": [40]}, "mom2.count is array([40]), expected the number of tokens"),
        ({"mom2_mom2": np.eye(F, dtype=int)}, "mom2.mom2 holds int64, expected floating-point"),
        ({"mom2_mom2": np.eye(5)}, "mom2.mom2 has shape 5 x 5, the model's keys need 6 x 6; give"),
        ({"mom2_mom2": np.ones(F)}, "mom2.mom2 has shape 6, the model's keys need 6 x 6; give"),
        ({"mom2_mom2": np.full((F, F), np.inf)}, "mom2.mom2 holds infinities or NaNs; give the co"),
        ({"mom2_mom2": np.triu(np.ones((F, F)))}, "mom2.mom2 is not symmetric; give the covarian"),
    ],
)
def test_bad_public_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_public(tmp_path / PUBLIC, some_keys(), **changes)
    with pytest.raises(InputError) as caught:
        read_public_covariance(path, F)
    assert str(caught.value).startswith(f"{path}: {message}")


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("entry", ["mom2_mom2", "mom2_count", "the file itself"])
def test_pickles_are_refused_and_not_run(tmp_path: Path, entry: str) -> None:
    path, mark = tmp_path / PUBLIC, tmp_path / "ran"
    if entry == "the file itself":
        path.write_bytes(pickle.dumps(Bomb(mark)))
        pickle.loads(path.read_bytes())
    else:
        write_public(path, some_keys(), **{entry: np.array([Bomb(mark)], dtype=object)})
        np.load(path, allow_pickle=True)[entry.replace("_", ".")]
    assert mark.exists(), "the pickle does nothing when it is loaded"
    mark.unlink()
    with pytest.raises(
        InputError, match=r"holds pickled Python objects, which can run code, and i"
    ):
        read_public_covariance(path, F)
    assert not mark.exists()


def test_public_files_that_are_damaged(tmp_path: Path) -> None:
    path = write_public(tmp_path / PUBLIC, some_keys())
    whole = path.read_bytes()
    middle = whole.index(b"mom2.mom2.npy") + 200
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (b"", b"PK\x03\x04", whole[:-40], whole[:200], flipped):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError, match=r"(is not opened|cannot be read as .npz: .+); get a s"
        ):
            read_public_covariance(path, F)
    with open(path, "wb") as file:
        np.save(file, np.eye(F))
    with pytest.raises(InputError, match=r"cannot be read as .npz: it is one array, not an arch"):
        read_public_covariance(path, F)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", json.dumps({}))
    with pytest.raises(InputError, match=r"has no mom2.mom2, as .*; its entries are readme"):
        read_public_covariance(path, F)


# All layers of a job


def test_load_takes_our_own_files_before_public_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = write_covariance(tmp_path, 3, some_covariance(), tokens=9, identity=IDENTITY)
    write_public(tmp_path / "gpt2-xl" / PUBLIC, some_keys())
    public = write_public(tmp_path / "gpt2-xl" / PUBLIC.replace("h.3", "h.4"), some_keys())
    with caplog.at_level(logging.INFO, "pipeline.covariances"):
        found = load_covariances(tmp_path, [3, 4, 33], SIZES, NAMES, NO_CORPUS)
    assert found.tokens == {3: 9, 4: 40}
    assert found.missing == [33]
    assert list(found.covariances) == [3, 4]
    assert torch.equal(found.covariances[3], read_covariance(own, key_size=F)[0])
    assert torch.equal(found.covariances[4], read_public_covariance(public, F)[0])
    assert caplog.messages == [f"layer 4: covariance of 40 tokens from {public}"]


def test_load_reuses_what_was_written_and_names_the_rest(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "yet"
    assert load_covariances(directory, [3, 4], SIZES, NAMES, IDENTITY) == ({}, {}, [3, 4])
    write_covariance(directory, 4, some_covariance(), tokens=9, identity=IDENTITY)
    covariances, tokens, missing = load_covariances(directory, [3, 4], SIZES, NAMES, IDENTITY)
    assert (list(covariances), tokens, missing) == ([4], {4: 9}, [3])


def test_a_public_file_cannot_stand_for_a_corpus(tmp_path: Path) -> None:
    path = write_public(tmp_path / PUBLIC, some_keys())
    with pytest.raises(FingerprintMismatchError) as caught:
        load_covariances(tmp_path, [3], SIZES, NAMES, IDENTITY)
    assert str(caught.value) == (
        f"{path}: does not record its texts, so it cannot be checked against the corpus "
        "corpus.txt; set covariance.corpus to null to use it, or another covariance.path"
    )


def test_a_file_as_the_place(tmp_path: Path) -> None:
    path = write_public(tmp_path / PUBLIC, some_keys())
    with pytest.raises(InputError, match=r"is a file, expected a directory; correct covariance"):
        load_covariances(path, [3], SIZES, NAMES, NO_CORPUS)
