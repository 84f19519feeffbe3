"""Knowledge attribution of many facts at once against one step of one prompt at a time.

    python -m benchmarks.attribution --model MODEL --requests COUNTERFACT.json

The plain way attributes a part of the facts, evenly spaced; times are compared by the passes that
it makes. Attributions are compared, too.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.machine import print_goals, print_table, report
from benchmarks.plain_attribution import plain_scores
from benchmarks.timing import alternate
from benchmarks.workload import Workload, parser, spread
from pipeline.cluster.calls.base import TOKENS_PER_BACKWARD
from pipeline.editing.attribution import Attributions, AttributionSettings, attribute
from pipeline.planning.flops import ModelSize, attribution_flops
from pipeline.prompts import FactPrompts, tokenize_fact_prompts


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    work = Workload.of(arguments)
    facts = tokenize_fact_prompts(
        work.tokenizer, work.requests, work.contexts, paraphrases=False, with_old=True
    )
    chosen = list(spread(len(facts), arguments.plain_facts))
    model, plain = work.model, work.plain_model
    layers, steps = range(model.num_blocks), arguments.steps
    most = TOKENS_PER_BACKWARD[work.device.type]

    def batched() -> list[Attributions]:
        settings = AttributionSettings(steps)
        return list(attribute(model, facts, layers, settings, max_tokens=most))

    timed = alternate(
        {
            "batched": batched,
            "plain": lambda: [plain_scores(plain, facts[i], layers, steps) for i in chosen],
        },
        arguments.repeats,
        arguments.clock,
    )
    share = sum(_tokens(facts[i]) for i in chosen) / sum(map(_tokens, facts))
    seconds = {"batched": timed["batched"].seconds, "plain": timed["plain"].seconds / share}
    found = timed["batched"].result
    differences = [
        float((found[i].scores - scores).abs().max() / scores.abs().max())
        for i, scores in zip(chosen, timed["plain"].result, strict=True)
    ]
    flops = attribution_flops(ModelSize.of(model), facts, layers, steps)
    row: dict[str, Any] = {
        "dtype": work.spec.model.dtype,
        "clock": arguments.clock,
        "facts": len(facts),
        "plain_facts": len(chosen),
        "prompts": len(work.contexts),
        "steps": steps,
        "milliseconds_a_fact": 1e3 * seconds["batched"] / len(facts),
        "gigaflops": flops / seconds["batched"] / 1e9,
        "ratio": seconds["plain"] / seconds["batched"],
        "peak_megabytes": timed["batched"].peak_bytes / 1e6,
        "largest_relative_difference": max(differences),
    }
    print_table(
        f"attribution of {len(facts)} facts: medians of {arguments.repeats} rounds",
        ("way", "seconds (plain: for all facts)", "ms a fact", "peak MB"),
        [
            (name, taken, 1e3 * taken / len(facts), timed[name].peak_bytes / 1e6)
            for name, taken in seconds.items()
        ],
    )
    report("attribution", row, arguments.results)
    print_goals(
        {
            "attribution, times faster": (row["ratio"], ">=", 20.0),
            "largest difference, relative": (row["largest_relative_difference"], "<=", 1e-3),
        }
    )
    return row


def _tokens(fact: FactPrompts) -> int:
    """Tokens of all passes that the plain way makes of a fact, for one block and step."""
    answer = len(fact.old or ())
    return sum(len(prompt) + number for prompt in fact.prompts for number in range(answer))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], edits=16)
    made.add_argument("--plain-facts", type=int, default=1, help="facts the plain way attributes")
    made.add_argument("--steps", type=int, default=20, help="points of the integral")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
