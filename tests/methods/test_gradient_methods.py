"""Fine-tuning, UltraEdit and repeated KE against their plain forms, and as whole jobs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.editing.gradients import Condition, Factors
from pipeline.editing.hypernetworks.ke import KnowledgeEditorNetwork
from pipeline.editing.update import EditedWeights, Update
from pipeline.editors import read_card, write_editor
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


# --- KE, applied again until it takes -----------------------------------------------------------


def _editor(tiny: Case, folder: Path, max_scale: float, repeats: int) -> MethodSpec:
    """An editor that steps down the gradient, and a little aside."""
    settings = {"condition_size": 8, "hidden_size": 8, "lstm_size": 4, "max_scale": max_scale}
    network = _network(tiny, settings)
    card = {
        "kind": "ke", "fingerprint": "0" * 64, "model": "tiny", "layers": LAYERS,
        "settings": settings, "train": {}, "requests_sha256": "0" * 64, "steps": 1,
        "validation": {}, "versions": {},
    }  # fmt: skip
    write_editor(folder / "editor", card, network.state_dict())
    digest = read_card(folder / "editor", "the test").sha256
    place = {"editor": str(folder / "editor"), "editor_sha256": digest}
    return _spec("ke", **settings, **place, repeats=repeats)


def _network(tiny: Case, settings: dict[str, Any]) -> KnowledgeEditorNetwork:
    sizes = {layer: (tiny.editable.hidden_size, tiny.editable.key_size(layer)) for layer in LAYERS}
    network = KnowledgeEditorNetwork(
        sizes, tiny.editable.hidden_size, **settings, begins="descent", seed=3
    )
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(0.02 * draw(*parameter.shape, seed=number).to(parameter))
    return network.eval()


def _repeated(tiny: Case, network: Any, edit: oracle.Edit, most: int) -> tuple[list[Any], int]:
    """The plain loop: ask, stop if the answer is the new one, else gate the gradient and add."""
    (prompts,) = tiny.prompts([edit], ["{}"])
    prompt, target = list(prompts.rewrites[0].ids), list(prompts.target)
    downs = [tiny.down_projections[layer] for layer in LAYERS]
    pristine: list[Any] = [down.weight.detach().clone() for down in downs]
    totals: list[Any] = [
        torch.zeros_like(oracle.oriented(*both)) for both in zip(downs, pristine, strict=True)
    ]
    table = tiny.model.get_input_embeddings()
    times = 0
    while times < most:
        ids = list(prompt)
        with torch.no_grad():
            for _ in target:
                ids.append(int(tiny.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if times and ids[len(prompt) :] == target:
            break
        _, slopes = oracle.gradients(
            tiny.model, tiny.tokenizer, downs, [edit], ["{}"], last_prompt_token=False
        )
        with torch.no_grad():
            words = (ids[len(prompt) :], target, prompt)
            read = network.read(Condition(*(table(torch.tensor(part)).float() for part in words)))
            for place, (layer, slope) in enumerate(zip(LAYERS, slopes, strict=True)):
                totals[place] += network.gated(read, slope.to(read), layer)
                moved = oracle.oriented(downs[place], pristine[place]) + totals[place]
                downs[place].weight.copy_(oracle.oriented(downs[place], moved))
        times += 1
    with torch.no_grad():
        for down, weight in zip(downs, pristine, strict=True):
            down.weight.copy_(weight)
    return totals, times


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("max_scale", "repeats"), [(10.0, 1), (10.0, 3), (3000.0, 6)])
def test_ke_is_applied_again_until_the_model_answers(
    tmp_path: Path, family: str, max_scale: float, repeats: int
) -> None:
    tiny = fresh(family)
    spec = _editor(tiny, tmp_path, max_scale, repeats)
    settings = spec.ke.model_dump(
        include={"condition_size", "hidden_size", "lstm_size", "max_scale"}
    )
    found, _, epochs = _updates(tiny, spec, EDITS[4:])
    expected, times = _repeated(tiny, _network(tiny, settings), EDITS[4], repeats)
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < 1e-4
    # Where it took, one more time only looked.
    assert (times == repeats) == (max_scale == 10.0)
    assert epochs == min(times + 1, repeats)
