"""The files around the package agree with it: licence, image, versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
LOCKED = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", (PROJECT / "constraints.txt").read_text(), re.MULTILINE))
DOCKERFILE = (PROJECT / "Dockerfile").read_text()


def test_images_have_the_locked_ray_and_a_python_that_is_enough() -> None:
    in_cluster = yaml.safe_load((PROJECT / "cluster.yaml").read_text())["docker"]["image"]
    images = re.findall(r"rayproject/ray:[\w.-]+", DOCKERFILE)
    assert len(images) >= 2
    least = tuple(map(int, re.findall(r"\d+", PYPROJECT["project"]["requires-python"])))
    for image in [*images, in_cluster]:
        found = re.fullmatch(r"rayproject/ray:([\d.]+)-py(\d)(\d+)(-gpu|-cpu)?", image)
        assert found is not None, image
        assert found[1] == LOCKED["ray"] and (int(found[2]), int(found[3])) >= least, image


def test_the_image_installs_the_locked_versions_of_what_is_there() -> None:
    (install,) = re.findall(r"^RUN pip install (.*)$", DOCKERFILE, re.MULTILINE)
    assert "--constraint constraints.txt" in install
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", install)
    assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])
    copied = [word for line in re.findall(r"^COPY \S+ (.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert "constraints.txt" in copied and "nightseg" in copied
    left_out = (PROJECT / ".dockerignore").read_text().split()
    for name in copied:
        assert (PROJECT / name).exists() and name not in left_out, name
    needed = {PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]}
    assert needed <= set(copied), "pip reads them when it builds the package"


def test_every_requirement_is_locked() -> None:
    asked = [*PYPROJECT["project"]["dependencies"]]
    for extra in ("dev", "tensorboard", "video", "encoders", "onnx"):
        asked += PYPROJECT["project"]["optional-dependencies"][extra]
    names = {re.match(r"[A-Za-z0-9._-]+", one)[0].lower() for one in asked}  # type: ignore[index]
    locked = {name.lower() for name in LOCKED}
    assert names <= locked, sorted(names - locked)


def test_the_licence_is_the_one_that_is_said() -> None:
    text = (PROJECT / "LICENSE").read_text()
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert text.split()[:2] == ["Apache", "License"] and "Version 2.0, January 2004" in text
    assert "[yyyy]" not in text
    packages = PYPROJECT["tool"]["setuptools"]["package-data"]["nightseg"]
    assert "unit/*.safetensors" in packages and "scenes.safetensors" in (PROJECT / "NOTICE").read_text()


def test_the_newest_changes_stand_on_top() -> None:
    versions = re.findall(r"^## (\S+)", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == "Unreleased" and versions[1] == PYPROJECT["project"]["version"]
