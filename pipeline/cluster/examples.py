"""What an editor is trained on: the requests of a plan, drawn and cut for the workers."""

import logging
import random
from collections.abc import Sequence

from pipeline.cluster.plan import Plan
from pipeline.cluster.shards import Shard
from pipeline.errors import InputError
from pipeline.methods import build_trainable
from pipeline.requests import EditRequest
from pipeline.sources.corpus import read_corpus

log = logging.getLogger(__name__)


class Examples:
    """The requests of a plan, those to train on and those to measure on, and how they are drawn.

    Raises:
        InputError: there are too few of them, or nothing to leave alone.
    """

    def __init__(self, plan: Plan) -> None:
        assert plan.spec.train is not None
        self.train, self.seed = plan.spec.train, plan.spec.seed
        self.trainable = build_trainable(plan.spec)
        accepted = [row.request for row in plan.rows if row.request is not None]
        held = int(len(accepted) * self.train.validation)
        self.learnt, self.held = accepted[: len(accepted) - held], accepted[len(accepted) - held :]
        assert self.train.batch_size is not None and self.train.accumulate is not None
        self.of_step = self.train.batch_size * self.train.accumulate
        if self.train.batch_size > len(self.learnt):
            raise InputError(
                f"train.batch_size: {self.train.batch_size} edits are to be made at once, and there"
                f" are {len(self.learnt)} requests to train on; give more requests, or a smaller"
                " train.batch_size"
            )
        self._ordered: tuple[int, list[int]] = -1, []
        self.texts: list[str] = []
        if self.train.corpus is not None:
            self.texts = read_corpus(
                self.train.corpus,
                field=self.train.field,
                samples=self.train.texts,
                seed=self.seed,
                setting="train",
            )
        # Here, so that what cannot be made is said before anything is begun.
        self.step(0)
        self.measured = self._measured()

    def epoch(self, step: int) -> int:
        """How often the requests had all been gone through before a step."""
        return step * self.of_step // len(self.learnt)

    def step(self, step: int) -> list[Shard]:
        """The pieces of a step: requests in a new order every epoch, whatever came before."""
        start = step * self.of_step
        drawn = []
        for place in range(start, start + self.of_step):
            epoch, position = divmod(place, len(self.learnt))
            drawn.append(self.learnt[self._order(epoch)[position]])
        return self._cut(drawn, self.learnt, f"step {step}")

    def _order(self, epoch: int) -> list[int]:
        if self._ordered[0] != epoch:
            order = list(range(len(self.learnt)))
            random.Random(f"{self.seed} epoch {epoch}").shuffle(order)
            self._ordered = epoch, order
        return self._ordered[1]

    def _measured(self) -> list[list[Shard]]:
        """The same of the held requests, in batches as large as a step's as far as they reach."""
        assert self.train.batch_size is not None
        whole = len(self.held) - len(self.held) % self.train.batch_size
        if not whole:
            log.warning(
                "train.validation keeps %d requests, fewer than train.batch_size: nothing is"
                " measured, and the last editor is saved, not the best",
                len(self.held),
            )
        return [
            self._cut(self.held[start : min(start + self.of_step, whole)], self.held, f"at {start}")
            for start in range(0, whole, self.of_step)
        ]

    def _cut(
        self, drawn: Sequence[EditRequest], others: Sequence[EditRequest], what: str
    ) -> list[Shard]:
        generator = random.Random(f"{self.seed} {what}")
        pieces = self.trainable.pieces(drawn, others, self.texts, generator)
        return [Shard(number, items) for number, items in enumerate(pieces)]
