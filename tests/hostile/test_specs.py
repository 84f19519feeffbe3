"""Any YAML, any setting, any --set: a spec, or one line that says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.printable import one_line
from pipeline.spec import JobSpec, load_spec, parse_spec
from tests.fuzzing import altered, damaged, fuzz, hostile_json

WHOLE: dict[str, Any] = JobSpec.model_validate(
    {
        "name": "whole",
        "model": {"path": "some/model", "revision": "main"},
        "method": {
            "layers": [1, 2],
            "covariance_weight": 3.5,
            "contexts": ["{}", "So {}"],
            "value": {"steps": 5, "stop_loss": 0.5},
        },
        "covariance": {"corpus": "corpus.txt", "path": "covariances"},
        "output": {"path": "runs/whole"},
    }
).model_dump(mode="json")

DEEP = "[" * 20_000
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 25)
)
PIECES = [
    *("name: ", "model", "method: {", "}", "[", "]", "- ", ": ", "\n", "  ", "&a ", "*a", "!!int "),
    *("!!bool ", "!!timestamp ", "!!float ", "!!binary ", "!!python/object/apply:os.getpid []"),
    *("2001-13-99", "0x", "1_0", "<<: ", "? ", "|\n", ">", "'", '"\\ud800"', "%YAML 1.1", "---"),
    *("null", "=", "1e999", "-", "path", "9" * 5000, "\t", "\x00", "\ufeff", "#"),
]
texts = st.text() | st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def usable(spec: JobSpec) -> None:
    """What is accepted can be written, read, hashed, and its paths looked up."""
    assert parse_spec(json.loads(json.dumps(spec.model_dump(mode="json"))), "again") == spec
    assert len(spec.digest()) == 64
    spec.run_path.exists()
    Path(spec.model.path).is_dir()
    Path(spec.requests.path).is_file()


def read_or_refuse(read: Any) -> None:
    try:
        spec = read()
    except InputError as error:
        assert "\n" not in one_line(str(error)) and len(str(error)) < 10_000
    else:
        usable(spec)


@fuzz(40, 3000)
@given(text=texts)
@example(text=DEEP)
@example(text="{a: " * 5000)
@example(text=LAUGHS)
@example(text="model: &m [*m]")
@example(text="!!bool maybe")
@example(text="!!timestamp never")
@example(text="name: !!int ''")
@example(text="seed: 2001-13-99")
@example(text="{[1]: 2}")
@example(text="1: 2")
@example(text="null: 2")
def test_any_yaml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    read_or_refuse(lambda: load_spec(path))


@fuzz(20, 1500)
@given(data=st.data())
def test_any_damage_to_a_spec(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(data.draw(damaged(yaml.safe_dump(WHOLE).encode())))
    read_or_refuse(lambda: load_spec(path))


@fuzz(60, 3000)
@given(content=altered(WHOLE))
@example(content={"model": {"path": "\0"}})
@example(content={"output": {"path": "a" * 300}})
@example(content={"output": {"path": "a/" * 3000}})
@example(content={"name": ".."})
@example(content={"name": "\u0416" * 200})
@example(content={"seed": 2**64})
@example(content={"cluster": {"reducer_threads": 10**9}})
def test_any_settings(content: object) -> None:
    read_or_refuse(lambda: parse_spec(content, "spec.yaml"))


NAMES = ["model.path", "method.layers", "seed", "method", "method.value.steps", "output.path", ""]


@fuzz(40, 2500)
@given(
    overrides=st.lists(
        st.tuples(
            st.sampled_from(NAMES) | st.text(max_size=12),
            st.sampled_from(["=", "", "=="]),
            texts | hostile_json.map(json.dumps),
        ).map("".join),
        max_size=3,
    )
)
@example(overrides=["seed=" + DEEP])
@example(overrides=["name=!!bool x"])
def test_any_overrides(overrides: list[str]) -> None:
    read_or_refuse(lambda: load_spec(None, overrides))


@pytest.mark.parametrize(
    "path",
    [
        "https://someone:password1234@huggingface.co/some/model",
        "hf_abcdefghijABCDEFGHIJabcdefghijABCD",
        "https://hub/x?token=hf_abcdefghijABCDEFGHIJabcdefghijABCD",
    ],
)
@pytest.mark.parametrize(
    "place", ["model.path", "model.revision", "requests.path", "covariance.corpus", "output.path"]
)
def test_a_secret_in_a_spec_is_refused_and_not_repeated(path: str, place: str) -> None:
    with pytest.raises(InputError, match="HF_TOKEN") as caught:
        load_spec(None, [f"{place}={path}"])
    assert "password1234" not in str(caught.value) and "ABCDEFGHIJ" not in str(caught.value)
    assert place in str(caught.value)
