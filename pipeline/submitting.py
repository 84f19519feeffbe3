"""Submitting a job to the job server of a Ray cluster, and following it to its end."""

import asyncio
import json
import logging
import os
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, JobFailedError
from pipeline.spec import JobSpec, load_spec
from pipeline.uploading import require_uploadable, uploaded_files

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Ray would kill after 3 s; a driver ends its workers and gives its lock back in less than 10.
_STOP_SECONDS = 20
_RECONNECT_SECONDS = 1.0
_GIVE_UP_SECONDS = 300.0
# Settings that may name files of the working directory.
_INPUTS = (
    "model.path",
    "requests.path",
    "covariance.corpus",
    "covariance.path",
    "evaluation.general.corpus",
)


@dataclass(frozen=True)
class Submitted:
    """A job on a cluster.

    Attributes:
        client: of its job server.
        address: of its job server.
        id: Ray's submission id.
    """

    client: "JobSubmissionClient"
    address: str
    id: str

    def command(self, verb: str, *options: str) -> str:
        """The `ray job` command that does something with it."""
        return " ".join(["ray job", verb, "--address", self.address, *options, self.id])


def submit(
    spec_path: Path,
    overrides: Sequence[str] = (),
    *,
    address: str = DEFAULT_ADDRESS,
    working_dir: Path = Path(),
    is_study: bool = False,
    restart: bool = False,
) -> Submitted:
    """Upload a working directory and start `editfleet edit SPEC` in it on a cluster's head.

    Args:
        spec_path: the job spec, a file of the working directory.
        overrides: `field.path=value` settings.
        address: of the job server, `http://HOST:8265`; this wins over RAY_ADDRESS.
        working_dir: what is uploaded, less what .gitignore and .rayignore name.
        is_study: `editfleet sequential` instead.
        restart: begin anew in a new run directory.

    Raises:
        InputError: the spec is wrong, a file that it names would not be there, the working
            directory is too large, or no job server answers or lets this user in.
        JobFailedError: the job server answers with an error.
    """
    spec = load_spec(spec_path, list(overrides))
    files = uploaded_files(working_dir)
    name = _uploaded_spec(spec_path, working_dir, files)
    require_reachable(spec, working_dir, files)
    require_uploadable(working_dir, files)
    client = _client(address)
    runtime_env = {
        "working_dir": str(working_dir),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)},
    }
    try:
        job = client.submit_job(
            entrypoint=entry_point(name, overrides, is_study=is_study, restart=restart),
            runtime_env=runtime_env,
            metadata={"job_name": spec.name},
        )
    except (OSError, RuntimeError) as error:
        raise JobFailedError(f"{address} does not take the job: {error}") from error
    return Submitted(client, address, job)


def entry_point(spec: str, overrides: Sequence[str], *, is_study: bool, restart: bool) -> str:
    """The shell command that runs a job in its copy of the working directory."""
    settings = [part for override in overrides for part in ("--set", override)]
    command = "sequential" if is_study else "edit"
    begin = ["--restart"] if restart else []
    return shlex.join(["python", "-m", "pipeline", command, spec, *settings, *begin])


