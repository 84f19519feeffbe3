"""A worker without calls of any method: the model, its edited weights, and its memory."""

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.adapter_files import save_edited
from pipeline.editing.update import Change, EditedWeights, Update
from pipeline.errors import WeightVersionMismatchError
from pipeline.methods import build_method
from pipeline.models.editable import resolve_devices
from pipeline.models.encoder_decoder import editable_model
from pipeline.models.kernels import choose_kernels
from pipeline.models.loading import fingerprint, load_model, load_tokenizer
from pipeline.prompts import EditPrompts, generate_contexts, token_ids, tokenize_edits
from pipeline.requests import EditRequest
from pipeline.spec import JobSpec, ModelSpec

# Tokens in one forward pass without gradients: enough to keep a processor's or a card's matrix
# units busy, few enough to stay small beside the model.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768}
EDITS_PER_BATCH = {"cpu": 16, "cuda": 256}
# Tokens in one pass with gradients, which keeps what every block has put out.
TOKENS_PER_BACKWARD = {"cpu": 2048, "cuda": 4096}


@dataclass(frozen=True)
class WorkerDescription:
    """What a worker says about itself when it has started."""

    fingerprint: str
    device: str
    device_reason: str
    dtype: str
    hidden_size: int
    key_sizes: dict[int, int]
    weight_names: dict[int, str]
    threads: int
    process: int


class Replica:
    """A loaded model with its tokenizer.

    Args:
        spec: the model to load.
        threads: compute threads.
        gpus: GPUs that it has, or a part of one; `auto` is one, if there is any.

    Raises:
        InputError: the model cannot be loaded or is not supported, or there are too few GPUs.
    """

    def __init__(
        self, spec: ModelSpec, threads: int, gpus: float | Literal["auto"] = "auto"
    ) -> None:
        torch.set_num_threads(threads)
        devices, self.device_reason = resolve_devices(1 if gpus == "auto" else gpus)
        self.gpu_share = gpus if gpus != "auto" and 0 < gpus < 1 else 1.0
        if self.gpu_share < 1 and devices[0].type == "cuda":
            # Beyond its part of a shared GPU this process runs out of memory, not its neighbours.
            torch.cuda.set_per_process_memory_fraction(self.gpu_share, devices[0])
        self.tokenizer = load_tokenizer(spec)
        model = load_model(spec, *devices)
        self.fingerprint = fingerprint(model)
        choose_kernels(model)
        self.model = editable_model(model)


class Worker:
    """One replica of the model, at a known weight version: what every call builds on.

    Args:
        spec: the resolved job spec.
        threads: compute threads.
        replica: the unedited model, which others may use as well (see `WorkerHost`); null loads it.

    Raises:
        InputError: the model cannot be loaded or is not supported.
    """

    def __init__(self, spec: JobSpec, threads: int, replica: Replica | None = None) -> None:
        self._replica = replica or Replica(spec.model, threads, spec.cluster.gpus_per_worker)
        self.spec = spec
        self.model, self.tokenizer = self._replica.model, self._replica.tokenizer
        self.method = build_method(spec.method)
        self.contexts = tuple(spec.method.contexts or ())
        self.weights = EditedWeights(self.model, self.method.layers)
        self._max_tokens = TOKENS_PER_BATCH[self.model.input_device.type]

    def describe(self) -> WorkerDescription:
        """Report model, device and shapes."""
        layers = self.method.layers
        return WorkerDescription(
            fingerprint=self._replica.fingerprint,
            device=",".join(map(str, self.model.devices)),
            device_reason=self._replica.device_reason,
            dtype=str(self.model.dtype).removeprefix("torch."),
            hidden_size=self.model.hidden_size,
            key_sizes={layer: self.model.key_size(layer) for layer in layers},
            weight_names={layer: self.model.weight_name(layer) for layer in layers},
            threads=torch.get_num_threads(),
            process=os.getpid(),
        )

    def generate_contexts(self) -> tuple[str, ...]:
        """Draw context templates from the unedited model by the spec's seed."""
        self._require(0)
        return generate_contexts(self.model, self.tokenizer, self.spec.seed)

    def set_contexts(self, contexts: Sequence[str]) -> None:
        """Use these context templates from now on."""
        self.contexts = tuple(contexts)

    def set_anchor_norm(self, norm: float) -> None:
        """Use this norm anchor from now on."""
        self.method = build_method(self.spec.method.with_anchor(norm))

    def apply(self, layer: int, update: Change, *, version: int) -> int:
        """Apply a layer's change if this worker is at `version`; return its new version.

        Asking again after it was applied changes nothing.
        """
        if self.weights.version == version + 1:
            return self.weights.version
        self._require(version)
        self.weights.apply(layer, self.method.bound(update, self.model, self.tokenizer))
        return self.weights.version

    def revert(self) -> None:
        """Put the unedited weights back, to the bit: version 0."""
        self.weights.revert()

    def masters(self, *, version: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Every edited weight as it is now and as it was at first: layer -> (D, F) float64."""
        self._require(version)
        both = {layer: self.weights.masters(layer) for layer in self.weights.layers}
        return (
            {layer: now.cpu() for layer, (now, _) in both.items()},
            {layer: first.cpu() for layer, (_, first) in both.items()},
        )

    def wrap_update(self, layer: int, update: Update, *, version: int) -> Update:
        """What the method's wrappers make of an update, before it is applied."""
        self._require(version)
        return self.method.wrap(update, *self.weights.masters(layer))

    def save_model(self, directory: str, *, version: int) -> None:
        """Write model and tokenizer with save_pretrained, at the weights of `version`."""
        self._require(version)
        save_edited(self.weights, self.tokenizer, directory)

    def peak_memory(self) -> dict[str, int]:
        """Peak resident memory of this process, and peak device memory, in bytes.

        Of a model over several devices that is the fullest one's.
        """
        on_gpus = [device for device in self.model.devices if device.type == "cuda"]
        cuda = max(map(torch.cuda.max_memory_allocated, on_gpus), default=0)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"resident": resident, "device": cuda}

    def _token_rows(self, texts: Sequence[str], max_tokens: int | None) -> list[list[int]]:
        limit = min(n for n in (max_tokens, self.model.max_positions, 1 << 20) if n is not None)
        rows = [ids[:limit] for ids in token_ids(self.tokenizer, texts)]
        return [ids for ids in rows if ids]

    def _tokenize(
        self, requests: Sequence[EditRequest], contexts: Sequence[str]
    ) -> list[EditPrompts]:
        return tokenize_edits(self.tokenizer, requests, contexts, self.model.answers)

    def _require(self, version: int) -> None:
        if self.weights.version != version:
            raise WeightVersionMismatchError(
                f"this worker holds {self.weights.version} updates, {version} are expected"
            )
