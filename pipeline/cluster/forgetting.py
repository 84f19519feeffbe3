"""A run's memory as it would be without some of its edits: their entries are left out."""

from collections.abc import Callable, Iterator

from torch import Tensor

from pipeline.cluster.removal import Removal
from pipeline.editing.adapters import MemoryAdapter
from pipeline.editing.update import Change, EditedWeights
from pipeline.errors import ResultsDamagedError
from pipeline.results.updates import read_update


class Forgetting:
    """What a removal leaves of a memory, round after round; every other entry stays as it is.

    Args:
        removal: what is taken out.
        weights: the unedited model's; every change is applied to them.
        bound: gives a change the models that it is used with.
    """

    def __init__(
        self, removal: Removal, weights: EditedWeights, bound: Callable[[Change], Change]
    ) -> None:
        self.removal, self.weights, self.bound = removal, weights, bound
        self.changes: dict[int, Tensor] = {}
        """Of weights, of which none changes."""

    def apply(self) -> Iterator[tuple[int, int]]:
        """Apply the changes of all rounds in their order; yield (round, layer) after each.

        Raises:
            ResultsDamagedError: a change is not what its name says.
        """
        for round in range(len(self.removal.edits)):
            paths = self.removal.store.layers("update", round)
            for layer in self.removal.layers:
                stored = read_update(paths[layer])[1]
                if not isinstance(stored, MemoryAdapter):
                    raise ResultsDamagedError(f"{paths[layer]} holds no entries of a memory")
                self.weights.apply(layer, self.bound(stored.without(self.removal.removed)))
                yield round, layer