def warn_of_temporary(run: Path) -> None:
    """Say in a job's log that its run directory is inside the copy of its working directory."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    if job.get("runtime_env", {}).get("working_dir") and not run.is_absolute():
        log.warning(
            "output.path: %s is inside this job's copy of the working directory, which Ray deletes"
            " when it needs the space; take a directory that the cluster keeps",
            run.absolute(),
        )


def require_reachable(spec: JobSpec, working_dir: Path, files: dict[Path, int]) -> None:
    """Check what a spec's relative paths mean inside the uploaded copy of the working directory.

    Raises:
        InputError: results would lie in that copy, which Ray deletes, or an input is not uploaded.
    """
    written = {
        "output.path": None if spec.url else spec.place,
        "output.staging": spec.output.staging,
        "covariance.path": spec.covariance.path,
    }
    for setting, value in written.items():
        is_read = setting == "covariance.path" and value and (working_dir / value).is_dir()
        if value is not None and not Path(value).is_absolute() and not is_read:
            raise InputError(
                f"{setting}: {value} would lie in the job's copy of the working directory, which"
                f" Ray deletes; --set {setting}=/... to a directory that the cluster keeps"
            )
    for setting in _INPUTS:
        value = _setting(spec, setting)
        if value is None or Path(value).is_absolute() or not (working_dir / value).exists():
            continue
        place = Path(os.path.normpath(value))
        if not any(path.is_relative_to(place) for path in files):
            raise InputError(
                f"{setting}: {value} is not uploaded, since it is outside the working directory or"
                " .gitignore or .rayignore names it; put it where the cluster finds it"
            )


def follow(job: Submitted, write: Callable[[str], Any]) -> int:
    """Write a job's log as it grows; return the job's exit code when it has ended.

    A connection that breaks is opened again, and the log goes on where it was.

    Args:
        job: the job.
        write: takes pieces of text.

    Returns:
        The driver's exit code; 128 plus the number of the signal that ended it, as in a shell;
        1 where the job failed without a driver.

    Raises:
        JobFailedError: the job server has not answered for minutes; the job may go on.
    """
    from aiohttp import ClientError

    # It says at each end of a log that the connection is closed.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    printer, answered = _LogPrinter(job, write), time.monotonic()
    while True:
        try:
            # Asked for first: only the log of a job that has ended then is whole.
            info = job.client.get_job_info(job.id)
            asyncio.run(printer.print())
            answered = time.monotonic()
            if info.status.is_terminal():
                return _exit_code(info)
        except (ClientError, OSError, RuntimeError) as error:
            if time.monotonic() - answered > _GIVE_UP_SECONDS:
                raise JobFailedError(
                    f"{job.address} does not answer ({error}); the job may go on:"
                    f" `{job.command('logs', '--follow')}` follows it again"
                ) from error
            log.warning("the connection to %s broke (%s); trying again", job.address, error)
        time.sleep(_RECONNECT_SECONDS)


class _LogPrinter:
    """Writes a job's log, and what has come since when it is asked again.

    Args:
        job: the job.
        write: takes pieces of text.
    """

    def __init__(self, job: Submitted, write: Callable[[str], Any]) -> None:
        self.job, self.write = job, write
        self._printed = 0

    async def print(self) -> None:
        """Write until the job or the connection ends; a log is always sent from its beginning."""
        seen = 0
        async for text in self.job.client.tail_job_logs(self.job.id):
            self.write(text[max(0, self._printed - seen) :])
            seen += len(text)
            self._printed = max(self._printed, seen)


def _exit_code(info: Any) -> int:
    from ray.job_submission import JobStatus

    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return 128 + signal.SIGTERM
    if info.driver_exit_code is None:
        log.error("the job did not run: %s", info.message)
        return 1
    code = int(info.driver_exit_code)
    return code if code >= 0 else 128 - code


def _uploaded_spec(spec_path: Path, working_dir: Path, files: dict[Path, int]) -> str:
    try:
        name = Path(os.path.abspath(spec_path)).relative_to(os.path.abspath(working_dir))
    except ValueError as error:
        raise InputError(
            f"{spec_path} is outside the working directory {working_dir}, which is all that the job"
            " sees; copy it there, or name another --working-dir"
        ) from error
    if name not in files:
        raise InputError(f"{spec_path} is not uploaded: .gitignore or .rayignore names it")
    return name.as_posix()


def _setting(spec: JobSpec, name: str) -> str | None:
    place: Any = spec
    for part in name.split("."):
        place = getattr(place, part)
    return None if place is None else str(place)


def _client(address: str) -> "JobSubmissionClient":
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise InputError(f"--address {address}: give the job server, as http://HOST:8265")
    # Ray takes the address from the environment before it takes it from its caller.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise InputError(
            f"{address} wants another token: export RAY_AUTH_MODE=token, with the cluster's token"
            " in ~/.ray/auth_token or RAY_AUTH_TOKEN (docs/security.md)"
        ) from error
    except (OSError, RuntimeError) as error:
        if "ray[default]" in str(error):
            raise InputError(
                "submitting needs ray[default]; `pip install 'editfleet[cluster]'`"
            ) from error
        raise InputError(
            f"--address {address}: no job server of Ray answers there ({error}); it is part of the"
            " dashboard of a head that has ray[default], at port 8265"
        ) from error
