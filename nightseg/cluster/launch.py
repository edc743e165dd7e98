"""What Ray's validation of a cluster.yaml does not see: open doors, missing tokens, another Ray, idle cost; and the
most that a cluster of that file can have."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
CLOUDS = ("aws", "gcp")
_SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:secret|password|api_key|access_key|auth_token)\w*\s*[=:]\s*[\"']?[^\s\"'$/~]{6,}"
)
SECRET_NAME = re.compile(r"(?i)secret|password|token|_key\b|_key$")


def cluster_problems(config: Mapping[str, Any]) -> list[str]:
    """Every weakness of a parsed cluster.yaml, in words; an empty list means that none was found."""
    kind = (config.get("provider") or {}).get("type")
    found = [*_start_problems(config), *_head_problems(config), *_setup_problems(config), *_secret_problems(config)]
    if kind in CLOUDS:
        found += _node_problems(config, kind)
    if kind == "local":
        found += _machine_problems(config)
    return found


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


def texts(config: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a parsed file, with its dotted key."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from texts(value, f"{place}.{key}" if place else str(key))
    elif isinstance(config, list):
        for value in config:
            yield from texts(value, place)
    elif isinstance(config, str):
        yield place, config


def image_problems(image: str, place: str) -> Iterator[str]:
    """Of an image of containers: another Ray or Python than ours, or a tag that moves."""
    wanted, tag = version("ray"), image.rpartition("/")[2].partition(":")[2]
    if not image:
        yield f"{place}: no image"
    elif tag in ("", "latest", "nightly", "latest-gpu") and "@sha256:" not in image:
        yield f"{place}: {image} moves: nodes that start later get another Ray; name a version"
    elif image.startswith("rayproject/") and not tag.startswith(f"{wanted}-"):
        yield f"{place}: {image} is not the Ray {wanted} that nightseg was tested with"
    elif image.startswith("rayproject/") and "-py311" not in image:
        yield f"{place}: {image} has another Python than constraints.txt (3.11)"


def secret_in(config: Any) -> Iterator[str]:
    """Keys and passwords that stand in a file which others read."""
    for place, text in texts(config):
        if _SECRET.search(text):
            yield f"{place}: a secret stands in the file; nodes have roles, and the token comes by file_mounts"


def _start_problems(config: Mapping[str, Any]) -> Iterator[str]:
    is_local = (config.get("provider") or {}).get("type") == "local"
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
            if "--head" in command and "--autoscaling-config" not in command:
                yield f"{key}: `ray start --head` without --autoscaling-config: no worker is ever started"
            if is_local:
                yield from _address_problems(key, command, config)


def _address_problems(key: str, command: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Ray knows the address of the head from the file, and tells others what the command says."""
    address, head = re.search(r"--node-ip-address[= ](\S+)", command), config["provider"].get("head_ip")
    if address is None:
        yield (
            f"{key}: `ray start` without --node-ip-address: Ray tells the others the address of the interface that "
            "leads to the internet, which they may not reach"
        )
    if "--head" in command and "RAY_enable_autoscaler_v2=0" not in command:
        yield f"{key}: `ray start --head` without RAY_enable_autoscaler_v2=0: no machine of worker_ips is ever started"
    if address and "--head" in command and not {"$", "`"} & set(address[1]) and address[1] != head:
        yield f"{key}: the head listens at {address[1]}, and workers look for it at provider.head_ip, {head}"


def _head_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """The head has the drivers and the cluster's own processes: work there can take the cluster down."""
    head = config.get("head_node_type")
    resources = ((config.get("available_node_types") or {}).get(head) or {}).get("resources") or {}
    starts = " ".join(map(str, config.get(COMMANDS[0]) or []))
    if resources.get("CPU") != 0 and not re.search(r"--num-cpus[= ]0\b", starts):
        where = f"available_node_types.{head}.resources: {{CPU: 0}}" if head else f"{COMMANDS[0]}: --num-cpus=0"
        yield f"the head takes work, and a busy head makes the whole cluster stutter: set {where}"


