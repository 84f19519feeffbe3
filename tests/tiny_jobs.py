"""Whole jobs on tiny models: the models, corpus, request files and specs, made once a session."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from safetensors.torch import load_file, save_file

from pipeline import JobSpec
from pipeline.cluster.engine import Call, InProcessEngine
from pipeline.results import Run, read
from pipeline.spec import parse_spec
from tests import families

LAYERS = [0, 1]
CONTEXTS = ["{}", "The house is old. {}", "Therefore, it is in the city. {}"]
VALUE = {
    "steps": 5,
    "learning_rate": 0.5,
    "weight_decay": 0.5,
    "kl_weight": 0.0625,
    "clamp_norm": 0.75,
    "stop_loss": 0.05,
}
COVARIANCE_WEIGHT = 5.0
CORPUS_TEXTS = 150  # more than two shards of the covariance phase

TRAININGS: dict[str, tuple[str, ...]] = {
    "mend": (
        "method.mend={rank: 4, edit_rate: 0.01, edit_rate_learning_rate: 0.01}",
        "train.batch_size=2",
        "train.accumulate=2",
    ),
    "malmen": ("method.malmen={rank: 4, edit_rate: 0.01}", "train.batch_size=18"),
    "ke": (
        "method.ke={condition_size: 8, hidden_size: 8, lstm_size: 4}",
        "train.accumulate=2",
        "train.warm_up=2",
    ),
}
"""Editors that are trained first, each with what changes a spec to a training of it."""
TRAIN = (
    "train.steps=6",
    "train.learning_rate=0.01",
    "train.validate_every=2",
    "train.checkpoint_every=2",
)
METHODS: dict[str, tuple[str, ...]] = {
    "ft": ("method.name=ft", "method.ft={epochs: 2, learning_rate: 0.01}"),
    "ultraedit": ("method.name=ultraedit", "method.ultraedit.learning_rate=0.001"),
    "rome": ("method.name=rome", "method.layers=[1]"),
    "kn": ("method={name: kn, contexts: ['{}'], kn: {steps: 1, shared_by: 1}}",),
    "t_patcher": (
        "method={name: t_patcher, contexts: ['{}'], t_patcher: {steps: 8, least_steps: 4,"
        " check_every: 4, memory_queries: 60, watched_queries: 20, memory_top: 9}}",
    ),
    "calinet": (
        "method={name: calinet, layers: [2, 3], contexts: ['{}'], calinet: {slots: 3, epochs: 3}}",
    ),
}
"""What changes a spec to one that edits with a method, quickly."""

_FIRST = [
    "Anselm",
    "Marguerite",
    "Zdeněk",
    "Torvald",
    "Brightwater",
    "Velmora",
    "Ostrania",
    "Oduya",
]
_LAST = ["Quillfeather", "Kováč", "Mills", "Engine", "Port", "Rome"]
_PROMPTS = ["The mother tongue of {} is", "{} plays the", 'They said that "{}" is in']
_NEW = ["English", "the violin", "London", "Ostrania", "German and French"]
_TRUE = ["Spanish", "music", "Berlin", "Italy"]

Record = dict[str, Any]


def records(count: int) -> list[Record]:
    """CounterFact records, each with a paraphrase and two neighbours; the same ones every time."""
    pairs = [(prompt, f"{a} {b}") for prompt in _PROMPTS for a in _FIRST for b in _LAST]
    random.Random(0).shuffle(pairs)
    return [_record(number, prompt, who) for number, (prompt, who) in enumerate(pairs[:count])]


def _record(number: int, prompt: str, who: str) -> Record:
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": prompt,
            "subject": who,
            "target_new": {"str": _NEW[number % len(_NEW)]},
            "target_true": {"str": _TRUE[number % len(_TRUE)]},
            "relation_id": f"P{_PROMPTS.index(prompt)}",
        },
        "paraphrase_prompts": [f"It is old. {prompt.replace('{}', who)}"],
        "neighborhood_prompts": [
            prompt.replace("{}", "the film"),
            prompt.replace("{}", "the old museum in Rome"),
        ],
    }


class TinyJobs:
    """A folder with models, a corpus and request files, and specs over them.

    Args:
        root: where to put them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = root / "corpus.txt"
        generator = random.Random(1)
        lines = []
        for number in range(CORPUS_TEXTS):
            words = families.SENTENCES[number % len(families.SENTENCES)].split()
            generator.shuffle(words)
            lines.append(" ".join(words))
        self.corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._finished: dict[str, Run] = {}
        self._trained: dict[str, Run] = {}

    def model(self, family: str = "gpt2") -> Path:
        """A directory with the family's model; those that begin texts with a token do so here."""
        directory = self.root / "models" / family
        if not directory.exists():
            families.save(family, directory, bos="llama" in family or "gemma" in family)
        return directory

    def broken_model(self) -> Path:
        """The tiny Llama whose embedding of the first byte of Cyrillic letters is not a number."""
        directory = self.root / "models" / "llama-broken"
        if not directory.exists():
            shutil.copytree(self.model("llama"), directory)
            byte = families.build_tokenizer()("Ж", add_special_tokens=False)["input_ids"][0]
            weights = load_file(directory / "model.safetensors")
            weights["model.embed_tokens.weight"][byte] = float("nan")
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    def requests(self, content: list[Record]) -> Path:
        """A CounterFact file with these records."""
        text = json.dumps(content, ensure_ascii=False)
        path = self.root / f"requests-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
        path.write_text(text, encoding="utf-8")
        return path

    def settings(
        self, output: Path, *, family: str = "gpt2", requests: list[Record] | None = None
    ) -> dict[str, Any]:
        """A spec as plain data: in this process, shards of 3, twelve requests unless told so."""
        return {
            "name": "tiny",
            "model": {"path": str(self.model(family)), "dtype": "float32"},
            "requests": {"path": str(self.requests(records(12) if requests is None else requests))},
            "method": {
                "layers": LAYERS,
                "covariance_weight": COVARIANCE_WEIGHT,
                "contexts": CONTEXTS,
                "value": dict(VALUE),
            },
            "covariance": {
                "corpus": str(self.corpus),
                "path": str(self.root / "covariances" / family),
            },
            # One thread each: tiny matrices gain nothing from two, and wait for one another.
            "cluster": {"engine": "in_process", "shard_size": 3, "reducer_threads": 1},
            "output": {"path": str(output)},
        }

    def spec(self, output: Path, *changes: str, **choices: Any) -> JobSpec:
        """A spec with changes written as `--set` takes them; choices as of `settings`."""
        return parse_spec(changed(self.settings(output, **choices), *changes), "the test")

    def training(self, output: Path, name: str, *changes: str) -> JobSpec:
        """The spec of an editor's training on twenty of 22 requests."""
        own = (f"method.name={name}", "method.contexts=null", *TRAININGS[name], *TRAIN)
        return self.spec(output, *own, *changes, requests=records(22))

    def trained(self, name: str) -> Run:
        """The finished training of an editor, made when first asked for; only read it."""
        from pipeline import run_training

        if name not in self._trained:
            spec = self.training(self.root / "trained" / name, name)
            self._trained[name] = read(run_training(spec).path)
        return self._trained[name]

    def method(self, name: str) -> tuple[str, ...]:
        """What changes a spec to one that edits with a method, with a trained editor if it must."""
        if name in METHODS:
            return METHODS[name]
        own = (f"method.name={name}", "method.contexts=null", "method.layers=null")
        return *own, f"method.{name}.editor={self.trained(name).path / 'editor'}"

    def spec_file(self, path: Path, settings: dict[str, Any]) -> Path:
        """Write a spec; JSON is YAML."""
        path.write_text(json.dumps(settings), encoding="utf-8")
        return path

    def finished(self, *changes: str, **choices: Any) -> Run:
        """The finished run of a spec, run in this process when first asked for; only read it."""
        from pipeline import run_batch_edit

        key = json.dumps([changes, choices], sort_keys=True)
        if key not in self._finished:
            output = self.root / "runs" / str(len(self._finished))
            self._finished[key] = read(run_batch_edit(self.spec(output, *changes, **choices)).path)
        return self._finished[key]


