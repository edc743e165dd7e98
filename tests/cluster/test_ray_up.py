"""`ray up` over SSH: a head and a worker in namespaces of their own, a round from a laptop, and nothing left after it.

The machines are network, process and mount namespaces, with a private home, /tmp and /run each: `ray stop`, which
`ray up` and `ray down` give, ends every Ray that it sees, and here it sees its own. Needs root, sshd, rsync, iproute2.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.test_submit_to_ray import BASE, outside

PROJECT = Path(__file__).parents[2]
FILE = PROJECT / "configs/cluster/local.yaml"
HEAD, WORKER, LAPTOP = "10.77.0.1", "10.77.0.2", "10.77.0.254"
MODELS = "models: {day_only: {train: [day], start: scratch}}\ntest_sets: {night: test}\n"
NEEDED = ("unshare", "ip", "ssh", "ssh-keygen", "rsync", "mount")
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"

PRIVATE = """
set -euo pipefail
mkdir -p LAB/$1/tmp LAB/$1/home/.ssh
cp LAB/key LAB/$1/home/.ssh/id_ed25519
cp LAB/key.pub LAB/$1/home/.ssh/authorized_keys
printf 'Host *\\n  Port 2222\\n' > LAB/$1/home/.ssh/config
chmod 700 LAB/$1/home/.ssh; chmod 600 LAB/$1/home/.ssh/*
ln -s VENV LAB/$1/home/nightseg-env
for kept in KEPT; do
  case "$kept" in
    /tmp/*) there="LAB/$1/tmp/${kept#/tmp/}" ;;
    *) there="LAB/$1/home/${kept#HOME/}" ;;
  esac
  mkdir -p "$there"
  mount --rbind "$kept" "$there"
done
mount --rbind LAB/$1/home HOME
mount --rbind LAB/$1/tmp /tmp
mount -t tmpfs none /run
"""
NODE = """
. LAB/private.sh $1
until ip link set eth0 up 2> /dev/null; do sleep 0.1; done
ip link set lo up
ip address add $2/24 dev eth0
mkdir -p /run/sshd
exec SSHD -D -e -o Port=2222 -o HostKey=LAB/key -o StrictModes=no -o UsePAM=no -o PidFile=none \
    -o PermitRootLogin=prohibit-password -o PasswordAuthentication=no
"""
LAB = """
. LAB/private.sh laptop
ip link set lo up
ip link add br0 type bridge
ip address add LAPTOP/24 dev br0
ip link set br0 up
machine() {
  unshare --mount --pid --fork --mount-proc --net --kill-child bash LAB/node.sh $1 $2 > LAB/$1.log 2>&1 &
  ip link add $1 type veth peer name eth0
  until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
  ip link set eth0 netns $!
  ip link set $1 master br0 up
}
machine head HEAD
machine worker WORKER
for address in HEAD WORKER; do
  for try in $(seq 100); do
    ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=2 root@$address true && break
    sleep 0.3
  done
done
cd PROJECT
ray get-auth-token --generate > /dev/null
export RAY_AUTH_MODE=token
ray up --yes --no-config-cache LAB/cluster.yaml
ray dashboard LAB/cluster.yaml > LAB/dashboard.log 2>&1 &
for try in $(seq 60); do
  ray exec LAB/cluster.yaml 'RAY_AUTH_MODE=token ray status' > LAB/status.txt 2>&1 || true
  grep -q '/[1-9][0-9.]* CPU' LAB/status.txt && break
  sleep 3
done
for address in HEAD WORKER; do
  ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null root@$address \
    'ss -Hltnp; ls ~/nightseg/nightseg/data/table.py; stat -c %a ~/.ray ~/.ray/auth_token' > LAB/$address.txt
done
python LAB/doors.py > LAB/doors.json
cd LAB
PYTHONPATH=PROJECT python -m nightseg.cli.main submit tiny.yaml --run-dir LAB/shared/run --json > LAB/job.json
cd PROJECT
ray down --yes LAB/cluster.yaml
for try in $(seq 90); do
  ps -eo args > LAB/left.txt
  grep -qE '[r]aylet|[g]cs_server|[r]ay::' LAB/left.txt || break
  sleep 2
done
kill $(jobs -p)
"""
DOORS = """
import http.client, json, os, subprocess, sys, urllib.error, urllib.request

def status(address):
    try:
        return urllib.request.urlopen(address, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return type(error.reason).__name__

def reaches(**mode):
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", "HEAD:6379"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(command, env=kept | mode, capture_output=True, timeout=120).returncode == 0

def answers(port):
    # without a token; all but the metrics ask for one
    try:
        return b"ray_" in urllib.request.urlopen(f"http://HEAD:{port}/metrics", timeout=20).read()
    except (OSError, ValueError, http.client.HTTPException):
        return False

listening = {}
for line in open("LAB/HEAD.txt"):
    if line.startswith("LISTEN"):
        address, _, port = line.split()[3].rpartition(":")
        process = line.partition('(("')[2].partition('"')[0]
        listening[port] = (process, address, answers(port) if "127.0.0.1" not in address else None)
print(json.dumps({
    "listening": sorted(listening.values(), key=str),
    "tunnel": status("http://127.0.0.1:8265/api/jobs/"),
    "network": status("http://HEAD:8265/api/jobs/"),
    "control store": [reaches(RAY_AUTH_MODE="token"), reaches(RAY_AUTH_MODE="disabled"),
                      reaches(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="5" * 64)],
}))
"""


APART = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--net", "--kill-child")
TRY = "ip link add name one type veth peer name two && ip link add name br0 type bridge && mount -t tmpfs none /run"


@pytest.fixture
def lab() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ns", dir="/var/tmp"))  # each machine has another /tmp
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def written(lab: Path, text: str) -> str:
    home = Path.home()
    kept = {Path(place).resolve() for place in (sys.base_prefix, sys.prefix, PROJECT)}
    hidden = (home, Path("/tmp"))
    below = " ".join(str(place) for place in sorted(kept) if any(map(place.is_relative_to, hidden)))
    for word, value in {
        "LAPTOP": LAPTOP, "LAB": lab, "HEAD": HEAD, "WORKER": WORKER, "PROJECT": PROJECT, "SSHD": SSHD, "KEPT": below,
        "VENV": sys.prefix, "HOME": home,
    }.items():  # fmt: skip
        text = text.replace(word, str(value))
    return text


def cluster_file() -> str:
    """That of the project, filled in; its last set-up command would fetch packages."""
    text = FILE.read_text()
    for old, new in {
        "head_ip: CHANGE-ME": f"head_ip: {HEAD}",
        "[CHANGE-ME-TOO]": f"[{WORKER}]",
        "ssh_user: CHANGE-ME": "ssh_user: root",
        "~/.ssh/CHANGE-ME": "~/.ssh/id_ed25519",
        "--node-ip-address=CHANGE-ME": f"--node-ip-address={HEAD}",
        "IFNAME=CHANGE-ME": "IFNAME=eth0",
        "~/nightseg-env/bin/pip install": "true",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.mark.ssh
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_cluster_comes_up_over_ssh_does_a_round_and_leaves_no_process(lab: Path) -> None:
    missing = [name for name in (*NEEDED, SSHD) if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"machines that are namespaces need root and {', '.join(missing or NEEDED)}")
    tried = subprocess.run([*APART, "sh", "-c", TRY], capture_output=True, text=True, timeout=60, check=False)
    if tried.returncode:
        pytest.skip(f"this machine lets nobody make namespaces or their networks: {tried.stderr.strip()}")
    (lab / "cluster.yaml").write_text(cluster_file())
    (lab / "tiny.yaml").write_text(f"{BASE}taxonomy: camvid11\n{MODELS}")
    for name, text in (("private.sh", PRIVATE), ("node.sh", NODE), ("lab.sh", LAB), ("doors.py", DOORS)):
        (lab / name).write_text(written(lab, text))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(lab / "key")], check=True)
    words = [*APART, "bash", lab / "lab.sh"]
    ended = subprocess.run(words, env=outside(Path.home()), capture_output=True, text=True, timeout=1100, check=False)
    logs = "\n".join(f"{file}:\n{file.read_text(errors='replace')[-3000:]}" for file in lab.glob("*.*"))
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-6000:] + logs

    job = json.loads((lab / "job.json").read_text())
    assert job["status"] == "SUCCEEDED" and (lab / "shared/run/report.html").exists()
    status = (lab / "status.txt").read_text()
    cpus = re.search(r"/([\d.]+) CPU", status)
    assert cpus is not None and float(cpus[1]) > 0, "the worker has joined (the head has none): " + status
    left = (lab / "left.txt").read_text()
    assert not [line for line in left.splitlines() if "raylet" in line or "gcs_server" in line or "ray::" in line]
    doors = json.loads((lab / "doors.json").read_text())
    print(*doors.pop("listening"), sep="\n")
    assert doors == {"tunnel": 401, "network": "ConnectionRefusedError", "control store": [True, False, False]}
    for address in (HEAD, WORKER):
        told = (lab / f"{address}.txt").read_text()
        print(told)
        assert "nightseg/data/table.py" in told and told.endswith("700\n600\n")
