"""Fine-tuning and UltraEdit against their plain forms, and as whole jobs."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.editing.gradients import Factors
from pipeline.editing.update import EditedWeights, Update
from pipeline.methods import build_gradient_method
from pipeline.methods.gradient import State
from pipeline.spec import MethodSpec
from tests.cases import EDITS, Case, case, confident, draw, fresh, relative_error
from tests.oracles import gradients as oracle

LAYERS = (1, 3)
TUNING: dict[str, Any] = {
    "epochs": 4,
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "batch_size": 2,
    "stop_loss": 0.01,
}


def _spec(name: str, **settings: Any) -> MethodSpec:
    return MethodSpec.model_validate(
        {"name": name, "layers": LAYERS, "contexts": ["{}"], name: settings}
    )


def _updates(
    tiny: Case, spec: MethodSpec, edits: list[oracle.Edit], state: State | None = None
) -> tuple[list[torch.Tensor], State, int]:
    """Make updates with the method's own parts, pieces of two edits."""
    method = build_gradient_method(spec)
    weights = EditedWeights(tiny.editable, method.layers)
    prompts = tiny.prompts(edits, ["{}"])
    masters = {layer: weights.masters(layer) for layer in method.layers}
    now = {layer: both[0] for layer, both in masters.items()}
    first = {layer: both[1] for layer, both in masters.items()}
    making = method.begin(now, first, state)
    changes: dict[int, torch.Tensor] = {}
    epochs = 0
    for _ in range(method.epochs):
        steps = []
        for batch in method.batches(prompts):
            for start in range(0, len(batch), 2):
                piece = batch[start : start + 2]
                with weights.tried(changes):
                    laid_out = method.gradients(tiny.editable, piece, 512, keeps=False)
                    making.add(laid_out.factors(method.tokens))
            steps.append(making.step())
            changes = steps[-1].changes or changes
        epochs += 1
        if method.is_done(steps):
            break
    updates, after = making.finish()
    return [updates[layer].matrix() for layer in method.layers], after, epochs


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "qwen2", "gemma2"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"norm_constraint": 0.015}, {"read": "last_prompt_token", "weight_decay": 0.0}],
)
def test_fine_tuning_is_the_plain_loop(family: str, settings: dict[str, Any]) -> None:
    tiny, given = case(family), {**TUNING, **settings}
    found, _, _ = _updates(tiny, _spec("ft", **given), EDITS)
    plain = {k: v for k, v in given.items() if k not in ("read", "norm_constraint")}
    expected = oracle.fine_tune(
        tiny.model, tiny.tokenizer, [tiny.down_projections[layer] for layer in LAYERS], EDITS,
        last_prompt_token=given.get("read") == "last_prompt_token",
        norm_constraint=given.get("norm_constraint"), **plain,
    )  # fmt: skip
    for mine, theirs in zip(found, expected, strict=True):
        # Adam divides by the gradient's own size, so that float32 shows where it is near zero.
        assert relative_error(mine, theirs) < 2e-3


def test_the_box_is_kept_to_the_unedited_weights_or_to_the_rounds() -> None:
    tiny = fresh("gpt2")
    weights = EditedWeights(tiny.editable, LAYERS)
    for around, bound in (("unedited", 0.01), ("round", 0.015)):
        settings = {**TUNING, "norm_constraint": 0.01, "constraint_around": around}
        weights.revert()
        for layer in LAYERS:
            weights.apply(layer, torch.full((32, 64), 0.005))
        method = build_gradient_method(_spec("ft", **settings))
        now = {layer: weights.masters(layer)[0] for layer in LAYERS}
        first = {layer: weights.masters(layer)[1] for layer in LAYERS}
        making = method.begin(now, first, None)
        prompts = tiny.prompts(EDITS, ["{}"])
        for _ in range(4):
            making.add(method.gradients(tiny.editable, prompts, 512, keeps=False).factors("all"))
            making.step()
        moved = 0.005 + torch.stack([u.matrix() for u in making.finish()[0].values()])
        assert float(moved.max()) == pytest.approx(bound, abs=1e-6)
        assert float(moved.min()) >= (-0.01 if around == "unedited" else -0.005) - 1e-6


