"""The doctor sees what is wrong with a machine and with a cluster file, and says what to do."""

from __future__ import annotations

import builtins
import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightseg.cli import doctor
from nightseg.storage import UserError

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def findings(cluster: str | None = None) -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.examine(cluster)}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home of its own: no token, no weights."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("TORCH_HOME", raising=False)
    return tmp_path


def test_this_machine_is_fit_enough_to_run_these_tests() -> None:
    found = findings()
    assert {"python", "torch", "ray", "pyarrow", "gpu", "weights", "disk", "ray token"} <= found.keys()
    assert all(found[what].good for what in ("python", *doctor.FLOORS, "gpu", "weights"))
    assert found["python"].detail.startswith("3.")


def test_old_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1+cpu", "ray": "2.60.0", "pyarrow": "17.0.0rc1", "pillow": "9.5.0", "pydantic": "2.10"}

    def version(package: str) -> str:
        if package == "ray":
            raise PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(doctor, "version", version)
    found = findings()
    assert not found["torch"].good and "2.9.1+cpu, but 2.10 is needed" in found["torch"].detail
    assert not found["ray"].good and "pip install" in found["ray"].detail
    assert found["pyarrow"].good and found["pydantic"].good and not found["pillow"].good


def test_a_torch_that_does_not_import_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_torch(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torch":
            raise ImportError("libcudart.so is missing")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    found = findings()["gpu"]
    assert not found.good and "libcudart.so is missing" in found.detail


def test_a_full_disk_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**30))
    found = findings()["disk"]
    assert not found.good and "1 GiB free" in found.detail and "TMPDIR" in found.detail


def test_weights_that_are_at_hand_are_listed(home: Path) -> None:
    assert "inception" in findings()["weights"].detail.partition("not in")[2]
    place = home / ".cache/torch/hub/checkpoints"
    place.mkdir(parents=True)
    (place / "pt_inception-2015-12-05-6726825d.pth").touch()
    here, _, missing = findings()["weights"].detail.partition("not in")
    assert "inception" in here and "inception" not in missing and "vgg16" in missing


def test_a_token_that_others_may_read_is_a_finding(home: Path) -> None:
    assert findings()["ray token"].good
    file = home / ".ray/auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o644)
    found = findings()["ray token"]
    assert not found.good and f"chmod 600 {file}" in found.detail and "secret" not in found.detail
    file.chmod(0o600)
    assert findings()["ray token"].good
    file.parent.chmod(0o770)  # who can write there puts another one in its place
    assert f"chmod 700 {file.parent}" in findings()["ray token"].detail


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda file: None, "there is no such file"),
        (lambda file: file.touch(0o600), "it is empty"),
        (lambda file: file.mkdir(), "it is a folder"),
    ],
)
def test_a_token_file_that_holds_none_is_a_finding(
    home: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], what: str
) -> None:
    make(file := home / "tok")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    found = findings()["ray token"]
    assert not found.good and f"RAY_AUTH_TOKEN_PATH: {file}: {what}, cure: write there what" in found.detail
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")  # Ray takes it first
    assert findings()["ray token"] == ("ray token", True, "that of RAY_AUTH_TOKEN")


@pytest.mark.parametrize("what", ["it is empty", "it is a folder"])
def test_a_default_token_file_that_holds_none_is_a_finding(home: Path, what: str) -> None:
    file = home / ".ray/auth_token"
    file.parent.mkdir(0o700)
    file.touch(0o600) if "empty" in what else file.mkdir()
    found = findings()["ray token"]
    assert not found.good and found.detail.startswith(f"{file}: {what}, cure: ")


def test_a_folder_of_all_is_not_closed_for_a_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "shared/tok"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o600)
    file.parent.chmod(0o1777)  # as /tmp
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    found = findings()["ray token"]
    assert not found.good and "chmod 700 /" not in found.detail
    assert "others may write in its folder, cure: move it to a folder of yours" in found.detail
    file.parent.chmod(0o777)
    assert f"cure: chmod 700 {file.parent}" in findings()["ray token"].detail


