"""What each phase of a job computes, counted from the plan, the tokenizer and the model's shapes.

A few hundred requests and probes are tokenised and stand for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from pipeline.cluster.covariance import AMPLE_TOKENS_PER_KEY_ENTRY, text_shards
from pipeline.cluster.cutting import cut_shards
from pipeline.cluster.plan import Plan, cut_probes
from pipeline.cluster.remembering import EDITS_OF_A_PIECE as EDITS_REMEMBERED_AT_ONCE
from pipeline.cluster.rounds import BASELINE_ROUND
from pipeline.cluster.training import EDITS_OF_A_PIECE
from pipeline.evaluation.packing import Layout, encode_probes
from pipeline.evaluation.probes import Probe
from pipeline.methods import build_adapter_method, build_gradient_method, build_method
from pipeline.models.answers import AnswerForm
from pipeline.planning.edit_memory import EditMemorySize
from pipeline.planning.flops import (
    ModelSize,
    attribution_flops,
    continuation_flops,
    covariance_flops,
    factor_flops,
    gradient_flops,
    key_flops,
    patch_flops,
    reduce_flops,
    scoring_flops,
    value_flops,
)
from pipeline.planning.outline import ModelOutline
from pipeline.prompts import (
    CONTEXT_SEEDS,
    CONTEXT_TOKENS,
    EditPrompts,
    FactPrompts,
    token_ids,
    tokenize_edits,
)
from pipeline.sources.corpus import read_corpus
from pipeline.spec import JobSpec

_SAMPLED_REQUESTS, _SAMPLED_PROBES, _SAMPLED_TEXTS = 256, 4096, 256
STEPS_SHARE = 0.6
"""Of `value.steps`, what an edit takes where a stop loss ends it early. Measured: 0.9 with
CounterFact on counterfact-12m, 0.26 with the facts of the embedded model. Nothing tells beforehand;
this lies within a factor of 2 of both once a batch's refilling is counted."""
_TOKENS_OF_A_TEXT = 440.0
"""Where a corpus is not a file on this machine: Wikipedia's mean (44 M tokens in 100,000 texts,
arXiv 2506.04226)."""

T = TypeVar("T")


@dataclass(frozen=True)
class Pieces:
    """What one phase, or one layer or round of it, hands to the workers: FLOP of each shard."""

    shards: tuple[float, ...]

    @property
    def flops(self) -> float:
        """Of all shards."""
        return sum(self.shards)


@dataclass(frozen=True)
class Work:
    """FLOP of a job.

    Attributes:
        values: of every stage of every round.
        keys: of every layer of every round.
        merge: of the reducer, all layers and rounds; float64.
        apply: of one worker, which applies every update; float64.
        scored: phase (baseline, evaluation) -> what is scored in every round of it.
        generated: the same for continuations, token by token.
        general: of every measurement of `evaluation.general`.
        covariance: one pass over the corpus; empty where `covariance.path` holds every layer.
        covariance_tokens: tokens of that pass.
        steps: steps that an edit is taken to need.
        gradients: of every step of every round, of a method that works on them; of every round's
            pieces, of one that makes adapters.
        attribution: of every round, of a method that looks for neurons.
        memory: one pass over the texts whose queries are remembered; of a method with a memory,
            of every round what is put into it.
    """

    values: tuple[Pieces, ...] = ()
    keys: tuple[Pieces, ...] = ()
    merge: float = 0.0
    apply: float = 0.0
    scored: dict[str, tuple[Pieces, ...]] = field(default_factory=dict)
    generated: dict[str, tuple[Pieces, ...]] = field(default_factory=dict)
    general: tuple[Pieces, ...] = ()
    covariance: Pieces = Pieces(())
    covariance_tokens: float = 0.0
    steps: float = 0.0
    gradients: tuple[Pieces, ...] = ()
    attribution: tuple[Pieces, ...] = ()
    memory: tuple[Pieces, ...] = ()