@pytest.mark.parametrize("bound", [None, 0.3])
def test_fine_tuning_learns_its_facts_and_changes_nothing_else(bound: float | None) -> None:
    tiny, edits = confident(), EDITS[1:3]
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    given = {**TUNING, "epochs": 200, "weight_decay": 0.0, "norm_constraint": bound}
    spec = _spec("ft", **given).model_copy(update={"layers": (1,)})
    (update,), _, epochs = _updates(tiny, spec, edits)
    assert 1 < epochs < 200
    weights = EditedWeights(tiny.editable, (1,))
    weights.apply(1, update)
    losses = [
        oracle.edit_loss(tiny.model, tiny.tokenizer, edit, ["{}"], last_prompt_token=False)
        for edit in edits
    ]
    assert float(sum(losses)) / 2 < given["stop_loss"] == 0.01
    after = tiny.model.state_dict()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert changed == ["transformer.h.1.mlp.c_proj.weight"]
    if bound is not None:
        gone = after[changed[0]] - before[changed[0]]
        assert float(gone.abs().max()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("family", "variance"),
    [*((family, "biased") for family in ("gpt2", "gptj", "llama", "gpt_neox")),
     ("llama", "unbiased")],
)  # fmt: skip
def test_ultraedit_over_two_rounds_is_the_plain_procedure(family: str, variance: str) -> None:
    tiny = fresh(family)
    spec = _spec("ultraedit", learning_rate=1e-3, variance=variance)
    plain = oracle.UltraEdit(1e-3, correction=int(variance == "unbiased"))
    downs = [tiny.down_projections[layer] for layer in LAYERS]
    weights, state = EditedWeights(tiny.editable, LAYERS), None
    for edits in (EDITS[:3], EDITS[3:]):
        expected = plain.updates(tiny.model, tiny.tokenizer, downs, edits)
        found, state, _ = _updates(tiny, spec, edits, state)
        for layer, mine, theirs in zip(LAYERS, found, expected, strict=True):
            assert relative_error(mine, theirs) < 1e-5
            weights.apply(layer, mine)


def test_ultraedits_update_goes_down_the_loss_and_grows_with_its_rate() -> None:
    tiny = case("llama")
    once, _, _ = _updates(tiny, _spec("ultraedit", learning_rate=1e-4), EDITS)
    twice, _, _ = _updates(tiny, _spec("ultraedit", learning_rate=2e-4), EDITS)
    downs = [tiny.down_projections[layer] for layer in LAYERS]
    _, slopes = oracle.gradients(
        tiny.model, tiny.tokenizer, downs, EDITS, ["{}"], last_prompt_token=False
    )
    assert sum(float((mine * slope).sum()) for mine, slope in zip(once, slopes, strict=True)) < 0
    for mine, double in zip(once, twice, strict=True):
        assert relative_error(double, 2 * mine) < 1e-5


def test_ultraedit_does_nothing_where_gradients_are_what_they_always_were() -> None:
    """Rows whose gradients are the mean of all that were ever seen, which did vary."""
    method = build_gradient_method(_spec("ultraedit", learning_rate=1.0, ridge=1e-3))
    weights = {layer: draw(4, 6, seed=layer) for layer in LAYERS}
    usual, spread = draw(4, seed=7).float(), draw(10, seed=8).square() + 0.1
    mean = torch.cat([draw(6, seed=9), usual.double()])
    state = {"count": torch.tensor(20), "mean": mean, "squares": 20 * spread}
    for apart in (0.0, 1e-3):
        making = method.begin(weights, weights, state)
        keys = {layer: draw(5, 6, seed=layer + 1).float() for layer in LAYERS}
        gradients = {layer: (usual + apart).expand(5, 4) for layer in LAYERS}
        making.add(Factors(torch.ones(2).double(), keys, gradients))
        making.step()
        updates, _ = making.finish()
        for update in updates.values():
            assert isinstance(update, Update)
            assert bool(update.matrix().any()) == (apart > 0)


def test_wrappers_of_values_are_refused_and_those_of_updates_are_not() -> None:
    with pytest.raises(ValidationError, match="wrappers: nas changes how values are found, and ft"):
        MethodSpec(name="ft", wrappers=("nas",))
    assert MethodSpec(name="ft", wrappers=("rect",)).wrappers == ("rect",)
