"""The job that faults are tried on, and what must be true of its run whatever happened to it."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline import run_batch_edit
from pipeline.cluster import plan
from pipeline.errors import ResultsDamagedError
from pipeline.results import Run, read
from pipeline.results.listing import Part
from pipeline.spec import parse_spec
from tests.tiny_jobs import LAYERS, TinyJobs, digests, records

COUNT = 72  # more than a key has entries
SHARDS = 12
PROBES_PER_SHARD = 24
PROBES = {"rewrite": 1, "paraphrase": 1, "neighborhood": 2}  # of every request
PHASES = ("start", "covariance", "baseline", "values", "insertion", "evaluation", "finish")
PARTS = {"baseline": 12, "values": SHARDS, "insertion": len(LAYERS), "evaluation": 12}


@contextmanager
def small_probe_shards() -> Iterator[None]:
    """Cut evaluations finely, so that they have a middle."""
    before = plan._SMALLEST_PROBE_SHARD
    plan._SMALLEST_PROBE_SHARD = PROBES_PER_SHARD
    try:
        yield
    finally:
        plan._SMALLEST_PROBE_SHARD = before


class Job:
    """One job on a tiny model and its undisturbed run, which one process made.

    Args:
        tiny: where models and request files are.
        root: where to put the runs.
        count: requests to edit; one that cannot be stands beside them.
        shards: of requests.
        save_model: also write the edited model.
        value: settings of the value search.
    """

    def __init__(
        self,
        tiny: TinyJobs,
        root: Path,
        *,
        count: int = COUNT,
        shards: int = SHARDS,
        save_model: bool = False,
        value: Mapping[str, Any] = MappingProxyType({"steps": 20}),
    ) -> None:
        self.tiny, self.root, self.value = tiny, root, value
        self.count, self.shards, self.save_model = count, shards, save_model
        root.mkdir(parents=True, exist_ok=True)
        settings = self.settings(root / "whole", engine="in_process")
        with small_probe_shards():
            self.whole = read(run_batch_edit(parse_spec(settings, "the test")).path)
        self.expected = digests(self.whole)

    def settings(self, output: Path, **cluster: Any) -> dict[str, Any]:
        """The job's spec as plain data; its covariances are kept beside the run."""
        requests = records(self.count + 1)
        requests[self.count]["requested_rewrite"]["prompt"] = "no place for the subject"
        settings = self.tiny.settings(output, requests=requests)
        settings["covariance"]["path"] = str(output.with_name(f"{output.name}-covariances"))
        size = self.count // self.shards
        settings["cluster"] |= {"shard_size": size, "engine": "ray", "workers": 2} | cluster
        settings["output"]["save_model"] = self.save_model
        settings["method"]["value"] |= self.value
        return settings

    def spec_file(self, output: Path, **cluster: Any) -> Path:
        """Write the spec of a run beside it."""
        path = output.with_name(f"{output.name}.yaml")
        return self.tiny.spec_file(path, self.settings(output, **cluster))

    def problems(self, output: Path) -> list[str]:
        """What is wrong with a run that should be complete; an empty list is what is wanted."""
        try:
            run = read(output)
            run.verify()
        except (ResultsDamagedError, ValueError) as error:
            return [str(error)]
        return [name for name, is_right in self._findings(run).items() if not is_right]

    def _findings(self, run: Run) -> dict[str, bool]:
        found = digests(run)
        rows = run.metrics().select(["round", "case_id", "probe", "probe_index"]).to_pylist()
        probes = Counter(tuple(row.values()) for row in rows)
        wanted = {
            (round, str(case), kind, index): 1
            for round in (-1, 0)
            for case in range(self.count)
            for kind, count in PROBES.items()
            for index in range(count)
        }
        # The command also writes a report, which the undisturbed run in this process has not.
        files = {
            file
            for file in _files(run.path)
            if file.parts[0] not in ("report", "report.html") or file.suffix == ".tmp"
        }
        return {
            "the run is not finished": run.manifest["status"] == "finished",
            "updates/ are other bits": found["updates"] == self.expected["updates"],
            "values/ are other bits": found["values"] == self.expected["values"],
            "metrics/ are other bits": found["metrics"] == self.expected["metrics"],
            "edits/ are other rows": found["edits"] == self.expected["edits"],
            "a request is not exactly once in edits/": Counter(run.edits()["case_id"].to_pylist())
            == {str(case): 1 for case in range(self.count + 1)},
            "a probe is not exactly once in metrics/": probes == wanted,
            "the summary is another": run.summary["evaluation"] == self.whole.summary["evaluation"],
            "something lies around": files == _files(self.whole.path),
        }


def _files(path: Path) -> set[Path]:
    return {file.relative_to(path) for file in path.rglob("*")}


def phase_of(part: Part) -> str:
    """The phase that wrote a part."""
    if part.kind == "metrics":
        return "baseline" if part.round == -1 else "evaluation"
    return {"values": "values", "update": "insertion", "edits": "finish"}[part.kind]


def parts_written(run: Path) -> Counter[str]:
    """How many parts each phase has listed so far, in a run that may not have begun."""
    try:
        lines = (run / "manifest.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return Counter()
    listed: dict[str, Part] = {}
    for line in lines:
        part = Part.model_validate(json.loads(line))
        if part.withdrawn:
            listed.pop(part.name, None)
        else:
            listed[part.name] = part
    return Counter(phase_of(part) for part in listed.values())
