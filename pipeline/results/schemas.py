"""The columns of a run's Parquet files: a public contract, defined here and nowhere else."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from pipeline.tracing.names import KINDS, TOKEN_CLASSES

SCHEMA_VERSION = 1
"""Columns are only ever added within a version; any other change raises it."""

STATUSES = ("applied", "rejected", "conflict", "failed")
PROBES = ("rewrite", "paraphrase", "neighborhood", "locality", "portability", "generation")

SPLITS = ("train", "validation")

MEASURES = (
    "nll",
    "perplexity",
    "token_accuracy",
    "kl",
    "same_argmax",
    "weight_norm",
    "update_norm",
)
"""What `pipeline.evaluation.general` measures and defines."""

_FOOTER = {"schema_version": str(SCHEMA_VERSION)}


def _required(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=False)


EDITS = pa.schema(
    [
        _required("round", pa.int32()),
        _required("case_id", pa.string()),
        # A rejected request is listed too, and may lack any of these.
        pa.field("subject", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("target_new", pa.string()),
        pa.field("target_true", pa.string()),
        pa.field("relation_id", pa.string()),
        _required("status", pa.string()),
        pa.field("reason", pa.string()),
    ],
    metadata=_FOOTER,
)
"""One row a request. `round` counts from 0; `status` is one of `STATUSES`."""

VALUES = pa.schema(
    [
        _required("round", pa.int32()),
        _required("case_id", pa.string()),
        _required("layer", pa.int32()),
        _required("z", pa.list_(pa.float32())),
        _required("initial_norm", pa.float32()),
        _required("delta_norm", pa.float32()),
        _required("steps", pa.int32()),
        _required("loss", pa.float32()),
        pa.field("target_probability", pa.float32()),
        pa.field("seconds", pa.float32()),
    ],
    metadata=_FOOTER,
)
"""One row a computed value. `z` has the model's hidden size; norms are Euclidean."""

METRICS = pa.schema(
    [
        _required("round", pa.int32()),
        _required("edit_round", pa.int32()),
        _required("case_id", pa.string()),
        _required("probe", pa.string()),
        _required("probe_index", pa.int32()),
        _required("prompt", pa.string()),
        pa.field("target_new", pa.string()),
        pa.field("target_true", pa.string()),
        pa.field("nll_new", pa.float32()),
        pa.field("nll_true", pa.float32()),
        pa.field("success", pa.bool_()),
        pa.field("exact", pa.bool_()),
        pa.field("generated", pa.string()),
        pa.field("generated_match", pa.bool_()),
        pa.field("generated_exact", pa.bool_()),
        pa.field("fluency", pa.float32()),
        pa.field("aspect", pa.string()),
        pa.field("unchanged", pa.bool_()),
    ],
    metadata=_FOOTER,
)
"""One row a scored probe. `round` is -1 for the unedited model; `nll_*` are mean negative
log-likelihoods a target token, in nats; `fluency` is in bits; `aspect` is what kind of question a
locality or portability probe asks; a column that a probe does not define is null."""

GENERAL = pa.schema(
    [
        _required("round", pa.int32()),
        _required("measure", pa.string()),
        pa.field("layer", pa.int32()),
        _required("value", pa.float64()),
        _required("count", pa.int64()),
    ],
    metadata=_FOOTER,
)
"""One row a measure of the whole model, and for norms a layer. `round` is -1 for the unedited
model; `count` says how many tokens, prompts or entries the value is made of."""

UNEDIT = pa.schema(
    [
        _required("edit_round", pa.int32()),
        _required("case_id", pa.string()),
        _required("is_removed", pa.bool_()),
        *(METRICS.field(name) for name in ("probe", "probe_index", "prompt", "aspect")),
        *(METRICS.field(name) for name in ("target_new", "target_true")),
        *(
            METRICS.field(name).with_name(f"{name}_{when}")
            for name in ("nll_new", "nll_true", "success", "exact")
            for when in ("before", "after")
        ),
        pa.field("changed", pa.bool_()),
    ],
    metadata=_FOOTER,
)
"""`unedit.parquet` of `editfleet unedit`, no part of a run: one row a scored probe, before and
after some edits (`is_removed`) were taken out. `edit_round` is -1 for a fact that was never edited.
`changed` says whether `success` is another than it was, or `exact` where a probe has no success."""

TRACE = pa.schema(
    [
        _required("round", pa.int32()),
        _required("case_id", pa.string()),
        _required("kind", pa.string()),
        _required("token", pa.int32()),
        _required("token_text", pa.string()),
        _required("token_class", pa.string()),
        _required("layer", pa.int32()),
        _required("window", pa.int32()),
        _required("samples", pa.int32()),
        _required("answer", pa.string()),
        _required("clean", pa.float32()),
        _required("corrupted", pa.float32()),
        _required("restored", pa.float32()),
        _required("effect", pa.float32()),
    ],
    metadata=_FOOTER,
)
"""One row a fact, kind of restoration, token and layer. `clean`, `corrupted` and `restored` are
probabilities of `answer`, the clean run's next token, the last two as means over `samples`;
`effect` is `restored` less `corrupted`. `window` counts the blocks around `layer` that are restored
at once, before they are clipped at the model's ends. `round` is -1, the unedited model."""

