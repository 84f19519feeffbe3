"""The public files as they are; run with `pytest -s tests/sources/test_real_request_files.py`."""

import json
import time
from collections import Counter
from pathlib import Path

from pipeline.requests import RequestRow
from pipeline.sources import jsonl, parquet, read_requests


def read_timed(path: Path, format: str) -> list[RequestRow]:
    started = time.perf_counter()
    rows = read_requests(path, format)
    seconds = time.perf_counter() - started
    print(f"\n{path.name}: {seconds:.2f} s, {dict(Counter(row.status for row in rows))}")
    return rows


def test_counterfact_20k(shared: Path) -> None:
    """All records are valid, but some subject-prompt pairs are asked for more than once."""
    path = shared / "data" / "counterfact_20k.json"
    rows = read_timed(path, "auto")
    records = json.loads(path.read_text())
    assert len(rows) == len(records) == 20_000
    asked: dict[tuple[str, str], list[str]] = {}
    for record in records:
        rewrite = record["requested_rewrite"]
        asked.setdefault((rewrite["subject"], rewrite["prompt"]), []).append(
            rewrite["target_new"]["str"]
        )
    several = [targets for targets in asked.values() if len(set(targets)) > 1]
    repeated = [targets for targets in asked.values() if len(targets) > 1 == len(set(targets))]
    expected = {
        "conflict": sum(map(len, several)),
        "rejected": sum(len(targets) - 1 for targets in repeated),
    }
    expected["accepted"] = 20_000 - sum(expected.values())
    assert Counter(row.status for row in rows) == expected
    assert all("asks for the same edit as row" in r.reason for r in rows if r.status == "rejected")
    for row, record in zip(rows, records, strict=True):
        assert row.fields["subject"] == record["requested_rewrite"]["subject"]
        if row.request is not None:
            assert list(row.request.neighborhood_prompts) == record["neighborhood_prompts"]
            assert row.request.text[slice(*row.request.subject_span)] == row.request.subject


def test_zsre_500(shared: Path) -> None:
    """The only fault in these records is an alternative that is the true answer."""
    path = shared / "data" / "zsre_500.json"
    rows = read_timed(path, "zsre")
    records = json.loads(path.read_text())
    same = [i for i, r in enumerate(records) if r["alt"].strip() == r["answers"][0].strip()]
    assert [row.row for row in rows if row.status != "accepted"] == same
    assert all("field answers[0]: is the same as target_new" in rows[i].reason for i in same)
    for row, record in zip(rows, records, strict=True):
        if row.request is not None:
            assert row.request.text == record["src"]
            assert not row.request.locality[0].prompt.startswith("nq question")


def test_easyedit_1k(shared: Path) -> None:
    """The only fault in these records is one pair that conflicts."""
    path = shared / "data" / "easyedit_counterfact_1k.json"
    rows = read_timed(path, "easyedit")
    records = json.loads(path.read_text())
    out = [row.row for row in rows if row.status != "accepted"]
    assert {rows[i].status for i in out} == {"conflict"}
    assert len({(records[i]["subject"], records[i]["prompt"]) for i in out}) == len(out) // 2 == 1
    for row, record in zip(rows, records, strict=True):
        if row.request is not None:
            assert row.request.text == record["prompt"]
            assert row.request.case_id == str(record["case_id"])


def test_real_requests_survive_our_own_formats(shared: Path, tmp_path: Path) -> None:
    rows = read_requests(shared / "data" / "counterfact_20k.json", limit=500)
    found = [row.request for row in rows if row.request is not None]
    jsonl.write_requests(found, str(tmp_path / "r.jsonl"))
    parquet.write_requests(found, str(tmp_path / "r.parquet"))
    for name in ("r.jsonl", "r.parquet"):
        assert [row.request for row in read_requests(tmp_path / name)] == found
