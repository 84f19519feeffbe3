"""zsRE questions in the schema of MEND (Mitchell et al. 2021, arXiv:2110.11309).

A JSON list of `{subject, src, rephrase, alt, answers, loc, loc_ans, pred, cond}`; `pred` and `cond`
are not used. `alt` is the new answer and the first of `answers` the true one. `loc` is a
question of Natural Questions behind the marker "nq question: ", which means nothing to a causal
language model, and without its question mark: the marker is taken away, the mark is put back.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.sources.files import load_json_list
from pipeline.sources.records import (
    Layout,
    Problem,
    Records,
    as_list,
    first_if_list,
    put_template,
    required_text,
)

MARKER = "nq question: "


def read(path: str) -> Records:
    """Read a zsRE file; a record's case_id is its position in the file.

    Raises:
        InputError: the file is not a JSON list with at least one record.
    """
    return Records(load_json_list(path), LAYOUT)


def _to_fields(record: Mapping[str, Any], row: int, problems: list[Problem]) -> dict[str, Any]:
    values: dict[str, Any] = {"case_id": str(row)}
    if "alt" in record:
        values["target_new"] = record["alt"]
    put_template(values, record, "src", problems)
    answers = record.get("answers", [])
    if not isinstance(answers, list):
        problems.append(Problem("answers", "is not a list; put the answers in [ ]"))
    elif answers:
        values["target_true"] = answers[0]
    if "rephrase" in record:
        values["paraphrase_prompts"] = as_list(record["rephrase"])
    if "loc" in record or "loc_ans" in record:
        question = required_text(record, "loc", problems)
        if "loc_ans" not in record:
            problems.append(Problem("loc_ans", "is missing; add it or remove loc"))
        elif question is not None:
            probe = {"prompt": _question(question), "target": first_if_list(record["loc_ans"])}
            values["locality"] = [probe]
    return values


def _question(loc: str) -> str:
    question = loc.removeprefix(MARKER)
    return question if question.endswith("?") else question + "?"


LAYOUT = Layout(
    "zsre",
    _to_fields,
    {
        "prompt": "src",
        "target_new": "alt",
        "target_true": "answers[0]",
        "paraphrase_prompts": "rephrase",
        "locality.prompt": "loc",
        "locality.target": "loc_ans",
    },
)