def _setup_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if not config.get("setup_commands"):
        yield "setup_commands: empty, so Ray's default installs a nightly build, or nothing"
    docker = config.get("docker") or {}
    images = {f"docker.{key}": docker[key] for key in ("image", "head_image", "worker_image") if docker.get(key)}
    for name, node in (config.get("available_node_types") or {}).items():
        own = (node.get("docker") or {}).items()
        images |= {f"available_node_types.{name}.docker.{key}": image for key, image in own if key.endswith("image")}
    for place, image in images.items():
        yield from image_problems(str(image), place)
    options = [str(option) for key, value in docker.items() if key.endswith("run_options") for option in value or []]
    if images and docker.get("disable_shm_size_detection") and not any("--shm-size" in option for option in options):
        yield "docker: /dev/shm has 64 MiB: Ray's objects go to the disk and NCCL fails; give --shm-size in run_options"
    for option in options:
        if re.search(r"--privileged|-p[ =]|--publish|docker\.sock", option):
            yield f"docker.run_options: {option}: the container gets more of its machine or network than it needs"


def _node_problems(config: Mapping[str, Any], kind: str) -> Iterator[str]:
    head, accounts = config.get("head_node_type"), dict[str, set[str]]()
    for name, node in (config.get("available_node_types") or {}).items():
        place, made = f"available_node_types.{name}", node.get("node_config") or {}
        if name != head and node.get("min_workers"):
            yield f"{place}: min_workers {node['min_workers']}: paid for all the time; 0 starts them when needed"
        yield from _aws_problems(place, made) if kind == "aws" else _gcp_problems(place, node, made, name == head)
        if name == head and re.search(r"(?i)\bspot\b|'preemptible': True", str(made)):
            yield f"{place}: the head is a spot machine: when it is taken away, the whole cluster is lost"
        for account in re.findall(r"instance-profile/[\w+=,.@-]+|[\w-]+@[\w.-]+\.iam\.gserviceaccount\.com", str(made)):
            accounts.setdefault(account, set()).add("head" if name == head else "workers")
    for account, users in accounts.items():
        if len(users) > 1:
            yield f"{account}: workers have the head's role, which starts machines; give them one for the bucket alone"
    rules = ((config.get("provider") or {}).get("security_group") or {}).get("IpPermissions") or []
    for rule in rules:
        blocks = [*(rule.get("IpRanges") or []), *(rule.get("Ipv6Ranges") or [])]
        if any({block.get("CidrIp"), block.get("CidrIpv6")} & {"0.0.0.0/0", "::/0"} for block in blocks):
            yield "provider.security_group: a rule that lets in the whole internet (0.0.0.0/0)"


def _aws_problems(place: str, made: Mapping[str, Any]) -> Iterator[str]:
    if not made.get("SecurityGroupIds") and not made.get("NetworkInterfaces"):
        yield f"{place}: no SecurityGroupIds, so Ray makes a group with SSH open to the world"
    if not made.get("IamInstanceProfile"):
        yield f"{place}: no IamInstanceProfile, so Ray makes a head that may do everything with EC2 and S3"
    if not made.get("ImageId"):
        yield f"{place}: no ImageId, so Ray takes one of Ubuntu 18.04, whose NVIDIA driver is too old for our torch"
    if (made.get("MetadataOptions") or {}).get("HttpTokens") != "required":
        yield f"{place}: MetadataOptions.HttpTokens is not `required`: a fooled program hands out the role's keys"


def _gcp_problems(place: str, node: Mapping[str, Any], made: Mapping[str, Any], is_head: bool) -> Iterator[str]:
    if not made.get("serviceAccounts"):
        yield f"{place}: no serviceAccounts, so Ray makes one that may change all machines and buckets of the project"
    if not made.get("networkInterfaces"):
        yield f"{place}: no networkInterfaces: in the default network SSH is open to the world"
    if not is_head and not (node.get("resources") or {}).get("CPU"):
        yield f"{place}: no resources: {{CPU: ..., GPU: ...}}: Ray does not know before a machine is there what it has"
    has_gpu = "guestAccelerators" in made or re.match(
        r"(g2|a2|a3|a4)", str(made.get("machineType", "")).rpartition("/")[2]
    )
    if has_gpu and "'onHostMaintenance': 'TERMINATE'" not in str(made):
        yield f"{place}: a machine with GPUs needs scheduling: [{{onHostMaintenance: TERMINATE}}], or it is refused"


