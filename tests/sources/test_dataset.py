"""Hugging Face data sets on disk; run with `pytest tests/sources/test_dataset.py`."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.requests import EditRequest
from pipeline.sources import parquet, read_requests

datasets = pytest.importorskip("datasets")

OURS: list[dict[str, Any]] = [
    {
        "case_id": "b",
        "subject": "Bo",
        "prompt": "{} sings",
        "target_new": "bass",
        "paraphrase_prompts": ["Bo's voice is"],
        "locality": [{"prompt": "q", "target": "t"}],
    },
    {"case_id": "a", "subject": "Ana", "prompt": "{} sings", "target_new": "alto"},
]
COUNTERFACT = [
    {
        "case_id": 5,
        "pararel_idx": 2,
        "requested_rewrite": {
            "prompt": "{} sings",
            "relation_id": "P1",
            "target_new": {"id": "Q1", "str": "alto"},
            "target_true": {"id": "Q2", "str": "bass"},
            "subject": "Ana",
        },
        "paraphrase_prompts": ["Ana's voice is"],
        "neighborhood_prompts": ["Bo sings"],
        "attribute_prompts": [],
        "generation_prompts": [],
    }
]


@pytest.fixture(autouse=True)
def offline_with_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def accepted(path: object, format: str = "dataset") -> list[EditRequest | None]:
    rows = read_requests(str(path), format)
    assert {row.status for row in rows} == {"accepted"}, [row.reason for row in rows]
    return [row.request for row in rows]


def test_saved_to_disk(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(OURS).save_to_disk(folder)
    expected = [EditRequest(**record) for record in OURS]
    assert accepted(folder) == expected
    assert accepted(folder, "auto") == expected


def test_saved_selection_is_respected(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(OURS).select([1]).save_to_disk(folder)
    assert accepted(folder) == [EditRequest(**OURS[1])]


def test_counterfact_layout_is_told_by_its_columns(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(COUNTERFACT).save_to_disk(folder)
    (request,) = accepted(folder)
    assert request == EditRequest(
        case_id="5",
        subject="Ana",
        prompt="{} sings",
        target_new="alto",
        target_true="bass",
        relation_id="P1",
        paraphrase_prompts=("Ana's voice is",),
        neighborhood_prompts=("Bo sings",),
    )


def test_splits(tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    parts = {
        "train": datasets.Dataset.from_list(OURS[:1]),
        "test": datasets.Dataset.from_list(OURS[1:]),
    }
    datasets.DatasetDict(parts).save_to_disk(folder)
    assert accepted(f"{folder}:test") == [EditRequest(**OURS[1])]
    with pytest.raises(InputError) as caught:
        read_requests(str(folder), "dataset")
    assert f"{folder}: has more than one split; write {folder}: and one of train, test" in str(
        caught.value
    )
    with pytest.raises(InputError, match=r"has no split 'dev'; write .*: and one of train, test"):
        read_requests(f"{folder}:dev", "dataset")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_directory_of_data_files(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    if ending == "jsonl":
        lines = [json.dumps(record) for record in COUNTERFACT]
        (folder / "train.jsonl").write_text("\n".join(lines))
        (request,) = accepted(folder)
        assert request is not None
        assert (request.case_id, request.subject) == ("5", "Ana")
    else:
        requests = [EditRequest(**record) for record in OURS]
        parquet.write_requests(requests[:1], str(folder / "train.parquet"))
        parquet.write_requests(requests[1:], str(folder / "test.parquet"))
        assert accepted(f"{folder}:test") == requests[1:]


def test_wrong_rows_and_columns(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    bad = OURS[1] | {"prompt": "Ana sings"}
    datasets.Dataset.from_list([OURS[0], bad]).save_to_disk(folder)
    good, rejected = read_requests(str(folder), "dataset")
    assert good.status == "accepted"
    assert rejected.reason.startswith(f"{folder}: row 1, field prompt: has no {{}}; ")
    datasets.Dataset.from_list([OURS[0] | {"relation": "x"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match=r"column 'relation' is not .*; did you mean relation_id"):
        read_requests(str(tmp_path / "other"), "dataset")


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text("{}")
    with pytest.raises(InputError, match="is a file, expected a directory or a name on the hub"):
        read_requests(str(file), "dataset")
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "state.json").write_text("{}")
    (damaged / "dataset_info.json").write_text("{}")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.jsonl").write_text('{"a": 1}\n{"a": ')
    for name in (empty, damaged, broken, "nobody/absent-data-set", "./absent", "a:b:c", ""):
        with pytest.raises(InputError, match=r"cannot be loaded as a data set: .+; check the name"):
            read_requests(str(name), "dataset")