TRAINING = pa.schema(
    [
        _required("round", pa.int32()),
        _required("epoch", pa.int32()),
        _required("step", pa.int32()),
        _required("edits", pa.int32()),
        _required("loss", pa.float32()),
        _required("seconds", pa.float32()),
        pa.field("split", pa.string()),
        pa.field("edit_loss", pa.float32()),
        pa.field("locality_loss", pa.float32()),
        pa.field("success", pa.float32()),
    ],
    metadata=_FOOTER,
)
"""One row a step of a gradient method. `loss` is the mean over its `edits` before the step, in nats
a target token; `step` counts within the epoch.

In the training of an editor a row is a step (`split` train) or a measurement after a step
(validation). `loss` is what is made small, the mean over `edits` examples; `edit_loss` and
`locality_loss` are what it is made of, before their weights; `success` is the share of examples
whose answer the edited model gives. `step` counts from 0, `epoch` how often the requests were gone
through. Null elsewhere, and where an editor does not define it."""

SURVEY = pa.schema(
    [
        _required("model", pa.string()),
        _required("dataset", pa.string()),
        _required("editor", pa.string()),
        _required("setting", pa.string()),
        _required("edits", pa.int32()),
        _required("status", pa.string()),
        pa.field("measure", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("count", pa.int32()),
        pa.field("reason", pa.string()),
        pa.field("run", pa.string()),
    ],
    metadata=_FOOTER,
)
"""`survey.parquet` of `editfleet survey`: a row a cell and measure (`pipeline.evaluation.survey`).
`setting` is single, batch or sequence, `edits` how many edits had been made. `status` is done,
impossible (the editor cannot do that, for `reason`) or failed. The mean is over `count` edits, with
its 95 % interval; where there is none, `reason` says why. `run` is the cell's directory below the
survey's."""

ATTRIBUTIONS = pa.schema(
    [
        _required("round", pa.int32()),
        _required("case_id", pa.string()),
        _required("layer", pa.int32()),
        _required("neuron", pa.int32()),
        _required("attribution", pa.float32()),
        _required("agreeing", pa.int32()),
        _required("prompts", pa.int32()),
        _required("answer", pa.string()),
        _required("answer_ids", pa.list_(pa.int32())),
    ],
    metadata=_FOOTER,
)
"""One row a fact and neuron that stands out in some prompt of it. `attribution` is the mean over
its `prompts`, in probability (or logits) of `answer`; in `agreeing` of these it stands out."""

NEURONS = pa.schema(
    [
        _required("round", pa.int32()),
        _required("case_id", pa.string()),
        _required("layer", pa.int32()),
        _required("neuron", pa.int32()),
        _required("attribution", pa.float32()),
        _required("shared_by", pa.float32()),
        _required("is_edited", pa.bool_()),
    ],
    metadata=_FOOTER,
)
"""One row a fact and neuron that its prompts agree on. `shared_by` is the share of the relation's
other facts in the round that have it, too, which decides whether it is edited."""

PATCHES = pa.schema(
    [
        _required("round", pa.int32()),
        _required("case_id", pa.string()),
        _required("layer", pa.int32()),
        _required("patches", pa.int32()),
        _required("steps", pa.int32()),
        _required("edit_loss", pa.float32()),
        _required("activation_loss", pa.float32()),
        _required("memory_loss", pa.float32()),
        _required("difference_loss", pa.float32()),
        pa.field("least_activation", pa.float32()),
        pa.field("greatest_memory", pa.float32()),
        _required("target_probability", pa.float32()),
        _required("seconds", pa.float32()),
    ],
    metadata=_FOOTER,
)
"""One row an edit of T-Patcher: its `patches` and how they ended (`editing/patching.py`). Losses
are without their weights, `edit_loss` in nats a target token; `least_activation` is the least inner
value of a patch at its own token, `greatest_memory` the greatest one at a watched query."""

ASSESSMENT = pa.schema(
    [
        _required("round", pa.int32()),
        _required("case_id", pa.string()),
        pa.field("relation_id", pa.string()),
        _required("subject", pa.string()),
        _required("prompt", pa.string()),
        _required("object", pa.string()),
        _required("contrasts", pa.list_(pa.string())),
        _required("probability", pa.float64()),
        _required("contrastive", pa.float64()),
        pa.field("score", pa.float64()),
        _required("is_held", pa.bool_()),
    ],
    metadata=_FOOTER,
)
"""One row a fact: the probability of its `object` behind its own `prompt`, the mean behind prompts
of other relations (`contrasts`), and their ratio (`pipeline.evaluation.knowledge`), which is null
where it is 0 / 0. `round` is -1, the unedited model."""

MEMORY = pa.schema(
    [
        _required("round", pa.int32()),
        _required("case_id", pa.string()),
        _required("prompt", pa.string()),
        _required("target", pa.string()),
        _required("embedding", pa.list_(pa.float32())),
    ],
    metadata=_FOOTER,
)
"""One row an edit that a memory holds: the full prompt, the new answer, and the embedding that the
scope classifier made of both."""

HARNESS = pa.schema(
    [
        _required("round", pa.int32()),
        _required("task", pa.string()),
        _required("metric", pa.string()),
        _required("filter", pa.string()),
        pa.field("unedited", pa.float64()),
        pa.field("unedited_stderr", pa.float64()),
        pa.field("edited", pa.float64()),
        pa.field("edited_stderr", pa.float64()),
        pa.field("higher_is_better", pa.bool_()),
        pa.field("count", pa.int64()),
        pa.field("documents", pa.int64()),
        pa.field("num_fewshot", pa.int32()),
        pa.field("version", pa.string()),
        _required("lm_eval_version", pa.string()),
    ],
    metadata=_FOOTER,
)
"""One row a metric of a task of lm-evaluation-harness, for the unedited model and the one after
`round`; `filter` is how answers were taken from the output. `count` of the task's `documents` were
asked; a group has no `documents`. `version` is the task's."""

SCHEMAS: dict[str, pa.Schema] = {
    "edits": EDITS,
    "values": VALUES,
    "metrics": METRICS,
    "general": GENERAL,
    "trace": TRACE,
    "training": TRAINING,
    "survey": SURVEY,
    "attributions": ATTRIBUTIONS,
    "neurons": NEURONS,
    "patches": PATCHES,
    "assessment": ASSESSMENT,
    "memory": MEMORY,
    "harness": HARNESS,
}

_ALLOWED_VALUES = {
    ("edits", "status"): STATUSES,
    ("metrics", "probe"): PROBES,
    ("general", "measure"): MEASURES,
    ("survey", "setting"): ("single", "batch", "sequence"),
    ("survey", "status"): ("done", "impossible", "failed"),
    ("trace", "kind"): KINDS,
    ("training", "split"): SPLITS,
    ("trace", "token_class"): TOKEN_CLASSES,
}

# A cast inside one of these families keeps the meaning; any other (a number to a string) hides
# a mistake of the caller.
_FAMILIES: tuple[Callable[[pa.DataType], bool], ...] = (
    pt.is_integer,
    pt.is_floating,
    pt.is_boolean,
    lambda type_: pt.is_string(type_) or pt.is_large_string(type_) or pt.is_string_view(type_),
    lambda type_: pt.is_list(type_) or pt.is_large_list(type_) or pt.is_fixed_size_list(type_),
)


def conform(kind: str, rows: pa.Table | list[dict[str, Any]]) -> pa.Table:
    """Return the rows as a table with exactly the schema of `kind`.

    Columns that may be null can be left out. Integers and floats are cast to the width of the
    schema; nothing else is converted.

    Raises:
        TypeError: a column is unknown, missing, of another type, null or outside its allowed
            values. The rows come from our own code, so this is an internal error.
    """
    schema = SCHEMAS[kind]
    names = set(rows.column_names) if isinstance(rows, pa.Table) else set().union(*rows)
    if unknown := sorted(names - set(schema.names)):
        raise TypeError(f"{kind} rows: the schema has no column {', '.join(unknown)}")
    try:
        if isinstance(rows, pa.Table):
            columns = [_column(rows, field) for field in schema]
            table = pa.Table.from_arrays(columns, schema=schema)
        else:
            table = pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowException, OverflowError) as error:
        raise TypeError(f"{kind} rows do not fit the schema: {error}") from error
    _check_content(kind, table)
    return table