def _machine_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Machines that are there already: the provider `local`."""
    provider = config.get("provider") or {}
    workers = provider.get("worker_ips") or []
    if provider.get("head_ip") in workers:
        yield "provider.worker_ips: the head is among them: it would be started as a worker, too"
    if len(set(workers)) < len(workers):
        yield "provider.worker_ips: one of them stands there twice"
    named = [count for key in ("min_workers", "max_workers") if (count := config.get(key)) not in (None, len(workers))]
    if named and "worker_ips" in provider:
        yield f"min_workers, max_workers: {len(workers)} machines are listed, so leave both out: each is to be started"
    if not config.get("docker"):
        starts = [str(command) for key in COMMANDS for command in config.get(key) or []]
        profile = " ".join(
            map(str, [*(config.get("setup_commands") or []), *(config.get("initialization_commands") or [])])
        )
        if any(re.match(r"(\S+=\S*\s+)*ray\b", command) for command in starts) and "PATH" not in profile:
            yield (
                "setup_commands: no PATH is set in ~/.bashrc, so `ray` is the first of the login shell, or none, and "
                "`ray down`, which calls `ray stop` there, ends nothing: name the virtual environment"
            )


def _secret_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if any(str(source).rstrip("/") in (".", "~", "") for source in (config.get("file_mounts") or {}).values()):
        yield "file_mounts: a whole folder with all that lies in it, such as keys, .venv and data: name what is needed"
    if not any(str(target).endswith(".ray/auth_token") for target in config.get("file_mounts") or {}):
        yield "file_mounts: the auth token is not brought to the nodes (/home/ray/.ray/auth_token: ~/.ray/auth_token)"
    elif "chmod 600" not in " ".join(str(command) for command in config.get("setup_commands") or []):
        yield "setup_commands: the token is readable for all of a node: chmod 600 .ray/auth_token"
    yield from secret_in(config)


def most_resources(config: Any) -> dict[str, float] | None:
    """What all nodes of a parsed cluster.yaml would have together, head and workers from 0 to their most; None where it
    does not say it, as of machines that tell by themselves what they have."""
    kinds = node_types(config)
    if kinds is None:
        return None
    names = {resource for kind in kinds for resource in kind.resources}
    return {name: sum(kind.most * kind.resources.get(name, 0.0) for kind in kinds) for name in names}


class NodeType(NamedTuple):
    """What a node of a type has, and how many of them there may be."""

    resources: dict[str, float]
    most: int


def node_types(config: Any) -> list[NodeType] | None:
    """Those of a parsed cluster.yaml, of which there may be any; None where it does not say what they have."""
    kinds = config.get("available_node_types") if isinstance(config, Mapping) else None
    if not kinds:
        return None
    found = []
    for name, kind in kinds.items():
        count = 1 if name == config.get("head_node_type") else kind.get("max_workers", config.get("max_workers", 0))
        if count and not kind.get("resources"):
            return None
        if count:
            found.append(NodeType({key: float(amount) for key, amount in kind["resources"].items()}, count))
    return found


def most_nodes(config: Any) -> float:
    """How many nodes a parsed cluster.yaml allows, the head among them; infinity where it does not say it."""
    if not isinstance(config, Mapping) or "max_workers" not in config:
        return math.inf
    kinds = config.get("available_node_types") or {}
    workers = [
        kind.get("max_workers", math.inf) for name, kind in kinds.items() if name != config.get("head_node_type")
    ]
    return 1 + min(float(config["max_workers"]), float(sum(workers)) if workers else math.inf)
