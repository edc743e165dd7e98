"""A recipe or a search as a job of a cluster: what is uploaded, and what has to lie where the cluster sees it.

Uploaded is this code, the jobs, the recipe with its bases and overrides, and the files that it names (class lists,
lists of frames, weights): nothing else of this machine. Folders of frames are not: they lie on shared storage.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from zipfile import ZipFile, ZipInfo

import nightseg
from nightseg.cluster.submit import Job, Request, dashboard_at, run_job
from nightseg.errors import UserError, closest, first_of, together
from nightseg.pipeline.search import Search
from nightseg.recipe import load_recipe, load_settings, written
from nightseg.recipe.load import as_yaml
from nightseg.recipe.types import PATH_KEYS
from nightseg.storage import Location
from nightseg.storage.credentials import refuse_credentials
from nightseg.storage.yaml import read_yaml

MOST_BYTES: Final = 90 * 2**20  # of all that is uploaded: a head refuses requests of more than 100 MiB
WHOLE: Final = ("self_train", "search")  # the jobs that are not of one stage
RUNS_OF_JOBS: Final = "~/nightseg-runs"
_FILES: Final = "files"  # folder of the job that holds what the recipe names
_OF_JOB: Final = "/proc/self/cwd"  # the job's folder, where a relative path would mean another one
_OF_SEARCH: Final = "recipe_of_search.yaml"
_BELOW_ROOT: Final = ("images", "labels", "split_list")  # relative to the folder of the dataset
_PLACES: Final = (*PATH_KEYS, "start", "taxonomy", *_BELOW_ROOT)

Path_ = tuple[str | int, ...]


class Named(NamedTuple):
    """A file or folder that a recipe names: the mapping or list that it stands in, its key there, and its full key."""

    owner: Any
    key: str | int
    path: str
    text: str


def submit(
    recipe_file: str,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    only: str | None = None,
    until: str | None = None,
    address: str | None = None,
    wait: bool = True,
    max_tries: int = 1,
    words: Callable[..., list[str]],
    say: Callable[[str], None],
    write: Callable[[str], None],
) -> tuple[Job, str]:
    """Run a recipe, a search, or one stage of a recipe, as a job; see `cluster.submit.run_job`.

    `words`: how a job of jobs/ is told its run folder and model.

    Returns the job, and where its run lies. Raises UserError, before anything is uploaded, with all that is wrong with
    the request as far as this machine can tell: whether folders are there is only known on the cluster.
    """
    place = dashboard_at(address)
    if run_dir is not None:  # the command of a job can be read by all who see the cluster's dashboard
        refuse_credentials(run_dir, "run folder")
    if run_dir is not None and "://" not in run_dir and not run_dir.startswith(("/", "~")):
        raise UserError(
            f"run folder {run_dir!r}: a relative one would vanish with the job",
            cure="a URI such as s3://bucket/runs/x, or a path that all nodes see, such as /nfs/runs/x",
        )
    if run_dir is not None:
        run_dir = _in_one_way(run_dir)
    name, job, package = _packed(recipe_file, overrides, only, until, say)
    work = run_dir or f"{RUNS_OF_JOBS}/{name}"
    if run_dir is None:
        say(
            f"the run will lie on the head node, in {work}: where there are other nodes, which do not see it, name "
            "a run folder on shared storage"
        )
    command = ["python", f"jobs/{job}.py", f"{name}.yaml", *words(run_dir=run_dir, only=only)]
    request = Request(name, package, command, work)
    return run_job(request, place, wait=wait, max_tries=max_tries, say=say, write=write), work


def _in_one_way(run_dir: str) -> str:
    """The same words for the same folder, by which a job at work there is found. `~` is a folder of the head."""
    if not run_dir.startswith("~"):
        return Location.of(run_dir).uri
    return "/".join(part for part in run_dir.split("/") if part not in ("", "."))


class Package:
    """What a job needs, in memory: nothing of it is left anywhere, and each try uploads the same bytes."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, int]] = {}

    @property
    def size(self) -> int:
        return sum(len(content) for content, _ in self._files.values())

    def add(self, name: str, content: bytes, *, is_program: bool = False) -> None:
        self._files[name] = content, 0o755 if is_program else 0o644

    def add_file(self, name: str, file: Path) -> None:
        self.add(name, file.read_bytes(), is_program=os.access(file, os.X_OK))

    def archive(self) -> bytes:
        """All of it as a ZIP archive. The same files make the same bytes, whenever they were written."""
        archive = io.BytesIO()
        with ZipFile(archive, "w") as opened:
            for name, (content, mode) in self._files.items():
                entry = ZipInfo(name)
                entry.external_attr = (stat.S_IFREG | mode) << 16
                opened.writestr(entry, content)
        return archive.getvalue()


