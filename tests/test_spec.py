"""The job spec: what is accepted, what is refused, and what is said about it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.spec import JobSpec, load_spec, parse_spec


def _write(directory: Path, text: str) -> Path:
    path = directory / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _refused(content: Any) -> str:
    with pytest.raises(InputError) as caught:
        parse_spec(content, "job.yaml")
    message = str(caught.value)
    assert message.startswith("job.yaml: ") and "\n" not in message
    return message


def test_an_empty_spec_has_defaults() -> None:
    spec = parse_spec({}, "test")
    assert spec == JobSpec() == load_spec(None)
    assert spec.model.path == spec.requests.path == "factworld"
    assert spec.method.layers is None and spec.method.value.steps is None
    assert spec.run_path == Path("runs/edit")
    assert parse_spec({"output": {"path": "/x"}}, "test").run_path == Path("/x")


def test_the_documented_spec_is_accepted(tmp_path: Path) -> None:
    """The example of the design, but for the part that belongs to sequential jobs."""
    path = _write(
        tmp_path,
        """
name: counterfact-10k
model:      {path: EleutherAI/gpt-j-6b, dtype: bfloat16, revision: null}
requests:   {path: data/counterfact.json, format: counterfact, limit: 10000, offset: 0,
             shuffle_seed: null}
method:
  name: memit
  layers: [3, 4, 5, 6, 7, 8]
  covariance_weight: 15000
  contexts: null
  value: {steps: 25, learning_rate: 0.5, weight_decay: 0.5, kl_weight: 0.0625, clamp_norm: 0.75,
          stop_loss: 0.05, loss_layer: null}
