"""Rows that do not fit a schema are refused; widths are cast, meanings are not."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.results.schemas import EDITS, METRICS, SCHEMA_VERSION, SCHEMAS, VALUES, conform

EDIT = {"round": 0, "case_id": "1", "status": "applied"}
VALUE = {
    "round": 0,
    "case_id": "1",
    "layer": 3,
    "z": [1.0, 2.0],
    "initial_norm": 1.0,
    "delta_norm": 0.5,
    "steps": 25,
    "loss": 0.1,
}


def test_columns_are_the_public_contract() -> None:
    names = {kind: " ".join(schema.names) for kind, schema in SCHEMAS.items()}
    assert names == {
        "edits": "round case_id subject prompt target_new target_true relation_id status reason",
        "values": "round case_id layer z initial_norm delta_norm steps loss target_probability "
        "seconds",
        "metrics": "round edit_round case_id probe probe_index prompt target_new target_true "
        "nll_new nll_true success exact generated generated_match generated_exact "
        "fluency aspect unchanged",
        "general": "round measure layer value count",
        "trace": "round case_id kind token token_text token_class layer window samples answer "
        "clean corrupted restored effect",
        "training": "round epoch step edits loss seconds split edit_loss locality_loss success",
        "survey": "model dataset editor setting edits status measure value low high count reason"
        " run",
        "attributions": "round case_id layer neuron attribution agreeing prompts answer answer_ids",
        "neurons": "round case_id layer neuron attribution shared_by is_edited",
        "patches": "round case_id layer patches steps edit_loss activation_loss memory_loss "
        "difference_loss least_activation greatest_memory target_probability seconds",
        "assessment": "round case_id relation_id subject prompt object contrasts probability "
        "contrastive score is_held",
        "memory": "round case_id prompt target embedding",
        "harness": "round task metric filter unedited unedited_stderr edited edited_stderr "
        "higher_is_better count documents num_fewshot version lm_eval_version",
    }
    assert VALUES.field("z").type == pa.list_(pa.float32())
    for schema in (EDITS, VALUES, METRICS):
        assert schema.metadata == {b"schema_version": str(SCHEMA_VERSION).encode()}
        assert schema.field("round").type == pa.int32()


def test_columns_that_may_be_null_can_be_left_out() -> None:
    from_rows = conform("edits", [EDIT])
    from_table = conform("edits", pa.Table.from_pylist([EDIT]))
    assert from_rows.schema.equals(EDITS, check_metadata=True)
    assert from_table.equals(from_rows, check_metadata=True)
    assert from_rows["reason"].to_pylist() == [None]


@pytest.mark.parametrize(
    "z_type",
    [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 2)],
    ids=str,
)
def test_widths_are_cast(z_type: pa.DataType) -> None:
    z = pa.array([np.array([1, 2], dtype=z_type.value_type.to_pandas_dtype())], type=z_type)
    table = pa.Table.from_pylist([VALUE])  # int64 and float64
    table = table.set_column(table.column_names.index("z"), "z", z)
    assert conform("values", table).equals(conform("values", [VALUE]))


@pytest.mark.parametrize("as_table", [False, True])
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("edits", {"reasom": "x"}, "no column reasom"),
        ("edits", {"status": None}, "status has 1 nulls"),
        ("edits", {"status": "done"}, "status is 'done', expected one of"),
        ("edits", {"round": 2**31}, "do not fit"),
        ("edits", {"case_id": 1}, "do not fit"),
        ("edits", {"round": "0"}, "do not fit"),
        ("values", {"z": None}, "z has 1 nulls"),
        ("values", {"z": ["a"]}, "do not fit"),
        ("values", {"loss": "low"}, "do not fit"),
    ],
)
def test_rows_that_do_not_fit(
    kind: str, change: dict[str, object], message: str, as_table: bool
) -> None:
    row = {**{"edits": EDIT, "values": VALUE}[kind], **change}
    with pytest.raises(TypeError, match=message):
        conform(kind, pa.Table.from_pylist([row]) if as_table else [row])


def test_one_unknown_probe_among_many_rows_is_found() -> None:
    row = {"round": 0, "edit_round": 0, "case_id": "1", "probe_index": 0, "prompt": "p"}
    rows = [{**row, "probe": probe} for probe in ("rewrite", "neighbourhood", "locality")]
    with pytest.raises(TypeError, match="probe is 'neighbourhood'"):
        conform("metrics", rows)
