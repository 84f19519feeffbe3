"""Several studies side by side on the same workers, as one job."""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rich.console import Console

from pipeline.cluster.engine import Engine
from pipeline.cluster.gpus import settled_here
from pipeline.cluster.hosts import InProcessHosts
from pipeline.cluster.outcomes import shards_left
from pipeline.cluster.plan import Plan, cut_probes, make_plan, settle_spec
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.resume import open_earlier
from pipeline.cluster.rounds import BASELINE_ROUND
from pipeline.cluster.run import RunResult, check_job, make_scheduler
from pipeline.cluster.sharing import Sharing, asked_key, unedited_key, values_key
from pipeline.cluster.study import Study
from pipeline.errors import EditfleetError, InputError, JobFailedError
from pipeline.requests import EditRequest
from pipeline.results.driving import driving
from pipeline.results.mirror import Mirror
from pipeline.results.remote import next_free_place
from pipeline.results.store import RunStore
from pipeline.spec import JobSpec
from pipeline.spec.variants import variants
from pipeline.watching import logs
from pipeline.watching.watch import watch_of


class Hosts(Protocol):
    """Workers that several studies share."""

    ended: threading.Event

    def engine(self, study: int) -> Engine: ...

    def close(self) -> None: ...


@dataclass
class Member:
    """One of several studies that share workers, and what became of it."""

    plan: Plan
    store: RunStore | None
    progress: PhaseProgress
    result: RunResult | None = None
    error: BaseException | None = None

    @property
    def label(self) -> str:
        return self.plan.spec.run_path.name


def run_comparison(
    spec: JobSpec,
    requests: Sequence[EditRequest] | None = None,
    *,
    restart: bool = False,
    console: Console | None = None,
) -> list[RunResult]:
    """Make the studies that `spec.compare` lists, side by side on the same workers.

    Each has the bits that it would have alone, and a run directory of its own below the job's. They
    share the replicas of the model, the requests, the covariances, and where these follow from
    equal settings, the scores of the unedited model and the values of the first round. A study that
    fails leaves the others going. What a directory holds already is gone on with, as
    `run_sequential` does.

    Args:
        spec: the job, with `compare` and `rounds`.
        requests: edit requests given in memory; null reads `spec.requests`.
        restart: begin anew in the first of PATH, PATH-2, PATH-3, ... that is free.
        console: where to show progress; null is silent.

    Returns:
        The results, in the order of `pipeline.spec.variants.variants`.

    Raises:
        InputError: as of `run_sequential`, of any study; nothing was started.
        JobFailedError: some studies could not go on; the others are finished.
    """
    if spec.survey is not None:
        raise InputError("survey: run it with `editfleet survey` (run_survey), or set it to null")
    if spec.rounds is None:
        raise InputError("compare: it is of sequential studies; give rounds.size too")
    if restart:
        spec = spec.at(next_free_place(spec.place))
    studies = variants(spec)
    with ExitStack() as driven:
        mirrors = [driven.enter_context(driving(one.run_path, one.url)) for one in studies]
        members = _members(studies, requests, console, mirrors)
        left = [member for member in members if member.result is None]
        if left:
            _run_side_by_side(left, _held_already(members))
    _require_none_failed(members)
    return [member.result for member in members if member.result is not None]


def _members(
    studies: list[JobSpec],
    requests: Sequence[EditRequest] | None,
    console: Console | None,
    mirrors: list[Mirror | None],
) -> list[Member]:
    """Plan every study and find those that are complete; requests are read once for all."""
    plans: dict[str, Plan] = {}
    members = []
    for study, mirror in zip(studies, mirrors, strict=True):
        _, settled, source = settle_spec(study)
        key = asked_key(settled)
        if key not in plans:
            plans[key] = make_plan(study, requests)
        plan = replace(plans[key], spec=settled, settings_source=source)
        store = open_earlier(study)
        progress = PhaseProgress(console, study.run_path.name)
        progress.watch, progress.mirror = watch_of(settled), mirror
        members.append(Member(plan, store, progress, check_job(plan, store, progress)))
    return members


def _held_already(members: list[Member]) -> Sharing:
    """What earlier runs hold of the work that is shared."""
    sharing = Sharing()
    for member in members:
        store, plan = member.store, member.plan
        if store is None:
            continue
        probes = cut_probes(plan.rounds.probes(BASELINE_ROUND))
        measured = not plan.held_out or store.has_part("general", BASELINE_ROUND, 0)
        if measured and not shards_left(store, "metrics", BASELINE_ROUND, probes):
            sharing.is_done(unedited_key(plan.spec), store)
        if not shards_left(store, "values", 0, plan.rounds.shards[0]):
            sharing.is_done(values_key(plan.spec), store)
    return sharing


def _run_side_by_side(members: list[Member], sharing: Sharing) -> None:
    """Give every study a thread; they take turns at the workers, whose queues never run empty."""
    with ExitStack() as starting:
        for member in members:
            starting.enter_context(member.progress.phase("start", 1))
        hosts = start_hosts([member.plan.spec for member in members], len(members))
    threads = [
        threading.Thread(target=run_member, args=(hosts, place, member, len(members), sharing))
        for place, member in enumerate(members)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        hosts.ended.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    finally:
        hosts.close()
    for member in members:
        if member.error is not None and not isinstance(member.error, EditfleetError):
            raise member.error


def _require_none_failed(members: list[Member]) -> None:
    failed = [member for member in members if member.error is not None]
    if not failed:
        return
    all_input = all(isinstance(member.error, InputError) for member in failed)
    reasons = "; ".join(f"{member.label}: {member.error}" for member in failed)
    raise (InputError if all_input else JobFailedError)(
        f"{len(failed)} of {len(members)} studies ended early; {reasons}"
    )


def run_member(hosts: Hosts, place: int, member: Member, studies: int, sharing: Sharing) -> None:
    """Make one study of several; what ends it early becomes `member.error`.

    Args:
        hosts: the workers.
        place: the study's place among their specs.
        member: the study.
        studies: how many are under way at the same time.
        sharing: what they share.
    """
    spec = member.plan.spec
    try:
        engine = hosts.engine(place)
        try:
            scheduler = make_scheduler(engine, member.plan.spec, studies, place)
            study = Study(member.plan, engine, scheduler, member.progress, member.store, sharing)
            with logs.about(run=spec.place):
                summary: dict[str, Any] = study.run()
                if member.progress.mirror is not None:
                    member.progress.mirror.close()
            member.result = RunResult(spec.run_path, summary, spec.place)
        finally:
            engine.close()
    except BaseException as error:  # reported by the thread that started this one
        member.error = error
        if isinstance(error, EditfleetError):
            member.progress.say(f"ended early: {error}")


def start_hosts(specs: Sequence[JobSpec], at_once: int) -> Hosts:
    """Start workers that studies of one model share, so many of them at the same time."""
    if specs[0].cluster.engine == "in_process":
        return InProcessHosts(settled_here(specs), at_once)
    # Ray is imported only where it is used: the core and this engine run without it.
    from pipeline.cluster.ray_hosts import RayHosts

    return RayHosts(specs, at_once)
