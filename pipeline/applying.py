"""Put a run's updates and adapters into a model in memory, and take them out to the bit."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from pipeline.editing.adapters import Adapter
from pipeline.editing.update import Change, EditedWeights
from pipeline.errors import FingerprintMismatchError, InputError
from pipeline.models.editable import EditableModel
from pipeline.models.encoder_decoder import editable_model
from pipeline.models.loading import fingerprint
from pipeline.models.modes import keeping_modes
from pipeline.results import Run, read
from pipeline.results.updates import read_update
from pipeline.spec import JobSpec, parse_spec


@dataclass(frozen=True)
class AppliedUpdates:
    """Updates and adapters that are in a model; `revert` takes them out."""

    model: PreTrainedModel
    weights: EditedWeights

    def revert(self) -> None:
        """Restore the exact bits that the model had before."""
        self.weights.revert()


def apply_updates(
    model: PreTrainedModel, run: str | Path, *, round: int | None = None
) -> AppliedUpdates:
    """Apply a run's updates and adapters to a plain transformers model, in place.

    The model may be in another dtype than the run computed in; each edited weight is W0 plus the
    sum of its updates, formed in float32 and rounded once. An adapter is put beside its block by
    hooks, and the weights stay as they are. Its modes are left alone (training, requires_grad).

    Args:
        model: the unedited model that the run edited.
        run: the run directory, or the run's URL.
        round: stop after this round of a study, counted from 0, or where rounds were rolled back
            apply this one; null applies all of a finished run.

    Raises:
        InputError: the run is not finished, or the round is not.
        FingerprintMismatchError: the model is another one, is already edited, or a shape differs.
        ResultsDamagedError: an update file does not match the run's manifest.
    """
    opened = read(run)
    require_round(opened, round)
    opened.verify()
    if spec_of(opened).method.is_memory:
        raise InputError(
            f"{run}: its edits are in a memory, and change no weight: `editfleet export` it and"
            " load that with pipeline.load_serac"
        )
    require_fingerprint(model, opened)
    with keeping_modes(model):
        editable = editable_model(model)
    updates = [
        read_update(path)[:2]
        for number in rounds_of(opened, round)
        for path in opened.updates(number)
    ]
    check_shapes(editable, updates, run)
    weights = EditedWeights(editable, tuple(sorted({layer for layer, _ in updates})))
    for layer, update in updates:
        weights.apply(layer, update)
    return AppliedUpdates(model, weights)


def rounds_of(run: Run, round: int | None) -> Sequence[int | None]:
    """The rounds whose updates make the model as it was after a round; None for all."""
    if round is None:
        return [None]
    return [round] if spec_of(run).rolls_back else range(round + 1)


def spec_of(run: Run) -> JobSpec:
    """The resolved spec of a run.

    Raises:
        InputError: it is none that this version knows.
    """
    return parse_spec(run.recorded.spec, f"{run.place}/manifest.json: spec")


def require_fingerprint(model: PreTrainedModel, run: Run) -> None:
    """Check that a model is the unedited one of a run.

    Raises:
        FingerprintMismatchError: it is not.
    """
    recorded = run.recorded
    found, expected = fingerprint(model), recorded.model.fingerprint
    if found != expected:
        raise FingerprintMismatchError(
            f"{run.place}: its updates were made for the model with fingerprint {expected[:12]},"
            f" this one has {found[:12]}; load the unedited {recorded.model.path!r}"
        )


def require_round(run: Run, round: int | None) -> None:
    """Check that a run holds all updates up to a round, or with null that it is finished.

    Of a study that rolled every round back, `round` has to be given: no model holds all of it.

    Raises:
        InputError: it does not; the message names the last round that it holds whole.
    """
    if spec_of(run).rolls_back:
        _require_round_apart(run, round)
        return
    if round is None:
        if run.recorded.status != "finished":
            raise InputError(f"{run.place} is not finished (status {run.recorded.status!r})")
        return
    last = last_round(run)
    if not 0 <= round <= last:
        held = f"its last whole one is {last}" if last >= 0 else "it holds no whole one"
        raise InputError(f"{run.place} has no round {round}; {held}")


def _require_round_apart(run: Run, round: int | None) -> None:
    if round is None:
        raise InputError(
            f"{run.place} is a study that put the unedited model back after every round; say with"
            " --round which one's edits to apply"
        )
    if round < 0 or not run.updated_layers(round) >= set(spec_of(run).method.layers or ()):
        raise InputError(f"{run.place} holds no whole round {round}")


def last_round(run: Run) -> int:
    """The last round of which a run holds the updates of all layers, counted from 0; else -1."""
    layers = set(spec_of(run).method.layers or ())
    count = 0
    while run.updated_layers(count) >= layers:
        count += 1
    return count - 1


def check_shapes(
    model: EditableModel, updates: Sequence[tuple[int, Change]], run: str | Path
) -> None:
    """Check that updates and adapters, each with its layer, fit a model.

    Raises:
        FingerprintMismatchError: one does not.
    """
    num_blocks = model.num_blocks
    for layer, update in updates:
        if layer >= num_blocks:
            raise FingerprintMismatchError(
                f"{run}: has an update of layer {layer}, the model has {num_blocks} blocks"
            )
        if isinstance(update, Adapter):
            if misfit := update.misfit(model, layer):
                raise FingerprintMismatchError(f"{run}: the adapter of layer {layer}: {misfit}")
            continue
        has, wants = tuple(update.matrix().shape), tuple(model.oriented_weight(layer).shape)
        if has != wants:
            raise FingerprintMismatchError(
                f"{run}: the update of layer {layer} is {has}, the model's weight {wants}"
            )
