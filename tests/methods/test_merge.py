"""MEMIT-Merge: one value and one row of the equations for the edits of a subject."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline import run_sequential
from pipeline.cluster.cutting import cut_by_subject, cut_shards
from pipeline.cluster.plan import make_plan
from pipeline.editing.values import ValueSettings, find_merged_values, find_values
from pipeline.methods import ClosedForm, build_closed_form
from pipeline.methods.merge import first_of_each_value
from pipeline.results import read
from pipeline.results.keys import read_keys
from pipeline.spec import MethodSpec, ValueSpec
from tests.cases import CONTEXTS, EDITS, SETTINGS, case, relative_error, requests
from tests.methods.plain import Plain, memit, stored_updates
from tests.oracles.memit import Edit
from tests.oracles.merge import compute_merged_value
from tests.tiny_jobs import LAYERS, TinyJobs, records

MORE = ["gptj", "gpt_neox", "opt", "llama", "qwen2", "phi3"]
ONE, OTHER = EDITS[0].subject, EDITS[1].subject
GROUPS = [
    [
        Edit("The mother tongue of {} is", ONE, "English"),
        Edit("{} plays the", ONE, "piano and drums"),
        Edit("They said that {}", ONE, "Rome"),
    ],
    [EDITS[2]],
    [EDITS[1], Edit('"{}" is in', OTHER, "London")],
]
IN_ANY_ORDER = [GROUPS[0][0], GROUPS[2][0], *GROUPS[1], *GROUPS[0][1:], GROUPS[2][1]]


def _method(*wrappers: str, **settings: Any) -> ClosedForm:
    given = {"layers": (0, 1), "covariance_weight": 1.0, "value": ValueSpec(**SETTINGS)}
    return build_closed_form(MethodSpec.model_validate({**given, "wrappers": wrappers, **settings}))


@pytest.mark.parametrize(
    "family",
    ["gpt2", "gemma3_text", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)],
)
def test_a_merged_value_is_the_oracles(family: str) -> None:
    tiny = case(family)
    groups = [tiny.prompts(group) for group in GROUPS]
    expected = [
        compute_merged_value(
            tiny.model, tiny.tokenizer, tiny.blocks, 1, group, CONTEXTS, **SETTINGS
        )
        for group in GROUPS
    ]
    for size in (1, 4):
        found = find_merged_values(tiny.editable, groups, 1, ValueSettings(**SETTINGS), size)
        for ours, (z, loss, passes) in zip(found, expected, strict=True):
            assert relative_error(ours.z, z) < tiny.tolerance
            assert ours.loss == pytest.approx(loss, rel=tiny.tolerance)
            assert ours.steps == passes - 1 and ours.delta_norm > 0.1


def test_groups_end_on_their_own() -> None:
    tiny = case("gpt2")
    changes = SETTINGS | {"steps": 8, "clamp_norm": 4.0, "weight_decay": 0.001, "stop_loss": 6.2}
    expected = [
        compute_merged_value(tiny.model, tiny.tokenizer, tiny.blocks, 1, group, CONTEXTS, **changes)
        for group in GROUPS
    ]
    assert len({passes for *_, passes in expected}) > 1, expected
    groups = [tiny.prompts(group) for group in GROUPS]
    for size in (2, 6):
        found = find_merged_values(tiny.editable, groups, 1, ValueSettings(**changes), size)
        for ours, (z, _, passes) in zip(found, expected, strict=True):
            assert ours.steps == passes - 1
            assert relative_error(ours.z, z) < 1e-9


def test_an_edit_merged_with_itself_has_its_own_value() -> None:
    tiny = case("llama")
    edits, settings = tiny.prompts(EDITS[:2]), ValueSettings(**SETTINGS)
    alone = find_values(tiny.editable, edits, 1, settings, 8)
    twice = find_merged_values(tiny.editable, [[edit] * 2 for edit in edits], 1, settings, 8)
    for one, two in zip(alone, twice, strict=True):
        assert relative_error(two.z, one.z) < 1e-12
        assert two.target_probability == pytest.approx(one.target_probability)


def test_a_method_merges_by_subject_only_if_told_so() -> None:
    tiny = case("llama")
    prompts = tiny.prompts(IN_ANY_ORDER)
    found = _method("merge").find_values(tiny.editable, prompts, 8)
    expected = find_merged_values(
        tiny.editable, [tiny.prompts(g) for g in GROUPS], 1, ValueSettings(**SETTINGS), 8
    )
    for edit, value in zip(IN_ANY_ORDER, found, strict=True):
        (group,) = (i for i, members in enumerate(GROUPS) if edit in members)
        assert relative_error(value.z, expected[group].z) < 1e-12
    apart = _method().find_values(tiny.editable, prompts, 8)
    assert relative_error(apart[0].z, found[0].z) > 0.01
    # NAS rescales the value that they share, at the prompt that it is written at.
    both = _method("merge", "nas", nas={"anchor_norm": 3.0, "drop_above": 1e6})
    anchored = both.find_values(tiny.editable, prompts, 8)
    assert torch.equal(anchored[0].z, anchored[3].z) and torch.equal(anchored[0].z, anchored[4].z)
    lone = _method("nas", nas={"anchor_norm": 3.0, "drop_above": 1e6})
    assert relative_error(anchored[2].z, lone.find_values(tiny.editable, prompts, 8)[2].z) < 1e-9


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 12))
def test_a_subjects_requests_share_a_shard(subjects: list[int], size: int) -> None:
    given = requests([EDITS[0]._replace(subject=f"subject {number}") for number in subjects])
    shards = cut_by_subject(given, size)
    assert sorted(r.case_id for shard in shards for r in shard.items) == sorted(
        r.case_id for r in given
    )
    assert [shard.index for shard in shards] == list(range(len(shards)))
    homes = {r.subject: shard.index for shard in shards for r in shard.items}
    for shard in shards:
        assert all(homes[r.subject] == shard.index for r in shard.items)
        assert len(shard.items) <= size or len({r.subject for r in shard.items}) == 1


def test_subjects_of_one_request_are_cut_as_ever() -> None:
    given = requests([EDITS[0]._replace(subject=f"subject {number}") for number in range(100)])
    for size in (7, "auto"):
        assert cut_by_subject(given, size) == cut_shards(given, size)  # type: ignore[arg-type]


def test_a_subject_with_two_values_is_written_twice() -> None:
    given = requests([EDITS[0], EDITS[1], EDITS[0], EDITS[0]])
    one, other = torch.ones(3), torch.zeros(3)
    values = {"0": one, "1": one, "2": one.clone(), "3": other}
    assert [r.case_id for r in first_of_each_value(given, values)] == ["0", "1", "3"]


def _same_subjects(count: int, subjects: int) -> list[dict[str, Any]]:
    content = records(count)
    for number, record in enumerate(content):
        rewrite = record["requested_rewrite"]
        rewrite["subject"] = content[number % subjects]["requested_rewrite"]["subject"]
        rewrite["prompt"] = f"{rewrite['prompt']} number {number}, that is"
    return content


def _values(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    return {row["case_id"]: torch.tensor(row["z"]) for row in rows}


def test_a_study_writes_one_row_a_subject(tiny: TinyJobs, tmp_path: Path) -> None:
    content = _same_subjects(8, 3)
    changes = ["method.wrappers=[merge]", "rounds.size=8", "evaluation.probes=[]"]
    spec = tiny.spec(tmp_path / "run", *changes, requests=content)
    (shards,) = make_plan(spec).rounds.shards
    assert [len({r.subject for r in shard.items}) for shard in shards] == [1, 1, 1]
    run = read(run_sequential(spec).path)
    values = _values(run.values().to_pylist())
    assert len(values) == 8 and len({tuple(z.tolist()) for z in values.values()}) == 3
    first = [shard.items[0].case_id for shard in shards]
    for shard in shards:
        for request in shard.items:
            assert torch.equal(values[request.case_id], values[shard.items[0].case_id])
    for path in sorted((run.path / "keys").rglob("*.safetensors")):
        assert list(read_keys(path).case_ids) == first
    plain = Plain(tiny, [record for record in content if str(record["case_id"]) in first])
    expected, found = plain.updates(run, memit), stored_updates(run)
    assert list(found) == list(expected) == LAYERS
    for layer, update in found.items():
        assert relative_error(update, expected[layer]) < 2e-3


def test_one_edit_a_round_is_never_merged() -> None:
    with pytest.raises(ValueError, match="merge has nothing to merge: rome writes one edit"):
        MethodSpec(name="rome", wrappers=("merge",))
