"""The embedded default: an invented world, and a small model that knows its facts."""

import json
from pathlib import Path

from pipeline.factworld.questions import corpus
from pipeline.factworld.requests import edit_requests
from pipeline.factworld.world import Fact, World, make_world

__all__ = [
    "SEED",
    "Fact",
    "World",
    "corpus",
    "edit_requests",
    "make_world",
    "model_path",
    "write_corpus",
    "write_requests",
]

SEED = 0
"""The seed of the world that the packaged model was trained on."""


def model_path() -> Path:
    """Return the directory of the packaged model, with its tokenizer and `editing.yaml`."""
    return Path(__file__).parent / "model"


def write_requests(path: Path, count: int, seed: int = 0) -> None:
    """Write `count` edit requests for the packaged model as JSON in the CounterFact schema.

    Raises:
        InputError: the world has not enough facts for `count` requests.
    """
    requests = edit_requests(make_world(SEED), count, seed)
    path.write_text(json.dumps(requests, indent=1), encoding="utf-8")


def write_corpus(path: Path, seed: int = 0) -> None:
    """Write the sentences the packaged model was trained on as text, one a line, shuffled."""
    lines = [f"{sentence}.\n" for sentence in corpus(make_world(SEED), seed)]
    path.write_text("".join(lines), encoding="utf-8")