def count_work(
    plan: Plan,
    model: ModelOutline,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[EditPrompts],
    steps: float,
) -> Work:
    """Count what a plan computes.

    Args:
        plan: the job.
        model: its model's shapes.
        tokenizer: its tokenizer.
        edits: the sample of its requests that `sample_edits` returns.
        steps: steps that an edit takes.
    """
    size, layers = ModelSize.of(model), plan.layers
    if plan.spec.method.is_locating:
        return _attribution_work(plan, model, size, tokenizer, edits)
    if plan.spec.method.is_piecewise:
        return _adapter_work(plan, model, size, tokenizer, edits)
    if plan.spec.method.is_memory:
        return _memory_work(plan, model, size, tokenizer, edits)
    if not plan.spec.method.is_closed_form:
        return _gradient_work(plan, model, size, tokenizer, edits)
    taken, stages = [steps] * len(edits), plan.stages
    of_value = [value_flops(size, edits, taken, stage[-1]) / len(edits) for stage in stages]
    of_key = [
        key_flops(size, edits, stage) / len(edits) / len(stage) for stage in stages for _ in stage
    ]
    counts = [[len(shard.items) for shard in shards] for shards in plan.rounds.shards]
    sizes = {layer: model.key_size(layer) for layer in layers}
    has_basis = plan.spec.method.name == "alphaedit"
    factors = sum(factor_flops(size, has_basis=has_basis) for size in sizes.values())
    # What is remembered is in the penalty, which is factored again every round.
    remembers = plan.spec.rounds is not None and build_method(plan.spec.method).remembers
    merge, apply = factors * (len(counts) if remembers else 1), 0.0
    for numbers in counts:
        edits_of_round = sum(numbers)
        for key_size in sizes.values():
            merge += reduce_flops(edits_of_round, key_size, model.hidden_size)
            apply += _apply_flops(edits_of_round, key_size, model.hidden_size)
    covariance, tokens = _covariance(plan.spec, model, size, tokenizer)
    return replace(
        _evaluation(plan, model, size, tokenizer),
        values=_pieces(of_value, counts),
        keys=_pieces(of_key, counts),
        merge=merge,
        apply=apply,
        covariance=covariance,
        covariance_tokens=tokens,
        steps=steps,
    )


def _gradient_work(
    plan: Plan,
    model: ModelOutline,
    size: ModelSize,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[EditPrompts],
) -> Work:
    """What a plan of a gradient method computes, if it goes through all epochs that it may."""
    method = build_gradient_method(plan.spec.method)
    layer, at_prompt = method.layers[0], method.read == "last_prompt_token"
    # What runs once is spread over the epochs.
    total = gradient_flops(size, edits, layer, method.epochs, at_prompt=at_prompt)
    of_edit = total / method.epochs / len(edits)
    steps: list[Pieces] = []
    for shards in plan.rounds.shards:
        items = [request for shard in shards for request in shard.items]
        epoch = [
            Pieces(tuple(of_edit * len(p.items) for p in cut_shards(batch, EDITS_OF_A_PIECE)))
            for batch in method.batches(items)
        ]
        steps += epoch * method.epochs
    return replace(
        _evaluation(plan, model, size, tokenizer),
        steps=method.epochs,
        gradients=tuple(steps),
    )


def _attribution_work(
    plan: Plan,
    model: ModelOutline,
    size: ModelSize,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[EditPrompts],
) -> Work:
    """What a plan that looks for neurons computes; old answers are taken for as long as new ones.

    What is done to the few neurons that are found costs next to nothing.
    """
    asked = plan.spec.method.kn
    facts = [
        FactPrompts(
            tuple(row.ids for row in edit.rewrites),
            edit.target if asked.old_answer == "target_true" else None,
            edit.target,
        )
        for edit in edits
    ]
    of_fact = attribution_flops(size, facts, plan.layers, asked.steps) / len(facts)
    counts = [[len(shard.items) for shard in shards] for shards in plan.rounds.shards]
    return replace(
        _evaluation(plan, model, size, tokenizer),
        steps=asked.steps,
        attribution=_pieces([of_fact], counts),
    )