def test_a_token_file_of_another_user_is_a_finding(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / ".ray/auth_token"
    file.parent.mkdir(0o700)
    file.write_text("secret")
    file.chmod(0o600)
    if os.getuid() == 0:
        os.chown(file, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    found = findings()["ray token"]
    assert not found.good and "it is another user's, who may change it, cure: copy it" in found.detail


@pytest.mark.parametrize("name", ["cluster.yaml", *(f"configs/cluster/{n}.yaml" for n in ("gcp", "local", "kuberay"))])
def test_our_cluster_files_only_lack_what_the_user_fills_in(name: str) -> None:
    bad = [finding.detail for finding in doctor.examine(str(CLUSTER.parent / name)) if not finding.good]
    assert bad and all(detail.endswith("still says CHANGE-ME") for detail in bad)


def test_a_cluster_file_without_a_token_is_a_finding(tmp_path: Path) -> None:
    text = CLUSTER.read_text().replace("CHANGE-ME", "filled-in")
    (tmp_path / "good.yaml").write_text(text)
    assert findings(str(tmp_path / "good.yaml"))["cluster"].good
    (tmp_path / "open.yaml").write_text(text.replace("RAY_AUTH_MODE=token", ""))
    bad = [finding.detail for finding in doctor.examine(str(tmp_path / "open.yaml")) if not finding.good]
    assert bad and "without RAY_AUTH_MODE=token" in bad[0]


def test_keys_that_stand_twice_are_findings(tmp_path: Path) -> None:
    text = CLUSTER.read_text().replace("CHANGE-ME", "filled-in")
    (tmp_path / "twice.yaml").write_text(f"{text}\nmax_workers: 100\nmax_workers: 200\n")
    lines = text.count("\n") + 2
    bad = [finding.detail for finding in doctor.examine(str(tmp_path / "twice.yaml")) if finding.what == "cluster"]
    assert bad == [
        f"line {line}: max_workers: this key stands twice in the same mapping" for line in (lines, lines + 1)
    ]


def in_documents(*more: dict[str, Any]) -> str:
    """The objects of our file for Kubernetes as documents, filled in."""
    items = yaml.safe_load((CLUSTER.parent / "configs/cluster/kuberay.yaml").read_text().replace("CHANGE-ME", "x"))
    return "---\n" + "---\n".join(yaml.safe_dump(one) for one in (*items["items"], *more)) + "---\n# the end\n"


def test_kubernetes_objects_may_be_documents(tmp_path: Path) -> None:
    file = tmp_path / "ray.yaml"
    file.write_text(in_documents({"replicas": 3}, {"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "b"}}))
    assert findings(str(file))["cluster"].good
    file.write_text(in_documents().replace("mode: token", "mode: disabled") + "kind: Service\nname: CHANGE-ME\n")
    bad = [finding.detail for finding in doctor.examine(str(file)) if finding.what == "cluster"]
    assert "no authOptions: {mode: token}" in bad[0] and bad[-1].endswith(".name still says CHANGE-ME")
    assert bad[-1].startswith("document ")


def test_several_clusters_of_ray_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(f"{CLUSTER.read_text()}\n---\n{CLUSTER.read_text()}")
    with pytest.raises(UserError, match="it has 2 documents, and none is an object of Kubernetes"):
        doctor.examine(str(tmp_path / "cluster.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b", "a cluster is a mapping"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("{apiVersion: v1, kind: List}", "not shaped like a cluster file"),
        ("{apiVersion: v1, kind: RayCluster, metadata: {name: a}, spec: {}}", "not shaped like a cluster file"),
        ("provider: aws", "not shaped like a cluster file"),
        ("available_node_types: [head]\nprovider: {type: aws}", "not shaped like a cluster file"),
    ],
)
def test_what_is_no_cluster_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "cluster.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        doctor.examine(str(tmp_path / "cluster.yaml"))


def test_an_old_python_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    found = findings()["python"]
    assert not found.good and "3.11 or newer" in found.detail
