"""Hosts on a network of this machine's own: a namespace and a cable each, which can be pulled.

A head without processors in the machine's own namespace and `ray start` nodes in others, joined by
a bridge. Needs root, `ip` and namespaces.
"""

import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

from tests.faults.nodes import Actor, actors_here, wait_until_idle
from tests.started import StartedCluster

_NETWORK = "10.213.77"
_BRIDGE = "efbridge"
# A node counts as lost after three unanswered questions, a second and up to two apart.
_HEALTH = (
    '--system-config={"health_check_period_ms": 1000, "health_check_timeout_ms": 2000,'
    ' "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 5000,'
    ' "max_direct_call_object_size": 256}'
)


def why_not() -> str | None:
    """Why this machine can have no such hosts; None where it can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs the command ip (iproute2)"
    probe = f"efprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"needs network namespaces: {made.stderr.strip()}"
    _ip("netns", "delete", probe)
    return None


class Hosts:
    """A head and `count` hosts of one processor each.

    Args:
        home: for logs and Ray's token.
        temporary: a short path for Ray's sockets.
        ended: what is run at the end.
        count: how many hosts beside the head.
    """

    def __init__(self, home: Path, temporary: Path, ended: ExitStack, count: int) -> None:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        ended.callback(_ip, "link", "delete", _BRIDGE)
        _ip("address", "add", f"{_NETWORK}.1/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        self._ended = ended
        options = ("--include-dashboard=false", _HEALTH)
        self.cluster = StartedCluster(home, temporary, ended, f"{_NETWORK}.1", options)
        # Of each host: the group of its processes.
        self.groups = [self._add(number) for number in range(count)]

    @property
    def address(self) -> str:
        """HOST:PORT for `cluster.address`."""
        return self.cluster.address

    def restore(self) -> None:
        """Nobody brings other hosts."""

    def cut(self, host: int) -> None:
        """Pull a host's cable."""
        _ip("link", "set", _cable(host), "down")

    def mend(self, host: int) -> None:
        """Put it back."""
        _ip("link", "set", _cable(host), "up")

    def host_of(self, actor: Actor) -> int | None:
        """The host that a process is on; None for the head."""
        group = os.getpgid(actor.raylet)
        return self.groups.index(group) if group in self.groups else None

    def actors(self) -> list[Actor]:
        """The job's processes on the hosts."""
        return [actor for actor in actors_here() if self._is_ours(actor)]

    def wait_until_idle(self, seconds: float = 60.0) -> list[Actor]:
        """Wait for all of a job's processes to end; return those that have not."""
        return wait_until_idle(self.actors, seconds)

    def _is_ours(self, actor: Actor) -> bool:
        try:
            return self.host_of(actor) is not None
        except ProcessLookupError:
            return False

    def _add(self, number: int) -> int:
        namespace, cable = f"efhost{number}", _cable(number)
        _ip("netns", "add", namespace)
        # What is in a namespace goes with it, and a cable with either of its ends.
        self._ended.callback(_ip, "netns", "delete", namespace)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", cable, "master", _BRIDGE)
        _ip("link", "set", cable, "up")
        inside = ("ip", "netns", "exec", namespace)
        address = f"{_NETWORK}.{10 + number}"
        for command in (
            ("address", "add", f"{address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-netns", namespace, *command)
        process = self.cluster.add_node(
            1, f"--node-ip-address={address}", name=namespace, before=inside
        )
        return process.pid


def _cable(host: int) -> str:
    """The end of a host's cable that is at the bridge."""
    return f"efcable{host}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
