"""The reducer: merges shards of keys and residuals into one layer's update."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.editing.calibration import BankGradients
from pipeline.editing.descent import Step
from pipeline.editing.equations import ManyEdits, NormalEquations, Penalty
from pipeline.editing.gradients import Factors
from pipeline.editing.sums import Sums
from pipeline.editing.update import Change, Update
from pipeline.methods import ClosedForm, GradientMethod, build_method, build_trainable
from pipeline.methods.gradient import Making, State
from pipeline.methods.trainable import Contribution, Measured, Shapes, Trainer
from pipeline.models.editable import resolve_device
from pipeline.spec import JobSpec, MethodSpec

# What a worker hands over, as the phase needs it.
HandedOver = tuple[Tensor, Tensor] | Sums | Factors | Contribution

# What is kept of the layers between rounds. A model whose layers need more than that has their
# factors computed again each round, to the same bits.
KEPT_BYTES = 4e9


class Reducer:
    """Adds shards in the plan's order, whatever order they arrive in, and solves.

    Memory: C and the sums, 4 F^2 float64 numbers at the solve, the shards that wait for an earlier
    one, and up to 4 GB of what the next round can use again: a layer's penalty and its factor.

    Args:
        method: the resolved method.
        threads: compute threads; they decide the last bits of the result.
    """

    def __init__(self, method: MethodSpec, threads: int) -> None:
        torch.set_num_threads(threads)
        self.method = build_method(method)
        self.device, _ = resolve_device()
        self._penalties: dict[int, Penalty] = {}
        self._equations: NormalEquations | None = None
        self._making: Making | None = None
        self._trainer: Trainer | None = None
        self._waiting: dict[int, HandedOver] = {}
        self._next = 0

    def begin(
        self,
        layer: int,
        covariance_FF: Tensor,
        num_edits: int,
        past_FF: Tensor | None = None,
    ) -> None:
        """Start a layer; what was under way is dropped.

        Args:
            layer: the layer, whose covariance is the same in every round.
            covariance_FF: C, float64.
            num_edits: edits of this round.
            past_FF: sum of K K^T over the rounds before, for a method that remembers.

        Raises:
            ValueError: the covariance cannot be factored, or leaves an update no direction.
        """
        assert isinstance(self.method, ClosedForm), "a gradient method begins a round"
        past = None if past_FF is None else past_FF.to(self.device, torch.float64)
        penalty = self._penalty(layer, covariance_FF)
        self._equations = self.method.equations(penalty, num_edits, past)
        self._waiting.clear()
        self._next = 0

    def begin_round(
        self,
        weights: dict[int, Tensor],
        pristine: dict[int, Tensor],
        state: State | None,
    ) -> None:
        """Start a round of a gradient method; what was under way is dropped.

        Args: as of `GradientMethod.begin`.
        """
        assert isinstance(self.method, GradientMethod), "a method in closed form begins a layer"
        near = {layer: weight.to(self.device) for layer, weight in weights.items()}
        first = {layer: weight.to(self.device) for layer, weight in pristine.items()}
        self._making = self.method.begin(near, first, state)
        self._waiting.clear()
        self._next = 0

    def add(self, order: int, part: HandedOver) -> None:
        """Take what the part at this place (from 0) has come to."""
        self._waiting[order] = part
        while self._next in self._waiting:
            self._take(self._waiting.pop(self._next))
            self._next += 1

    def solve(self, num_parts: int) -> Update:
        """Solve for the update once all parts are in.

        Raises:
            ValueError: the equations are not finite or cannot be factored.
        """
        assert self._equations is not None and self._next == num_parts, "parts are missing"
        return self._equations.solve()

    def step(self, num_parts: int) -> Step:
        """Do a gradient method's step once all its parts are in; the next begins at place 0.

        Raises:
            ValueError: the factors make no update.
        """
        assert self._making is not None and self._next == num_parts, "parts are missing"
        self._next = 0
        return self._making.step()

    def finish_round(self) -> tuple[Mapping[int, Change], State]:
        """The updates of a gradient method's round, and what the next one has to know."""
        assert self._making is not None, "begin a round first"
        return self._making.finish()

    def begin_training(self, spec: JobSpec, shapes: Shapes, state: State | None) -> int:
        """Begin the training of an editor, or go on with it; what was under way is dropped.

        Args:
            spec: the resolved job spec.
            shapes: of the model.
            state: of the checkpoint to go on from.

        Returns:
            Measurements since the best one.
        """
        self._trainer = build_trainable(spec).trainer(shapes, state)
        self._waiting.clear()
        self._next = 0
        return self._trainer.since_best

    def begin_step(self, learns: bool) -> object:
        """Begin a step of a training, or a measurement; what its first pass is given."""
        return self._training.begin(learns=learns)

    def end_pass(self, number: int, num_parts: int) -> object:
        """What the next pass of a step is given, once all parts of this one are in."""
        self._require_all(num_parts)
        return self._training.end_pass(number)

    def end_step(self, num_parts: int) -> Measured:
        """Make a training's step once all parts of its last pass are in.

        Raises:
            ValueError: a loss or a gradient is not finite.
        """
        self._require_all(num_parts)
        return self._training.end()

    def validated(self, measured: Measured) -> int:
        """Take note of a measurement; how many there have been since the best one."""
        return self._training.validated(measured)

    def checkpoint(self) -> State:
        """What going on with a training needs."""
        return self._training.state()

    def trained_editor(self) -> State:
        """The parameters that a training has come to."""
        return self._training.editor()

    @property
    def _training(self) -> Trainer:
        assert self._trainer is not None, "begin a training first"
        return self._trainer

    def _require_all(self, num_parts: int) -> None:
        assert self._next == num_parts, "parts are missing"
        self._next = 0

    def _take(self, part: HandedOver) -> None:
        if isinstance(part, Contribution):
            self._training.add(part)
            return
        if isinstance(part, Factors | BankGradients):
            assert self._making is not None, "begin a round first"
            self._making.add(part)
            return
        assert self._equations is not None, "begin a layer first"
        if isinstance(part, Sums):
            assert isinstance(self._equations, ManyEdits), "sums are of many edits"
            self._equations.add_sums(part)
        else:
            self._equations.add(*part)

    def _penalty(self, layer: int, covariance_FF: Tensor) -> Penalty:
        if layer not in self._penalties:
            self._equations = None
            assert isinstance(self.method, ClosedForm)
            penalty = self.method.penalty(covariance_FF.to(self.device, torch.float64))
            kept = sum(kept.num_bytes for kept in self._penalties.values())
            if kept + penalty.num_bytes > KEPT_BYTES:
                return penalty
            self._penalties[layer] = penalty
        return self._penalties[layer]
