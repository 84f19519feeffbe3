"""Calls of methods in closed form: the search for values, keys and residuals, covariance sums."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cluster.calls.base import EDITS_PER_BATCH, Replica, Worker
from pipeline.editing.covariance import GramSums, gram_sums
from pipeline.editing.keys import KeyWave
from pipeline.editing.memory import edits_that_fit, free_bytes
from pipeline.editing.values import FoundValue
from pipeline.errors import DivergedError
from pipeline.methods import ClosedForm
from pipeline.prompts import EditPrompts
from pipeline.requests import EditRequest, quote
from pipeline.results.schemas import conform
from pipeline.spec import JobSpec
from pipeline.watching.metrics import count_search

log = logging.getLogger(__name__)


class ClosedFormCalls(Worker):
    """Values, keys and covariance sums of methods in closed form."""

    def __init__(self, spec: JobSpec, threads: int, replica: Replica | None = None) -> None:
        super().__init__(spec, threads, replica)
        self._waves: dict[int, KeyWave] = {}
        self._waves_of = 0

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

    def revert(self) -> None:
        super().revert()
        self._waves.clear()

    @property
    def _closed_form(self) -> ClosedForm:
        assert isinstance(self.method, ClosedForm), "a gradient method has no values"
        return self.method

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
