"""A run directory from anyone: what it holds is read as it was written, or refused by name."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from pipeline import apply_updates, export_model, run_batch_edit
from pipeline.errors import EditfleetError, InputError, ResultsDamagedError
from pipeline.models.loading import load_model
from pipeline.report.status import print_status, run_status
from pipeline.report.summary import problem_lines, summary_tables
from pipeline.results import Run, read
from pipeline.results.schemas import SCHEMAS
from pipeline.results.updates import read_update
from pipeline.spec import ModelSpec
from tests.fuzzing import altered, damaged, fuzz
from tests.tiny_jobs import TinyJobs

KINDS = ("edits", "values", "metrics")


@pytest.fixture(scope="module")
def sound(tiny: TinyJobs) -> Run:
    return tiny.finished()


@pytest.fixture
def copied(sound: Run, tmp_path: Path) -> Path:
    shutil.copytree(sound.path, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def spoilt(sound: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which each case spoils one file, and puts it back."""
    path = tmp_path_factory.mktemp("spoilt") / "run"
    shutil.copytree(sound.path, path)
    return path


def look_at(path: Path) -> None:
    """Use a run as the commands do."""
    run = read(path)
    run.verify()
    for kind in KINDS:
        table = run._table(kind, "arrow")
        assert table.schema.names[: len(SCHEMAS[kind])] == SCHEMAS[kind].names
        table.to_pylist()
    problem_lines(run.edits().to_pylist())
    for update in run.updates():
        read_update(update)[1].norm()
    summary_tables(run.summary)
    screen = Console(file=io.StringIO(), width=100)
    print_status(run_status(path, verify=True), screen)
    assert isinstance(screen.file, io.StringIO)
    assert all(line.isprintable() for line in screen.file.getvalue().split("\n"))
    run.recorded  # noqa: B018


