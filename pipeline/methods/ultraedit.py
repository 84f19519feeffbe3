"""UltraEdit (arXiv 2505.14679): no search and no training, one backward pass an edit.

Keys k and gradients g at the tokens that predict a target are normalised by the moments of all
rows [k; g] that were ever seen, of all edited layers together, to k^ and g^. The update is the
ridge regression of v = -eta ||k^||^2 g^ on the raw keys: V K^T (K K^T + ridge I)^-1.

An edit's loss is the mean over its target's tokens; published, that mean goes over all edits of a
forward pass, so that gradients there depend on how many passes a batch takes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.editing.descent import Step
from pipeline.editing.gradients import Factors
from pipeline.editing.normaliser import Moments
from pipeline.editing.solve import ridge_factors
from pipeline.editing.update import Update
from pipeline.methods.gradient import GradientMethod, Making, State
from pipeline.spec.method import UltraEditSpec


class UltraEdit(GradientMethod):
    """The moments go on from round to round."""

    remembers = True
    tokens = "target"

    def begin(
        self, weights: Mapping[int, Tensor], pristine: Mapping[int, Tensor], state: State | None
    ) -> Making:
        entries = sum(next(iter(weights.values())).shape)
        before = Moments.none(entries) if state is None else _read(state)
        return _Regression(before, self.spec.ultraedit)


class _Regression(Making):
    def __init__(self, before: Moments, settings: UltraEditSpec) -> None:
        self._moments, self._settings = before, settings
        self._parts: list[Factors] = []
        self._updates: dict[int, Update] = {}

    def add(self, factors: Factors) -> None:
        self._parts.append(factors)

    def step(self) -> Step:
        joined = Factors.joined(self._parts)
        losses, keys, gradients = joined.losses, joined.keys, joined.gradients
        layers = list(keys)
        rows = {layer: torch.cat([keys[layer], gradients[layer]], dim=1) for layer in layers}
        self._moments = self._moments.with_rows(
            torch.cat(list(rows.values())), biased=self._settings.variance == "biased"
        )
        self._updates = {
            layer: self._update(keys[layer], self._moments.normalise(rows[layer]))
            for layer in layers
        }
        return Step(len(losses), float(losses.mean()), None)

    def finish(self) -> tuple[dict[int, Update], State]:
        moments = self._moments
        count = torch.tensor(moments.count, dtype=torch.int64)
        return self._updates, {"count": count, "mean": moments.mean, "squares": moments.squares}

    def _update(self, keys_RF: Tensor, normal_RE: Tensor) -> Update:
        size = keys_RF.shape[1]
        normal_keys, normal_gradients = normal_RE[:, :size], normal_RE[:, size:]
        lengths = normal_keys.square().sum(dim=1, keepdim=True)
        values = -self._settings.learning_rate * lengths * normal_gradients
        return Update.of(*ridge_factors(keys_RF.double(), values, self._settings.ridge))


def _read(state: State) -> Moments:
    return Moments(int(state["count"]), state["mean"], state["squares"])