def _packed(
    file: str, overrides: Sequence[str], only: str | None, until: str | None, say: Callable[[str], None]
) -> tuple[str, str, bytes]:
    """The name of the recipe or search, and of the job, and an archive of all that it needs."""
    package = Package()
    recipe_file, recipe_overrides = file, list(overrides)
    if "space" in read_yaml(Location.of(file), file, "recipe").data:
        search = load_settings(Search, file, overrides)
        if only or until:
            raise UserError(f"{file}: a search has one model and all stages", cure="name neither model nor stage")
        recipe_file, recipe_overrides, job = str(Location.of(file).beside(search.recipe)), search.set, "search"
        uploaded = search.model_copy(update={"recipe": _OF_SEARCH, "set": []}).model_dump(mode="json")
        package.add(f"{search.name}.yaml", as_yaml(uploaded).encode())
        name, recipe_name = search.name, _OF_SEARCH
    else:
        if until in WHOLE:
            raise UserError(f"there is no job for the stage {until!r}", cure="name a stage, or none for all of them")
        job = until or "self_train"
        recipe = load_recipe(file, overrides, elsewhere=True)
        name, recipe_name = recipe.name, f"{recipe.name}.yaml"
        if only is not None and only not in recipe.models:
            known = ", ".join(recipe.models) or "none"
            raise UserError(
                f"{file}: the recipe has no such model: {only!r}{closest(only, recipe.models)}", cure=f"one of: {known}"
            )
    _add_code(job, package)
    load_recipe(recipe_file, recipe_overrides, elsewhere=True)
    data = written(recipe_file, recipe_overrides)
    _add_files(recipe_file, data, package, say)
    package.add(recipe_name, as_yaml(data).encode())
    return name, job, package.archive()


def _add_code(job: str, package: Package) -> None:
    code = Path(nightseg.__file__).parent
    jobs = code.parent / "jobs"
    known = sorted(path.stem for path in jobs.glob("*.py"))
    if not known:
        raise UserError(
            f"{jobs}: the jobs are not beside the package",
            cure="submit from a checkout, installed with `pip install -e .`",
        )
    stages = [name for name in known if name not in WHOLE]
    if job not in (*stages, *WHOLE):
        raise UserError(
            f"there is no job for the stage {job!r}{closest(job, stages)}", cure=f"one of {', '.join(stages)}"
        )
    for part in (code, jobs):
        for path in sorted(part.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                package.add_file(f"{part.name}/{path.relative_to(part)}", path)


def _add_files(recipe_file: str, data: dict[str, Any], package: Package, say: Callable[[str], None]) -> None:
    """Files that the recipe names come along; folders are told of, or refused where no other machine can have them."""
    problems, uploaded, here = list[UserError](), dict[str, str](), list[str]()
    for owner, key, path, text in _named(data):
        place = Location.of(text)
        if place.exists() and not place.is_folder() and not place.local.is_file():
            problems.append(
                UserError(
                    f"{recipe_file}: {path}: {place} is a pipe, socket or device, which cannot come along",
                    cure="name a regular file",
                )
            )
        elif place.uri in uploaded or (place.local.is_file() and _fits(place.local, package)):
            if place.uri not in uploaded:
                uploaded[place.uri] = f"{_FILES}/{len(uploaded)}/{place.name}"
                package.add_file(uploaded[place.uri], place.local)
            owner[key] = f"{_OF_JOB}/{uploaded[place.uri]}" if key in _BELOW_ROOT else uploaded[place.uri]
        elif place.exists():
            owner[key] = shown = text if text.startswith("~") else place.uri
            here.append(f"{path} ({shown})")
        elif not text.startswith(("/", "~")):
            problems.append(
                UserError(
                    f"{recipe_file}: {path}: there is no {text!r} here, and on a cluster a relative path leads nowhere",
                    cure="the path or URI under which all nodes of the cluster see it",
                )
            )
    if problems:
        raise together(problems)
    if uploaded:
        say(f"goes along: {first_of(list(uploaded))}")
    if here:
        say(
            f"on this machine; the job fails unless all nodes of the cluster see the same under that path (NFS), so "
            f"else copy it to shared storage and set it to its URI: {first_of(here)}"
        )


def _fits(file: Path, package: Package) -> bool:
    return package.size + file.stat().st_size <= MOST_BYTES


def _named(data: Any, path: Path_ = ()) -> Iterator[Named]:
    """Local files and folders that a raw recipe names."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(entries):
        if not isinstance(value, str):
            yield from _named(value, (*path, key))
        elif _is_place(path, key, value):
            yield Named(data, key, ".".join(map(str, (*path, key))), value)


def _is_place(path: Path_, key: str | int, text: str) -> bool:
    if "://" in text or not text or "{" in text:
        return False
    if path[-1:] == ("argv",):  # a program is found where it runs, a file of the user's comes along
        return Path(text).is_file() and not text.startswith("/")
    if key not in _PLACES:
        return path == ("roots",)
    if key in _BELOW_ROOT:
        return text.startswith(("/", "~"))
    if key in ("taxonomy", "start"):  # a name, or a path
        return "/" in text or Path(text).is_file()
    return True
