"""Scoring and generation in batches against one prompt at a time.

    python -m benchmarks.evaluation --model MODEL --requests COUNTERFACT.json

The plain way scores one prompt with one target at a time through the whole model, and continues one
prompt at a time with the model's own `generate`. It does a part of the probes, evenly spaced; times
are compared per (prompt, target) and per prompt.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.machine import print_goals, print_table, report
from benchmarks.timing import Timed, alternate
from benchmarks.workload import Workload, parser, spread
from pipeline.cluster.cutting import cut_shards
from pipeline.cluster.plan import probe_shards
from pipeline.evaluation.generation import generate
from pipeline.evaluation.metrics import Score
from pipeline.evaluation.probes import Probe
from pipeline.evaluation.scoring import score
from pipeline.models.editable import EditableModel
from pipeline.prompts import encode_targets, pad_token_id

GOAL_RATIO = 8.0


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    work = Workload.of(arguments)
    shards = probe_shards(cut_shards(work.requests, "auto"), work.spec.evaluation.probes)
    probes = [probe for shard in shards for probe in shard.items]
    chosen = [probes[i] for i in spread(len(probes), arguments.plain_probes)]
    prompts = list(
        dict.fromkeys(p.prompt for p in probes if p.kind in ("rewrite", "paraphrase"))
    )  # fmt: skip
    asked = [prompts[i] for i in spread(len(prompts), arguments.plain_probes)]
    length = work.spec.evaluation.generate_tokens
    model, plain, tokenizer = work.model, work.plain_model, work.tokenizer
    timed = alternate(
        {
            "scoring, batched": lambda: score_shards(model, tokenizer, shards, work.max_tokens),
            "scoring, plain": lambda: [plain_score(plain, tokenizer, probe) for probe in chosen],
            "generation, batched": lambda: generate(
                model, tokenizer, prompts, max_new_tokens=length, batch_tokens=work.max_tokens
            ),
            "generation, plain": lambda: [
                plain_generate(plain, tokenizer, prompt, length) for prompt in asked
            ],
        },
        arguments.repeats,
        arguments.clock,
    )
    pairs = {
        "scoring, batched": _pairs(probes),
        "scoring, plain": _pairs(chosen),
        "generation, batched": len(prompts),
        "generation, plain": len(asked),
    }
    each = {name: timed[name].seconds / count for name, count in pairs.items()}
    scores = dict(zip(map(id, probes), timed["scoring, batched"].result, strict=True))
    texts = dict(zip(prompts, timed["generation, batched"].result, strict=True))
    row: dict[str, Any] = {
        "dtype": work.spec.model.dtype,
        "clock": arguments.clock,
        "edits": len(work.requests),
        "probes": len(probes),
        "pairs_per_second": 1 / each["scoring, batched"],
        "scoring_ratio": each["scoring, plain"] / each["scoring, batched"],
        "prompts_generated_per_second": 1 / each["generation, batched"],
        "generation_ratio": each["generation, plain"] / each["generation, batched"],
        "peak_megabytes": timed["scoring, batched"].peak_bytes / 1e6,
        "largest_difference": _difference(
            [scores[id(probe)] for probe in chosen], timed["scoring, plain"].result
        ),
        "same_texts": sum(
            texts[prompt] == text
            for prompt, text in zip(asked, timed["generation, plain"].result, strict=True)
        ) / len(asked),
    }  # fmt: skip
    _print_ways(timed, pairs, each, arguments.repeats)
    report("evaluation", row, arguments.results)
    print_goals(
        {
            "scoring, times faster": (row["scoring_ratio"], ">=", GOAL_RATIO),
            "generation, times faster": (row["generation_ratio"], ">=", GOAL_RATIO),
        }
    )
    return row


def score_shards(
    model: EditableModel,
    tokenizer: PreTrainedTokenizerBase,
    shards: Sequence[Any],
    max_tokens: int,
) -> list[Score]:
    """Score all probes as a worker does, shard by shard."""
    return [
        found
        for shard in shards
        for found in score(model, tokenizer, shard.items, max_tokens=max_tokens)
    ]


@torch.no_grad()
def plain_score(
    model: EditableModel, tokenizer: PreTrainedTokenizerBase, probe: Probe
) -> tuple[float | None, float | None]:
    """Mean negative log-likelihood of the new and the true answer, each by a pass of its own."""
    found: list[float | None] = []
    for answer in (probe.target_new, probe.target_true):
        if answer is None:
            found.append(None)
            continue
        ids = tokenizer(probe.prompt)["input_ids"]
        (target,) = encode_targets(tokenizer, [answer])
        whole = torch.tensor([[*ids, *target]], device=model.input_device)
        log_p = model.model(input_ids=whole).logits[0].float().log_softmax(dim=-1)
        wanted = torch.tensor(target, device=model.input_device)[:, None]
        found.append(float(-log_p[len(ids) - 1 : -1].gather(-1, wanted).mean()))
    return found[0], found[1]


def plain_generate(
    model: EditableModel, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int
) -> str:
    """Continue one prompt greedily."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.input_device)
    ids = model.model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=False,
        max_new_tokens=length,
        pad_token_id=pad_token_id(tokenizer),
    )
    new = ids[0, encoded["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _pairs(probes: Sequence[Probe]) -> int:
    return sum((p.target_new is not None) + (p.target_true is not None) for p in probes)


def _difference(
    found: Sequence[Score], expected: Sequence[tuple[float | None, float | None]]
) -> float:
    """Largest difference of a negative log-likelihood, in nats."""
    return max(
        abs(mine - theirs)
        for score, pair in zip(found, expected, strict=True)
        for mine, theirs in zip((score.nll_new, score.nll_true), pair, strict=True)
        if mine is not None and theirs is not None
    )


def _print_ways(
    timed: dict[str, Timed], pairs: dict[str, int], each: dict[str, float], repeats: int
) -> None:
    print_table(
        f"evaluation: medians of {repeats} rounds",
        ("way", "pairs or prompts", "seconds", "ms each", "peak MB"),
        [
            (name, pairs[name], run.seconds, 1e3 * each[name], run.peak_bytes / 1e6)
            for name, run in timed.items()
        ],
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], edits=64)
    made.add_argument("--plain-probes", type=int, default=64, help="probes the plain way does")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
