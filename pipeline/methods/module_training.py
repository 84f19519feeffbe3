"""Training a torch module by gradients that come from the workers: the usual two halves.

A subclass of `ModuleLearner` says only what its loss is; `ModuleTrainer` serves as it is.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.methods.trainable import Contribution, Learner, Measured, State, Trainer

_PARAMETERS, _BEST, _OPTIMISER = "parameters.", "best.", "optimiser."


class ModuleLearner(Learner):
    """Runs a module on a worker, with the parameters that the trainer gives out.

    Args:
        module: what is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @abstractmethod
    def losses(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Measures summed over some items' examples, scalars; `loss` is what is made small."""

    def count(self, items: Sequence[Any]) -> int:
        """Examples in some items."""
        return len(items)

    def contribute(
        self, items: Sequence[Any], number: int, shared: Any, *, learns: bool
    ) -> Contribution:
        self.module.load_state_dict(shared)
        self.module.train(learns)
        with torch.set_grad_enabled(learns):
            measures = self.losses(items)
            gradients = gradients_of(measures["loss"], self.module) if learns else {}
        found = {name: float(measure.detach()) for name, measure in measures.items()}
        return Contribution(self.count(items), found, gradients)


def gradients_of(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Gradients of a scalar in a module's parameters, on the CPU; those that it does not use have
    none."""
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    pairs = zip(named, found, strict=True)
    return {name: gradient.detach().cpu() for name, gradient in pairs if gradient is not None}


def add_gradients(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add gradients to those that there are."""
    for name, gradient in more.items():
        before = total.get(name)
        total[name] = gradient.clone() if before is None else before.add_(gradient)


class ModuleTrainer(Trainer):
    """Holds a module and its optimiser, and keeps the parameters of the best measurement.

    Args:
        module: what is trained, as it is before the first step.
        optimiser: of its parameters.
        max_gradient_norm: a step's gradient is scaled down to this norm; None leaves it.
        warm_up: steps over which the learning rates grow from nothing.
        state: of a checkpoint to go on from.
    """

    def __init__(
        self,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        max_gradient_norm: float | None,
        warm_up: int,
        state: State | None,
    ) -> None:
        self.module, self.optimiser = module, optimiser
        self.max_gradient_norm, self.warm_up = max_gradient_norm, warm_up
        self._rates = [group["lr"] for group in optimiser.param_groups]
        self._step, self._since_best, self._best_loss = 0, 0, float("inf")
        self._best: State = {}
        self._learns = True
        self._count = 0
        self._measures: dict[str, float] = {}
        self._gradients: dict[str, Tensor] = {}
        if state is not None:
            self._load(state)

    @property
    def since_best(self) -> int:
        return self._since_best

    def begin(self, *, learns: bool) -> Any:
        self._learns, self._count = learns, 0
        self._measures, self._gradients = {}, {}
        return self.shared()

    def shared(self) -> Any:
        """What the calls of the first pass are given: all parameters and buffers, on the CPU."""
        return _copied(self.module.state_dict())

    def add(self, part: Contribution) -> None:
        self._count += part.count
        for name, measure in part.measures.items():
            self._measures[name] = self._measures.get(name, 0.0) + measure
        add_gradients(self._gradients, part.gradients)

    def end(self) -> Measured:
        means = {name: total / self._count for name, total in self._measures.items()}
        if self._learns:
            self.learn(self._gradients, self._count)
        return Measured(self._count, means)

    @torch.no_grad()
    def learn(self, gradients: Mapping[str, Tensor], count: int) -> None:
        """Make a step down the mean of gradients that are summed over `count` examples.

        Raises:
            ValueError: a gradient is not finite.
        """
        parameters = dict(self.module.named_parameters())
        for name, parameter in parameters.items():
            found = gradients.get(name)
            parameter.grad = None if found is None else found.to(parameter) / count
        moved = [parameter for parameter in parameters.values() if parameter.grad is not None]
        most = float("inf") if self.max_gradient_norm is None else self.max_gradient_norm
        norm = nn.utils.clip_grad_norm_(moved, most)
        if not bool(norm.isfinite()):
            raise ValueError("the gradient is not finite; take a smaller learning rate")
        self._step += 1
        grown = min(1.0, self._step / self.warm_up) if self.warm_up else 1.0
        for group, rate in zip(self.optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * grown
        self.optimiser.step()
        self.optimiser.zero_grad()

    def validated(self, measured: Measured) -> int:
        self._since_best += 1
        if measured.measures["loss"] < self._best_loss:
            self._best_loss, self._since_best = measured.measures["loss"], 0
            self._best = _copied(self.module.state_dict())
        return self._since_best

    def state(self) -> State:
        counts = {"step": self._step, "since_best": self._since_best}
        return {
            **{name: torch.tensor(count) for name, count in counts.items()},
            "best_loss": torch.tensor(self._best_loss, dtype=torch.float64),
            **_prefixed(_PARAMETERS, _copied(self.module.state_dict())),
            **_prefixed(_BEST, self._best),
            **{
                f"{_OPTIMISER}{index}.{name}": tensor.detach().cpu().clone()
                for index, entries in self.optimiser.state_dict()["state"].items()
                for name, tensor in entries.items()
            },
        }

    def editor(self) -> State:
        return self._best or _copied(self.module.state_dict())

    def _load(self, state: State) -> None:
        self._step, self._since_best = int(state["step"]), int(state["since_best"])
        self._best_loss = float(state["best_loss"])
        self._best = _under(_BEST, state)
        self.module.load_state_dict(_under(_PARAMETERS, state))
        held = self.optimiser.state_dict()
        held["state"] = {}
        for name, tensor in _under(_OPTIMISER, state).items():
            index, _, entry = name.partition(".")
            held["state"].setdefault(int(index), {})[entry] = tensor
        self.optimiser.load_state_dict(held)


def _copied(state: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _under(prefix: str, state: State) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
