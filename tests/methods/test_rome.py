"""ROME's update in float64, before it is kept in float32, and on models as they are edited."""

from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipeline import apply_updates
from pipeline.editing.keys import KeyWave
from pipeline.editing.update import EditedWeights
from pipeline.methods import build_closed_form
from pipeline.methods.rome import RankOne, Rome
from pipeline.spec import MethodSpec
from tests import families
from tests.cases import CONTEXTS, EDITS, Case, draw, fresh, relative_error
from tests.methods.equations import normal_equations
from tests.oracles.memit import Edit, Row, block_output, compute_key, module_input, rewrite_rows
from tests.tiny_jobs import TinyJobs, records

Form = Literal["r-rome", "p-rome", "original"]
FORMS = get_args(Form)
LAYER = 1
_SEEDS = st.integers(0, 10_000)


def _method(form: Form) -> Rome:
    spec = {"name": "rome", "layers": (LAYER,), "rome": {"form": form}}
    method = build_closed_form(MethodSpec.model_validate(spec))
    assert isinstance(method, Rome)
    return method


def _update(form: Form, keys: Tensor, residual: Tensor, covariance: Tensor) -> Tensor:
    """The update (d, f), from keys (1, f) or (1, 2 f), as `keys_and_residuals` returns them."""
    equations = normal_equations(_method(form), covariance, 1)
    assert isinstance(equations, RankOne)
    equations.add(keys, residual)
    left, right = equations.factors()
    assert left.dtype == right.dtype == torch.float64
    return left @ right


