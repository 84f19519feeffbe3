"""Fine-tuning and UltraEdit against their plain forms, and as whole jobs."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.editing.update import EditedWeights
from pipeline.methods import build_gradient_method
from pipeline.methods.gradient import State
from pipeline.spec import MethodSpec
from tests.cases import EDITS, Case, case, fresh, relative_error
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
    method, weights = build_gradient_method(spec), EditedWeights(tiny.editable, LAYERS)
    prompts = tiny.prompts(edits, ["{}"])
    masters = {layer: weights.masters(layer) for layer in LAYERS}
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
    return [updates[layer].matrix() for layer in LAYERS], after, epochs


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


def test_fine_tuning_stops_where_the_loss_is_low() -> None:
    tiny = case("gpt2")
    # Two layers of this random model cannot bring it below about 1.
    given = {**TUNING, "epochs": 100, "weight_decay": 0.0, "batch_size": 5, "stop_loss": 2.0}
    updates, _, epochs = _updates(tiny, _spec("ft", **given), EDITS)
    assert 1 < epochs < 100
    edited = EditedWeights(tiny.editable, LAYERS)
    with edited.tried(dict(zip(LAYERS, updates, strict=True))):
        losses, _ = oracle.gradients(
            tiny.model, tiny.tokenizer, tiny.down_projections[:1], EDITS, ["{}"],
            last_prompt_token=False,
        )  # fmt: skip
    assert sum(losses) / len(losses) < 2.0


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gpt_neox"])
def test_ultraedit_over_two_rounds_is_the_plain_procedure(family: str) -> None:
    tiny = fresh(family)
    spec, plain = _spec("ultraedit", learning_rate=1e-3), oracle.UltraEdit(1e-3)
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


def test_wrappers_of_values_are_refused_and_those_of_updates_are_not() -> None:
    with pytest.raises(ValidationError, match="wrappers: nas changes how values are found, and ft"):
        MethodSpec(name="ft", wrappers=("nas",))
    assert MethodSpec(name="ft", wrappers=("rect",)).wrappers == ("rect",)
