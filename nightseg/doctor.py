"""Is this machine fit to run nightseg? Each finding says what was looked at and, if it is bad, what to do."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nightseg.compute.launch import cluster_problems, unfilled
from nightseg.storage import Location, UserError

# Oldest releases without a known way to run a stranger's code (CVE-2026-24747; CVE-2026-41486; CVE-2023-47248).
FLOORS = {"torch": (2, 10), "ray": (2, 55), "pyarrow": (17, 0), "pillow": (12, 0), "pydantic": (2, 5)}
LEAST_FREE_BYTES = 5 * 2**30


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    good: bool
    detail: str


def examine(cluster_file: str | None = None) -> list[Finding]:
    """All findings; with a cluster.yaml, also what is wrong with that."""
    findings = [*_versions(), _processor(), _space(), _token()]
    return findings + _cluster(cluster_file) if cluster_file else findings


def _versions() -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    yield Finding("python", good, sys.version.split()[0] + ("" if good else ", but 3.11 or newer is needed"))
    for package, floor in FLOORS.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Finding(package, False, "not installed; cure: pip install -c constraints.txt -e .")
            continue
        numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
        wanted = ".".join(map(str, floor))
        yield Finding(package, numbers >= floor, found if numbers >= floor else f"{found}, but {wanted} is needed")


def _processor() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding("gpu", True, names)
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding("gpu", True, f"none; {os.cpu_count()} CPU cores with {capability} do the work")


def _space() -> Finding:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    detail = f"{free / 2**30:.0f} GiB free in {tempfile.gettempdir()}"
    cure = "" if free >= LEAST_FREE_BYTES else "; Ray needs some, set TMPDIR to a larger disk"
    return Finding("disk", free >= LEAST_FREE_BYTES, detail + cure)


def _token() -> Finding:
    """A token file that others may read is a key under the mat; none at all is fine until a cluster is used."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not file.exists():
        return Finding("ray token", True, "none yet; before a cluster: ray get-auth-token --generate")
    open_to_others = stat.S_IMODE(file.stat().st_mode) & 0o077
    return Finding("ray token", not open_to_others, f"{file}" + (f"; cure: chmod 600 {file}" if open_to_others else ""))


def _cluster(file: str) -> list[Finding]:
    try:
        config: Any = yaml.safe_load(Location.of(file).read_bytes())
    except FileNotFoundError:
        raise UserError(f"--cluster {file}: there is no such file.") from None
    except yaml.YAMLError as error:
        raise UserError(f"--cluster {file}: not valid YAML: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--cluster {file}: a cluster file is a mapping.")
    bad = [Finding("cluster", False, problem) for problem in cluster_problems(config)]
    bad += [Finding("cluster", False, f"{place} still says CHANGE-ME") for place in unfilled(config)]
    return bad or [Finding("cluster", True, f"{file}: no open door found")]