def _problem(size: int, hidden: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A mean key and a bare one (f,), a residual (d,) and a covariance."""
    samples = draw(3 * size + 5, size, seed=seed)
    mean, bare = draw(2, size, seed=seed + 1)
    return mean, bare, draw(hidden, seed=seed + 2), samples.T @ samples / len(samples)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 10), st.integers(1, 5), _SEEDS)
def test_the_value_is_written_exactly_at_the_least_cost(size: int, hidden: int, seed: int) -> None:
    mean, bare, residual, covariance = _problem(size, hidden, seed)
    for form in FORMS:
        key, is_mixed = mean, form == "original"
        constrained = bare if is_mixed else mean
        keys = torch.cat([mean, bare]) if is_mixed else mean
        found = _update(form, keys[None], residual[None], covariance)
        scale = float(found.norm() * constrained.norm())
        assert float((found @ constrained - residual).norm()) < 1e-10 * scale
        assert torch.linalg.matrix_rank(found, rtol=1e-10) == 1
        # D C Q^T = 0 for every Q with Q k = 0, and with k = k_c those are all other ways to write.
        other = draw(hidden, size, seed=seed + 9)
        other = other - torch.outer(other @ key, key) / key.square().sum()
        cross = float(torch.trace(found @ covariance @ other.T).abs())
        assert cross < 1e-10 * float(found.norm() * covariance.norm() * other.norm())
        if is_mixed:
            least = _update("p-rome", bare[None], residual[None], covariance)
            costs = [float(torch.trace(d @ covariance @ d.T)) for d in (least, found)]
            assert costs[0] <= costs[1] * (1 + 1e-9)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 10), st.integers(1, 5), _SEEDS)
def test_without_a_covariance_the_update_is_the_shortest(size: int, hidden: int, seed: int) -> None:
    key, _, residual, _ = _problem(size, hidden, seed)
    found = _update("p-rome", key[None], residual[None], torch.eye(size).double())
    expected = torch.outer(residual, key) / key.square().sum()
    assert relative_error(found, expected) < 1e-12
    assert relative_error(found, residual[:, None] @ torch.linalg.pinv(key[:, None])) < 1e-10


def test_only_the_original_explodes_where_the_keys_are_nearly_at_right_angles() -> None:
    mean, bare, residual, covariance = _problem(8, 4, 3)
    direction = torch.linalg.solve(covariance, mean)
    bare = bare - direction * (direction @ bare) / direction.square().sum()
    norms = []
    for apart in (1.0, 1e-4, 1e-8):
        near = bare + apart * direction / direction.square().sum()
        both = torch.cat([mean, near])[None]
        norms.append(float(_update("original", both, residual[None], covariance).norm()))
        for form, key in (("r-rome", mean), ("p-rome", near)):
            norm = float(_update(form, key[None], residual[None], covariance).norm())
            # ||u|| / (u.k) with u = C^-1 k is at most cond(C) / ||k||.
            bound = torch.linalg.cond(covariance) * residual.norm() / key.norm()
            assert norm <= float(bound)
    assert [norm / norms[0] for norm in norms] == pytest.approx([1.0, 1e4, 1e8], rel=1e-6)


# --- on models ----------------------------------------------------------------------------------


def _bare_row(tiny: Case, edit: Edit) -> Row:
    return rewrite_rows(tiny.tokenizer, ["{}"], *edit)[0]


@torch.no_grad()
def _mlp_output(model: nn.Module, mlp: nn.Module, row: Row) -> Tensor:
    """What the MLP puts out at the subject's last token, (d,)."""
    seen: list[Tensor] = []
    handle = mlp.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(input_ids=torch.tensor([row.ids]))
    handle.remove()
    return seen[0].flatten(0, -2)[row.lookup]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_the_edited_mlp_puts_out_the_value(family: str, form: Form) -> None:
    """With weights of either orientation, and with a gated network."""
    tiny, edit = fresh(family), EDITS[0]
    row, block, down = _bare_row(tiny, edit), tiny.blocks[LAYER], tiny.down_projections[LAYER]
    delta = draw(32, seed=4)
    value = block_output(tiny.model, block, row) + delta
    clean = _mlp_output(tiny.model, block.mlp, row)
    samples = module_input(tiny.model, down, row.ids)
    covariance = samples.T @ samples / len(samples) + 0.1 * torch.eye(64).double()
    wave = KeyWave(tiny.editable, tiny.prompts([edit], CONTEXTS), LAYER, max_tokens=512)
    keys, residuals = _method(form).keys_and_residuals(wave, LAYER, value[None])
    update = _update(form, keys, residuals, covariance)
    bare = compute_key(tiny.model, tiny.tokenizer, down, edit, ["{}"])
    constrained = keys[0] if form == "r-rome" else bare
    weight = tiny.editable.oriented_weight(LAYER).clone()
    written, wanted = (weight + update) @ constrained, weight @ bare + delta
    assert relative_error(written, wanted) < max(1e-10, tiny.tolerance)
    EditedWeights(tiny.editable, (LAYER,)).apply(LAYER, update)
    found = _mlp_output(tiny.model, block.mlp, row) - clean
    if form == "r-rome":
        assert relative_error(found, update @ bare) < max(1e-10, tiny.tolerance)
    else:
        assert relative_error(found, delta) < max(1e-10, tiny.tolerance)


@pytest.mark.parametrize("form", ["p-rome", "original"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_job_leaves_the_value_at_the_subject(tiny: TinyJobs, family: str, form: str) -> None:
    """r-ROME writes it at the mean key, and so nowhere exactly."""
    changes = ["method.name=rome", f"method.rome.form={form}", f"method.layers=[{LAYER}]"]
    quiet = ("evaluation.probes=[]", "evaluation.baseline=false", "method.max_drift=1000")
    content = records(1)
    run = tiny.finished(*quiet, *changes, family=family, requests=content)
    model = AutoModelForCausalLM.from_pretrained(tiny.model(family), dtype=torch.float32).eval()
    fact = content[0]["requested_rewrite"]
    edit = Edit(fact["prompt"], fact["subject"], fact["target_new"]["str"])
    blocks, _ = families.modules(model, family)
    words = families.build_tokenizer(bos=family == "llama")
    row = rewrite_rows(words, ["{}"], *edit)[0]
    z = torch.tensor(run.values()["z"].to_pylist()[0])
    delta = z - block_output(model, blocks[LAYER], row)
    value = _mlp_output(model, blocks[LAYER].mlp, row) + delta
    apply_updates(model, run.path)
    found = _mlp_output(model, blocks[LAYER].mlp, row)
    assert float(delta.norm()) > 0.1
    assert float((found - value).abs().max()) < 1e-4
