"""Data sets of Hugging Face `datasets`: a name on the hub or a local directory, and a split."""

from pathlib import Path

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.sources import jsonl
from pipeline.sources.detect import foreign_layout
from pipeline.sources.parquet import check_columns, to_records
from pipeline.sources.records import Records


def read(path: str) -> Records:
    """Read `name` or `name:split`; the layout is told by the columns, else it is our own.

    A local directory is one that `save_to_disk` wrote or one with data files. A null cell is a
    field left away.

    Raises:
        InputError: it cannot be loaded, the split is not clear, or a column is wrong.
    """
    name, split = _name_and_split(path)
    table = _load(name, split, path)
    layout = foreign_layout(table.column_names)
    if layout is None:
        check_columns(table.column_names, path)
        layout = jsonl.LAYOUT
    return Records(to_records(table, path), layout)


def _name_and_split(path: str) -> tuple[str, str | None]:
    if Path(path).is_file():
        raise InputError(
            f"{path}: is a file, expected a directory or a name on the hub; "
            "set requests.format to jsonl, parquet or the file's layout"
        )
    name, colon, split = path.rpartition(":")
    if Path(path).exists() or not colon:
        return path, None
    return name, split


def _load(name: str, split: str | None, path: str) -> pa.Table:
    import datasets  # here, since it takes a second and few jobs need it

    folder = Path(name)
    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except MemoryError:
        raise
    except Exception as error:  # files from anyone make `datasets` raise anything
        cause = str(error.__cause__ or error).split("\n", 1)[0] or type(error).__name__
        raise InputError(
            f"{path}: cannot be loaded as a data set: {cause}; check the name, the files or the "
            "network"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    if split is None and len(loaded) == 1:
        split = next(iter(loaded))
    if split not in loaded:
        found = "has more than one split" if split is None else f"has no split {split!r}"
        raise InputError(f"{path}: {found}; write {name}: and one of {', '.join(loaded)}")
    return loaded[split].with_format("arrow")[:]
