"""Corpora, covariances and data sets from anyone: content, or an error that names the file."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.covariances import (
    CovarianceIdentity,
    find_covariances,
    read_covariance,
    read_public_covariance,
    write_covariance,
)
from pipeline.errors import EditfleetError, InputError
from pipeline.sources import parquet, read_requests
from pipeline.sources.corpus import read_corpus
from tests.fuzzing import altered, damaged, fuzz, hostile_json

TEXTS = ["One text.", "Two texts, {} and {x}.", "Łódź \u202e \u2028"]
IDENTITY = CovarianceIdentity("f" * 64, "corpus.txt", "d" * 64, 400, None, "float32")


def parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def npz_bytes() -> bytes:
    sink = io.BytesIO()
    entries = {"mom2.count": np.array(40), "mom2.mom2": np.eye(4, dtype=np.float32)}
    np.savez(sink, allow_pickle=False, **entries)
    return sink.getvalue()


CORPORA: dict[str, bytes] = {
    "c.txt": "\n".join(TEXTS).encode(),
    "c.json": json.dumps([*TEXTS, {"text": "three"}]).encode(),
    "c.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(),
    "c.parquet": parquet_bytes(pa.table({"text": TEXTS})),
}


def content_or_error(path: Path, read: Callable[[], object]) -> None:
    try:
        read()
    except EditfleetError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@fuzz(30, 1500)
@given(name=st.sampled_from(sorted(CORPORA)), data=st.data())
def test_any_damage_to_a_corpus(tmp_path: Path, name: str, data: st.DataObject) -> None:
    path = tmp_path / name
    path.write_bytes(data.draw(damaged(CORPORA[name])))
    content_or_error(path, lambda: read_corpus(str(path), field="text", samples=2, seed=0))


@fuzz(20, 1000)
@given(content=altered([*TEXTS, {"text": "three"}]))
def test_any_json_corpus(tmp_path: Path, content: object) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(content))
    content_or_error(path, lambda: read_corpus(str(path), field="text", samples=2, seed=0))


@pytest.fixture(scope="module")
def covariance(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    matrix = torch.eye(4, dtype=torch.float64)
    folder = tmp_path_factory.mktemp("covariance")
    path = write_covariance(folder, 3, matrix, tokens=9, identity=IDENTITY)
    return path, path.read_bytes()


@fuzz(20, 1500)
@given(data=st.data())
def test_any_damage_to_a_covariance(covariance: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = covariance
    path.write_bytes(data.draw(damaged(whole)))
    content_or_error(path, lambda: read_covariance(path, key_size=4))
    content_or_error(path, lambda: find_covariances(path.parent, [3], IDENTITY))


@fuzz(20, 1500)
@given(data=st.data())
def test_any_damage_to_a_public_covariance(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "c.npz"
    path.write_bytes(data.draw(damaged(npz_bytes())))
    content_or_error(path, lambda: read_public_covariance(path, 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    row = {"case_id": "1", "subject": "a", "prompt": "{} b", "target_new": "c"}
    folder = tmp_path_factory.mktemp("saved") / "data"
    datasets.Dataset(pa.Table.from_pylist([row], schema=parquet.SCHEMA)).save_to_disk(folder)
    return folder


@fuzz(8, 500)
@given(data=st.data())
def test_any_damage_to_a_saved_data_set(saved: Path, data: st.DataObject) -> None:
    folder = saved.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    if path.suffix == ".json" and data.draw(st.booleans()):
        content = data.draw(altered(json.loads(path.read_bytes())) | hostile_json)
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        rows = read_requests(folder, "dataset")
    except InputError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        assert [row.row for row in rows] == list(range(len(rows)))