covariance: {corpus: path-or-dataset, field: text, samples: 100000, max_tokens: null, path: null}
cluster:    {address: null, workers: auto, cpus_per_worker: 1, gpus_per_worker: auto}
evaluation: {probes: [rewrite, paraphrase, neighborhood], generate: false, baseline: true}
output:     {path: runs/counterfact-10k, save_model: false}
seed: 0
""",
    )
    spec = load_spec(path)
    assert spec.method.layers == (3, 4, 5, 6, 7, 8)
    assert spec.method.covariance_weight == 15000.0
    assert spec.method.value.kl_weight == 0.0625
    assert spec.cluster.workers == "auto"
    assert spec.run_path == Path("runs/counterfact-10k")


@pytest.mark.parametrize(
    ("content", "where", "meant"),
    [
        ({"metod": {}}, "metod", "method"),
        ({"sed": 1}, "sed", "seed"),
        ({"method": {"layer": [1]}}, "method.layer", "layers"),
        ({"method": {"value": {"step": 1}}}, "method.value.step", "steps"),
        ({"model": {"dtyp": "auto"}}, "model.dtyp", "dtype"),
        ({"requests": {"limits": 1}}, "requests.limits", "limit"),
        ({"covariance": {"sample": 1}}, "covariance.sample", "samples"),
        ({"cluster": {"worker": 1}}, "cluster.worker", "workers"),
        ({"evaluation": {"probe": []}}, "evaluation.probe", "probes"),
        ({"output": {"save_modle": True}}, "output.save_modle", "save_model"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest(
    content: dict[str, Any], where: str, meant: str
) -> None:
    assert f"{where}: unknown setting; did you mean {meant!r}?" in _refused(content)


def test_where_nothing_is_near_the_known_settings_are_listed() -> None:
    message = _refused({"output": {"qqq": 1}})
    assert "output.qqq: unknown setting; known: path, staging, save_model" in message


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"method": {"layers": [2, 1], "covariance_weight": 1}}, "method"),
        ({"method": {"layers": [1, 1]}}, "method"),
        ({"method": {"layers": []}}, "method.layers"),
        ({"method": {"layers": [-1]}}, "method.layers.0"),
        ({"method": {"layers": 3}}, "method.layers"),
        ({"method": {"layers": [1.5]}}, "method.layers.0"),
        ({"method": {"name": "rom"}}, "method.name"),
        ({"method": {"wrappers": ["rect", "rect"]}}, "method"),
        ({"method": {"wrappers": ["nas"], "nas": {"anchor_norm": 0}}}, "method.nas.anchor_norm"),
        ({"method": {"name": "rome", "wrappers": ["merge"]}}, "method"),
        ({"method": {"name": "alphaedit", "norm_penalty": 1}}, "method"),
        ({"method": {"rect": {"keep": 0}}}, "method.rect.keep"),
        ({"method": {"alphaedit": {"threshold": 0}}}, "method.alphaedit.threshold"),
        ({"method": {"covariance_weight": 0}}, "method.covariance_weight"),
        ({"method": {"covariance_weight": float("inf")}}, "method.covariance_weight"),
        ({"method": {"contexts": []}}, "method"),
        ({"method": {"contexts": ["no place"]}}, "method"),
        ({"method": {"contexts": ["{} and {}"]}}, "method"),
        ({"method": {"value": {"steps": 0}}}, "method.value.steps"),
        ({"method": {"value": {"learning_rate": float("nan")}}}, "method.value.learning_rate"),
        ({"method": None}, "method"),
        ({"model": {"dtype": "float8"}}, "model.dtype"),
        ({"requests": {"limit": 0}}, "requests.limit"),
        ({"requests": {"offset": -1}}, "requests.offset"),
        ({"requests": {"on_conflict": "maybe"}}, "requests.on_conflict"),
        ({"cluster": {"reducer_threads": 0}}, "cluster.reducer_threads"),
        ({"evaluation": {"probes": ["rewrite", "poem"]}}, "evaluation.probes.1"),
        ({"name": "a/b"}, "name"),
        ({"name": ""}, "name"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(content: dict[str, Any], where: str) -> None:
    assert _refused(content).startswith(f"job.yaml: {where}: ")


@pytest.mark.parametrize(
    "setting", ["workers", "gpus_per_worker", "shard_size", "value_batch_size"]
)
def test_a_setting_that_may_be_auto_is_named_as_it_is_typed(setting: str) -> None:
    """Not by the names of the types that were tried, and counted as one mistake."""
    message = _refused({"cluster": {setting: "many"}})
    assert message.startswith(f"job.yaml: cluster.{setting}: ")
    assert "more)" not in message


def test_the_first_of_several_mistakes_is_shown_and_the_rest_counted() -> None:
    message = _refused({"seed": "x", "name": "", "modl": {}})
    assert message.endswith("(2 more)")


@pytest.mark.parametrize("content", [[], "text", 3, None])
def test_a_spec_is_a_mapping(content: Any) -> None:
    assert "mapping" in _refused(content)


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        JobSpec().seed = 3  # type: ignore[misc]


# --- files and overrides ------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "1E-4", "0.0001", "1e-04"])
def test_numbers_are_numbers_however_they_are_written(tmp_path: Path, text: str) -> None:
    """YAML 1.1 takes 1e-4, without a dot, for text."""
    path = _write(tmp_path, f"method: {{value: {{learning_rate: {text}}}, covariance_weight: 2e4}}")
    method = load_spec(path).method
    assert method.value.learning_rate == 1e-4 and isinstance(method.value.learning_rate, float)
    assert method.covariance_weight == 20000.0
    override = load_spec(None, [f"method.value.learning_rate={text}"])
    assert override.method.value.learning_rate == 1e-4


def test_overrides_are_applied_in_order_over_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path, "seed: 1\nmethod: {layers: [1], covariance_weight: 5}\n")
    spec = load_spec(
        path,
        [
            "method.layers=[3,4]",
            "method.value.steps=7",
            "seed=2",
            "seed=3",
            "output.path=runs/a=b",
            "requests.limit=null",
            'method.contexts=["{}", "So, {}"]',
            "output.save_model=true",
        ],
    )
    assert spec.method.layers == (3, 4)
    assert spec.method.covariance_weight == 5
    assert spec.method.value.steps == 7
    assert spec.seed == 3
    assert spec.output.path == "runs/a=b" and spec.output.save_model
    assert spec.requests.limit is None
    assert spec.method.contexts == ("{}", "So, {}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "field.path=value"),
        ("=3", "field.path=value"),
        (" =3", "field.path=value"),
        ("seed=[", "not valid YAML"),
        ("name.first=x", "name is a value"),
        ("method.layrs=[1]", "did you mean 'layers'"),
        ("methd.layers=[1]", "did you mean 'method'"),
        ("seed=abc", "seed"),
    ],
)
def test_a_wrong_override_is_explained(tmp_path: Path, override: str, said: str) -> None:
    path = _write(tmp_path, "name: mine\n")
    with pytest.raises(InputError) as caught:
        load_spec(path, [override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"method: [", "not valid YAML"),
        (b"\tname: x", "not valid YAML"),
        (b"name: \xff\xfe", "not valid YAML"),
        (b"- a\n- b\n", "mapping"),
        (b"just text", "mapping"),
        (b"", "mapping"),
        (b"!!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"1: 2", "spec.yaml"),
    ],
)
def test_a_file_that_is_no_spec_is_refused_in_one_line(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_spec(path)
    message = str(caught.value)
    assert str(path) in message and said in message and "\n" not in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InputError, match="cannot read the spec") as caught:
            load_spec(path)
        assert str(path) in str(caught.value)


# --- digest and round trips ---------------------------------------------------------------------


def _digest(*overrides: str) -> str:
    return load_spec(None, list(overrides)).digest()


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "output.path=/x",
        "output.save_model=true",
        "cluster.workers=7",
        "cluster.engine=in_process",
        "cluster.address=auto",
        "cluster.gpus_per_worker=0",
        "cluster.memory_per_worker_gb=4",
        "cluster.hidden_states_gb=2",
        "cluster.max_retries=1",
        "cluster.stall_seconds=1",
        "cluster.call_timeout_seconds=1",
        "covariance.path=/x",
    ],
)
def test_the_digest_ignores_where_and_how_widely_a_job_runs(override: str) -> None:
    assert _digest(override) == _digest()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "model.path=x",
        "model.dtype=float16",
        "requests.limit=3",
        "requests.on_conflict=last",
        "method.layers=[1]",
        "method.value.steps=3",
        'method.contexts=["{}"]',
        "covariance.samples=5",
        "evaluation.baseline=false",
        "cluster.shard_size=7",
        "cluster.value_batch_size=7",
        "cluster.cpus_per_worker=7",
        "cluster.reducer_threads=7",
        "cluster.reducer_gpus=0.1",
    ],
)
def test_the_digest_follows_what_decides_the_result(override: str) -> None:
    assert _digest(override) != _digest()
    assert _digest(override) == _digest(override)
    assert len(_digest(override)) == 64


def test_differences_are_named_with_both_values() -> None:
    earlier = load_spec(None, ["method.layers=[1, 2]", "cluster.workers=3"])
    assert earlier.differences(earlier) == []
    now = load_spec(None, ["seed=4", "method.contexts=['{}, and {x}']", "cluster.workers=5"])
    assert now.differences(earlier) == [
        "method.layers was [1, 2] and is null",
        'method.contexts was null and is ["{}, and {x}"]',
        "seed was 0 and is 4",
    ]
    long = load_spec(None, [f"model.path={'x/' * 500}"]).differences(earlier)[0]
    assert len(long) < 300 and long.endswith("...")


def test_every_setting_that_is_free_exists() -> None:
    from pipeline.spec import job as module

    everything = module._flat(JobSpec().model_dump())
    assert set(everything) > module._FREE
    assert JobSpec().deciding().keys() == everything.keys() - module._FREE


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_PLACE = _TEXT.filter(lambda text: text and "\0" not in text)
_COUNT = st.none() | st.integers(1, 10**6)
_RATE = st.none() | st.floats(1e-12, 1e12)
_CONTEXT = st.builds(
    lambda left, right: left.replace("{}", "") + "{}" + right.replace("{}", ""), _TEXT, _TEXT
).filter(lambda text: text.count("{}") == 1)


def _part(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


_SPECS = _part(
    name=st.from_regex(r"\A[A-Za-z0-9_.\-]{1,9}\Z").filter(lambda text: text.strip(".")),
    seed=st.integers(-(2**63), 2**63 - 1),
    model=_part(
        path=_PLACE,
        dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
        revision=st.none() | _PLACE,
        allow_pickle=st.booleans(),
    ),
    requests=_part(
        path=_PLACE, limit=_COUNT, offset=st.integers(0, 9), shuffle_seed=st.none() | st.integers()
    ),
    method=_part(
        layers=st.none() | st.sets(st.integers(0, 99), min_size=1).map(sorted),
        covariance_weight=_RATE,
        contexts=st.none() | st.lists(_CONTEXT, min_size=1, max_size=3),
        value=_part(steps=_COUNT, learning_rate=_RATE, kl_weight=_RATE, stop_loss=_RATE),
    ),
    covariance=_part(corpus=st.none() | _PLACE, field=_PLACE, samples=_COUNT, max_tokens=_COUNT),
    cluster=_part(
        workers=st.just("auto") | st.integers(1, 99),
        gpus_per_worker=st.just("auto") | st.floats(0, 1) | st.integers(2, 8),
        stall_seconds=st.floats(1e-3, 1e9),
    ),
    evaluation=_part(
        probes=st.lists(st.sampled_from(["rewrite", "locality"])), generate=st.booleans()
    ),
    output=_part(path=st.none() | _PLACE, save_model=st.booleans()),
)


@settings(deadline=None)
@given(content=_SPECS)
def test_a_spec_survives_writing_and_reading(
    content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = parse_spec(content, "test")
    for section, given_part in content.items():
        if not isinstance(given_part, dict):
            assert getattr(spec, section) == given_part
    assert parse_spec(spec.model_dump(), "test") == spec
    plain = spec.model_dump(mode="json")
    as_json = parse_spec(json.loads(json.dumps(plain)), "test")
    path = _write(tmp_path_factory.getbasetemp(), yaml.safe_dump(plain))
    assert as_json == load_spec(path) == spec
    assert as_json.digest() == load_spec(path).digest() == spec.digest()
