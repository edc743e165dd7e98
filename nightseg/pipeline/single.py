"""Single stages without a recipe and without a run folder: the work of the verbs of the command line.

Each is a graph of one node, or of the few that it needs, and runs like any other, in a hidden folder beside its output:
what is interrupted continues when the same is asked again, and the folder is removed once the output is written.
"""

from __future__ import annotations

import secrets
import tempfile
from typing import Any

import pyarrow as pa

from nightseg.cluster.settings import MapCompute
from nightseg.data import table as frame
from nightseg.data.layouts import pair_up
from nightseg.data.taxonomy import taxonomy as load_taxonomy
from nightseg.pipeline import build, run
from nightseg.pipeline.graph import Given, NodeId
from nightseg.progress import Progress
from nightseg.recipe.types import Evaluation
from nightseg.segmenter.predict import PICTURES
from nightseg.storage import Location, hash_of


def evaluate_folders(
    predictions: Location,
    labels: Location,
    taxonomy: str,
    *,
    label_encoding: str | None = None,
    evaluation: Evaluation,
    compute: MapCompute,
    work: Location | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Score label images of train ids against labels, paired by name (`pair_up`); see `stages/evaluate.py`.

    Actors keep what they have done in a folder of its own below `work` (default: below the predictions); this process
    alone does so only where `work` is given. Raises UserError: no folder, no label, a label without prediction, sizes
    that differ, unknown ids.
    """
    classes = load_taxonomy(taxonomy)
    pairs = pair_up(predictions, labels, skip=PICTURES)  # `nightseg predict` with pictures to look at
    places = {
        "prediction_uri": [(predictions / pair.prediction.name).uri for pair in pairs],
        frame.LABEL_URI: [(labels / pair.label.name).uri for pair in pairs],
    }
    listing = [places, [[entry.size, entry.modified_ns] for pair in pairs for entry in pair]]
    if label_encoding is not None:
        classes.lut(label_encoding)
    folder = (work or predictions) / ".evaluate.work"
    if not compute.actors and work is None:  # minutes at most: not worth a place that must be writable
        folder = Location.of(tempfile.gettempdir()) / f"nightseg-evaluate-{secrets.token_hex(4)}"
    given = Given(pa.table(places), hash_of(listing))
    graph = build.evaluation_graph(given, taxonomy, label_encoding, evaluation, compute)
    with run.finished(graph, folder, progress) as commits:
        found: dict[str, Any] = commits[NodeId("evaluate", "folders")].json("scores.json")
    return found
