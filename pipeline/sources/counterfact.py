"""CounterFact in its original schema (Meng et al. 2022, arXiv:2202.05262, appendix D).

A JSON list of `{case_id, requested_rewrite: {prompt, subject, target_new: {str}, target_true:
{str}, relation_id}, paraphrase_prompts, neighborhood_prompts, generation_prompts}`. Other keys
(`attribute_prompts`, `pararel_idx`, `target_new.id` ...) are not used. Beside the published keys a
record may have `locality` and `portability`, lists of `{prompt, target, aspect}`, those of
`portability` with a `target_true` besides.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.sources.files import load_json_list
from pipeline.sources.records import Layout, Problem, Records, case_name, kind

_LISTS = (
    "paraphrase_prompts",
    "neighborhood_prompts",
    "generation_prompts",
    "locality",
    "portability",
)


def read(path: str) -> Records:
    """Read a CounterFact file.

    Raises:
        InputError: the file is not a JSON list with at least one record.
    """
    return Records(load_json_list(path), LAYOUT)


def _to_fields(record: Mapping[str, Any], row: int, problems: list[Problem]) -> dict[str, Any]:
    values = {key: record[key] for key in _LISTS if key in record}
    if "case_id" in record:
        values["case_id"] = case_name(record["case_id"])
    rewrite = _object(record, "requested_rewrite", "requested_rewrite", problems)
    if rewrite is None:
        return values
    values |= {key: rewrite[key] for key in ("prompt", "subject", "relation_id") if key in rewrite}
    for key in ("target_new", "target_true"):
        if key == "target_true" and rewrite.get(key) is None:
            continue
        target = _object(rewrite, key, f"requested_rewrite.{key}", problems)
        if target is not None and "str" in target:
            values[key] = target["str"]
        elif target is not None:
            problems.append(Problem(f"requested_rewrite.{key}.str", "is missing; add it"))
    return values


def _object(
    record: Mapping[str, Any], key: str, path: str, problems: list[Problem]
) -> Mapping[str, Any] | None:
    value = record.get(key)
    if isinstance(value, dict):
        return value
    if key not in record:
        problems.append(Problem(path, "is missing; add it"))
    else:
        problems.append(Problem(path, f"is {kind(value)}, expected an object; see the schema"))
    return None


LAYOUT = Layout(
    "counterfact",
    _to_fields,
    {
        "prompt": "requested_rewrite.prompt",
        "subject": "requested_rewrite.subject",
        "relation_id": "requested_rewrite.relation_id",
        "target_new": "requested_rewrite.target_new.str",
        "target_true": "requested_rewrite.target_true.str",
    },
)
