"""What Ray's validation of a cluster.yaml does not see: open doors, missing tokens, a Ray other than ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


def cluster_problems(config: Mapping[str, Any]) -> list[str]:
    """Every weakness of a parsed cluster.yaml, in words; an empty list means that none was found."""
    return [*_start_problems(config), *_setup_problems(config), *_node_problems(config), *_secret_problems(config)]


def unfilled(config: Any, place: str = "") -> Iterator[str]:
    """The keys whose value still says CHANGE-ME."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from unfilled(value, f"{place}.{key}" if place else str(key))
    elif isinstance(config, list):
        for value in config:
            yield from unfilled(value, place)
    elif isinstance(config, str) and "CHANGE-ME" in config:
        yield place


def _start_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for key in COMMANDS:
        commands = [str(command) for command in config.get(key) or []]
        starts = [command for command in commands if "ray start" in command]
        if not starts:
            yield f"{key}: no `ray start`, so Ray's default runs: a dashboard on every interface and no token"
        for command in starts:
            if "RAY_AUTH_MODE=token" not in command:
                yield f"{key}: `ray start` without RAY_AUTH_MODE=token: whoever reaches a port runs code on the cluster"
            host = re.search(r"--dashboard-host[= ](\S+)", command)
            if "--head" in command and (host is None or host.group(1) not in ("127.0.0.1", "localhost")):
                yield f"{key}: the dashboard must bind to --dashboard-host=127.0.0.1; reach it with `ray dashboard`"


def _setup_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if not config.get("setup_commands"):
        yield "setup_commands: empty, so Ray's default installs a nightly build"
    docker = config.get("docker") or {}
    image = str(docker.get("image") or docker.get("head_image") or "")
    wanted = version("ray")
    if image.startswith("rayproject/") and f":{wanted}-" not in image:
        yield f"docker.image: {image} is not the Ray {wanted} that nightseg was tested with"
    if image.startswith("rayproject/") and "-py311" not in image:
        yield f"docker.image: {image} has another Python than constraints.txt (3.11)"


def _node_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if (config.get("provider") or {}).get("type") != "aws":
        return
    for name, node in (config.get("available_node_types") or {}).items():
        if not (node.get("node_config") or {}).get("SecurityGroupIds"):
            yield f"available_node_types.{name}: no SecurityGroupIds, so Ray makes a group with SSH open to the world"
    rules = ((config.get("provider") or {}).get("security_group") or {}).get("IpPermissions") or []
    for rule in rules:
        if any(block.get("CidrIp") == "0.0.0.0/0" for block in rule.get("IpRanges") or []):
            yield "provider.security_group: a rule that lets in the whole internet (0.0.0.0/0)"


def _secret_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if not any(str(target).endswith(".ray/auth_token") for target in config.get("file_mounts") or {}):
        yield "file_mounts: the auth token is not brought to the nodes (/home/ray/.ray/auth_token: ~/.ray/auth_token)"