def _adapter_work(
    plan: Plan,
    model: ModelOutline,
    size: ModelSize,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[EditPrompts],
) -> Work:
    """What a plan of T-Patcher computes, if an edit ends soon after it may."""
    method = build_adapter_method(plan.spec.method)
    settings, layer = plan.spec.method.t_patcher, method.layers[0]
    steps = min(settings.steps, settings.least_steps + settings.check_every)
    patches = [min(len(edit.target), settings.max_patches) for edit in edits]
    entries = settings.memory_queries * model.hidden_size
    # An encoder reads as much of a text as makes queries.
    of_token = size.up_to(layer) + size.source_up_to(layer)
    total = patch_flops(size, edits, layer, steps, patches, entries)
    counts = _counts(plan, method.edits_of_a_piece)
    return replace(
        _evaluation(plan, model, size, tokenizer),
        steps=steps,
        gradients=_pieces([total / len(edits)], counts),
        memory=(Pieces((2.0 * of_token * method.num_queries,)),),
    )


def _memory_work(
    plan: Plan,
    model: ModelOutline,
    size: ModelSize,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[EditPrompts],
) -> Work:
    """What a plan of SERAC computes."""
    beside = EditMemorySize.of(plan.spec.method.serac, model, edits)
    counts = _counts(plan, EDITS_REMEMBERED_AT_ONCE)
    return replace(
        _evaluation(plan, model, size, tokenizer, beside),
        memory=_pieces([beside.embedding_flops], counts),
    )


def _counts(plan: Plan, edits_of_a_piece: int) -> list[list[int]]:
    """Edits of every piece of every round, where pieces are cut from whole rounds."""
    rounds = [[r for shard in shards for r in shard.items] for shards in plan.rounds.shards]
    return [[len(p.items) for p in cut_shards(items, edits_of_a_piece)] for items in rounds]


def _pieces(of_one: Sequence[float], counts: Sequence[Sequence[int]]) -> tuple[Pieces, ...]:
    """What every round hands out, once for each cost of an edit."""
    return tuple(Pieces(tuple(one * n for n in numbers)) for numbers in counts for one in of_one)


def sample_edits(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, answers: AnswerForm
) -> list[EditPrompts]:
    """Some of a plan's requests, evenly spaced, behind its contexts or as many of usual length."""
    requests = [request for shard in plan.shards for request in shard.items]
    contexts = plan.spec.method.contexts
    if contexts is None:
        drawn = [" ".join([word] * (CONTEXT_TOKENS - 1)) for word in CONTEXT_SEEDS]
        contexts = ("{}", *(f"{text}. {{}}" for text in drawn))
    return tokenize_edits(tokenizer, evenly(requests, _SAMPLED_REQUESTS), contexts, answers)


