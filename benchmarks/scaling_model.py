"""What W workers take, from what one takes: the model behind `scaling` and `scaling_shapes`.

A phase's shards go one after another to whichever worker is free. A layer's keys, sums, merge and
update wait for each other; keys enter the reducer's node over one link, an update goes on from node
to node. What the driver does for a shard it does alone, while the workers go on with others.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.planning.rates import crossing_seconds, makespan

GOAL = 0.8
EVEN = "even"
PARTS = {
    EVEN: "work, evenly spread",
    "uneven": "workers without a shard while others finish theirs",
    "groups": "workers without keys to sum while others sum theirs",
    "driver": "workers that wait for the driver",
    "merge": "the reducer's equations, all workers waiting",
    "apply": "every worker's application of the update",
    "network": "keys and updates on their way",
}
"""What the seconds of a phase consist of."""


@dataclass(frozen=True)
class LayerCosts:
    """Seconds and bytes of one edited layer.

    Attributes:
        keys: seconds of every shard's keys.
        sums: seconds of every group's sum, which workers' nodes form; none where keys travel.
        merge: seconds of the reducer.
        apply: seconds in which a worker applies the update.
        inward: bytes that enter a node one after another before the reducer has everything.
        update: bytes of the update.
    """

    keys: Sequence[float]
    merge: float
    apply: float
    inward: float
    update: float
    sums: Sequence[float] = ()


@dataclass(frozen=True)
class Costs:
    """What a job costs one worker.

    Attributes:
        shards: phase -> seconds of its shards; of all phases but `insertion`.
        layers: the insertion's.
        driver: phase -> seconds of the driver for a shard, beside the workers.
    """

    shards: Mapping[str, Sequence[float]]
    layers: Sequence[LayerCosts]
    driver: Mapping[str, float] = field(default_factory=dict)

    @property
    def phases(self) -> tuple[str, ...]:
        """In the order in which they run."""
        first, *others = self.shards
        return (first, "insertion", *others)

    def parts(self, phase: str, workers: int, bytes_per_second: float) -> Counter[str]:
        """Seconds of a phase on so many workers, by `PARTS`; their sum is what it takes."""
        driver = self.driver.get(phase, 0.0)
        if phase != "insertion":
            return _spread(self.shards[phase], workers, driver)
        found: Counter[str] = Counter()
        for layer in self.layers:
            found += _spread(layer.keys, workers, driver)
            summed = _spread(layer.sums, workers, 0.0)
            found += Counter({EVEN: summed[EVEN], "groups": summed["uneven"]})
            moved = crossing_seconds(layer.inward, layer.update, workers, bytes_per_second)
            found += Counter({"merge": layer.merge, "apply": layer.apply, "network": moved})
        return found

    def all_parts(self, workers: int, bytes_per_second: float) -> Counter[str]:
        """The same of all phases together."""
        found: Counter[str] = Counter()
        for phase in self.phases:
            found += self.parts(phase, workers, bytes_per_second)
        return found


def efficiency(alone: Counter[str], many: Counter[str], workers: int) -> float:
    """T(1) / (W T(W))."""
    return alone.total() / (workers * many.total())


def largest_loss(parts: Counter[str]) -> str:
    """What most of the seconds beyond even work go to."""
    lost = Counter({name: seconds for name, seconds in parts.items() if name != EVEN})
    return PARTS[lost.most_common(1)[0][0]] if lost else "nothing"


def _spread(shards: Sequence[float], workers: int, driver: float) -> Counter[str]:
    """Seconds of shards on workers, and of the driver where it is slower than they are."""
    even, last = sum(shards) / workers, makespan(shards, workers)
    waiting = max(0.0, driver * len(shards) - last)
    return +Counter({EVEN: even, "uneven": last - even, "driver": waiting})
