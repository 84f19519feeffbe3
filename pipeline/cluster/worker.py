"""The worker: one model replica that computes values, keys, covariance sums and scores.

A plain class: the driver wraps it as a Ray actor, tests and machines without Ray call it directly.
"""

import logging
import os
import resource
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.adapter_files import save_edited
from pipeline.cluster.neuron_tables import attribution_rows
from pipeline.editing.calibration import BankGradients
from pipeline.editing.covariance import GramSums, gram_sums
from pipeline.editing.gradients import Factors
from pipeline.editing.keys import KeyWave
from pipeline.editing.knowledge_neurons import NeuronEdit
from pipeline.editing.memory import edits_that_fit, free_bytes
from pipeline.editing.queries import ffn_queries
from pipeline.editing.update import Change, EditedWeights, Update
from pipeline.editing.values import FoundValue
from pipeline.errors import DivergedError, InputError, WeightVersionMismatchError
from pipeline.evaluation import general, metrics
from pipeline.evaluation.asking import continuations_of, scores_of
from pipeline.evaluation.knowledge import assessment_rows
from pipeline.evaluation.probes import Probe
from pipeline.methods import (
    AdapterMethod,
    ClosedForm,
    GradientMethod,
    KnowledgeNeurons,
    Made,
    MemoryMethod,
    Scene,
    build_method,
    build_trainable,
    seed_of,
)
from pipeline.methods.gradient import LaidOut
from pipeline.methods.trainable import Contribution, Learner
from pipeline.models.editable import resolve_devices
from pipeline.models.encoder_decoder import editable_model
from pipeline.models.loading import (
    fingerprint,
    fuse_activations,
    load_model,
    load_tokenizer,
)
from pipeline.prompts import (
    EditPrompts,
    encode_targets,
    generate_contexts,
    token_ids,
    tokenize_edits,
    tokenize_fact_prompts,
)
from pipeline.requests import EditRequest, quote
from pipeline.results.schemas import conform
from pipeline.spec import JobSpec, ModelSpec
from pipeline.tracing.facts import subject_ids, tokenize_facts
from pipeline.tracing.recording import embedding_deviation
from pipeline.tracing.table import trace_rows
from pipeline.tracing.trace import TraceSettings, trace
from pipeline.watching.metrics import count_search

log = logging.getLogger(__name__)

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
        fuse_activations(model)
        self.model = editable_model(model)


