"""One layer's update from a round of edits: with a ready factor of lambda C, and from scratch.

    python -m benchmarks.reduce --edits 100 --key-size 4096 --hidden-size 1024

Keys and residuals are random; C is the covariance of random keys with a falling spectrum. Ready:
lambda C is factored already, the push-through form solves an N x N system. Fresh: the f x f normal
equations by a general solve for the keys, as the code published with MEMIT does; Cholesky: the
same by a fresh Cholesky factor. All in float64.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, print_goals, print_table, report
from benchmarks.timing import CLOCKS, Timed, alternate
from pipeline.editing.solve import Factor, factorise, update_factors
from pipeline.models.editable import resolve_device

GOAL_RATIO = 5.0
WEIGHT = 20.0
_CORPUS_KEYS = 256


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    edits, key_size, width = arguments.edits, arguments.key_size, arguments.hidden_size
    problem = _Problem(edits, key_size, width)
    timed = problem.time(arguments.repeats, arguments.clock)
    ready, fresh = timed["ready factor"], timed["fresh solve"]
    row: dict[str, Any] = {
        "edits": edits,
        "key_size": key_size,
        "hidden_size": width,
        "clock": arguments.clock,
        "milliseconds": 1e3 * ready.seconds,
        "factor_milliseconds": 1e3 * problem.factor_seconds(arguments.clock),
        "fresh_ratio": fresh.seconds / ready.seconds,
        "cholesky_ratio": timed["fresh Cholesky"].seconds / ready.seconds,
        "peak_megabytes": ready.peak_bytes / 1e6,
        "fresh_peak_megabytes": fresh.peak_bytes / 1e6,
        "bytes_keys": bytes_of_keys(edits, key_size, width),
        "bytes_gram": bytes_of_gram(key_size, width),
        "largest_difference": problem.difference(timed),
    }
    _print_way_table(timed, f"N = {edits}, f = {key_size}: medians of {arguments.repeats} rounds")
    _print_growth(arguments)
    report("reduce", row, arguments.results)
    print_goals({"times faster than a fresh f x f solve": (row["fresh_ratio"], ">=", GOAL_RATIO)})
    return row


class _Problem:
    """Random keys, residuals and covariance of one size, and the ways to solve for the update."""

    def __init__(self, edits: int, key_size: int, hidden_size: int) -> None:
        device, _ = resolve_device()
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {
            "generator": generator, "dtype": torch.float64, "device": device
        }  # fmt: skip
        # Standard deviations from 1 down to 1 / 30, as keys have few strong directions.
        scale = torch.linspace(0, -3.4, key_size, dtype=torch.float64, device=device).exp()
        # As many random keys as this would leave C singular; the diagonal stands for the rest.
        some = torch.randn(_CORPUS_KEYS, key_size, **options) * scale
        self.covariance_FF = some.T @ some / _CORPUS_KEYS + torch.diag(scale**2)
        self.keys_NF = torch.randn(edits, key_size, **options) * scale
        self.residuals_ND = torch.randn(edits, hidden_size, **options)
        self.factor = factorise(WEIGHT * self.covariance_FF)

    def time(self, repeats: int, clock: str) -> dict[str, Timed]:
        return alternate(
            {
                "ready factor": lambda: update_factors(
                    self.keys_NF, self.residuals_ND, self.factor
                ),
                "fresh Cholesky": lambda: self.fresh(factorise),
                "fresh solve": lambda: self.fresh(_General),
            },
            repeats,
            clock,
        )

    def fresh(self, solver: Any) -> tuple[Tensor, Tensor]:
        """The update as factors (D, N), (N, F), from normal equations built and solved anew."""
        matrix = WEIGHT * self.covariance_FF + self.keys_NF.T @ self.keys_NF
        return self.residuals_ND.T, solver(matrix).solve(self.keys_NF.T).T

    def factor_seconds(self, clock: str) -> float:
        """Seconds to factor lambda C, which happens once a layer, not once a round."""
        return alternate({"factor": self._factorise}, 1, clock)["factor"].seconds

    def difference(self, timed: dict[str, Timed]) -> float:
        """Largest relative difference between the ways' updates (Frobenius norm)."""
        updates = [left @ right for left, right in (run.result for run in timed.values())]
        return max(float((other - updates[0]).norm() / updates[0].norm()) for other in updates[1:])

    def _factorise(self) -> Factor:
        return factorise(WEIGHT * self.covariance_FF)


class _General:
    """A general solve of the same equations, without the use of symmetry."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def solve(self, right: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix, right)


def bytes_of_keys(edits: int, key_size: int, hidden_size: int) -> int:
    """Bytes that travel to the reducer as keys and residuals, in float32."""
    return 4 * edits * (key_size + hidden_size)


def bytes_of_gram(key_size: int, hidden_size: int) -> int:
    """Bytes that travel, from each worker, as the sums K K^T and R K^T, in float64."""
    return 8 * key_size * (key_size + hidden_size)


def _print_way_table(timed: dict[str, Timed], title: str) -> None:
    first = next(iter(timed.values())).seconds
    print_table(
        title,
        ("way", "ms", "times the ready factor", "peak MB"),
        [
            (name, 1e3 * run.seconds, run.seconds / first, run.peak_bytes / 1e6)
            for name, run in timed.items()
        ],
    )


def _print_growth(arguments: argparse.Namespace) -> None:
    """Cost against N and f, and the bytes that travel: keys in all, or sums from each worker."""
    full, width = arguments.key_size, arguments.hidden_size
    few, many = max(1, arguments.edits // 4), min(arguments.edits * 4, full // 2)
    sizes = [(arguments.edits, full // 4), (arguments.edits, full // 2)]
    sizes += [(few, full), (arguments.edits, full), (many, full)]
    rows = []
    for edits, key_size in sizes:
        timed = _Problem(edits, key_size, width).time(1, arguments.clock)
        ready = timed["ready factor"]
        rows.append(
            (
                edits,
                key_size,
                1e3 * ready.seconds,
                timed["fresh solve"].seconds / ready.seconds,
                timed["fresh Cholesky"].seconds / ready.seconds,
                bytes_of_keys(edits, key_size, width) / 1e6,
                bytes_of_gram(key_size, width) / 1e6,
                ready.peak_bytes / 1e6,
            )
        )
    print_table(
        "how the cost grows",
        (
            "N",
            "f",
            "ms",
            "fresh solve",
            "fresh Cholesky",
            "MB as keys",
            "MB as sums, a worker",
            "peak MB",
        ),
        rows,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--edits", type=int, default=100)
    made.add_argument("--key-size", type=int, default=4096)
    made.add_argument("--hidden-size", type=int, default=1024)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--clock", choices=CLOCKS, default="wall", help="time a run by this")
    made.add_argument("--results", type=Path, default=RESULTS)
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
