"""What the networks have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from pipeline.editing.gradients import Factors
from pipeline.editing.normaliser import Moments
from pipeline.editing.update import Update

Seen = Mapping[str, Moments]


class HyperNetwork(nn.Module, ABC):
    """Makes updates of factors; differentiable in its parameters."""

    @abstractmethod
    def edit(self, factors: Factors) -> dict[int, Update]:
        """The updates of all edits together, to be applied."""

    @abstractmethod
    def gradients(self, factors: Factors, slopes: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Gradients of a loss in the parameters, from those in the updates.

        Args:
            factors: that the updates are made of.
            slopes: layer -> (D, F) gradient of the loss in the layer's update.

        Returns:
            Parameter -> gradient, of those that the updates depend on, on the CPU.
        """

    def seen_in(self, factors: Factors) -> Seen:
        """What a normaliser, if there is one, has to take note of while it is trained."""
        return {}

    def take(self, seen: Seen) -> None:
        """Let the normaliser take note of that."""
