"""cluster.yaml passes Ray's own validation and our lint; the lint sees each open door."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightseg.cluster.launch import cluster_problems, unfilled

FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text()))


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def test_our_lint_finds_nothing_but_what_the_user_must_fill_in(config: dict[str, Any]) -> None:
    assert cluster_problems(config) == []
    assert {place.rsplit(".", 1)[-1] for place in unfilled(config)} == {"SecurityGroupIds", "SubnetIds", "Arn"}


def open_dashboard(config: dict[str, Any]) -> None:
    commands = config["head_start_ray_commands"]
    commands[1] = commands[1].replace("127.0.0.1", "0.0.0.0")


def no_token(config: dict[str, Any]) -> None:
    config["worker_start_ray_commands"][1] = "ray start --address=$RAY_HEAD_IP:6379"


def nightly(config: dict[str, Any]) -> None:
    config["setup_commands"] = []


def other_ray(config: dict[str, Any]) -> None:
    config["docker"]["image"] = "rayproject/ray:2.9.0-py311-gpu"


def other_python(config: dict[str, Any]) -> None:
    config["docker"]["image"] = config["docker"]["image"].replace("py311", "py312")


def ray_made_group(config: dict[str, Any]) -> None:
    del config["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]


def world(config: dict[str, Any]) -> None:
    config["provider"]["security_group"] = {"IpPermissions": [{"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}


def token_left_behind(config: dict[str, Any]) -> None:
    config["file_mounts"] = {}


@pytest.mark.parametrize(
    ("weaken", "words"),
    [
        (open_dashboard, "dashboard must bind"),
        (no_token, "without RAY_AUTH_MODE=token"),
        (nightly, "nightly"),
        (other_ray, "is not the Ray"),
        (other_python, "another Python"),
        (ray_made_group, "SSH open to the world"),
        (world, "whole internet"),
        (token_left_behind, "auth token is not brought"),
    ],
)
def test_each_open_door_is_seen(config: dict[str, Any], weaken: Any, words: str) -> None:
    weakened = deepcopy(config)
    weaken(weakened)
    assert [problem for problem in cluster_problems(weakened) if words in problem]
