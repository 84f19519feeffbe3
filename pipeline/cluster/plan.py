"""The plan of a job: which requests are edited, in which shards, with which settings.

Shards follow from the requests and `cluster.shard_size` alone, so that the result does not depend
on how many workers there are.
"""

import hashlib
import json
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline import factworld
from pipeline.cluster.cutting import MOST_SHARDS, cut_by_subject, cut_shards
from pipeline.cluster.general import held_out_texts
from pipeline.cluster.rounds import UNTOUCHED, Rounds, cut_rounds
from pipeline.cluster.shards import Shard
from pipeline.errors import InputError
from pipeline.evaluation.probes import Probe, probes_of
from pipeline.methods import resolve_settings
from pipeline.models.loading import load_config, load_tokenizer, resolve_path
from pipeline.prompts import CONTEXT_TOKENS, iter_token_ids
from pipeline.requests import EditRequest, RequestRow, quote, resolve_conflicts
from pipeline.sources import read_requests
from pipeline.spec import JobSpec

_FACTWORLD_REQUESTS = 200
# Room for special tokens, the context's full stop and the space before a target.
_MARGIN = 8
_SMALLEST_PROBE_SHARD, _LARGEST_PROBE_SHARD = 256, 4096


@dataclass(frozen=True)
class Plan:
    """What a job will do.

    Attributes:
        spec: the spec with every setting decided (contexts may still be drawn by the model).
        settings_source: where the settings that the spec left open come from.
        rows: every request that was read, accepted or not.
        rounds: the accepted requests, cut; one round unless the job is a study.
        held_out: texts for `evaluation.general`, none if it is off.
    """

    spec: JobSpec
    settings_source: str
    rows: list[RequestRow]
    rounds: Rounds
    held_out: tuple[str, ...] = ()

    @property
    def shards(self) -> list[Shard]:
        """The shards of all rounds; their indices are counted in each round."""
        return [shard for shards in self.rounds.shards for shard in shards]

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, ascending."""
        assert self.spec.method.layers is not None
        return self.spec.method.layers

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The edited layers, those together that one search of values is for."""
        return self.spec.method.stages

    def value_shards(self, round: int, stage: int) -> list[Shard]:
        """A round's shards with the numbers that its values' parts of a stage have.

        None for a method without values.
        """
        if not self.spec.method.is_closed_form:
            return []
        shards = self.rounds.shards[round]
        return [replace(shard, index=stage * len(shards) + shard.index) for shard in shards]

    @property
    def num_requests(self) -> int:
        """Requests to edit."""
        return sum(len(shard.items) for shard in self.shards)

    @cached_property
    def _rows(self) -> dict[int, list[RequestRow]]:
        edit_round, found = self.rounds.edit_round, defaultdict(list)
        for row in self.rows:
            case_id = str(row.fields["case_id"])
            # What cannot be edited is reported with the first round; what is left over, nowhere.
            round = 0 if row.status != "accepted" else edit_round.get(case_id, UNTOUCHED)
            found[round].append(row)
        return found

    def rows_of(self, round: int) -> list[RequestRow]:
        """The requests that a round reports on, in the order in which they were read."""
        return self._rows.get(round, [])

    def requests_digest(self) -> str:
        """SHA-256 in hexadecimal of all rows in their order, whatever file they came from."""
        digest = hashlib.sha256()
        for row in self.rows:
            if row.request is None:
                content = json.dumps([row.status, dict(row.fields)], sort_keys=True)
            else:
                content = row.request.model_dump_json()
            digest.update(content.encode() + b"\n")
        return digest.hexdigest()


def make_plan(spec: JobSpec, requests: Sequence[EditRequest] | None = None) -> Plan:
    """Read and check everything that can be checked without the model's weights.

    Args:
        spec: the job.
        requests: edit requests given in memory; null reads `spec.requests`.

    Raises:
        InputError: the spec, the model's configuration or the request file is wrong, or not one
            request can be edited.
    """
    config, spec, source = settle_spec(spec)
    rows = _read_rows(spec) if requests is None else _given_rows(requests, spec)
    tokenizer = load_tokenizer(spec.model)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None:
        rows = [_within_context(row, tokenizer, int(limit), spec) for row in rows]
    rows = _without_unknown(rows, tokenizer)
    accepted = [row.request for row in rows if row.request is not None]
    if not accepted:
        raise InputError(
            f"no request can be edited; {rows[0].reason if rows else 'none was given'}"
        )
    held_out = held_out_texts(spec, accepted)

    def cut(requests: Sequence[EditRequest]) -> list[Shard]:
        ordered, size = _by_length(requests, tokenizer), spec.cluster.shard_size
        if "merge" in spec.method.wrappers:
            return cut_by_subject(ordered, size)
        return cut_shards(ordered, size)

    return Plan(spec, source, rows, cut_rounds(accepted, spec, cut), held_out)


def settle_spec(spec: JobSpec) -> tuple[Any, JobSpec, str]:
    """Decide every setting and make the model's directory absolute; workers may be elsewhere.

    Returns:
        The model's configuration, the settled spec, and where open settings came from.

    Raises:
        InputError: the spec or the model's configuration is wrong.
    """
    if Path(spec.model.path).is_dir():
        model = spec.model.model_copy(update={"path": str(Path(spec.model.path).resolve())})
        spec = spec.model_copy(update={"model": model})
    config = load_config(spec.model)
    return config, *resolve_settings(spec, config, resolve_path(spec.model.path))


