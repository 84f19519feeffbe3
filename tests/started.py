"""A Ray cluster started as users start one, with `ray start`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PORT, _JOB_PORT, _AGENT_PORT = 46379, 46380, 46381
JOB_SERVER = f"http://127.0.0.1:{_JOB_PORT}"
PATIENCE_SECONDS = 400.0


class StartedCluster:
    """`ray start --head` without processors, and `ray start` nodes, as an operator would.

    Args:
        home: where Ray keeps its token; its temporary files go to a short path.
        temporary: that path.
        ended: what is run at the end.
        host: the head's address.
        options: more of `ray start --head`.
    """

    def __init__(
        self,
        home: Path,
        temporary: Path,
        ended: ExitStack,
        host: str = "127.0.0.1",
        options: Sequence[str] = (),
    ) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self._ended, self._logs, self.host = ended, home, host
        self.environment = kept | {
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            # Ray gives workers the lowest priority but four: on a busy machine they hardly start.
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self._bring_up(
            "head",
            (),
            *("--head", f"--node-ip-address={host}", f"--port={_PORT}", "--num-cpus=0"),
            f"--dashboard-port={_JOB_PORT}",
            *(f"--dashboard-agent-listen-port={_AGENT_PORT}", f"--temp-dir={temporary}"),
            *options,
        )

    def await_job_server(self) -> None:
        """Wait until jobs can be submitted."""
        wait_for(lambda: self.ray("job", "list", "--address", JOB_SERVER).returncode == 0)

    @property
    def address(self) -> str:
        """HOST:PORT for `cluster.address`."""
        return f"{self.host}:{_PORT}"

    def add_node(
        self, cpus: int = 2, *options: str, name: str = "node", before: Sequence[str] = ()
    ) -> "subprocess.Popen[bytes]":
        """Join another node.

        Args:
            cpus: its processors.
            options: more of `ray start`.
            name: of its log.
            before: command that runs it.

        Returns:
            The process that it and all that it starts are in the group of.
        """
        agent = f"--dashboard-agent-listen-port={_AGENT_PORT + 1}"
        address = f"--address={self.address}"
        return self._bring_up(name, before, address, f"--num-cpus={cpus}", agent, *options)

    def ray(self, *arguments: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
        """Run `ray ...` as a user would, without a terminal."""
        return self._run("ray.scripts.scripts", *arguments, cwd=cwd)

    def editfleet(
        self, *arguments: str, cwd: Path, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run `editfleet ...` in a folder."""
        return self._run("pipeline", *arguments, cwd=cwd, **environment)

    def _run(
        self, *arguments: str, cwd: Path, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=cwd,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    def _bring_up(
        self, name: str, before: Sequence[str], *arguments: str
    ) -> "subprocess.Popen[bytes]":
        """`ray start`, again where Ray gives up after half a minute, as on a busy machine."""
        process = self._start(name, before, *arguments)

        def is_up() -> bool:
            nonlocal process
            if process.poll() is not None:
                _end(process)
                process = self._start(name, before, *arguments)
            return "Ray runtime started" in self._log(name).read_text()

        wait_for(is_up)
        return process

    def _start(
        self, name: str, before: Sequence[str], *arguments: str
    ) -> "subprocess.Popen[bytes]":
        log = self._ended.enter_context(self._log(name).open("wb"))
        process = subprocess.Popen(
            [
                *before,
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                *("--object-store-memory=80000000", *arguments),
            ],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self._ended.callback(_end, process)
        return process

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a node with everything that it started; its own drain would take half a minute."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=15)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)
