"""What studies that run side by side do once: covariances, first scores, the first round's values.

Two studies share a piece of work when all settings that it follows from are equal. The first one to
come does it, the others wait and take over the parts.
"""

import json
import threading
from collections import defaultdict
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.methods import UPDATE_WRAPPERS, ClosedForm, build_closed_form
from pipeline.results.listing import TableKind
from pipeline.results.parts import read_table
from pipeline.results.store import RunStore
from pipeline.spec import JobSpec

# Settings of a method that act after its values have been found.
_AFTER_THE_SEARCH = (
    "covariance_weight",
    "norm_penalty",
    "max_drift",
    "emmet",
    "alphaedit",
    "rect",
    "prune",
)
# Wrappers that do so too; of BLUE's searches the first is what it would be without the wrapper.
_WRAPPERS_AFTER_THE_SEARCH = UPDATE_WRAPPERS | {"blue"}


class Sharing:
    """Work that was done by one of several studies, by its key."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._done: dict[str, RunStore] = {}

    @contextmanager
    def turn(self, key: str) -> Iterator[RunStore | None]:
        """Be the only study at a piece of work; gives the run that holds it already, if any does.

        Work that was left by an error is not done: the next study does it.
        """
        with self._guard:
            turn = self._turns[key]
        with turn:
            yield self._done.get(key)

    def is_done(self, key: str, store: RunStore) -> None:
        """Say that a run holds the whole of a piece of work."""
        self._done.setdefault(key, store)


def asked_key(spec: JobSpec) -> str:
    """What the requests, their rounds and what is asked of them follow from, as text."""
    apart = ("method.", "covariance.")
    kept = {k: v for k, v in spec.deciding().items() if not k.startswith(apart)}
    # `merge` cuts shards by subject.
    merges = "merge" in spec.method.wrappers
    return json.dumps({**kept, "contexts": spec.method.contexts, "merge": merges}, sort_keys=True)


def unedited_key(spec: JobSpec) -> str:
    """What the scores of the unedited model follow from, as text."""
    return json.dumps(["unedited", asked_key(spec)])


def values_key(spec: JobSpec) -> str:
    """What the values that are searched on the unedited model follow from, as text.

    With BLUE these are the first layer's alone.
    """
    method = build_closed_form(spec.method)
    content: dict[str, Any] = spec.method.model_dump(mode="json", exclude=set(_AFTER_THE_SEARCH))
    content["layers"], content["written"] = method.stages[0][-1], method.written
    after = _WRAPPERS_AFTER_THE_SEARCH
    content["wrappers"] = [name for name in spec.method.wrappers if name not in after]
    if type(method).find_values is ClosedForm.find_values:
        del content["name"]
    return json.dumps(["values", asked_key(spec), content], sort_keys=True)


def take_over(
    twin: RunStore,
    store: RunStore,
    kind: TableKind,
    round: int,
    shards: Container[int] | None = None,
) -> None:
    """Copy the parts of a round that a run does not hold from another one, which holds all.

    Those with these shard numbers only, if any are given.
    """
    for part in twin.parts(kind, round, shards):
        assert part.shard is not None and part.weight_version is not None
        if not store.has_part(kind, round, part.shard):
            store.write_part(
                kind,
                read_table(kind, twin.path_of(part)),
                round=round,
                shard=part.shard,
                weight_version=part.weight_version,
                failed=part.failed,
            )
