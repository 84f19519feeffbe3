"""Build the embedded model again: tokenizer, weights and editing settings from one seed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.errors import JobFailedError
from pipeline.factworld.packing import batches, encode_facts
from pipeline.factworld.recall import recall
from pipeline.factworld.train import (
    Shape,
    new_model,
    train,
    train_tokenizer,
)
from pipeline.factworld.world import World, corpus, make_world

DEFAULT_STEPS = 1600
REQUIRED_RECALL = 0.99
REPORT_EVERY = 100
NUM_CONTEXTS = 5
SETTINGS_SOURCE = (
    "searched on the packaged model with one batch of 300 edits: layers [1] and [0, 1], "
    "covariance_weight 10, 100, 1000; [0, 1] is the better in all figures, 10 and 100 are equal "
    "within half a point and 100 keeps more neighbourhood prompts exact; value settings are those "
    "published for Llama-2-7B in EasyEdit, not searched"
)


@dataclass(frozen=True)
class BuildReport:
    """What a build made; recall is a share of prompts, `seconds` the time of the training."""

    directory: Path
    num_facts: int
    steps: int
    seconds: float
    recall_seen: float
    recall_held_out: float
    weight_bytes: int


def build(
    directory: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[str], None] = print,
    entities_per_kind: int = 170,
    shape: Shape | None = None,
    required_recall: float = REQUIRED_RECALL,
) -> BuildReport:
    """Train the model of the world of `seed` and write it, float16, into `directory`.

    Takes about a quarter of an hour on two cores. Nothing is written unless the model recalls
    its facts; `entities_per_kind`, `shape` and `required_recall` make smaller builds possible.

    Raises:
        JobFailedError: recall is below `required_recall`, seen or held out, after all steps.
    """
    steps = DEFAULT_STEPS if steps is None else steps
    world = make_world(seed, entities_per_kind=entities_per_kind)
    shape = shape or Shape()
    tokenizer = train_tokenizer(corpus(world, seed), shape.vocab_size)
    model = new_model(shape, tokenizer, seed)
    start = time.monotonic()
    _train(model, tokenizer, world, steps, seed, progress)
    seconds = time.monotonic() - start
    _round_to_float16(model)
    seen = recall(model, tokenizer, world, held_out=False)
    held_out = recall(model, tokenizer, world, held_out=True)
    progress(f"recall: {seen:.4f} in seen phrasings, {held_out:.4f} in held-out ones")
    if min(seen, held_out) < required_recall:
        raise JobFailedError(
            f"the model recalls {seen:.4f} of its facts in seen and {held_out:.4f} in held-out "
            f"phrasings after {steps} steps, {required_recall} is required; give more steps"
        )
    weight_bytes = _save(directory, model, tokenizer, world)
    return BuildReport(directory, len(world.facts), steps, seconds, seen, held_out, weight_bytes)


def editing_settings(world: World) -> dict[str, Any]:
    """Return the published editing settings: the keys `method` and `covariance` of a job spec.

    The context prefixes are sentences of the world itself, so that a subject is read in text of
    the kind that the model was trained on.
    """
    contexts = ["{}"] + [f"{sentence}. {{}}" for sentence in corpus(world, 1)[:NUM_CONTEXTS]]
    return {
        "source": SETTINGS_SOURCE,
        "method": {
            "layers": [0, 1],
            "covariance_weight": 100,
            "contexts": contexts,
            "value": {
                "steps": 25,
                "learning_rate": 0.5,
                "weight_decay": 0.001,
                "kl_weight": 0.0625,
                "clamp_norm": 4,
                "stop_loss": 0.05,
            },
        },
        "covariance": {"corpus": "factworld", "samples": 4000},
    }


def _train(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    steps: int,
    seed: int,
    progress: Callable[[str], None],
) -> None:
    data = batches(encode_facts(world, tokenizer), tokenizer, seed)
    start = time.monotonic()
    for step, loss in train(model, data, world, steps=steps):
        if step % REPORT_EVERY == 0 or step == steps:
            elapsed = time.monotonic() - start
            left = elapsed / step * (steps - step)
            progress(f"step {step}/{steps}  loss {loss:.3f}  {elapsed:.0f} s, {left:.0f} s left")


@torch.no_grad()
def _round_to_float16(model: GPT2LMHeadModel) -> None:
    """Give every weight the value it will have in the file: recall is measured on those."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half())


def _save(
    directory: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, world: World
) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = yaml.safe_dump(editing_settings(world), sort_keys=False, width=100)
    (directory / "editing.yaml").write_text(settings, encoding="utf-8")
    return (directory / "model.safetensors").stat().st_size