def with_content(path: Path, content: bytes, use: Callable[[], None]) -> None:
    """Put other bytes into a file, use it, and put it back; ours alone may be raised."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        use()
    except EditfleetError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(whole)


def relist(run: Path, name: str) -> None:
    """List a part as it is now, so that its checksum fits."""
    listing = run / "manifest.jsonl"
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    data = (run / name).read_bytes()
    for line in lines:
        if line["name"] == name:
            line |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    listing.write_text("".join(json.dumps(line) + "\n" for line in lines))


@fuzz(15, 800)
@given(data=st.data())
def test_any_damage_to_any_file(spoilt: Path, data: st.DataObject) -> None:
    files = sorted(path for path in spoilt.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    with_content(path, data.draw(damaged(path.read_bytes())), lambda: look_at(spoilt))


@fuzz(40, 2500)
@given(name=st.sampled_from(["manifest.json", "summary.json"]), data=st.data())
def test_any_change_to_a_json_file(spoilt: Path, name: str, data: st.DataObject) -> None:
    content = data.draw(altered(json.loads((spoilt / name).read_bytes())))
    # JSON has no lone surrogates but as escapes, which json.dumps writes.
    with_content(spoilt / name, json.dumps(content).encode(), lambda: look_at(spoilt))


@fuzz(15, 700)
@given(data=st.data())
def test_damaged_parts_with_the_right_checksum(spoilt: Path, data: st.DataObject) -> None:
    """As one who writes the listing too can make them."""
    listing = (spoilt / "manifest.jsonl").read_bytes()
    names = [json.loads(line)["name"] for line in listing.splitlines()]
    name = data.draw(st.sampled_from(names))

    def look() -> None:
        relist(spoilt, name)
        look_at(spoilt)

    try:
        with_content(spoilt / name, data.draw(damaged((spoilt / name).read_bytes())), look)
    finally:
        (spoilt / "manifest.jsonl").write_bytes(listing)


CELLS: list[Any] = [None, 1, 0.5, True, "x", b"\xff", [0.5], ["x"], {"a": 1}]
columns = st.sampled_from([pa.array([cell]) for cell in CELLS])


@fuzz(15, 700)
@given(
    kind=st.sampled_from(KINDS),
    changes=st.dictionaries(st.integers(0, 12), st.none() | columns, min_size=1, max_size=3),
)
def test_parts_with_other_columns(
    spoilt: Path, kind: str, changes: dict[int, pa.Array | None]
) -> None:
    name = sorted((spoilt / kind).iterdir())[0].relative_to(spoilt)
    listing = (spoilt / "manifest.jsonl").read_bytes()
    table = pq.read_table(spoilt / name)
    for place, column in changes.items():
        field = SCHEMAS[kind].names[place % len(SCHEMAS[kind])]
        if field in table.column_names:
            table = table.drop_columns([field])
        if column is not None:
            filled = pa.concat_arrays([column] * table.num_rows)
            table = table.append_column(field, filled)
    whole = (spoilt / name).read_bytes()
    try:
        pq.write_table(table, spoilt / name)
        relist(spoilt, str(name))
        look_at(spoilt)
    except EditfleetError as error:
        assert str(name) in str(error)
    finally:
        (spoilt / name).write_bytes(whole)
        (spoilt / "manifest.jsonl").write_bytes(listing)


def test_invalid_utf8_in_a_part_is_refused(copied: Path) -> None:
    name = "edits/round-00000-shard-00000.parquet"
    table = pq.read_table(copied / name)
    bad = pa.array([b"\xff"] * len(table)).view(pa.string())
    place = table.column_names.index("subject")
    pq.write_table(table.set_column(place, "subject", bad), copied / name)
    relist(copied, name)
    with pytest.raises(ResultsDamagedError, match=r"edits/.*not one of our parts"):
        read(copied).edits()


def test_swapped_parts_are_found(copied: Path) -> None:
    first, second = sorted((copied / "values").iterdir())[:2]
    first.rename(copied / "x")
    second.rename(first)
    (copied / "x").rename(second)
    with pytest.raises(ResultsDamagedError, match="values/round-00000-shard-0000"):
        read(copied).values()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_no_link_leads_out_of_a_run(copied: Path, tmp_path: Path, what: str) -> None:
    place = copied / "edits" if what == "folder" else next((copied / "edits").iterdir())
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    for use in (Run.edits, Run.verify, lambda run: run.files("edits")):
        with pytest.raises(ResultsDamagedError, match="leads out of the run directory"):
            use(read(copied))
    rows = read(copied)._store.read_parts("values").slice(0, 0)
    with pytest.raises(ResultsDamagedError, match="leads out of the run directory"):
        read(copied)._store.write_part("edits", rows.select([]), round=0, shard=0, weight_version=0)


def test_a_lock_that_is_a_link_harms_nothing(copied: Path, tiny: TinyJobs, tmp_path: Path) -> None:
    """Taking a lock empties its file."""
    (tmp_path / "precious").write_text("precious")
    for name in (".lock", ".driver.json"):
        (copied / name).unlink(missing_ok=True)
        (copied / name).symlink_to(tmp_path / "precious")
        run_status(copied)
        with suppress(EditfleetError):
            run_batch_edit(tiny.spec(copied))
        assert (tmp_path / "precious").read_text() == "precious"


def test_a_run_behind_a_link_is_read(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copied)
    look_at(tmp_path / "link")


def test_a_run_cannot_allow_itself_pickles(copied: Path, tiny: TinyJobs, tmp_path: Path) -> None:
    """Its own manifest says what the one who made it wanted, not what its reader wants."""
    model = tmp_path / "model"
    shutil.copytree(tiny.model(), model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    manifest = json.loads((copied / "manifest.json").read_bytes())
    manifest["spec"]["model"] |= {"path": str(model), "allow_pickle": True}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="safetensors only"):
        export_model(copied, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"layer": "99"}, None, "layer 99, the model has 4 blocks"),
        ({"layer": "-1"}, None, "is for layer -1"),
        ({}, {"dense": torch.zeros(3)}, "which make no matrix"),
        ({}, {"left": torch.zeros(32, 2), "right": torch.zeros(3, 64)}, "which make no matrix"),
        ({}, {"dense": torch.full((32, 64), float("nan"))}, "holds infinities or NaNs"),
        ({}, {"dense": torch.zeros(5, 5)}, "the model's weight"),
    ],
)
def test_updates_that_do_not_fit(
    copied: Path, tiny: TinyJobs, metadata: dict[str, str], tensors: Any, message: str
) -> None:
    path = read(copied).updates()[0]
    weight = "transformer.h.0.mlp.c_proj.weight"
    found = load_file(path)
    if tensors is not None:
        found = {f"{weight}.{name}": tensor for name, tensor in tensors.items()}
    save_file(found, path, metadata={"weight": weight, "layer": "0"} | metadata)
    relist(copied, str(path.relative_to(copied)))
    model = load_model(ModelSpec(path=str(tiny.model()), dtype="float32"), torch.device("cpu"))
    with pytest.raises(EditfleetError, match=message):
        apply_updates(model, copied)