def probe_shards(shards: Sequence[Shard], kinds: Sequence[str]) -> list[Shard]:
    """Cut the probes of all requests into shards of their own, equal prompts side by side.

    Edits of one relation share neighbours; a worker scores a prompt once for all of them.
    """
    requests = (request for shard in shards for request in shard.items)
    return cut_probes([probe for request in requests for probe in probes_of(request, kinds)])


def cut_probes(probes: Sequence[Probe]) -> list[Shard]:
    """Cut probes into shards, equal prompts side by side."""
    return cut_shards(sorted(probes, key=lambda probe: probe.prompt), probe_shard_size(len(probes)))


def probe_shard_size(count: int) -> int:
    """Probes a shard, of so many."""
    return min(max(-(-count // MOST_SHARDS), _SMALLEST_PROBE_SHARD), _LARGEST_PROBE_SHARD)


def _by_length(
    requests: Sequence[EditRequest], tokenizer: PreTrainedTokenizerBase
) -> list[EditRequest]:
    """Requests in order of length, longest first, so that one batch holds like lengths.

    What the value search carries counts first: the tokens after the subject, in every context.
    """
    texts = (r.text[r.subject_span[1] :] + " " + r.target_new for r in requests)
    after = iter_token_ids(tokenizer, texts)
    before = iter_token_ids(tokenizer, (r.text[: r.subject_span[1]] for r in requests))
    # One number each, the first length before the second one; a prompt is shorter than 2^32.
    lengths = array("q", (len(a) << 32 | len(b) for a, b in zip(after, before, strict=True)))
    order = sorted(range(len(requests)), key=lengths.__getitem__, reverse=True)
    return [requests[i] for i in order]


def _read_rows(spec: JobSpec) -> list[RequestRow]:
    settings = spec.requests
    chosen: dict[str, Any] = {
        "limit": settings.limit,
        "offset": settings.offset,
        "shuffle_seed": settings.shuffle_seed,
        "on_conflict": settings.on_conflict,
    }
    if settings.path != "factworld":
        return read_requests(settings.path, settings.format, **chosen)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "factworld.json"
        count = settings.offset + (settings.limit or _FACTWORLD_REQUESTS)
        factworld.write_requests(path, count, spec.seed)
        return read_requests(path, "counterfact", **chosen)


def _given_rows(requests: Sequence[EditRequest], spec: JobSpec) -> list[RequestRow]:
    rows = [RequestRow.accept(i, "requests", request) for i, request in enumerate(requests)]
    return resolve_conflicts(rows, spec.requests.on_conflict)


def _within_context(
    row: RequestRow, tokenizer: PreTrainedTokenizerBase, limit: int, spec: JobSpec
) -> RequestRow:
    """Reject a request one of whose prompts is longer than the model's context."""
    if row.request is None:
        return row
    for field, text, to_come in _texts(row.request, spec):
        # A token is at least one byte of text, so most prompts need no counting.
        if len(text.encode()) + to_come + _MARGIN <= limit:
            continue
        tokens = len(tokenizer(text)["input_ids"]) + to_come + _MARGIN
        if tokens > limit:
            reason = (
                f"{row.source}: row {row.row}, field {field}: about {tokens} tokens with"
                f" context and target, the model takes {limit}; shorten it"
            )
            return replace(row, request=None, status="rejected", reason=reason)
    return row


def _without_unknown(
    rows: list[RequestRow], tokenizer: PreTrainedTokenizerBase
) -> list[RequestRow]:
    """Reject requests whose subject or target has a part that the tokenizer has no token for.

    All such texts share one token: the edit would be one of every unknown subject, or would teach
    the model to say that token.
    """
    unknown = tokenizer.unk_token_id
    texts = {
        name: [getattr(row.request, name) for row in rows if row.request is not None]
        for name in ("subject", "target_new")
    }
    if unknown is None or not texts["subject"]:
        return rows
    found = {
        name: iter_token_ids(tokenizer, found, add_special_tokens=False)
        for name, found in texts.items()
    }
    return [_known(row, found, tokenizer) if row.request is not None else row for row in rows]


def _known(
    row: RequestRow, found: dict[str, Iterator[list[int]]], tokenizer: PreTrainedTokenizerBase
) -> RequestRow:
    tokens = {name: next(ids) for name, ids in found.items()}
    for name, ids in tokens.items():
        if tokenizer.unk_token_id in ids:
            reason = (
                f"{row.source}: row {row.row}, field {name}: this model's tokenizer has no token"
                f" but {tokenizer.unk_token} for a part of {quote(str(row.fields[name]))}; write it"
                " in other letters"
            )
            return replace(row, request=None, status="rejected", reason=reason)
    return row


def _texts(request: EditRequest, spec: JobSpec) -> list[tuple[str, str, int]]:
    """Every text that will be put before the model, with its field and the tokens to come."""
    contexts = spec.method.contexts
    longest = "x " * CONTEXT_TOKENS if contexts is None else max(contexts, key=len)
    texts = [("prompt", f"{longest} {request.text} {request.target_new}", 0)]
    for probe in probes_of(request, spec.evaluation.probes):
        target = max(probe.target_new or "", probe.target_true or "", key=len)
        to_come = spec.evaluation.fluency_tokens if probe.kind == "generation" else 0
        texts.append((f"{probe.kind}[{probe.index}]", f"{probe.prompt} {target}", to_come))
    return texts
