"""Calls of methods that work on gradients, and of the training of editors."""

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.cluster.calls.base import TOKENS_PER_BACKWARD, Replica, Worker
from pipeline.editing.calibration import BankGradients
from pipeline.editing.gradients import Factors
from pipeline.errors import DivergedError, InputError
from pipeline.methods import GradientMethod, build_trainable
from pipeline.methods.gradient import LaidOut
from pipeline.methods.trainable import Contribution, Learner
from pipeline.requests import EditRequest, quote
from pipeline.spec import JobSpec


class GradientCalls(Worker):
    """Gradients of edits, and those of an editor that is trained."""

    def __init__(self, spec: JobSpec, threads: int, replica: Replica | None = None) -> None:
        super().__init__(spec, threads, replica)
        self._laid_out: dict[tuple[str, ...], LaidOut] = {}
        self._laid_out_of: tuple[int, ...] = ()
        self._learner: Learner | None = None

    def gradients(
        self,
        requests: Sequence[EditRequest],
        changes: dict[int, Any] | None,
        *,
        version: int,
        round: int,
    ) -> tuple[int, Factors | BankGradients]:
        """Take the gradients of some edits, with changes on top of the edited weights.

        Args:
            requests: the edits.
            changes: what the steps so far have changed, by layer; None is nothing.

        Returns:
            How many edits, and their factors.

        Raises:
            DivergedError: a loss is not finite, and the changes are to blame.
            InputError: it is not finite before any change.
        """
        self._require(version)
        laid_out = self._lay_out(requests, round)
        assert isinstance(self.method, GradientMethod), "a method in closed form has values"
        factors = self.method.factors(laid_out, self.weights, changes)
        finite = torch.isfinite(factors.losses).tolist()
        ruined = [r.case_id for r, fine in zip(requests, finite, strict=True) if not fine]
        if ruined and changes is None:
            raise InputError(f"the loss of {quote(ruined[0])} is not finite")
        if ruined:
            raise DivergedError(
                f"the losses of {len(ruined)} requests are not finite any more, the first of them"
                f" {quote(ruined[0])}'s; take a smaller learning rate",
                tuple(ruined),
            )
        return len(requests), factors

    def contribute(
        self, items: Sequence[Any], number: int, shared: Any, *, learns: bool, version: int
    ) -> tuple[int, Contribution]:
        """Say what some examples want of an editor that is trained; arguments as of `Learner`.

        Returns:
            How many items, and what they want.
        """
        self._require(version)
        if self._learner is None:
            self._learner = build_trainable(self.spec).learner(self.weights, self.tokenizer)
        return len(items), self._learner.contribute(items, number, shared, learns=learns)

    def revert(self) -> None:
        super().revert()
        self._laid_out.clear()

    def _lay_out(self, requests: Sequence[EditRequest], round: int) -> LaidOut:
        """Edits as rows; what lower blocks make of them is kept where there is room."""
        assert isinstance(self.method, GradientMethod)
        of = (round, self.weights.version)
        if of != self._laid_out_of:
            self._laid_out.clear()
            self._laid_out_of = of
        case_ids = tuple(request.case_id for request in requests)
        found = self._laid_out.get(case_ids)
        if found is None:
            edits = self._tokenize(requests, self.contexts)
            most = TOKENS_PER_BACKWARD[self.model.input_device.type]
            found = self.method.gradients(self.model, edits, most, keeps=True)
            kept = found.num_bytes + sum(other.num_bytes for other in self._laid_out.values())
            found.keeps = kept <= self.spec.cluster.hidden_states_gb * 1e9
            self._laid_out[case_ids] = found
        return found