class EditWorker:
    """One replica of the model, at a known weight version.

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
        self._queries = torch.zeros(0, self.model.hidden_size)
        self._waves: dict[int, KeyWave] = {}
        self._waves_of = 0
        self._laid_out: dict[tuple[str, ...], LaidOut] = {}
        self._laid_out_of: tuple[int, ...] = ()
        self._learner: Learner | None = None
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

    def queries(self, texts: Sequence[str], max_tokens: int | None) -> np.ndarray:
        """Inputs of the edited block's feed-forward network at some texts' tokens, (n, D) float32.

        Of the unedited model, without each text's first token.
        """
        self._require(0)
        rows = self._token_rows(texts, max_tokens)
        found = ffn_queries(self.model, self.method.layers[0], rows, self._max_tokens)
        return found.float().numpy()

    def set_queries(self, queries: np.ndarray) -> None:
        """Remember these from now on; on a processor they stay where they lie."""
        with warnings.catch_warnings():
            # They lie in memory that is shared by a node's workers, and nobody writes them.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self._queries = torch.from_numpy(queries).to(
                self.model.device_of(self.method.layers[0])
            )

    def adapt(self, requests: Sequence[EditRequest], *, version: int, round: int) -> Made:
        """Make the adapters of some edits on the model of the round before."""
        self._require(version)
        assert isinstance(self.method, AdapterMethod), "other methods change weights"
        start = time.perf_counter()
        scene = Scene(
            self.model,
            dict(self.weights.adapters),
            self._queries,
            TOKENS_PER_BACKWARD[self.model.input_device.type],
        )
        edits = self._tokenize(requests, self.contexts)
        seeds = [seed_of(self.spec.seed, request.case_id) for request in requests]
        made = self.method.make(scene, edits, seeds)
        seconds = (time.perf_counter() - start) / max(1, len(requests))
        rows = [
            {"round": round, "case_id": request.case_id, "seconds": seconds, **row}
            for request, row in zip(requests, made.rows, strict=True)
        ]
        return replace(made, rows=rows)

    @property
    def _closed_form(self) -> ClosedForm:
        assert isinstance(self.method, ClosedForm), "a gradient method has no values"
        return self.method

    def value_lengths(self, requests: Sequence[EditRequest], *, version: int) -> list[float]:
        """Search values behind bare prompts, for the norm anchor; ||v|| of every request."""
        self._require(version)
        edits = self._tokenize(requests, self.contexts[:1])
        size = self._batch_size(edits, self.method.layers[-1])
        return self._closed_form.value_lengths(self.model, edits, size)

    def covariance(self, texts: Sequence[str], max_tokens: int | None) -> GramSums:
        """Sum k k^T over the tokens of some texts for every edited layer of the unedited model."""
        self._require(0)
        rows = self._token_rows(texts, max_tokens)
        return gram_sums(self.model, self.method.layers, rows, self._max_tokens)

    def values(self, requests: Sequence[EditRequest], *, version: int, round: int) -> pa.Table:
        """Search the values of a shard; rows of values/, non-finite ones with NaN in them.

        They are for the layers that are edited next, as the version says.
        """
        self._require(version)
        method = self._closed_form
        stage = method.stage_at(version)
        layer = method.stages[stage][-1]
        start = time.perf_counter()
        edits = self._tokenize(requests, self.contexts)
        graphs = self.spec.cluster.cuda_graphs
        found = method.find_values(
            self.model, edits, self._batch_size(edits, layer), stage=stage, cuda_graphs=graphs
        )
        seconds = (time.perf_counter() - start) / max(1, len(found))
        count_search(len(found), sum(value.steps for value in found))
        pairs = zip(requests, found, strict=True)
        return conform(
            "values",
            [_value_row(request, value, layer, round, seconds) for request, value in pairs],
        )

    def read_keys(
        self,
        shard: int,
        requests: Sequence[EditRequest],
        values_ND: Tensor,
        layer: int,
        *,
        version: int,
    ) -> tuple[int, tuple[Tensor, Tensor]]:
        """Measure a shard's keys and residuals at a layer; edits before it must be in place.

        Returns:
            How many edits, and (keys (N, F), residuals (N, D)), float32 or wider, on the CPU.

        Raises:
            DivergedError: some are not finite; all were when the values were searched, so the
                updates of the layers before have ruined the model.
        """
        self._require(version)
        method = self._closed_form
        stage = method.stage_of(layer)
        began = version - stage.index(layer)
        if began != self._waves_of:
            # Another round, whose shards have the same numbers and other requests, or other values.
            self._waves.clear()
            self._waves_of = began
        wave = self._wave(shard, requests, stage[-1])
        keys, residuals = method.keys_and_residuals(wave, layer, values_ND)
        wide = torch.promote_types(keys.dtype, torch.float32)
        keys, residuals = keys.to(wide).cpu(), residuals.cpu()
        _require_finite(requests, keys, residuals, layer)
        if layer == stage[-1]:
            del self._waves[shard]
        return len(requests), (keys, residuals)

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
        self._waves.clear()
        self._laid_out.clear()

    def prepare(self) -> None:
        """Load what a method with a memory uses beside the model."""
        assert isinstance(self.method, MemoryMethod), "the method has no memory"
        self.method.prepare(self.model, self.tokenizer)

    def remember(self, requests: Sequence[EditRequest], *, version: int, round: int) -> pa.Table:
        """What a method with a memory keeps of some edits; rows of memory/."""
        self._require(version)
        assert isinstance(self.method, MemoryMethod), "the method has no memory"
        rows = self.method.remember(self.model, self.tokenizer, requests, round)
        return conform("memory", rows)

    def masters(self, *, version: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Every edited weight as it is now and as it was at first: layer -> (D, F) float64."""
        self._require(version)
        both = {layer: self.weights.masters(layer) for layer in self.weights.layers}
        return (
            {layer: now.cpu() for layer, (now, _) in both.items()},
            {layer: first.cpu() for layer, (_, first) in both.items()},
        )

    def gradients(
        self,
        requests: Sequence[EditRequest],
        changes: dict[int, Any] | None,
        *,
        version: int,
        round: int,
    ) -> tuple[int, Factors | BankGradients]:
        """Take the gradients of some edits, with changes on top of the edited weights.

        Args:
            requests: the edits.
            changes: what the steps so far have changed, by layer; None is nothing.

        Returns:
            How many edits, and their factors.

        Raises:
            DivergedError: a loss is not finite, and the changes are to blame.
            InputError: it is not finite before any change.
        """
        self._require(version)
        laid_out = self._lay_out(requests, round)
        assert isinstance(self.method, GradientMethod), "a method in closed form has values"
        factors = self.method.factors(laid_out, self.weights, changes)
        finite = torch.isfinite(factors.losses).tolist()
        ruined = [r.case_id for r, fine in zip(requests, finite, strict=True) if not fine]
        if ruined and changes is None:
            raise InputError(f"the loss of {quote(ruined[0])} is not finite")
        if ruined:
            raise DivergedError(
                f"the losses of {len(ruined)} requests are not finite any more, the first of them"
                f" {quote(ruined[0])}'s; take a smaller learning rate",
                tuple(ruined),
            )
        return len(requests), factors

    def attribute(
        self, requests: Sequence[EditRequest], *, version: int, round: int
    ) -> tuple[pa.Table, dict[str, str]]:
        """Look for the neurons of facts: rows of attributions/, and case_id -> why there are none.

        What is asked for is a request's `target_true`, or what the model answers
        (`method.kn.old_answer`).
        """
        self._require(version)
        settings, asked = self._locating.spec.kn, list(requests)
        failed: dict[str, str] = {}
        if with_old := settings.old_answer == "target_true":
            reason = "it has no target_true; method.kn.old_answer: argmax takes the model's answer"
            failed = {r.case_id: reason for r in asked if r.target_true is None}
            asked = [request for request in asked if request.case_id not in failed]
        facts = tokenize_fact_prompts(
            self.tokenizer,
            asked,
            self.contexts,
            paraphrases=settings.paraphrases,
            with_old=with_old,
        )
        most = TOKENS_PER_BACKWARD[self.model.input_device.type]
        found = list(self._locating.find(self.model, facts, most))
        reason = "no neuron has a positive, finite attribution"
        failed |= {
            request.case_id: reason
            for request, candidates in zip(asked, found, strict=True)
            if not candidates.neurons
        }
        return attribution_rows(self.tokenizer, asked, found, round), failed

    def change_neurons(
        self,
        layer: int,
        requests: Sequence[EditRequest],
        neurons: Sequence[tuple[int, ...]],
        answers: Sequence[tuple[int, ...]],
        *,
        version: int,
    ) -> Update:
        """The update of a layer in which each request's neurons, and no others, change.

        Args:
            answers: token ids of the requests' old answers.
        """
        self._require(version)
        new = encode_targets(self.tokenizer, [request.target_new for request in requests])
        edits = [NeuronEdit(*one) for one in zip(neurons, answers, new, strict=True)]
        return self._locating.update(self.weights, layer, edits)

    @property
    def _locating(self) -> KnowledgeNeurons:
        assert isinstance(self.method, KnowledgeNeurons), "this method looks for no neurons"
        return self.method

    def contribute(
        self, items: Sequence[Any], number: int, shared: Any, *, learns: bool, version: int
    ) -> tuple[int, Contribution]:
        """Say what some examples want of an editor that is trained; arguments as of `Learner`.

        Returns:
            How many items, and what they want.
        """
        self._require(version)
        if self._learner is None:
            self._learner = build_trainable(self.spec).learner(self.weights, self.tokenizer)
        return len(items), self._learner.contribute(items, number, shared, learns=learns)

    def wrap_update(self, layer: int, update: Update, *, version: int) -> Update:
        """What the method's wrappers make of an update, before it is applied."""
        self._require(version)
        return self.method.wrap(update, *self.weights.masters(layer))

    def evaluate(
        self, asked: Sequence[Probe], edit_rounds: Sequence[int], *, version: int, round: int
    ) -> pa.Table:
        """Score probes of edits of the given rounds; rows of metrics/."""
        self._require(version)
        given = self.weights, self.tokenizer, asked
        wanted, most = self.spec.evaluation, self._max_tokens
        scores = scores_of(*given, max_tokens=most, compared=wanted.unchanged)
        generated = continuations_of(*given, wanted, max_tokens=most)
        return conform(
            "metrics",
            metrics.rows(asked, scores, round=round, edit_rounds=edit_rounds, generated=generated),
        )

    def measure_general(
        self, texts: Sequence[str], prompts: Sequence[str], *, version: int, round: int
    ) -> pa.Table:
        """Measure what the rest of the model lost; rows of general/ for these texts and prompts.

        `pipeline.evaluation.general.combine` merges the tables of several calls and adds the
        perplexity.
        """
        self._require(version)
        rows = general.measure(
            self.weights,
            self.tokenizer,
            texts,
            prompts,
            text_tokens=self.spec.evaluation.general.max_tokens,
            batch_tokens=self._max_tokens,
            round=round,
        )
        return conform("general", rows)

    def embedding_deviation(self, subjects: Sequence[str], *, version: int) -> float:
        """Standard deviation over all entries of the subjects' token embeddings."""
        self._require(version)
        return embedding_deviation(self.model, subject_ids(self.tokenizer, subjects))

    def trace(
        self, requests: Sequence[EditRequest], noise: float, *, version: int
    ) -> tuple[pa.Table, dict[str, str]]:
        """Trace facts causally: rows of trace/, and case_id -> why of those that were skipped.

        Args:
            noise: standard deviation of the noise.
        """
        self._require(version)
        assert self.spec.trace is not None
        asked = self.spec.trace
        facts = tokenize_facts(self.tokenizer, requests, known=asked.known_only)
        settings = TraceSettings(noise, asked.samples, asked.window, asked.kinds, self.spec.seed)
        found = trace(self.model, facts, settings, max_tokens=self._max_tokens)
        return trace_rows(self.tokenizer, requests, facts, found, settings)

    def assessment(
        self, requests: Sequence[EditRequest], contrasts: Sequence[Sequence[str]], *, version: int
    ) -> tuple[pa.Table, dict[str, str]]:
        """Assess facts: rows of assessment/, and case_id -> why of those that have no object.

        Args:
            contrasts: prompts of other relations about each fact's subject.
        """
        self._require(version)
        assert self.spec.assess is not None
        return assessment_rows(
            self.model, self.tokenizer, requests, contrasts, self.spec.assess, self._max_tokens
        )

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

    def _batch_size(self, edits: Sequence[EditPrompts], layer: int) -> int:
        asked = self.spec.cluster.value_batch_size
        if asked != "auto" or not edits:
            return 1 if asked == "auto" else asked
        most = EDITS_PER_BATCH[self.model.input_device.type]
        share = self._replica.gpu_share
        free = {device: free_bytes(device, share) for device in self.model.devices}
        size = edits_that_fit(self.model, edits, layer, most, free)
        if size < most:
            log.info("values: %d edits at once instead of %d, for want of memory", size, most)
        return size

    def _lay_out(self, requests: Sequence[EditRequest], round: int) -> LaidOut:
        """Edits as rows; what lower blocks make of them is kept where there is room."""
        assert isinstance(self.method, GradientMethod)
        of = (round, self.weights.version)
        if of != self._laid_out_of:
            self._laid_out.clear()
            self._laid_out_of = of
        case_ids = tuple(request.case_id for request in requests)
        found = self._laid_out.get(case_ids)
        if found is None:
            edits = self._tokenize(requests, self.contexts)
            most = TOKENS_PER_BACKWARD[self.model.input_device.type]
            found = self.method.gradients(self.model, edits, most, keeps=True)
            kept = found.num_bytes + sum(other.num_bytes for other in self._laid_out.values())
            found.keeps = kept <= self.spec.cluster.hidden_states_gb * 1e9
            self._laid_out[case_ids] = found
        return found

    def _wave(self, shard: int, requests: Sequence[EditRequest], last: int) -> KeyWave:
        if shard not in self._waves:
            edits = self._tokenize(requests, self.contexts)
            written = self._closed_form.written
            wave = KeyWave(self.model, edits, last, max_tokens=self._max_tokens, written=written)
            self._make_room(wave)
            self._waves[shard] = wave
        return self._waves[shard]

    def _make_room(self, wave: KeyWave) -> None:
        """Let a wave keep what there is room for; the others keep less before it keeps nothing."""

        def fits() -> bool:
            kept = sum(other.num_bytes for other in (wave, *self._waves.values()))
            return kept <= self.spec.cluster.hidden_states_gb * 1e9

        if fits():
            return
        for other in (wave, *self._waves.values()):
            if other.keep == "keys":
                other.keep_less("hidden")
            if fits():
                return
        wave.keep_less("nothing")

    def _require(self, version: int) -> None:
        if self.weights.version != version:
            raise WeightVersionMismatchError(
                f"this worker holds {self.weights.version} updates, {version} are expected"
            )


def _require_finite(
    requests: Sequence[EditRequest], keys: Tensor, residuals: Tensor, layer: int
) -> None:
    finite = torch.isfinite(keys).all(dim=1) & torch.isfinite(residuals).all(dim=1)
    ruined = [r.case_id for r, fine in zip(requests, finite.tolist(), strict=True) if not fine]
    if ruined:
        raise DivergedError(
            f"layer {layer}: the keys or residuals of {len(ruined)} requests hold infinities or"
            f" NaNs, the first of them {quote(ruined[0])}",
            tuple(ruined),
        )


def _value_row(
    request: EditRequest, value: FoundValue, layer: int, round: int, seconds: float
) -> dict[str, Any]:
    return {
        "round": round,
        "case_id": request.case_id,
        "layer": layer,
        "z": value.z.float().numpy(),
        "initial_norm": value.initial_norm,
        "delta_norm": value.delta_norm,
        "steps": value.steps,
        "loss": value.loss,
        "target_probability": value.target_probability,
        "seconds": seconds,
    }