def expected_steps(spec: JobSpec) -> float:
    """Steps that an edit is taken to need, a guess unless no stop loss ends a search early."""
    value = spec.method.value
    assert value.steps is not None and value.stop_loss is not None
    return value.steps if value.stop_loss == 0.0 else max(1.0, STEPS_SHARE * value.steps)


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of some items, evenly spaced."""
    step = max(1, -(-len(items) // most))
    return list(items[::step])


def _apply_flops(edits: int, key_size: int, hidden_size: int) -> float:
    """Two factors multiplied, where an update travels as factors."""
    is_dense = edits * (key_size + hidden_size) >= key_size * hidden_size
    return 0.0 if is_dense else 2.0 * edits * key_size * hidden_size


def _evaluation(
    plan: Plan,
    model: ModelOutline,
    size: ModelSize,
    tokenizer: PreTrainedTokenizerBase,
    beside: EditMemorySize | None = None,
) -> Work:
    """What is scored, continued and measured, of the baseline and of every evaluated round.

    Args:
        beside: the memory that the edited model's prompts are looked up in.
    """
    rounds = {"evaluation": list(plan.rounds.evaluated)}
    if plan.spec.evaluation.baseline:
        rounds = {"baseline": [BASELINE_ROUND], **rounds}
    probes = {r: plan.rounds.probes(r) for numbers in rounds.values() for r in numbers}
    general = _general(plan, size, tokenizer)
    sample = _sampled_probes(max(probes.values(), key=len, default=[]))
    if not sample:
        return Work(general=general)
    scored, continued = _probe_costs(plan.spec, model.answers, size, tokenizer, sample)
    looked_up = 0.0 if beside is None else beside.lookup_flops(sample, tokenizer) / len(sample)

    def pieces(each: float, more: float = 0.0) -> dict[str, tuple[Pieces, ...]]:
        of_one = {"baseline": each, "evaluation": each + more}
        return {
            name: tuple(
                Pieces(tuple(of_one[name] * len(shard.items) for shard in cut_probes(probes[r])))
                for r in numbers
            )
            for name, numbers in rounds.items()
        }

    generated = pieces(continued) if continued else {}
    return Work(scored=pieces(scored, looked_up), generated=generated, general=general)


def _sampled_probes(probes: Sequence[Probe]) -> list[Probe]:
    """Whole shards: within one, a prompt that several edits share is scored once."""
    sample: list[Probe] = []
    for shard in evenly(cut_probes(probes), 8):
        sample += list(shard.items)
        if len(sample) >= _SAMPLED_PROBES:
            break
    return sample


def _probe_costs(
    spec: JobSpec,
    answers: AnswerForm,
    size: ModelSize,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sequence[Probe],
) -> tuple[float, float]:
    """Mean FLOP of scoring a probe, and of continuing it where the spec asks for that."""
    settings = spec.evaluation
    asked = [probe for probe in sample if probe.kind != "generation"]
    flops = 0.0
    if asked:
        layout = Layout(encode_probes(tokenizer, asked, answers))
        source = sum(len(ids) for ids in layout.sources or ())
        flops = scoring_flops(size, len(layout.ids), len(layout.labels), source)
    continued = 0.0
    lengths = {
        "generation": settings.fluency_tokens,
        **(dict.fromkeys(("rewrite", "paraphrase"), settings.generate_tokens)
           if settings.generate else {}),
    }  # fmt: skip
    prompts = [probe for probe in sample if probe.kind in lengths]
    for probe, ids in zip(prompts, _prompt_ids(prompts, tokenizer), strict=True):
        continued += continuation_flops(size, len(ids), lengths[probe.kind])
    return flops / len(sample), continued / len(sample)


def _prompt_ids(probes: Sequence[Probe], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return token_ids(tokenizer, [probe.prompt for probe in probes]) if probes else []


def _general(plan: Plan, size: ModelSize, tokenizer: PreTrainedTokenizerBase) -> tuple[Pieces, ...]:
    if not plan.held_out:
        return ()
    tokens = _mean_tokens(plan.held_out, tokenizer, plan.spec.evaluation.general.max_tokens)
    total = tokens * len(plan.held_out)
    times = len(plan.rounds.evaluated) + int(plan.spec.evaluation.baseline)
    return (Pieces((scoring_flops(size, total, total),)),) * times


def _covariance(
    spec: JobSpec, model: ModelOutline, size: ModelSize, tokenizer: PreTrainedTokenizerBase
) -> tuple[Pieces, float]:
    """FLOP by shard and tokens of the covariance; none without a corpus to compute it from."""
    settings, layers = spec.covariance, spec.method.layers
    assert layers is not None
    if settings.corpus is None:
        return Pieces(()), 0.0
    sizes = [model.key_size(layer) for layer in layers]
    limit = min(n for n in (settings.max_tokens, model.max_positions, 1 << 20) if n is not None)
    is_here = settings.corpus == "factworld" or Path(settings.corpus).is_file()
    mean, texts = min(_TOKENS_OF_A_TEXT, limit), settings.samples
    if is_here:
        wanted = _SAMPLED_TEXTS if texts == "auto" else texts
        found = read_corpus(settings.corpus, field=settings.field, samples=wanted, seed=spec.seed)
        mean = _mean_tokens(evenly(found, _SAMPLED_TEXTS), tokenizer, limit)
        texts = len(found) if texts != "auto" else texts
    if texts is None:
        return Pieces(()), 0.0
    if texts == "auto":
        texts = int(AMPLE_TOKENS_PER_KEY_ENTRY * max(sizes) / mean) + 1
    a_text = covariance_flops(size, sizes, 1, layers[-1]) * mean
    shards = tuple(a_text * len(shard.items) for shard in text_shards(range(texts)))
    return Pieces(shards), mean * texts


def _mean_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> float:
    some = evenly(texts, _SAMPLED_TEXTS)
    lengths = [len(ids) for ids in token_ids(tokenizer, some)]
    cut = lengths if limit is None else [min(length, limit) for length in lengths]
    return max(1.0, sum(cut) / len(cut))
