"""Labels of whole train, validation and test sets, before anything is trained: which classes have pixels there.

`collect` looks at one folder. What is drawn from it by domain, or joined from several, is known only here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nightseg.data import table as frame
from nightseg.data.encodings import FEW_VALID
from nightseg.data.taxonomy import Taxonomy
from nightseg.errors import UserError, together
from nightseg.pipeline.graph import Graph, NodeId, Use, View
from nightseg.progress import Progress
from nightseg.stages.collect import LABEL_FILES
from nightseg.storage import Commit, Shards


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
        counted = _pixels(uses, commits, classes)
        if counted is None:
            continue
        num_labels, by_class = counted
        if not num_labels:
            cure = "another side of the split, or another dataset; the quarantine tables say which frames were bad"
            problems.append(UserError(f"{where}: it holds no frame", cure=cure))
            continue
        valid = by_class[: classes.num_classes].sum() / by_class.sum()
        if not valid:
            problems.append(
                UserError(
                    f"{where}: none of the {num_labels} labels has a pixel with a class, only ignored ones",
                    cure="frames with finished labels; a split of a dataset that has them in both domains",
                )
            )
        elif len(uses) > 1 or any(view.domain for use in uses for view in use.views if isinstance(view, View)):
            absent = [name for name, pixels in zip(classes.classes, by_class, strict=False) if not pixels]
            if models and absent:
                progress.say(f"{where}: no pixel has {', '.join(absent)}")
            if valid < FEW_VALID:
                progress.say(f"warning: {where}: only {100 * valid:.2g} % of the pixels have a class")
    if problems:
        raise together(problems)


def _pixels(
    uses: Iterable[Use], commits: Mapping[NodeId, Commit | Shards], classes: Taxonomy
) -> tuple[int, npt.NDArray[np.float64]] | None:
    """Number of labels, and pixels by train id, float64[256]; None unless all labels of the frames were counted."""
    views = [view for use in uses for view in use.views]
    uris = []
    for view in views:
        if not isinstance(view, View) or not isinstance(commits.get(view.node), Commit):
            return None  # what is wrong with a set that could not be committed is said there
        rows = commits[view.node].table("frames")
        rows = rows if view.domain is None else rows.filter(pc.equal(rows[frame.DOMAIN], view.domain))
        uris.append(rows[frame.LABEL_URI].combine_chunks())
    wanted = pc.unique(pa.concat_arrays([pa.array([], pa.string()), *uris]).drop_null())
    tables = [commit.table(LABEL_FILES) for commit in commits.values() if commit.has_table(LABEL_FILES)]
    found = [table.filter(pc.is_in(table[frame.LABEL_URI], wanted)) for table in tables]
    known = {uri for table in found for uri in pc.unique(table[frame.LABEL_URI]).to_pylist()}
    if len(known) < len(wanted) or (not known and any(map(len, uris))):
        return None
    by_class = np.zeros(256)
    for table in found:
        for encoding in pc.unique(table[frame.LABEL_ENCODING]).to_pylist():
            rows = table.filter(pc.equal(table[frame.LABEL_ENCODING], encoding))
            ids, pixels = (pc.list_flatten(rows[name]).to_numpy() for name in ("ids", "pixels"))
            np.add.at(by_class, classes.lut(encoding)[0][ids], pixels)
    return len(wanted), by_class