def check_schema(kind: str, table: pa.Table) -> None:
    """Check a stored table: every column that is required, of its type, without nulls, in UTF-8.

    Raises:
        TypeError: a column is missing, of another type, or null where it may not be.
        pa.ArrowException: the content is not what its type says.
    """
    table.validate(full=True)
    for field in SCHEMAS[kind]:
        if field.name in table.column_names:
            column = table[field.name]
            if column.type != field.type:
                raise TypeError(f"column {field.name} is {column.type}, expected {field.type}")
            if column.null_count and not field.nullable:
                raise TypeError(f"column {field.name} has {column.null_count} nulls")
        elif not field.nullable:
            raise TypeError(f"has no column {field.name}")


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    if field.name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, field.type)])
    column = table[field.name]
    same_family = any(family(column.type) and family(field.type) for family in _FAMILIES)
    if not (same_family or pt.is_null(column.type)):
        raise pa.ArrowTypeError(f"column {field.name} is {column.type}, expected {field.type}")
    return column.cast(field.type)


def _check_content(kind: str, table: pa.Table) -> None:
    for field in table.schema:
        column = table[field.name]
        if column.null_count and not field.nullable:
            raise TypeError(f"{kind} rows: column {field.name} has {column.null_count} nulls")
        allowed = _ALLOWED_VALUES.get((kind, field.name))
        if not allowed:
            continue
        known = pc.is_in(column.drop_null(), pa.array(allowed))
        if not pc.all(known, min_count=0).as_py():
            found = sorted(set(column.drop_null().to_pylist()) - set(allowed))
            raise TypeError(f"{kind} rows: {field.name} is {found[0]!r}, expected one of {allowed}")
