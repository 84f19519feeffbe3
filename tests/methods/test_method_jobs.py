"""Each method as a whole batch job in this process, its stored updates against the plain oracle."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import run_batch_edit
from pipeline.cluster.sharing import asked_key, values_key
from pipeline.errors import InputError
from pipeline.spec import JobSpec
from tests.cases import relative_error
from tests.methods.plain import Plain, Solve, stored_updates
from tests.oracles import updates as oracle
from tests.oracles.memit import _prompt_row, block_output, compute_key
from tests.tiny_jobs import CONTEXTS, LAYERS, TinyJobs, records

FIVE = records(5)
QUIET = ("evaluation.probes=[]", "evaluation.baseline=false", "method.max_drift=1000")


@cache
def _plain(tiny: TinyJobs) -> Plain:
    return Plain(tiny, FIVE)


def _accumulated(plain: Plain) -> Solve:
    nothing = torch.zeros(64, 1, dtype=torch.float64)
    return lambda _, keys, residuals, covariance: oracle.accumulated(
        keys, residuals, covariance, 5.0, nothing, 0.5
    )


def _emmet(plain: Plain) -> Solve:
    return lambda _, keys, residuals, covariance: oracle.emmet(
        keys, residuals, covariance, 5.0, 0.3
    )


def _alphaedit(plain: Plain) -> Solve:
    def solve(layer: int, keys: Tensor, residuals: Tensor, covariance: Tensor) -> Tensor:
        bound = float(0.05 * torch.linalg.svdvals(covariance).mean())
        nothing = torch.zeros(64, 1, dtype=torch.float64)
        return oracle.alphaedit(keys, residuals, covariance, bound, 0.1, nothing)

    return solve


def _wrapped(plain: Plain) -> Solve:
    def solve(layer: int, keys: Tensor, residuals: Tensor, covariance: Tensor) -> Tensor:
        nothing = torch.zeros(64, 1, dtype=torch.float64)
        update = oracle.accumulated(keys, residuals, covariance, 0.001, nothing, 0.0)
        weight = plain.weight(layer)
        assert torch.linalg.svdvals(update)[0] > torch.linalg.svdvals(weight)[0]
        return oracle.prune(oracle.rect(update, weight, 0.4), weight, 1.5)

    return solve


@pytest.mark.parametrize(
    ("changes", "solve"),
    [
        (["method.name=memit_accumulated", "method.norm_penalty=0.5"], _accumulated),
        (["method.name=emmet", "method.emmet.damping=0.3"], _emmet),
        (
            [
                "method.name=alphaedit",
                "method.alphaedit={threshold: 0.05, threshold_is: relative, ridge: 0.1}",
            ],
            _alphaedit,
        ),
        (
            [
                "method.covariance_weight=0.001",
                "method.wrappers=[rect, prune]",
                "method.prune.base=1.5",
            ],
            _wrapped,
        ),
    ],
    ids=["memit_accumulated", "emmet", "alphaedit", "rect and prune"],
)
def test_stored_updates_are_those_of_the_oracle(
    tiny: TinyJobs, changes: list[str], solve: Callable[[Plain], Solve]
) -> None:
    run = tiny.finished(*QUIET, *changes, requests=FIVE)
    plain = _plain(tiny)
    expected, found = plain.updates(run, solve(plain)), stored_updates(run)
    assert list(found) == LAYERS
    for layer in LAYERS:
        assert expected[layer].norm() > 1e-3 * plain.weight(layer).norm()
        assert relative_error(found[layer], expected[layer]) < 2e-3


@pytest.mark.parametrize("form", ["r-rome", "p-rome", "original"])
def test_rome_writes_one_value_exactly(tiny: TinyJobs, form: str) -> None:
    changes = ["method.name=rome", f"method.rome.form={form}", "method.layers=[1]"]
    run = tiny.finished(*QUIET, *changes, requests=FIVE[:1])
    plain, edit = _plain(tiny), _plain(tiny).edits[0]
    module, weight = plain.down_projections[1], plain.weight(1)
    both = [
        compute_key(plain.model, plain.tokenizer, module, edit, contexts, in_groups=False)
        for contexts in (CONTEXTS, CONTEXTS[:1])
    ]
    mean, bare = both
    key, constrained = {"r-rome": (mean, mean), "p-rome": (bare, bare), "original": both}[form]
    row = _prompt_row(plain.tokenizer, "{}", edit.prompt, edit.subject)
    z = torch.tensor(run.values()["z"].to_pylist()[0], dtype=torch.float64)
    delta = z - block_output(plain.model, plain.blocks[1], row)
    value = weight @ bare + delta
    residual = value - weight @ constrained
    expected = oracle.rome(key, constrained, residual, plain.covariances[1])
    found = stored_updates(run)[1]
    assert relative_error(found, expected) < 2e-3
    written = (weight + found.double()) @ constrained
    assert (written - value).norm() < 2e-3 * delta.norm()


def test_rome_refuses_a_batch_and_several_layers(tiny: TinyJobs, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for changes, message in (
        (["method.layers=[1]"], "rome writes one edit at a time, and there are 5 requests"),
        (["method.layers=[0, 1]"], r"method\.layers: rome edits one layer, not \[0, 1\]"),
    ):
        spec = tiny.spec(output, "method.name=rome", *changes, requests=FIVE)
        with pytest.raises(InputError, match=message):
            run_batch_edit(spec)
        assert not list(output.glob("*"))


def test_all_wrappers_go_together(tiny: TinyJobs) -> None:
    twice = [*FIVE[:2], *(dict(record) for record in FIVE[2:4])]
    for record, subject in zip(twice[2:], twice[:2], strict=True):
        same = {"subject": subject["requested_rewrite"]["subject"], "prompt": "They say {} is"}
        record["requested_rewrite"] = record["requested_rewrite"] | same
    changes = [
        "method.name=alphaedit",
        "method.alphaedit={threshold: 0.05, threshold_is: relative, ridge: 0.1}",
        "method.wrappers=[merge, nas, prune, rect]",
    ]
    run = tiny.finished(*QUIET, *changes, requests=twice)
    assert run.summary["requests"]["applied"] == 4
    assert len({tuple(z) for z in run.values()["z"].to_pylist()}) == 2
    for update in stored_updates(run).values():
        assert update.isfinite().all() and 0 < update.count_nonzero() <= 0.41 * update.numel()


def test_studies_side_by_side_share_only_what_is_the_same(tiny: TinyJobs, tmp_path: Path) -> None:
    def spec(*changes: str) -> JobSpec:
        return tiny.spec(tmp_path / "run", *changes)

    alike = [
        spec(),
        spec("method.name=alphaedit", "method.wrappers=[rect]"),
        spec("method.name=rome", "method.layers=[1]"),
    ]
    assert len({values_key(each) for each in alike}) == 1
    others = [spec("method.name=pmet"), spec("method.wrappers=[nas]"), spec("method.layers=[0]")]
    merged = spec("method.wrappers=[merge]")
    assert len({values_key(each) for each in (alike[0], *others, merged)}) == 5
    assert len({asked_key(each) for each in (*alike, *others)}) == 1
    assert asked_key(merged) != asked_key(alike[0])
