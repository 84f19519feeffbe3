"""Workers with several GPUs, or a part of one: on stand-in devices, and how many `auto` takes."""

import logging
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.cluster.calls import base as worker_module
from pipeline.cluster.gpus import Gpus, choose, settled, visible_bytes
from pipeline.cluster.plan import make_plan
from pipeline.cluster.worker import EditWorker
from pipeline.editing.update import Update
from pipeline.errors import InputError
from pipeline.evaluation.probes import probes_of
from pipeline.models.editable import resolve_devices
from pipeline.planning.memory import gpu_memory, ordinary_edit
from pipeline.planning.outline import outline
from pipeline.results.planned import at_its_peak
from pipeline.spec import JobSpec
from pipeline.spec.loading import parse_spec
from tests.cases import draw
from tests.families import SENTENCES
from tests.models.test_placement import on_host
from tests.stand_ins import FIRST, SECOND, stand_ins
from tests.tiny_jobs import TinyJobs, records

GB = 10**9
KINDS = ["rewrite", "paraphrase", "neighborhood", "generation"]


def answers(spec: JobSpec, directory: Path) -> dict[str, Any]:
    """What a worker answers to all that it is asked in a job, with updates in between."""
    plan = make_plan(spec)
    worker = EditWorker(plan.spec, 1)
    requests = [request for shard in plan.shards for request in shard.items]
    probes = [probe for request in requests for probe in probes_of(request, KINDS)]
    layers = worker.method.layers
    found: dict[str, Any] = {"shapes": worker.describe().key_sizes}
    found["contexts"] = worker.generate_contexts()
    found["lengths"] = worker.value_lengths(requests[:2], version=0)
    found["covariance"] = worker.covariance(SENTENCES, 20)
    values = worker.values(requests, version=0, round=0).drop_columns(["seconds"])
    found["values"] = values
    z = torch.tensor(values["z"].to_pylist())
    for version, layer in enumerate(layers):
        found[f"keys {layer}"] = worker.read_keys(0, requests, z, layer, version=version)
        shape = worker.model.oriented_weight(layer).shape
        worker.apply(layer, Update.of(0.05 * draw(*shape, seed=layer)), version=version)
    now = len(layers)
    found["masters"] = worker.masters(version=now)
    found["scores"] = worker.evaluate(probes, [0] * len(probes), version=now, round=0)
    found["general"] = worker.measure_general(SENTENCES[:4], SENTENCES[4:6], version=now, round=0)
    worker.save_model(str(directory), version=now)
    found["saved"] = sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    found["deviation"] = worker.embedding_deviation(["Rome", "Port Velmora"], version=now)
    return {name: v.to_pylist() if isinstance(v, pa.Table) else on_host(v)
            for name, v in found.items()}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_worker_over_two_devices_answers_as_on_one(
    family: str, tiny: TinyJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    spec = tiny.spec(
        tmp_path, "evaluation.generate=true", "evaluation.generate_tokens=3",
        "evaluation.fluency_tokens=4", family=family, requests=records(3),
    )  # fmt: skip
    expected = answers(spec, tmp_path / "whole")
    monkeypatch.setattr(
        worker_module, "resolve_devices", lambda _gpus: ([FIRST, SECOND], "two stand-ins")
    )
    with stand_ins() as moves:
        found = answers(spec, tmp_path / "split")
    assert moves, "the model was on one device"
    for name, value in expected.items():
        assert found[name] == value, name


def test_a_model_over_more_devices_than_there_are_is_refused() -> None:
    many = torch.cuda.device_count() + 2
    with pytest.raises(InputError, match=f"{many} GPUs for one model, but this process sees"):
        resolve_devices(many)
    assert len(resolve_devices(0.5)[0]) == 1


@pytest.mark.parametrize("count", [0, 0.25, 0.5, 1, 2, 8, "auto"])
def test_a_whole_number_of_gpus_or_a_part_of_one(count: float | str) -> None:
    spec = parse_spec({"cluster": {"gpus_per_worker": count}}, "job.yaml")
    assert spec.cluster.gpus_per_worker == count


@pytest.mark.parametrize("count", [-1, 1.5, 2.25, "two", float("nan"), float("inf"), 2000])
def test_another_number_of_gpus_is_refused(count: float | str) -> None:
    with pytest.raises(InputError, match=r"^job.yaml: cluster.gpus_per_worker: "):
        parse_spec({"cluster": {"gpus_per_worker": count}}, "job.yaml")


def model_of(weights: int, activations: int) -> Callable[[int, int], int]:
    """Bytes of the fullest GPU of a model that is cut evenly."""
    return lambda count, batch: (weights + batch * activations) // count


@pytest.mark.parametrize(
    ("weights", "activations", "gpus", "expected"),
    [
        (5 * GB, GB // 100, Gpus(80 * GB, 8), 0.25),
        (15 * GB, GB // 100, Gpus(80 * GB, 8), 0.25),
        (25 * GB, GB // 100, Gpus(80 * GB, 8), 0.5),
        (25 * GB, GB // 100, Gpus(80 * GB, 8, parts=False), 1),
        # Of its edits at once so many fit that it is not worth another GPU.
        (60 * GB, GB // 10, Gpus(80 * GB, 8), 1),
        (71 * GB, GB // 10, Gpus(80 * GB, 8), 2),
        (140 * GB, GB // 10, Gpus(80 * GB, 8), 2),
        (145 * GB, GB // 10, Gpus(80 * GB, 8), 3),
        (405 * GB, GB // 10, Gpus(80 * GB, 8), 6),
    ],
)
def test_the_estimate_decides(weights: int, activations: int, gpus: Gpus, expected: float) -> None:
    count, reason = choose(model_of(weights, activations), gpus, most=80)
    assert count == expected
    assert "a GPU has 80 GB" in reason


def test_a_model_that_no_node_holds_is_refused() -> None:
    with pytest.raises(InputError, match="over 4 GPUs the fullest one needs about 101 GB and has"):
        choose(model_of(405 * GB, 0), Gpus(80 * GB, 4), most=80)
    with pytest.raises(InputError, match="over 2 GPUs"):
        choose(model_of(405 * GB, 0), Gpus(80 * GB, 8), most=2)


def test_the_log_says_how_many_and_why(
    tiny: TinyJobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_plan(tiny.spec(tmp_path)).spec
    caplog.set_level(logging.INFO)
    small = settled(spec, lambda: Gpus(24 * GB, 4))
    assert small.cluster.gpus_per_worker == 0.25
    (message,) = caplog.messages
    assert message.startswith("cluster.gpus_per_worker: 0.25, since a worker needs about ")
    assert re.search(r" [1-5](\.[0-9]+)? GB, and a GPU has 24 GB$", message)
    given = spec.model_copy(
        update={"cluster": spec.cluster.model_copy(update={"gpus_per_worker": 3})}
    )
    assert settled(given, lambda: Gpus(24 * GB, 4)) is given


def test_the_fullest_gpu_holds_less_of_more(tiny: TinyJobs, tmp_path: Path) -> None:
    spec = make_plan(tiny.spec(tmp_path, "cluster.hidden_states_gb=0", family="llama")).spec
    model, edits = outline(spec.model, device=torch.device("cuda")), [ordinary_edit(spec)]
    one, two, four = (gpu_memory(spec, model, edits, 256, count) for count in (1, 2, 4))
    assert at_its_peak(one) > at_its_peak(two) > at_its_peak(four)
    buffers = one["weights"] - model.num_parameters * model.dtype.itemsize
    assert 0 <= buffers < 1000
    assert two["weights"] < 0.6 * one["weights"]
    # Both layers' copies are where the layers are.
    assert two["copies of edited weights"] <= one["copies of edited weights"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_tells_its_memory_and_keeps_to_a_part(tiny: TinyJobs, tmp_path: Path) -> None:
    assert visible_bytes() == torch.cuda.get_device_properties(0).total_memory
    spec = make_plan(tiny.spec(tmp_path, "cluster.gpus_per_worker=0.25")).spec
    worker = EditWorker(spec, 1)
    assert worker._replica.gpu_share == 0.25
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(visible_bytes() // 3, dtype=torch.uint8, device="cuda")
