"""A sequential study with alphaedit against the code published with AlphaEdit, beside it.

    python -m benchmarks.public_alphaedit --public CHECKOUT --run RUN [--search 10] [--alone]

The published code (jianghoucheng/AlphaEdit) edits its own copy of the model, round after round,
with the study's requests, contexts, settings and covariance. It is given the study's values, so
that what is compared is keys, solve and what is remembered; `--search` also lets it search some
values of every round itself, on its weights, to compare. With `--alone` it searches and uses its
own values for everything: a second a value.

Its projection comes from a singular value decomposition in float32, which may take another number
of directions for small than float64 does; `--double` gives it the projection that float64 makes.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.machine import RESULTS, print_goals, print_table, report
from benchmarks.public_alphaedit_code import PublicAlphaEdit
from benchmarks.workload import spread
from pipeline.cluster.calls.base import TOKENS_PER_BATCH
from pipeline.cluster.plan import Plan, make_plan
from pipeline.covariances import covariance_path, read_covariance
from pipeline.editing.update import EditedWeights
from pipeline.evaluation.metrics import rows, summarise
from pipeline.evaluation.probes import probes_of
from pipeline.evaluation.scoring import score
from pipeline.models.editable import EditableModel
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.requests import EditRequest
from pipeline.results import Run, read
from pipeline.results.schemas import METRICS
from pipeline.results.updates import read_update
from pipeline.spec import JobSpec, parse_spec

_SCORES = ("ES", "PS", "NS", "S")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison and return its row."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    study = _Study(arguments.run)
    dtype = torch.float64 if arguments.double else torch.float32
    public = PublicAlphaEdit(
        arguments.public,
        study.load_model(),
        study.tokenizer,
        study.spec.method,
        {layer: study.covariance(layer) for layer in study.layers},
        dtype,
    )
    number = min(arguments.rounds or study.num_rounds, study.num_rounds)
    print_table(
        "free directions",
        ("layer", "study", "published"),
        list(zip(study.layers, study.ranks, public.ranks, strict=True)),
    )
    values, changes = _edit(study, public, number, None if arguments.alone else arguments.search)
    columns = ("round", *(f"layer {layer}" for layer in study.layers), "z")
    apart: list[float | None] = [*values] if values else [None] * number
    lines = [(round, *changes[round], apart[round]) for round in range(number)]
    print_table("relative difference of the change W - W0 after a round", columns, lines)
    sample = [
        request
        for round in range(number)
        for request in _some(study.requests(round), arguments.scored // number)
    ]
    weights = {layer: public.weight(layer) for layer in study.layers}
    scores = {"study": study.scores(sample), "published": study.scores(sample, weights)}
    print_table(
        f"after {number} rounds, on {len(sample)} of the edits",
        ("code", *_SCORES),
        [(name, *(of[score] for score in _SCORES)) for name, of in scores.items()],
    )
    row = {
        "double": arguments.double,
        "rounds": number,
        "edits": sum(len(study.requests(round)) for round in range(number)),
        "alone": arguments.alone,
        "change_difference": max(map(max, changes)),
        "values_a_round": arguments.search if values else 0,
        "value_difference": values[0] if values else None,
        **{f"{name}_{key}": of[key] for name, of in scores.items() for key in _SCORES},
    }
    report("public_alphaedit", row, arguments.results)
    goals: dict[str, tuple[float, str, float]] = {}
    if values:
        goals["relative difference of z, round 0"] = (row["value_difference"], "<=", 1e-4)
    if arguments.double and not arguments.alone:
        goals["relative difference of W - W0"] = (row["change_difference"], "<=", 1e-2)
    points = abs(scores["study"]["S"] - scores["published"]["S"])
    print_goals({**goals, "points of S apart": (points, "<=", 1.0)})
    return row


def _edit(
    study: "_Study", public: PublicAlphaEdit, number: int, search: int | None
) -> tuple[list[float], list[list[float]]]:
    """Edit both models round by round; `search` None lets the published code use its own values.

    Returns:
        For each round how far the values that it searched are from the study's at most, and after
        each round how far the changes of the weights are, a layer each; both relative. From the
        second round on values are searched on weights that differ by rounding, which the search
        enlarges.
    """
    values: list[float] = []
    changes: list[list[float]] = []
    for round in range(number):
        requests, found = study.requests(round), study.values(round)
        if search:
            values.append(
                max(
                    _difference(found[request.case_id], public.value(request))
                    for request in requests[:search]
                )
            )
        public.edit(requests, {} if search is None else found)
        study.apply(round)
        changes.append(
            [_difference(study.change(layer), public.change(layer)) for layer in study.layers]
        )
    return values, changes


class _Study:
    """A finished study with alphaedit: what went in, what came out, and a model with its updates.

    Raises:
        SystemExit: the run is of another method, or of settings that the published code has not.
    """

    def __init__(self, directory: Path) -> None:
        self.run: Run = read(directory)
        self.spec: JobSpec = parse_spec(self.run.recorded.spec, f"{directory}/manifest.json: spec")
        method = self.spec.method
        if method.name != "alphaedit" or method.wrappers or self.spec.rounds is None:
            sys.exit(f"--run {directory}: is no study with plain alphaedit")
        if method.alphaedit.threshold_is != "absolute":
            sys.exit(f"--run {directory}: the published code's threshold is absolute")
        if method.contexts is None:
            sys.exit(f"--run {directory}: its contexts were drawn by the model; give them")
        self.contexts: tuple[str, ...] = method.contexts
        self._plan: Plan = make_plan(self.spec)
        self.layers = self._plan.layers
        self.num_rounds = len(self._plan.rounds.shards)
        self.tokenizer = load_tokenizer(self.spec.model)
        self._model = self.load_model()
        self._weights = EditedWeights(self._model, self.layers)
        self._values = {
            row["case_id"]: torch.tensor(row["z"]) for row in self.run.values().to_pylist()
        }

    def load_model(self) -> EditableModel:
        """The unedited model, float32."""
        spec = self.spec.model.model_copy(update={"dtype": "float32"})
        return EditableModel(load_model(spec, torch.device("cpu")))

    def covariance(self, layer: int) -> Tensor:
        """C, (F, F) float64."""
        directory = Path(self.run.manifest["covariance"]["directory"])
        path = covariance_path(directory, layer)
        return read_covariance(path, key_size=self._model.key_size(layer))[0]

    @property
    def ranks(self) -> list[int]:
        """Directions that the study's updates could use, a layer each."""
        return [int(read_update(path)[2]["rank"]) for path in self.run.updates(0)]

    def requests(self, round: int) -> list[EditRequest]:
        """The requests of a round that have a value."""
        of_round = self._plan.rounds.requests(round)
        return [request for request in of_round if request.case_id in self._values]

    def values(self, round: int) -> dict[str, Tensor]:
        """case_id -> z, (D,)."""
        return {request.case_id: self._values[request.case_id] for request in self.requests(round)}

    def apply(self, round: int) -> None:
        """Apply the updates of a round to the study's model."""
        for path in self.run.updates(round):
            layer, update, _ = read_update(path)
            self._weights.apply(layer, update)

    def change(self, layer: int) -> Tensor:
        """W - W0 so far, (D, F) float64."""
        now, pristine = self._weights.masters(layer)
        return now - pristine

    @torch.no_grad()
    def scores(
        self, requests: Sequence[EditRequest], weights: Mapping[int, Tensor] | None = None
    ) -> dict[str, float]:
        """ES, PS, NS and S of the study's model, or with other edited weights, (D, F), in it."""
        own = {layer: self._model.oriented_weight(layer).clone() for layer in weights or {}}
        for layer, weight in (weights or {}).items():
            self._model.oriented_weight(layer).copy_(weight)
        probes = [
            probe
            for request in requests
            for probe in probes_of(request, ("rewrite", "paraphrase", "neighborhood"))
        ]
        scored = score(self._model, self.tokenizer, probes, max_tokens=TOKENS_PER_BATCH["cpu"])
        for layer, weight in own.items():
            self._model.oriented_weight(layer).copy_(weight)
        table = pa.Table.from_pylist(
            rows(probes, scored, round=0, edit_rounds=[0] * len(probes)), schema=METRICS
        )
        [summary] = summarise(table)["rounds"]
        return {name: summary[name]["score"] for name in _SCORES}


def _some(requests: list[EditRequest], number: int) -> list[EditRequest]:
    return [requests[i] for i in spread(len(requests), number)]


def _difference(expected: Tensor, found: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--public", type=Path, required=True, help="checkout of the published code")
    made.add_argument("--run", type=Path, required=True, help="run directory of the study")
    made.add_argument("--rounds", type=int, help="the first rounds only")
    made.add_argument("--search", type=int, default=5, help="values a round to compare")
    made.add_argument("--alone", action="store_true", help="let the published code search all")
    made.add_argument("--double", action="store_true", help="make its projection in float64")
    made.add_argument("--scored", type=int, default=500, help="edits that are scored at the end")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--results", type=Path, default=RESULTS)
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
