"""Calls that ask the model as it is, and change nothing."""

from collections.abc import Sequence

import pyarrow as pa

from pipeline.cluster.calls.base import Worker
from pipeline.evaluation import general, metrics
from pipeline.evaluation.asking import continuations_of, scores_of
from pipeline.evaluation.knowledge import assessment_rows
from pipeline.evaluation.probes import Probe
from pipeline.requests import EditRequest
from pipeline.results.schemas import conform
from pipeline.tracing.facts import subject_ids, tokenize_facts
from pipeline.tracing.recording import embedding_deviation
from pipeline.tracing.table import trace_rows
from pipeline.tracing.trace import TraceSettings, trace


class AskingCalls(Worker):
    """Scores of probes and texts, traces of facts, assessments."""

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
