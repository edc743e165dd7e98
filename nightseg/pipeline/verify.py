"""Is every file of a run what was written? Reads all of it again, whatever was found good before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nightseg.pipeline.folder import earlier
from nightseg.pipeline.results import RECIPE_NAME, RESULTS_NAME, seal_of
from nightseg.progress import Progress
from nightseg.report.run import root_of
from nightseg.storage import Commit, Location, Workspace, sha256_of
from nightseg.storage.commits import COMMIT_NAME, Damage, damages, read_commit, seal_fault
from nightseg.storage.paths import canonical_json
from nightseg.storage.portable import absolute_json


class Verified(NamedTuple):
    """How much was read, and what is damaged, with paths below the run folder, or whole ones of borrowed commits."""

    commits: int
    files: int
    bytes: int
    damaged: list[Damage]


def verify(run: Location, progress: Progress) -> Verified:
    """Compare every committed file with its sha256, the results with their own, the recipe's copy with the results'.

    The run folder of a search holds those of its trials; all are read.
    """
    damaged: list[Damage] = []
    commits: dict[str, Commit] = {}
    for folder in _runs(run):
        results, faults = _results(folder)
        damaged += [_named(run, folder, fault) for fault in faults]
        for place in earlier(folder):  # their commits lie in this folder
            damaged += [_named(run, place, fault) for fault in _results(place)[1]]
        recorded = {node: Location.of(facts["folder"]).parent for node, facts in results.items()}
        # a run folder may have been moved: its own commits come first, borrowed ones stay where they were
        places = {place.uri: place for place in Workspace(folder).stage_folders()}
        for node, place in recorded.items():
            own = folder / f"stages/{node}/{place.name}"
            recorded[node] = own if own.uri in places or not place.exists() else place
            places[recorded[node].uri] = recorded[node]
        for place in places.values():
            fault = seal_fault(place / COMMIT_NAME)
            if fault is not None:
                damaged.append(_named(run, place, fault))
            elif (commit := read_commit(place)) is not None:
                commits[place.uri] = commit
        for node, place in recorded.items():
            content = commits[place.uri].content if place.uri in commits else None
            if content is None and not (place / COMMIT_NAME).exists():
                damaged.append(_named(run, place, Damage(COMMIT_NAME, "a commit", "is missing")))
            elif content is not None and content != results[node]["content"]:
                words = f"content {results[node]['content'][:12]}", f"has content {content[:12]}"
                damaged.append(_named(run, place, Damage(COMMIT_NAME, *words)))
    outputs = [output for commit in commits.values() for output in commit.outputs]
    with progress.task("verify", len(outputs), "files") as task:
        for commit in commits.values():
            damaged += [_named(run, commit.folder, fault) for fault in damages(commit, done=task.advance)]
    return Verified(len(commits), len(outputs), sum(output.bytes for output in outputs), damaged)


def _runs(run: Location) -> Iterator[Location]:
    yield run
    for below in ("shared", "trials"):
        place = run / below
        if place.is_folder():
            yield from [place] if below == "shared" else (place / e.name for e in place.list() if e.is_folder)


def _results(folder: Location) -> tuple[Mapping[str, Any], list[Damage]]:
    """Node -> what the results say of its commit, and what is wrong with the results and the recipe's copy."""
    try:
        content = (folder / RESULTS_NAME).read_json()
        known = absolute_json(content["commits"], root_of(folder))
        commits = {node: facts for node, facts in known.items() if facts["content"] and facts["folder"]}
        expected, seen = content.get("sha256"), seal_of(content)
    except (FileNotFoundError, NotADirectoryError):
        return {}, []
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, [Damage(RESULTS_NAME, "the results of a run", "has other text")]
    if seen != expected:
        return {}, [Damage(RESULTS_NAME, f"sha256 {str(expected)[:12]}", f"has sha256 {str(seen)[:12]}")]
    if (folder / RESULTS_NAME).read_bytes() != canonical_json(content):
        return {}, [Damage(RESULTS_NAME, "the text that was written", "has other text")]
    recipe = content.get("recipe_sha256")
    try:
        found = sha256_of((folder / RECIPE_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        found = None
    if recipe in (None, found):
        return commits, []
    seen = "is missing" if found is None else f"has sha256 {found[:12]}"
    return commits, [Damage(RECIPE_NAME, f"sha256 {recipe[:12]}", seen)]


def _named(run: Location, folder: Location, damage: Damage) -> Damage:
    path = f"{folder.uri}/{damage.path}"
    return damage._replace(path=path.removeprefix(f"{run.uri}/"))
