"""SIGINT and SIGTERM that come while Ray waits; to whole commands they are in tests/test_cli.py."""

import os
import signal
import threading
import time

import pytest
import ray

from pipeline import signals
from pipeline.signals import Stopped, raising_stopped

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


@pytest.mark.parametrize("number", signals.SIGNALS)
@pytest.mark.parametrize("wait", [ray.get, ray.wait])
def test_a_signal_ends_a_wait_of_ray(
    number: signal.Signals, wait: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray turns what a handler raises into an exit with code 1; ours says which signal it was."""
    monkeypatch.setattr(signals, "_SECONDS_TO_END", 3600.0)  # else the tests would end, too
    never = ray.remote(num_cpus=0)(lambda: time.sleep(3600)).remote()
    handle = [never] if wait is ray.wait else never
    start = time.monotonic()
    with pytest.raises(Stopped) as caught, raising_stopped("go on"):
        threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
        wait(handle, timeout=60)  # type: ignore[operator]
    assert caught.value.code == 128 + number and str(caught.value).endswith("; go on")
    assert time.monotonic() - start < 30
    ray.cancel(never, force=True)
