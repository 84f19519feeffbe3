"""The studies that a comparison is made of, each as a job spec of its own."""

from collections import Counter
from typing import Any

from pipeline.errors import InputError
from pipeline.places import below
from pipeline.spec.job import JobSpec
from pipeline.spec.loading import parse_spec

_LABEL = "label"


def variants(spec: JobSpec) -> list[JobSpec]:
    """One spec for every method and seed that `spec.compare` lists, in their order.

    A study's name is its label, the same for all seeds; its run directory is below the job's.

    Raises:
        InputError: a method's settings are wrong, or two have the same label.
    """
    compare = spec.compare
    assert compare is not None, "the spec compares nothing"
    found, labels = [], []
    for place, changes in enumerate(compare.methods):
        one = merged(spec, changes, f"compare.methods[{place}]")
        labels.append(one.name)
        seeds = compare.seeds or (spec.seed,)
        suffixes = [f"-seed{seed}" for seed in seeds] if compare.seeds else [""]
        for seed, suffix in zip(seeds, suffixes, strict=True):
            where = below(spec.place, f"{one.name}{suffix}")
            found.append(one.model_copy(update={"seed": seed}).at(where))
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise InputError(
            f"compare.methods: {len(labels)} methods, of which several are called {twice[0]!r};"
            " give each a label of its own"
        )
    if compare.seeds and len(set(compare.seeds)) < len(compare.seeds):
        raise InputError(f"compare.seeds: {list(compare.seeds)} names one twice")
    return found


def merged(spec: JobSpec, changes: dict[str, Any], where: str) -> JobSpec:
    """The spec with some settings of its method changed, named by its label.

    Args:
        spec: the spec, of which this makes one of several.
        changes: settings of `method`, and perhaps a label; else that is the method's name with its
            wrappers.
        where: what errors call the changes.

    Raises:
        InputError: a setting is wrong.
    """
    base = spec.model_dump(mode="json", exclude_unset=True)
    changes = dict(changes)
    label = changes.pop(_LABEL, None)
    method = updated(base.get("method", {}), changes)
    content = {**base, "method": method, "compare": None, "survey": None}
    changed = parse_spec(content, where)
    if label is None:
        label = "-".join((changed.method.name, *changed.method.wrappers))
    return parse_spec({**content, "name": label}, f"{where}.{_LABEL}")


def updated(below: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with others put over them, group by group."""
    result = dict(below)
    for name, value in changes.items():
        group = result.get(name)
        if isinstance(group, dict) and isinstance(value, dict):
            value = updated(group, value)
        result[name] = value
    return result
