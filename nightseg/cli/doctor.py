"""Is this machine fit to run nightseg? Each finding says what was looked at and, if it is bad, what to do."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from nightseg.cluster import token
from nightseg.cluster.kuberay import by_place, is_for_kubernetes, kubernetes_problems
from nightseg.cluster.launch import cluster_problems, unfilled
from nightseg.storage import Location, UserError
from nightseg.storage.yaml import read_documents

# Oldest releases without a known way to run a stranger's code (CVE-2026-24747; CVE-2026-41486; CVE-2023-47248).
FLOORS = {"torch": (2, 10), "ray": (2, 55), "pyarrow": (17, 0), "pillow": (12, 0), "pydantic": (2, 5)}
LEAST_FREE_BYTES = 5 * 2**30
WEIGHTS = {"inception": "pt_inception", "vgg16": "vgg16-", "resnet18": "resnet18-", "resnet101": "resnet101-"}


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    good: bool
    detail: str


def examine(cluster_file: str | None = None) -> list[Finding]:
    """All findings; with a cluster.yaml, also what is wrong with that."""
    findings = [*_versions(), _processor(), _weights(), _space(), _token()]
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
        numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
        wanted = ".".join(map(str, floor))
        yield Finding(package, numbers >= floor, found if numbers >= floor else f"{found}, but {wanted} is needed")


def _processor() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("gpu", False, f"torch cannot be imported ({error}); cure: pip install -c constraints.txt -e .")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding("gpu", True, names)
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding("gpu", True, f"none; {os.cpu_count()} CPU cores with {capability} do the work")


def _weights() -> Finding:
    """Files of weights that recipes ask for by default. None is needed: EfficientNet-Lite0 brings its own."""
    home = Path(os.environ.get("TORCH_HOME") or Path.home() / ".cache" / "torch") / "hub" / "checkpoints"
    here = [name for name, start in WEIGHTS.items() if any(home.glob(f"{start}*"))]
    missing = [name for name in WEIGHTS if name not in here]
    found = f"efficientnet_lite0 (installed){''.join(f', {name}' for name in here)}"
    cure = (
        f"; not in {home}: {', '.join(missing)}, fetched only with --allow-download or allow_download: true in a recipe"
        if missing
        else ""
    )
    return Finding("weights", True, found + cure)


def _space() -> Finding:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    detail = f"{free / 2**30:.0f} GiB free in {tempfile.gettempdir()}"
    cure = "" if free >= LEAST_FREE_BYTES else "; Ray needs some, set TMPDIR to a larger disk"
    return Finding("disk", free >= LEAST_FREE_BYTES, detail + cure)


def _token() -> Finding:
    """A token file that others may read is a key under the mat; none at all is fine until a cluster is used."""
    if os.environ.get(token.VARIABLE):
        return Finding("ray token", True, f"that of {token.VARIABLE}")
    given = os.environ.get(token.FILE_VARIABLE)
    file = Path(given) if given else token.default_file()
    if not given and not os.path.lexists(file):
        return Finding("ray token", True, "none yet; before a cluster: ray get-auth-token --generate")
    found = "; ".join(f"{problem.what}, cure: {problem.cure}" for problem in _token_problems(file))
    where = f"{token.FILE_VARIABLE}: {file}" if given else str(file)
    return Finding("ray token", not found, f"{where}: {found}" if found else where)


def _token_problems(file: Path) -> Iterator[token.Problem]:
    if problem := token.problem_of_file(file):
        yield problem
    if not os.path.isfile(file):
        return
    if file.stat().st_uid not in (os.getuid(), 0):
        yield token.Problem("it is another user's, who may change it", "copy it to a file of yours (chmod 600)")
    folder = file.parent.stat()
    if folder.st_mode & 0o022:
        is_ours = folder.st_uid == os.getuid() and not folder.st_mode & stat.S_ISVTX
        move = f"move it to a folder of yours that is closed to others (chmod 700), named in {token.FILE_VARIABLE}"
        cure = f"chmod 700 {shlex.quote(str(file.parent))}" if is_ours else move
        yield token.Problem("others may write in its folder", cure)


def _cluster(file: str) -> list[Finding]:
    shown = f"--cluster {file}"
    parsed = read_documents(Location.of(file), shown, "cluster")
    documents = [document.data for document in parsed] or [{}]
    bad = [
        Finding("cluster", False, f"line {line}: {'.'.join(path)}: this key stands twice in the same mapping")
        for document in parsed
        for path, line in document.twice
    ]
    is_of_kubernetes = any(map(is_for_kubernetes, documents))
    if len(documents) > 1 and not is_of_kubernetes:
        found = f"{shown}: it has {len(documents)} documents, and none is an object of Kubernetes"
        raise UserError(found, cure="a cluster.yaml of Ray is one document: remove the lines `---` between them")
    try:
        problems = kubernetes_problems(*documents) if is_of_kubernetes else cluster_problems(documents[0])
        bad += [Finding("cluster", False, problem) for problem in problems]
        unsaid = unfilled(by_place(documents))
        bad += [Finding("cluster", False, f"{place} still says CHANGE-ME") for place in unsaid]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        what = f"{shown}: not shaped like a cluster file of Ray ({type(error).__name__}: {error})"
        raise UserError(what, cure="see cluster.yaml and configs/cluster of this project") from error
    return bad or [Finding("cluster", True, f"{file}: no open door found")]
