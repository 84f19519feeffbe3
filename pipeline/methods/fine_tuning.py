"""Fine-tuning of down-projections: FT, FT-L and FT-M, as the baselines of other editors.

FT (arXiv 2012.00363; 2202.05262, appendix) runs Adam over minibatches of the edits. FT-L keeps
every entry of the weights within a distance of what it was. What EasyEdit (arXiv 2308.07269) calls
FT-M predicts each target token behind the ones before it; the code of 2202.05262, and FT-L there,
predicts all of them at the prompt's last token. Both choices are settings of their own.

The box lies around the unedited model's weights, so that it bounds a whole study; published, it
lies around those that a call begins with, and grows with every round.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from pipeline.editing.descent import Descent, DescentSettings, Step, mean_loss
from pipeline.editing.gradients import Factors
from pipeline.editing.update import Update
from pipeline.methods.gradient import GradientMethod, Making, State, T
from pipeline.spec import MethodSpec


class FineTuning(GradientMethod):
    """Adam over minibatches, an epoch after another, until the mean loss is low."""

    def __init__(self, spec: MethodSpec) -> None:
        super().__init__(spec)
        self.read, self.epochs = spec.ft.read, spec.ft.epochs

    def batches(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        size = self.spec.ft.batch_size
        for start in range(0, len(items), size):
            yield items[start : start + size]

    def begin(
        self, weights: Mapping[int, Tensor], pristine: Mapping[int, Tensor], state: State | None
    ) -> Making:
        around = weights if self.spec.ft.constraint_around == "round" else pristine
        settings = self.spec.ft
        return _Tuning(
            Descent(
                weights,
                around,
                DescentSettings(
                    settings.learning_rate,
                    settings.weight_decay,
                    settings.stop_loss,
                    settings.norm_constraint,
                ),
            )
        )

    def is_done(self, epoch: Sequence[Step]) -> bool:
        return mean_loss(epoch) < self.spec.ft.stop_loss


class _Tuning(Making):
    def __init__(self, descent: Descent) -> None:
        self._descent = descent

    def add(self, factors: Factors) -> None:
        self._descent.add(factors)

    def step(self) -> Step:
        return self._descent.step()

    def finish(self) -> tuple[dict[int, Update], State]:
        return {layer: Update.of(change) for layer, change in self._descent.changes.items()}, {}
