"""The cluster files pass Ray's own validation and our lint; the lint sees each open door, in files of each kind."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightseg.cluster.kuberay import is_for_kubernetes, kubernetes_problems
from nightseg.cluster.launch import cluster_problems, unfilled

PROJECT = Path(__file__).parents[2]
AWS, GCP, LOCAL, KUBERAY = (
    PROJECT / name for name in ("cluster.yaml", *(f"configs/cluster/{n}.yaml" for n in ("gcp", "local", "kuberay")))
)
LAUNCHED = (AWS, GCP, LOCAL)


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def problems(config: Any) -> list[str]:
    return kubernetes_problems(config) if is_for_kubernetes(config) else cluster_problems(config)


def test_every_cluster_file_is_tested_here() -> None:
    assert {GCP, LOCAL, KUBERAY} == set((PROJECT / "configs/cluster").iterdir())


@pytest.mark.parametrize("file", LAUNCHED, ids=lambda file: file.name)
def test_ray_accepts_it(file: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(file)))


@pytest.mark.parametrize("file", [*LAUNCHED, KUBERAY], ids=lambda file: file.name)
def test_our_lint_finds_nothing_but_what_the_user_must_fill_in(file: Path) -> None:
    assert problems(read(file)) == []
    to_fill = {
        AWS: {"ImageId", "SecurityGroupIds", "SubnetIds", "Arn"},
        GCP: {"project_id", "sourceImage", "subnetwork", "email"},
        LOCAL: {"head_ip", "worker_ips", "ssh_user", "ssh_private_key", *("head_start_ray_commands",)}
        | {"worker_start_ray_commands"},
        KUBERAY: {"com/role-arn", "image", "entrypoint"},
    }
    assert {place.rsplit(".", 1)[-1] for place in unfilled(read(file))} == to_fill[file]


@pytest.mark.parametrize("file", LAUNCHED, ids=lambda file: file.name)
def test_what_is_installed_comes_along_and_nothing_else(file: Path) -> None:
    brought = {target: source for target, source in read(file)["file_mounts"].items() if "auth_token" not in target}
    of_image = [line.split()[2:-1] for line in (PROJECT / "Dockerfile").read_text().splitlines() if "COPY" in line]
    assert sorted(brought.values()) == sorted(source for sources in of_image for source in sources)
    (root,) = {target.removesuffix(source) for target, source in brought.items()}
    assert any(command.endswith(f"{root}constraints.txt {root[:-1]}") for command in read(file)["setup_commands"])


@pytest.mark.parametrize("file", [AWS, GCP, KUBERAY], ids=lambda file: file.name)
def test_workers_start_from_none_and_stop_after_ten_idle_minutes(file: Path) -> None:
    config = read(file)
    if file is KUBERAY:
        (cluster,) = (one["spec"] for one in config["items"] if one["kind"] == "RayCluster")
        assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 600
        least = [group["minReplicas"] for group in cluster["workerGroupSpecs"]]
    else:
        assert config["idle_timeout_minutes"] == 10
        nodes = config["available_node_types"].items()
        least = [node["min_workers"] for name, node in nodes if name != config["head_node_type"]]
    assert least == [0, 0]


def test_the_job_of_kubernetes_is_one_that_the_image_has() -> None:
    (job,) = (one["spec"] for one in read(KUBERAY)["items"] if one["kind"] == "RayJob")
    words = job["entrypoint"].split()
    folder, program, recipe = words[1], words[words.index("python") + 1], words[words.index("python") + 2]
    assert f"WORKDIR {folder}\n" in (PROJECT / "Dockerfile").read_text()
    assert (PROJECT / program).is_file() and (PROJECT / recipe).is_file()
    assert isinstance(yaml.safe_load(job["runtimeEnvYAML"]), dict)


# -- each rule has a file that breaks it ------------------------------------------------------------------------------


def change(place: str, value: Any = None) -> Any:
    """Sets the value at a dotted place (numbers count items); None takes the key away, a function is applied."""

    def weaken(config: Any) -> None:
        *path, last = place.split(".")
        for key in path:
            config = config[int(key)] if isinstance(config, list) else config[key]
        if value is None:
            del config[last]
        else:
            at = int(last) if isinstance(config, list) else last
            config[at] = value(config[at]) if callable(value) else value

    return weaken


def replaced(old: str, new: str) -> Any:
    def replace(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return replace


HEAD, GPU = "available_node_types.head", "available_node_types.gpu_spot"
OPEN_RULE = {"IpPermissions": [{"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}
OPEN_RULE_6 = {"IpPermissions": [{"Ipv6Ranges": [{"CidrIpv6": "::/0"}]}]}
CLUSTER = next(k for k, one in enumerate(read(KUBERAY)["items"]) if one["kind"] == "RayCluster")
JOB = next(k for k, one in enumerate(read(KUBERAY)["items"]) if one["kind"] == "RayJob")
SPEC = f"items.{CLUSTER}.spec"
POD = f"{SPEC}.workerGroupSpecs.1.template.spec"
TOKEN = "RAY_AUTH_MODE=token "


@pytest.mark.parametrize(
    ("file", "weaken", "words"),
    [
        # all that `ray up` reads
        (AWS, change("head_start_ray_commands.1", replaced("127.0.0.1", "0.0.0.0")), "dashboard must bind"),
        (AWS, change("head_start_ray_commands.1", replaced("--dashboard-host=127.0.0.1", "")), "dashboard must bind"),
        (GCP, change("worker_start_ray_commands.1", replaced(TOKEN, "")), "without RAY_AUTH_MODE=token"),
        (LOCAL, change("head_start_ray_commands.1", replaced(TOKEN, "")), "without RAY_AUTH_MODE=token"),
        (AWS, change("worker_start_ray_commands"), "no `ray start`"),
        (AWS, change("head_start_ray_commands.1", replaced("--autoscaling", "--no")), "no worker is ever started"),
        (AWS, change("setup_commands", []), "nightly"),
        (AWS, change("docker.image", replaced("2.60.0", "2.9.0")), "is not the Ray"),
        (AWS, change("docker.image", replaced("py311", "py312")), "another Python"),
        (AWS, change("docker.image", "team/nightseg"), "moves"),
        (AWS, change("docker.image", "team/nightseg:latest"), "moves"),
        (AWS, change(f"{GPU}.docker", {"worker_image": "rayproject/ray:nightly"}), "moves"),
        (AWS, change("docker.disable_shm_size_detection", True), "/dev/shm has 64 MiB"),
        (AWS, change("docker.run_options.0", "--privileged"), "--privileged"),
        (AWS, change("docker.run_options.0", "-v /var/run/docker.sock:/var/run/docker.sock"), "docker.sock"),
        (AWS, change(f"{HEAD}.resources", {}), "the head takes work"),
        (LOCAL, change("head_start_ray_commands.1", replaced("--num-cpus=0 ", "")), "the head takes work"),
        (AWS, change("file_mounts", {}), "auth token is not brought"),
        (AWS, change("file_mounts.~/nightseg", "."), "a whole folder"),
        (LOCAL, change("file_mounts", {"~/.ray": "~/"}), "a whole folder"),
        (GCP, change("setup_commands", ["pip install nightseg"]), "readable for all"),
        (AWS, change("head_setup_commands.0", "export AWS_SECRET_ACCESS_KEY=abcdefgh"), "a secret stands"),
        (LOCAL, change("setup_commands.0", "RAY_AUTH_TOKEN=0123456789 chmod 600 x"), "a secret stands"),
        (AWS, change("provider.aws_credentials", "AKIAABCDEFGHIJKLMNOP"), "a secret stands"),
        # clouds
        (AWS, change(f"{HEAD}.node_config.SecurityGroupIds"), "SSH open to the world"),
        (AWS, change("provider.security_group", OPEN_RULE), "whole internet"),
        (AWS, change("provider.security_group", OPEN_RULE_6), "whole internet"),
        (AWS, change(f"{GPU}.node_config.IamInstanceProfile"), "no IamInstanceProfile"),
        (AWS, change(f"{GPU}.node_config.IamInstanceProfile.Arn", replaced("worker", "head")), "the head's role"),
        (AWS, change(f"{GPU}.node_config.ImageId"), "driver is too old"),
        (AWS, change(f"{HEAD}.node_config.MetadataOptions"), "HttpTokens"),
        (AWS, change(f"{HEAD}.node_config.InstanceMarketOptions", {"MarketType": "spot"}), "head is a spot machine"),
        (AWS, change(f"{GPU}.min_workers", 2), "paid for all the time"),
        (GCP, change(f"{HEAD}.node_config.serviceAccounts"), "no serviceAccounts"),
        (GCP, change(f"{GPU}.node_config.serviceAccounts.0.email", replaced("worker", "head")), "the head's role"),
        (GCP, change(f"{HEAD}.node_config.networkInterfaces"), "default network SSH"),
        (GCP, change(f"{HEAD}.node_config.scheduling", [{"provisioningModel": "SPOT"}]), "head is a spot machine"),
        (GCP, change(f"{HEAD}.node_config.scheduling", [{"preemptible": True}]), "head is a spot machine"),
        (GCP, change(f"{GPU}.node_config.scheduling", [{"provisioningModel": "SPOT"}]), "onHostMaintenance"),
        (GCP, change(f"{GPU}.resources"), "does not know"),
        # machines
        (LOCAL, change("provider.worker_ips", ["CHANGE-ME", "b"]), "the head is among them"),
        (LOCAL, change("provider.worker_ips", ["b", "b"]), "twice"),
        (LOCAL, change("min_workers", 0), "leave both out"),
        (LOCAL, change("setup_commands.1", "true"), "name the virtual environment"),
        (LOCAL, change("worker_start_ray_commands.1", replaced("--node-ip-address", "--x")), "may not reach"),
        (LOCAL, change("head_start_ray_commands.1", replaced("RAY_enable_autoscaler_v2=0", "")), "ever started"),
        (LOCAL, change("provider.head_ip", "10.0.0.9"), "workers look for it at provider.head_ip"),
        # Kubernetes
        (KUBERAY, change(f"{SPEC}.authOptions"), "no authOptions"),
        (KUBERAY, change(f"{SPEC}.authOptions.mode", "disabled"), "no authOptions"),
        (KUBERAY, change(f"{SPEC}.rayVersion", "2.52.0"), "rayVersion 2.52.0"),
        (KUBERAY, change(f"{SPEC}.headGroupSpec.serviceType", "LoadBalancer"), "reached from outside"),
        (KUBERAY, change(f"{SPEC}.headGroupSpec.enableIngress", True), "reached from outside"),
        (KUBERAY, change(f"{SPEC}.headGroupSpec.rayStartParams", {}), "the head takes work"),
        (KUBERAY, change(f"{SPEC}.enableInTreeAutoscaling"), "neither added nor stopped"),
        (KUBERAY, change(f"{SPEC}.workerGroupSpecs.1.minReplicas", 1), "paid for all the time"),
        (KUBERAY, change(f"{SPEC}.workerGroupSpecs.0.replicas", 1), "paid for all the time"),
        (KUBERAY, change(f"{POD}.serviceAccountName"), "no serviceAccountName"),
        (KUBERAY, change(f"{POD}.hostNetwork", True), "hostNetwork"),
        (KUBERAY, change(f"{POD}.containers.0.image", "rayproject/ray:2.60.0-py310"), "another Python"),
        (KUBERAY, change(f"{POD}.containers.0.image", "team/nightseg:latest"), "moves"),
        (KUBERAY, change(f"{POD}.containers.0.image"), "no image"),
        (KUBERAY, change(f"{POD}.containers.0.resources"), "no limits"),
        (KUBERAY, change(f"{POD}.containers.0.volumeMounts"), "/dev/shm has 64 MiB"),
        (KUBERAY, change(f"{POD}.volumes.0.emptyDir", {}), "/dev/shm has 64 MiB"),
        (KUBERAY, change(f"{POD}.containers.0.securityContext", {"privileged": True}), "privileged"),
        (KUBERAY, change(f"{POD}.containers.0.env.0", {"name": "HF_TOKEN", "value": "x"}), "HF_TOKEN stands"),
        (KUBERAY, change(f"items.{JOB}.spec.entrypoint", "WANDB_API_KEY=abcdefgh python x"), "a secret stands"),
        (KUBERAY, change(f"items.{JOB}.spec.backoffLimit", 2), "are refused"),
        (KUBERAY, change(f"items.{JOB}.spec.rayClusterSpec", read(KUBERAY)["items"][CLUSTER]["spec"]), "cluster stays"),
        (KUBERAY, change("items", lambda items: [items[CLUSTER], items[JOB]]), "NetworkPolicy"),
        (KUBERAY, change("items", lambda items: items[:2]), "there is none of RayCluster"),
    ],
)  # fmt: skip
def test_each_open_door_is_seen(file: Path, weaken: Any, words: str) -> None:
    weakened = deepcopy(read(file))
    weaken(weakened)
    assert [problem for problem in problems(weakened) if words in problem], problems(weakened)
