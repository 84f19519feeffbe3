"""Workers of one node hold one copy of the unedited weights: the pages of the file itself."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.machine import ROOT
from tests import families

EDITED = 1
MEGABYTE = 2**20

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="only Linux tells whose memory a page is"
)

# A worker as the engines make it, edited once; it measures itself when all others are there too.
WORKER = """
import json, sys, torch
from pipeline.cluster.worker import EditWorker
from pipeline.spec import parse_spec

def anonymous():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

def of_weights():
    found, counts = False, {"Rss:": 0, "Pss:": 0}
    for line in open("/proc/self/smaps"):
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            found = line.rstrip().endswith("model.safetensors")
        elif found and first in counts:
            counts[first] += int(rest[0]) * 1024
    return counts

spec = parse_spec(json.loads(sys.argv[1]), "test")
before = anonymous()
worker = EditWorker(spec, 1)
ids = torch.ones(1, 4, dtype=torch.long)
with torch.no_grad():
    unedited = worker.model.model(ids).logits
    weight = worker.model.oriented_weight(spec.method.layers[0])
    worker.weights.apply(spec.method.layers[0], torch.full_like(weight, 0.01))
    edited = worker.model.model(ids).logits
assert not torch.equal(unedited, edited)
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps({"own": anonymous() - before, **of_weights()}), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 100 MB, so that its weights stand out from what a process needs besides."""
    directory = tmp_path_factory.mktemp("shared") / "model"
    torch.manual_seed(0)
    config = GPT2Config(n_embd=512, n_layer=8, n_head=8, vocab_size=512, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(directory)
    families.build_tokenizer().save_pretrained(directory)
    return directory


def _settings(model: Path, dtype: str) -> dict[str, Any]:
    method = {"layers": [EDITED], "contexts": ["{}"], "covariance_weight": 10.0}
    return {"model": {"path": str(model), "dtype": dtype}, "method": method}


def _measured(model: Path, dtype: str, workers: int) -> Iterator[dict[str, int]]:
    arguments = [sys.executable, "-c", WORKER, json.dumps(_settings(model, dtype))]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(arguments, cwd=ROOT, **pipes) for _ in range(workers)]
    try:
        for process in started:
            assert process.stdout.readline() == "ready\n"
        for process in started:
            process.stdin.write("measure\n")
            process.stdin.flush()
        for process in started:
            yield json.loads(process.stdout.readline())
    finally:
        for process in started:
            process.communicate("end\n")


@pytest.mark.parametrize("workers", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_all_workers_of_a_node_share_the_unedited_weights(model: Path, workers: int) -> None:
    """One copy in all (a page counts as much as it is one's own); of its own each has what it
    edits, three times: the weight, what it was, and what was added."""
    weights = (model / "model.safetensors").stat().st_size
    edited = 4 * 4 * 512 * 512
    measured = list(_measured(model, "float32", workers))
    assert len(measured) == workers
    for worker in measured:
        assert worker["Rss:"] > 0.9 * weights, "the file is not mapped"
        assert worker["own"] < 3 * edited + 30 * MEGABYTE < 0.6 * weights
    assert sum(worker["Pss:"] for worker in measured) < 1.1 * weights + workers * edited


def test_weights_of_another_dtype_are_each_worker_s_own(model: Path) -> None:
    """A checkpoint that is converted as it is loaded cannot be shared."""
    (worker,) = _measured(model, "bfloat16", 1)
    weights = (model / "model.safetensors").stat().st_size
    assert worker["own"] > 0.4 * weights
