"""Model, tokenizer and edits of a benchmark, from the arguments that all of them take."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.machine import RESULTS, ROOT
from benchmarks.timing import CLOCKS
from pipeline.cluster.calls.base import TOKENS_PER_BATCH
from pipeline.cluster.plan import make_plan
from pipeline.editing.batching import TokenBatch
from pipeline.models.editable import EditableModel, resolve_device
from pipeline.models.kernels import choose_kernels
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.prompts import EditPrompts, generate_contexts, tokenize_edits
from pipeline.requests import EditRequest
from pipeline.spec import JobSpec, load_spec


def parser(description: str, edits: int) -> argparse.ArgumentParser:
    """Arguments that every benchmark on a real model takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--spec", type=Path, default=ROOT / "jobs" / "specs" / "counterfact_12m.yaml",
        help="job spec with the method's settings",
    )  # fmt: skip
    made.add_argument("--model", required=True, help="directory, hub id, or factworld")
    made.add_argument("--requests", required=True, help="file of edit requests, or factworld")
    made.add_argument("--edits", type=int, default=edits)
    made.add_argument("--layers", type=int, nargs="+", help="edited blocks instead of the spec's")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repeats", type=int, default=3, help="measured rounds; one more warms up")
    made.add_argument("--clock", choices=CLOCKS, default="wall", help="time a run by this")
    made.add_argument("--results", type=Path, default=RESULTS)
    return made


@dataclass
class Workload:
    """A model and requests, as the job spec and the arguments say.

    Attributes:
        model: as a worker runs it.
        plain_model: the same weights, as Hugging Face loads them; float32 whatever `--dtype` says.
    """

    spec: JobSpec
    requests: list[EditRequest]
    tokenizer: PreTrainedTokenizerBase
    device: torch.device

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Workload":
        """Load what the arguments ask for, and set the number of threads."""
        torch.set_num_threads(arguments.threads)
        changes = [
            f"model.path={arguments.model}",
            f"requests.path={arguments.requests}",
            f"requests.limit={arguments.edits}",
            "requests.format=auto",
            f"model.dtype={arguments.dtype}",
        ]
        if arguments.layers:
            changes.append(f"method.layers={arguments.layers}")
        plan = make_plan(load_spec(arguments.spec, changes))
        requests = [request for shard in plan.shards for request in shard.items]
        tokenizer = load_tokenizer(plan.spec.model)
        return cls(plan.spec, requests, tokenizer, resolve_device()[0])

    @property
    def layers(self) -> tuple[int, ...]:
        assert self.spec.method.layers is not None
        return self.spec.method.layers

    @property
    def max_tokens(self) -> int:
        return TOKENS_PER_BATCH[self.device.type]

    @cached_property
    def model(self) -> EditableModel:
        model = load_model(self.spec.model, self.device)
        choose_kernels(model)
        return EditableModel(model)

    @cached_property
    def plain_model(self) -> EditableModel:
        return self.load_plain_model()

    def load_plain_model(self) -> EditableModel:
        """The same weights once more, for a run that changes the model's modules."""
        spec = self.spec.model.model_copy(update={"dtype": "float32"})
        return EditableModel(load_model(spec, self.device))

    @cached_property
    def contexts(self) -> tuple[str, ...]:
        given = self.spec.method.contexts
        return given or generate_contexts(self.plain_model, self.tokenizer, self.spec.seed)

    @cached_property
    def edits(self) -> list[EditPrompts]:
        return tokenize_edits(self.tokenizer, self.requests, self.contexts)


def spread(count: int, chosen: int) -> Sequence[int]:
    """Indices of `chosen` of `count` things, evenly spaced, so that a part stands for all."""
    chosen = min(chosen, count)
    return [i * count // chosen for i in range(chosen)]


@torch.no_grad()
def run_up_to(model: EditableModel, last_layer: int, batches: Iterable[TokenBatch]) -> None:
    """Run batches from the embeddings through a block."""
    for batch in batches:
        model.run(
            None,
            first=0,
            stop=last_layer + 1,
            masks=batch.masks,
            position_ids=batch.positions,
            input_ids=batch.ids,
        )
