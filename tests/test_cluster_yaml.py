"""cluster.yaml is what Ray's launcher accepts and what its comments promise."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def test_it_fits_the_schema_of_ray(cluster: dict[str, Any]) -> None:
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text(encoding="utf-8")))


def test_the_head_holds_no_work_and_the_workers_are_gpu_spot_instances(
    cluster: dict[str, Any],
) -> None:
    nodes = dict(cluster["available_node_types"])
    assert nodes.pop(cluster["head_node_type"])["resources"] == {"CPU": 0}
    (worker,) = nodes.values()
    assert (worker["min_workers"], worker["max_workers"]) == (0, 4)
    assert cluster["max_workers"] == 4
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert worker["node_config"]["InstanceType"].startswith(("g", "p"))


def test_every_node_demands_the_token_and_receives_it(cluster: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_nothing_is_reachable_from_outside(cluster: dict[str, Any]) -> None:
    assert cluster["provider"]["use_internal_ips"] is True
    (head_start,) = [line for line in cluster["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head_start
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert not [line for line in starts if "0.0.0.0" in line or "::" in line]
    for node in cluster["available_node_types"].values():
        interfaces = node["node_config"].get("NetworkInterfaces", [])
        assert not [one for one in interfaces if one.get("AssociatePublicIpAddress")]
    assert "IpPermissions" not in cluster["provider"].get("security_group", {})


def test_no_command_turns_authentication_off(cluster: dict[str, Any]) -> None:
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"RAY_AUTH_MODE=(\w+)", text)) == {"token"}
    options = " ".join(cluster["docker"]["run_options"])
    assert "-p " not in options and "--publish" not in options and "--network" not in options
    mounted = cluster["file_mounts"]["/home/ray/.ray/auth_token"]
    assert mounted.startswith("~"), "the token is in the user's home and not in the repository"


def test_nothing_of_ours_listens() -> None:
    sources = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]
    words = (".listen(", ".bind((", "socketserver", "http.server", "uvicorn", "create_server")
    assert len(sources) > 50
    assert not [path for path in sources for word in words if word in path.read_text()]


def test_the_setup_installs_the_mounted_repository(cluster: dict[str, Any]) -> None:
    (mounted,) = [remote for remote, local in cluster["file_mounts"].items() if local == "."]
    assert f"cd {mounted} && pip install ." in cluster["setup_commands"]


@pytest.mark.parametrize("role", ["head_image", "worker_image"])
def test_the_image_has_a_python_and_a_ray_that_the_package_admits(
    cluster: dict[str, Any], role: str
) -> None:
    tag = re.fullmatch(r"rayproject/ray:([\d.]+)-py3(\d+)(-gpu)?", cluster["docker"][role])
    assert tag is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (needed,) = [
        requirement
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name == "ray"
    ]
    assert needed.specifier.contains(tag[1])
    assert SpecifierSet(project["requires-python"]).contains(f"3.{tag[2]}")
