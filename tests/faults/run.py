"""Random faults, as many as wanted: `python -m tests.faults.run --kills 30 --seed 0`.

Drivers are started over and over on a cluster of four nodes on this machine; at random moments one
of the job's processes is killed, a node dies, the driver gets a signal, or a part on disk is
damaged. A run that is complete is compared with the undisturbed one. Prints a table; exits 1 when
anything was not as it should be. Victims, phases and delays follow from the seed, moments on the
clock do not.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.harness import HangingError, Trial
from tests.faults.job import PARTS, PHASES, Job, parts_written
from tests.faults.nodes import Actor, Nodes, kill
from tests.tiny_jobs import TinyJobs

# What happens, and how often relative to the others.
FAULTS = {
    "driver SIGKILL": 3,
    "driver SIGTERM": 1,
    "driver SIGINT": 1,
    "worker": 3,
    "reducer": 2,
    "node": 2,
    "raylet": 2,
}
_SIGNALS = {"driver SIGTERM": signal.SIGTERM, "driver SIGINT": signal.SIGINT}
_FAULTS_PER_RUN = (2, 3, 4, 5)
# A start takes several seconds on a free machine; the other phases are short on this model.
_MOST_DELAY_SECONDS = {"start": 20.0, "insertion": 0.3}
_DELAY_SECONDS = 0.1
_DAMAGE_AFTER_DEATH = 0.4
_SECONDS_TO_END = 30.0


@dataclass
class Fault:
    """A fault to come, and what came of it."""

    kind: str
    phase: str
    part: int  # how many parts of its phase are to be there
    delay: float
    seen: str = ""  # the phase that it came in, and what the victim was doing
    seconds: float | None = None  # from a signal to the driver's end
    drivers: int = 1  # 2 where the run had to be resumed
    problems: list[str] = field(default_factory=list)


class Chaos:
    """Makes faults until there have been enough of them.

    Args:
        job: what is run.
        nodes: where.
        seed: of all choices.
    """

    def __init__(self, job: Job, nodes: Nodes, seed: int) -> None:
        self.job, self.nodes = job, nodes
        self.random = random.Random(seed)
        self.faults: list[Fault] = []
        self.runs = 0
        self.drivers = 0

    def run(self, folder: Path) -> None:
        """One run with some faults, from its first driver to the comparison."""
        self.runs += 1
        trial = Trial(self.job, self.nodes, folder / f"run-{self.runs}")
        waiting = self._choose()
        came: list[Fault] = []
        problems = []
        try:
            while True:
                self.drivers += 1
                trial.start()
                while waiting and self._strike(trial, waiting[0]):
                    came.append(waiting.pop(0))
                    _say(f"run {self.runs}: {came[-1].kind} in {came[-1].seen}")
                ended = trial.wait()
                if ended.code in (0, 2):
                    break
                if came:
                    came[-1].drivers += 1
                if not ended.is_killed:
                    last = ended.log.strip().splitlines()[-1:]
                    _say(f"run {self.runs}: the driver gave up: {last}")
                    if not last or not last[0].startswith("editfleet: "):
                        problems.append(f"exit code {ended.code}: {last}")
                if len(trial.ends) > 8:
                    raise HangingError("not complete after 8 drivers")
            problems += trial.problems()
        except HangingError as error:
            problems.append(str(error))
        for problem in problems:
            _say(f"run {self.runs}: {problem}")
        if came:
            came[-1].problems += problems
        elif problems:
            raise AssertionError(problems)
        self.faults += came
        self.nodes.restore()

    def _choose(self) -> list[Fault]:
        """Faults of a run, in the order of their phases."""
        chosen = []
        for _ in range(self.random.choice(_FAULTS_PER_RUN)):
            (kind,) = self.random.choices(list(FAULTS), list(FAULTS.values()))
            phase = self.random.choice(PHASES)
            part = self.random.randrange(PARTS.get(phase, 1))
            delay = self.random.uniform(0, _MOST_DELAY_SECONDS.get(phase, _DELAY_SECONDS))
            chosen.append(Fault(kind, phase, part, delay))
        return sorted(chosen, key=lambda fault: (PHASES.index(fault.phase), fault.part))

    def _strike(self, trial: Trial, fault: Fault) -> bool:
        """Wait for the moment and let it happen; false when the driver has ended before."""
        if not trial.reach(lambda: self._has_come(trial, fault)):
            return False
        due = time.monotonic() + fault.delay
        if not trial.reach(lambda: time.monotonic() >= due):
            return False
        if fault.kind.startswith("driver"):
            return self._strike_driver(trial, fault)
        # Actors are not there yet, or between two lives.
        if not trial.reach(lambda: bool(self._victims(fault.kind))):
            return False
        victim = self.random.choice(self._victims(fault.kind) or [None])
        if victim is None:
            return False
        phase = "covariance" if victim.method == "covariance" else self._phase(trial)
        fault.seen = f"{phase} ({victim.method or 'idle'})"
        if fault.kind == "node":
            self.nodes.kill_node(victim.raylet)
        else:
            kill(victim.raylet if fault.kind == "raylet" else victim.process)
        return True

    def _strike_driver(self, trial: Trial, fault: Fault) -> bool:
        fault.seen = self._phase(trial)
        number = _SIGNALS.get(fault.kind, signal.SIGKILL)
        kill(trial.driver, number)
        sent = time.monotonic()
        if not self._await_end(trial):
            fault.problems.append(f"still there {_SECONDS_TO_END:.0f} s after the signal")
            return True
        fault.seconds = time.monotonic() - sent
        code = trial.code
        expected = 128 + number if fault.kind in _SIGNALS else -number
        # A signal that comes while the interpreter ends is the default one, or comes too late.
        if code != expected and not (fault.phase == "finish" and code in (2, -number)):
            fault.problems.append(f"exit code {code}, expected {expected}: {trial.tail()}")
        if self.random.random() < _DAMAGE_AFTER_DEATH:
            self._damage(trial)
        return True

    def _await_end(self, trial: Trial) -> bool:
        deadline = time.monotonic() + _SECONDS_TO_END
        return not trial.reach(lambda: time.monotonic() > deadline)

    def _damage(self, trial: Trial) -> None:
        """Flip a bit of a part, cut it short, or remove it; the next driver has to find it."""
        parts = sorted(
            path
            for path in trial.output.rglob("*")
            if path.suffix in (".parquet", ".safetensors") and path.is_file()
        )
        if not parts:
            return
        path, way = self.random.choice(parts), self.random.choice(["flip", "cut", "remove"])
        content = bytearray(path.read_bytes())
        place = self.random.randrange(len(content))
        if way == "flip":
            content[place] ^= 1 << self.random.randrange(8)
        path.unlink() if way == "remove" else path.write_bytes(
            content if way == "flip" else content[:place]
        )
        fault = Fault(f"part damaged ({way})", "", 0, 0.0, seen=path.parent.name, drivers=2)
        self.faults.append(fault)
        _say(f"run {self.runs}: {fault.kind}: {path.relative_to(trial.output)}")

    def _victims(self, kind: str) -> list[Actor]:
        actors = self.nodes.actors()
        if kind in ("node", "raylet"):
            return [actor for actor in actors if self.nodes.is_worker_node(actor.raylet)]
        wanted = "Reducer" if kind == "reducer" else "EditWorker"
        return [actor for actor in actors if actor.kind == wanted]

    def _has_come(self, trial: Trial, fault: Fault) -> bool:
        """Whether the phase of a fault has begun and its parts are there, or it is over."""
        if fault.phase == "start":
            return True
        if fault.phase == "covariance":
            begun = trial.output.with_name(f"{trial.output.name}-covariances").exists()
            return begun or any(a.method == "covariance" for a in self.nodes.actors())
        written = parts_written(trial.output)
        if fault.phase == "finish":
            return written["evaluation"] == PARTS["evaluation"]
        before = PHASES[PHASES.index("baseline") : PHASES.index(fault.phase)]
        whole = all(written[phase] == PARTS[phase] for phase in before)
        return whole and written[fault.phase] >= fault.part

    def _phase(self, trial: Trial) -> str:
        """The phase under way, by what has been written."""
        written = parts_written(trial.output)
        if not (trial.output / "manifest.json").exists():
            covariances = trial.output.with_name(f"{trial.output.name}-covariances")
            return "covariance" if covariances.exists() else "start"
        for phase, count in PARTS.items():
            if written[phase] < count:
                return phase
        return "finish"


def table(faults: list[Fault]) -> str:
    """Fault x phase x times x outcome, as Markdown."""
    groups: dict[tuple[str, str], list[Fault]] = defaultdict(list)
    for fault in faults:
        groups[fault.kind, fault.seen.partition(" ")[0]].append(fault)
    lines = ["| fault | phase | times | driver went on | resumed | s to end | wrong |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for (kind, phase), group in sorted(groups.items()):
        ways = Counter(fault.drivers for fault in group)
        seconds = [fault.seconds for fault in group if fault.seconds is not None]
        slowest = f"{max(seconds):.1f}" if seconds else ""
        wrong = sum(bool(fault.problems) for fault in group)
        row = (kind, phase, len(group), ways[1], len(group) - ways[1], slowest, wrong)
        lines.append("| " + " | ".join(str(cell) for cell in row) + " |")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main() -> int:
    """Parse the arguments, make the faults, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="faults to make at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no run after these")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="editfleet-faults-") as name:
        root = Path(name)
        job = Job(TinyJobs(root), root / "faults")
        nodes = Nodes()
        _say(f"the undisturbed run is made and {nodes.count} nodes and a head are up")
        chaos = Chaos(job, nodes, options.seed)
        try:
            while len(chaos.faults) < options.kills:
                if time.monotonic() - began > 60 * options.minutes:
                    break
                chaos.run(root)
        except KeyboardInterrupt:
            _say("interrupted; the run under way does not count")
        finally:
            nodes.close()
    print(table(chaos.faults))
    bad = [problem for fault in chaos.faults for problem in fault.problems]
    print(
        f"\n{len(chaos.faults)} faults in {chaos.runs} runs of {chaos.drivers} drivers,"
        f" {(time.monotonic() - began) / 60:.1f} minutes; {len(bad)} problems"
    )
    for problem in bad:
        print("-", problem)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
