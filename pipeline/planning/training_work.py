"""What the training of an editor computes and moves, counted from the examples that it draws.

The examples of a few steps are made as the job makes them and stand for all; so do those of all
held requests, up to some hundreds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipeline.cluster.examples import Examples
from pipeline.cluster.plan import Plan
from pipeline.planning.flops import RowTokens
from pipeline.planning.outline import ModelOutline
from pipeline.planning.training_flops import COUNTS, Cost, StepWork, TrainingCount
from pipeline.spec import TrainSpec

_SAMPLED_EXAMPLES, _MOST_STEPS = 256, 16


@dataclass(frozen=True)
class TrainingWork:
    """A training that makes all steps that it may.

    Attributes:
        train: its settings.
        learnt, held: requests to train on and to measure on.
        step: an ordinary step, the mean of some.
        measurement: of every part of one.
        measurements: how many there are.
        count: what it was counted by.
    """

    train: TrainSpec
    learnt: int
    held: int
    step: StepWork
    measurement: tuple[StepWork, ...]
    measurements: int
    count: TrainingCount

    @property
    def out(self) -> float:
        """Bytes that workers are given, each step's and measurement's once."""
        measured = sum(part.out for part in self.measurement)
        return self.train.steps * self.step.out + self.measurements * measured

    @property
    def back(self) -> float:
        """Bytes that they return."""
        measured = sum(part.back for part in self.measurement)
        return self.train.steps * self.step.back + self.measurements * measured

    @property
    def checkpoints(self) -> int:
        """How many are written, one after another."""
        return -(-self.train.steps // self.train.checkpoint_every)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one: the editor now and at its best, and two moments of every parameter."""
        editors = 2 if self.measurements else 1
        return editors * self.count.state_bytes + 2 * self.count.parameters * 4


def count_training(
    plan: Plan, model: ModelOutline, tokenizer: PreTrainedTokenizerBase
) -> TrainingWork:
    """Count what a plan of `pipeline.cluster.learning.plan_training` computes.

    Args:
        plan: the training.
        model: its model's shapes.
        tokenizer: its tokenizer.

    Raises:
        InputError: the requests make no examples, or a model that is named cannot be found.
    """
    examples, train = Examples(plan), plan.spec.train
    assert train is not None
    trainable = examples.trainable
    count = COUNTS[plan.spec.method.name](trainable, model, tokenizer, plan.layers)
    sampled = max(1, min(train.steps, _MOST_STEPS, _SAMPLED_EXAMPLES // examples.of_step))
    steps = [
        count.step([shard.items for shard in examples.step(number)], learns=True)
        for number in range(sampled)
    ]
    measured = tuple(
        count.step([shard.items for shard in shards], learns=False) for shards in examples.measured
    )
    times = train.steps // train.validate_every + bool(train.steps % train.validate_every)
    return TrainingWork(
        train,
        len(examples.learnt),
        len(examples.held),
        _mean(steps),
        measured,
        times if measured else 0,
        count,
    )


def _mean(steps: Sequence[StepWork]) -> StepWork:
    """Steps have equally many pieces; the largest piece is that of all."""
    share = 1.0 / len(steps)
    passes = tuple(
        tuple(_sum(piece) * share for piece in zip(*number, strict=True))
        for number in zip(*(step.passes for step in steps), strict=True)
    )
    largest: RowTokens = max((step.largest for step in steps), key=lambda rows: rows.tokens)
    return StepWork(
        passes,
        _sum([step.reducer for step in steps]) * share,
        share * sum(step.out for step in steps),
        share * sum(step.back for step in steps),
        largest,
    )


def _sum(costs: Sequence[Cost]) -> Cost:
    return sum(costs, Cost())
