"""Calls of methods that put something beside the weights: adapters, an edit memory."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from pipeline.cluster.calls.base import TOKENS_PER_BACKWARD, Replica, Worker
from pipeline.editing.queries import ffn_queries
from pipeline.methods import AdapterMethod, Made, MemoryMethod, Scene, seed_of
from pipeline.requests import EditRequest
from pipeline.results.schemas import conform
from pipeline.spec import JobSpec


class AdapterCalls(Worker):
    """Adapters of edits, the queries that they remember, and entries of a memory."""

    def __init__(self, spec: JobSpec, threads: int, replica: Replica | None = None) -> None:
        super().__init__(spec, threads, replica)
        self._queries = torch.zeros(0, self.model.hidden_size)

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