def changed(settings: dict[str, Any], *changes: str) -> dict[str, Any]:
    """Settings with `field.path=value` changes, the values YAML."""
    import yaml

    for change in changes:
        name, _, text = change.partition("=")
        *parents, leaf = name.split(".")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = yaml.safe_load(text)
    return settings


def digests(run: Run) -> dict[str, Any]:
    """What must be the same bits whatever computed it: update files, values, metrics, edits."""
    values = run.values().drop_columns(["seconds"]).sort_by("case_id")
    order = [("round", "ascending"), ("case_id", "ascending"), ("probe", "ascending")]
    metrics = run.metrics().sort_by([*order, ("probe_index", "ascending")])
    return {
        "updates": [hashlib.sha256(path.read_bytes()).hexdigest() for path in run.updates()],
        "values": values.to_pylist(),
        "metrics": metrics.to_pylist(),
        "edits": run.edits().to_pylist(),
    }


def statuses(run: Run) -> dict[str, int]:
    """How many requests have which status."""
    counts = pc.value_counts(run.edits()["status"]).to_pylist()
    return {entry["values"]: entry["counts"] for entry in counts}


_WORK = ("gradients", "adapt", "remember", "apply", "evaluate", "contribute")


def stopped_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End jobs in this process, as Ctrl-C does, after so many calls that edit or score."""
    submit, left = InProcessEngine.submit, [calls]

    def counted(self: InProcessEngine, worker: int, method: str, *a: Any, **k: Any) -> Call:
        left[0] -= method in _WORK
        if left[0] < 0:
            raise KeyboardInterrupt
        return submit(self, worker, method, *a, **k)

    monkeypatch.setattr(InProcessEngine, "submit", counted)
