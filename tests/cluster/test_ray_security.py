"""Real Ray processes: who has no token is refused, and a job's own Ray has one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4

JOIN = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False)
    print("joined", sorted(ray.cluster_resources()))
except BaseException as error:
    print("refused", type(error).__name__)
"""

OWN = """
import os
from pipeline.cluster.ray_engine import _connect
from pipeline.spec import ClusterSpec
_connect(ClusterSpec(workers=1))
import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
print("token" if is_token_auth_enabled() else "open", ray.get_runtime_context().gcs_address)
print("dashboard", ray._private.worker.global_worker.node.address_info.get("webui_url"))
ray.shutdown()
"""


def _python(code: str, *arguments: str, home: Path, **environment: str) -> str:
    """What a process says that knows no token but the one that it is given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.cluster
def test_a_driver_without_the_token_is_refused(tmp_path: Path) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    head = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--port=46379", "--num-cpus=1", "--object-store-memory=80000000"),
        ],
        env=kept | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        right = ""
        while "joined" not in right and time.monotonic() < deadline:
            right = _python(
                JOIN, "127.0.0.1:46379", home=tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN
            )
        assert "joined" in right, right
        wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
        without = {"RAY_AUTH_MODE": "disabled"}
        for environment in (wrong, without):
            said = _python(JOIN, "127.0.0.1:46379", home=tmp_path, **environment)
            assert "joined" not in said, said
    finally:
        # Its own drain would take half a minute.
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(timeout=15)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_jobs_own_ray_has_a_token_and_no_dashboard(tmp_path: Path) -> None:
    said = _python(OWN, home=tmp_path)
    assert said.startswith("token "), said
    assert "dashboard None" in said or "dashboard \n" in said, said
    assert len((tmp_path / ".ray" / "auth_token").read_text()) >= 32
