"""What a person finds in a run folder beside `stages`: models, masks, chosen frames, curves, tables, earlier results.

Files are hard links and folders relative links into `stages`, so they stay valid when the run folder moves. Where a
file system has no links, or the stage was borrowed from another run, a file is a copy, and a folder a text file that
says where it is. All of it can be made again: nothing reads it but people.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import numpy as np

from nightseg.data import table as frame
from nightseg.metrics.confusion import scores
from nightseg.pipeline.graph import NodeId
from nightseg.pipeline.results import RECIPE_NAME, RESULTS_NAME, read_results
from nightseg.report import Run, contact_sheet, model_card
from nightseg.report.page import REPORT_NAME
from nightseg.report.run import EARLIER
from nightseg.report.selections import is_ranking
from nightseg.storage import Commit, Location, UserError, hash_of
from nightseg.storage.paths import TEMPORARY_PREFIX

MODELS, MASKS, SELECTED, CURVES = "models", "masks", "selected", "tensorboard"

_MODEL_FILES: Final = ("model.safetensors", "model.json")  # the card last: a folder that has it is whole
_NO_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)
_FRAME_STAGES: Final = ("collect", "split", "score")  # found again by any recipe that asks for them: no results


class Contents(NamedTuple):
    """Paths below the place where they are laid out, and what lies there."""

    models: dict[str, Location]  # folder -> model folder
    folders: dict[str, Location]
    texts: dict[str, str]
    sheets: dict[str, Commit]  # picture -> the selection that it shows


def lay_out(run: Run, place: Location) -> None:
    """Write it into the run folder, or into one of its `earlier` ones."""
    found = contents(run)
    for path, model in found.models.items():
        _lay_model(place / path, model)
    for path, folder in found.folders.items():
        _lay_folder(place, path, folder, run.root)
    for path, commit in found.sheets.items():
        names = (place / path).parent / "names.txt"
        if not (place / path).exists() or not names.exists() or names.read_bytes().decode() != _names(commit):
            with suppress(UserError):  # frames that are gone, or that nobody may read, have no picture
                (place / path).write_bytes(contact_sheet(run, commit))
    for path, text in found.texts.items():
        (place / path).write_bytes(text.encode())


def contents(run: Run) -> Contents:
    found = Contents({}, {}, {}, {})
    for model in run.models:
        for name, node in run.trainings(model).items():
            if (commit := run.commit(node)) is not None:
                found.models[f"{MODELS}/{name}"] = commit.folder / "model"
                found.texts[f"{MODELS}/{name}/README.md"] = model_card(run, model, name)
                found.folders[_curves(NodeId(*node.split("/", 1)))] = commit.folder / "tensorboard"
        for name, node in run.evaluations(model).items():
            if (commit := run.commit(node)) is not None:
                found.folders[f"{MASKS}/{name}"] = commit.folder / "masks"
    for node in run.nodes("train_translator"):
        if (commit := run.commit(node)) is not None:
            found.folders[_curves(NodeId(*node.split("/", 1)))] = commit.folder / "tensorboard"
    for name, entry in run.results["predictions"].items():
        if (commit := run.commit(entry["node"])) is not None:
            found.folders[f"{MASKS}/{name}"] = commit.folder / "masks"
    for name, entry in run.results["selections"].items():
        if (commit := run.commit(entry["node"])) is not None and commit.has_table("frames"):
            found.sheets[f"{SELECTED}/{name}/sheet.jpg"] = commit
            found.texts[f"{SELECTED}/{name}/names.txt"] = _names(commit)
            found.texts[f"{SELECTED}/{name}/frames.csv"] = _table(_chosen(run, commit, entry["evidence"]))
    found.texts["quarantine.csv"] = _table(_quarantined(run))
    found.texts["training.csv"] = _table(_epochs(run))
    found.texts["frame_scores.csv"] = _table(_frame_scores(run))
    return found


def show_curves(run: Location, node: NodeId, attempt: Location) -> None:
    """The curves of a training that begins, under its name: `tensorboard/NAME`."""
    if run.is_local:
        (attempt / "tensorboard").make_folder()
        _lay_folder(run, _curves(node), attempt / "tensorboard", run)


def _curves(node: NodeId) -> str:
    return f"{CURVES}/{'' if node.stage == 'train_segmenter' else 'translator '}{node.name}"


# -- earlier results ---------------------------------------------------------------------------------------------------


def keep_earlier(folder: Location, results: Mapping[str, Any]) -> None:
    """What the results that lie here have and the new ones have not moves to `earlier/DATE-HASH`, with its recipe,
    report, models and tables. What the new ones have as well leaves `earlier`."""
    new = _finished(results)
    try:
        old = read_results(folder)
    except UserError:  # none, or damaged: there is nothing to keep
        old = {"commits": {}}
    kept = _finished(old)
    if kept.items() - new.items():
        place = (
            folder / f"{EARLIER}/{max(facts['created'] for facts in old['commits'].values())[:10]}-{hash_of(kept)[:6]}"
        )
        for name in (RECIPE_NAME, RESULTS_NAME, REPORT_NAME):
            with suppress(FileNotFoundError):
                (place / name).write_bytes((folder / name).read_bytes())
        run = Run(folder, old)
        lay_out(run, place)
        found = contents(run)
        for path in (*found.models, *found.folders, *(str(Location(path).parent.uri) for path in found.sheets)):
            (folder / path).delete()
    for place in earlier(folder):
        with suppress(UserError):
            if not _finished(read_results(place)).items() - new.items():
                place.delete()


def earlier(folder: Location) -> list[Location]:
    """The places of earlier results, the oldest first."""
    place = folder / EARLIER
    return [place / entry.name for entry in place.list() if entry.is_folder] if place.is_folder() else []


def owners(folder: Location) -> dict[tuple[str, str], list[str]]:
    """(node, key) of a commit -> which results have it: those of the last recipe, or of an earlier one."""
    found: dict[tuple[str, str], list[str]] = {}
    for place in (folder, *earlier(folder)):
        with suppress(UserError):
            for node, facts in read_results(place)["commits"].items():
                name = RESULTS_NAME if place == folder else f"{EARLIER}/{place.name}"
                found.setdefault((node, facts["key"]), []).append(name)
    return found


def _finished(results: Mapping[str, Any]) -> dict[str, str]:
    """Node -> key of what somebody may miss."""
    commits = results["commits"].items()
    return {node: facts["key"] for node, facts in commits if node.partition("/")[0] not in _FRAME_STAGES}


# -- tables ------------------------------------------------------------------------------------------------------------


def _names(commit: Commit) -> str:
    return "".join(f"{name}\n" for name in commit.table("frames")[frame.FRAME_ID].to_pylist())


def _chosen(run: Run, commit: Commit, evidence: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """Best first. Where the choice is no ranking by score, a score beside the rank would only mislead."""
    has_score = is_ranking(evidence)
    yield ("rank", "frame", "file", *(["score"] if has_score else []))
    for row in frame.resolve(commit.table("frames"), commit.folder).to_pylist():
        score = [row["score"]] if has_score else []
        yield (row["rank"], row[frame.FRAME_ID], row[frame.URI].removeprefix(f"{run.root.uri}/"), *score)


def _quarantined(run: Run) -> Iterator[Sequence[Any]]:
    columns = (frame.FRAME_ID, frame.URI, frame.REASON, frame.DETAIL)
    yield ("stage", "name", *columns)
    for node, facts in run.results["commits"].items():
        commit = run.commit(node) if facts["quarantined"] else None
        for row in commit.table("quarantine").to_pylist() if commit is not None else ():
            row[frame.URI] = row[frame.URI].removeprefix(f"{run.root.uri}/")
            yield (*node.split("/", 1), *(row[column] for column in columns))


def _epochs(run: Run) -> Iterator[Sequence[Any]]:
    scores = ("miou", "pa", "ca", "fwiou")
    yield ("model", "epoch", "step", "loss", "gradient_norm", "learning_rate", *(f"validation_{s}" for s in scores))
    for model in run.models:
        for name, node in run.trainings(model).items():
            for step, record in run.epochs(node):
                seen = record.get("validation") or {}
                values = (record.get(key) for key in ("loss", "gradient_norm", "learning_rate"))
                yield (name, record["epoch"], step, *values, *(seen.get(score) for score in scores))


def _frame_scores(run: Run) -> Iterator[Sequence[Any]]:
    """Of each test frame under each training: fractions, nothing for a frame without a labelled pixel."""
    yield ("model", "test", "frame", "pa", "miou")
    for model in run.models:
        rules = {
            test: of.get("absent_class", "cityscapes") for test, of in run.results["models"][model]["tests"].items()
        }
        for name, node in run.evaluations(model).items():
            commit = run.commit(node)
            if commit is None or not commit.has_table("predictions"):
                continue
            columns = commit.table("predictions").select([frame.FRAME_ID, "test_sets", "confusion"])
            for row in columns.to_pylist():
                matrix = np.reshape(row["confusion"], (run.classes.num_classes, -1))
                for test in row["test_sets"] if matrix.any() else ():
                    found = scores(matrix, rules[test])
                    yield (name, test, row[frame.FRAME_ID], found.pa, found.miou)


def _table(rows: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


# -- links -------------------------------------------------------------------------------------------------------------


def _lay_model(place: Location, model: Location) -> None:
    """Links to the files, or copies; what is a copy already is left alone."""
    card = place / _MODEL_FILES[-1]
    files = [name for name in _MODEL_FILES if (model / name).exists()]
    with suppress(FileNotFoundError):
        if not place.is_local and card.read_bytes() == (model / card.name).read_bytes():
            return
    for name in files:
        if not (place.is_local and _linked(place / name, model / name)):
            (place / name).write_bytes((model / name).read_bytes())


def _linked(place: Location, file: Location) -> bool:
    """Whether it is a hard link now. A copied tree of them is whole, and no copy of a link that leads nowhere."""
    if not file.is_local:
        return False
    os.makedirs(place.parent.uri, exist_ok=True)
    if os.path.exists(place.uri) and os.path.samefile(place.uri, file.uri):
        return True
    beside = f"{place.parent.uri}/{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    try:
        os.link(file.uri, beside)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    os.replace(beside, place.uri)
    return True


def _lay_folder(place: Location, path: str, folder: Location, root: Location) -> None:
    """A relative link; a text file where there can be none. Nothing for a folder that is not there."""
    link, note = place / path, place / f"{path}.txt"
    if not folder.is_folder():
        return
    link.delete()
    if place.is_local and root.holds(folder):
        os.makedirs(link.parent.uri, exist_ok=True)
        try:
            os.symlink(os.path.relpath(folder.uri, link.parent.uri), link.uri)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            note.delete()
            return
    where = folder.uri.removeprefix(f"{root.uri}/")
    note.write_bytes(f"{where}\n".encode())
