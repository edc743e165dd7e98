"""Labels of whole train, validation and test sets, before anything is trained: which classes have pixels there.

`collect` looks at one folder. What is drawn from it by domain, or joined from several, is known only here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from nightseg.data import table as frame
from nightseg.data.encodings import FEW_VALID
from nightseg.data.taxonomy import Taxonomy
from nightseg.errors import UserError, together
from nightseg.pipeline.graph import Graph, NodeId, Use, View
from nightseg.progress import Progress
from nightseg.storage import Commit, Shards


class _Labels(NamedTuple):
    """Labels of a set: how many, their pixels by class (K), all pixels."""

    num: int
    by_class: npt.NDArray[np.int64]
    pixels: int


def check(graph: Graph, commits: Mapping[NodeId, Commit | Shards], classes: Taxonomy, progress: Progress) -> None:
    """Say which classes the train sets of a model lack together, and which sets are nearly void.

    Raises UserError: a set without one pixel that has a class. Sets are left out of which not all labels were read.
    """
    sets: dict[tuple[str, tuple[Use, ...]], list[str]] = {}  # a set, in words, and what it is made of -> models
    for model, watched in graph.watched.items():
        trained = tuple(use for use in watched.learned if use.is_training)
        sets.setdefault(("what is trained on", trained), []).append(model)
        for use in (*watched.validated, *watched.tests):
            parts = tuple(one for one in (*watched.validated, *watched.tests) if one.what == use.what)
            sets.setdefault((use.what, parts), [])
    problems = []
    for (what, uses), models in sets.items():
        where = f"{what} (model {', '.join(models)})" if models else what
        labels = _counted(uses, commits)
        if labels is None:
            continue
        if not labels.num:
            cure = "another side of the split, or another dataset; the quarantine tables say which frames were bad"
            problems.append(UserError(f"{where}: it holds no frame", cure=cure))
            continue
        valid = labels.by_class.sum() / labels.pixels
        if not valid:
            problems.append(
                UserError(
                    f"{where}: none of the {labels.num} labels has a pixel with a class, only ignored ones",
                    cure="frames with finished labels; a split of a dataset that has them in both domains",
                )
            )
        elif len(uses) > 1 or any(view.domain for use in uses for view in use.views if isinstance(view, View)):
            absent = [name for name, pixels in zip(classes.classes, labels.by_class, strict=True) if not pixels]
            if models and absent:
                progress.say(f"{where}: no pixel has {', '.join(absent)}")
            if valid < FEW_VALID:
                progress.say(f"warning: {where}: only {100 * valid:.2g} % of the pixels have a class")
    if problems:
        raise together(problems)


def _counted(uses: Iterable[Use], commits: Mapping[NodeId, Commit | Shards]) -> _Labels | None:
    """None unless all labels of the frames were counted when they were collected."""
    found: dict[str, tuple[list[int], int]] = {}  # label file, which several parts may share -> by class, all pixels
    num_frames = 0
    for view in (view for use in uses for view in use.views):
        commit = commits.get(view.node) if isinstance(view, View) else None
        if not isinstance(view, View) or not isinstance(commit, Commit):
            return None  # what is wrong with a set that could not be committed is said there
        rows = frame.resolve(commit.table("frames"), commit.folder)
        rows = rows if view.domain is None else rows.filter(pc.equal(rows[frame.DOMAIN], view.domain))
        num_frames += rows.num_rows
        for row in rows.select([frame.LABEL_URI, frame.LABEL_PIXELS, frame.WIDTH, frame.HEIGHT]).to_pylist():
            if row[frame.LABEL_URI] is not None:
                if row[frame.LABEL_PIXELS] is None:
                    return None
                found[row[frame.LABEL_URI]] = row[frame.LABEL_PIXELS], row[frame.WIDTH] * row[frame.HEIGHT]
    if num_frames and not found:
        return None
    by_class: npt.NDArray[np.int64] = np.array([pixels for pixels, _ in found.values()], dtype=np.int64).sum(axis=0)
    return _Labels(len(found), by_class, sum(total for _, total in found.values()))
