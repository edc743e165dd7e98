"""Labels of a teacher: the whole stage against its network alone, and thresholds over an index against the labels."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.contest import Contest, Size
from benchmarks.ray_pass import frames_of
from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import read_image
from nightseg.networks.model_folder import save_model
from nightseg.progress import SilentProgress
from nightseg.segmenter.network import build_semantic_fpn, model_card
from nightseg.segmenter.predict import Segmenter
from nightseg.segmenter.settings import Network, Threshold
from nightseg.stages import label, pseudo_label
from nightseg.storage import Commit, Location, Workspace

CLASSES = "cityscapes19"
BATCH = 2
FRAMES: dict[Size, int] = {"tiny": 3, "default": 4, "full": 24}
INDEXED: dict[Size, int] = {"tiny": 20, "default": 10_000, "full": 10_000}
READ: dict[Size, int] = {"tiny": 20, "default": 200, "full": 1_000}  # labels themselves take longer
NETWORKS: dict[Size, Network] = {
    "tiny": Network(encoder="resnet18", pyramid_channels=8, head_channels=8, input_size=(64, 96)),
    "default": Network(encoder="resnet50", input_size=(256, 512)),
    "full": Network(encoder="resnet101", input_size=(512, 1024)),
}


def contest(size: Size) -> Contest:
    """Files in, stored labels and index out, all that a run does but Ray; the peer has its batches in memory."""
    frames, runs, number = frames_of(FRAMES[size], FRAMES[size]), _folder(), itertools.count()
    teacher = _teacher(runs, NETWORKS[size])
    model = teacher.folder / "model"
    segment = Segmenter(model, "cpu")
    inputs = [segment._input(read_image(Location.of(uri)), 1.0) for uri in frames["uri"].to_pylist()]
    batches = [torch.stack(inputs[start : start + BATCH]) for start in range(0, len(inputs), BATCH)]

    def ours() -> Commit:
        return _labels(runs, f"run-{next(number)}", frames, teacher)

    def bare_forward() -> int:
        opened = Segmenter(model, "cpu")  # once a pass, as by an actor
        with torch.inference_mode():
            return sum(len(opened._logits(inputs_BCHW)) for inputs_BCHW in batches)

    def check(mine: Commit, theirs: int) -> str:
        assert mine.rows_out == theirs == len(frames)
        return f"{theirs} frames"

    return Contest(
        name="label_pass",
        work=f"{len(frames)} JPEG files labelled by {NETWORKS[size].encoder} at {_size(NETWORKS[size])}, stored",
        peer="the same network, opened and run on batches in memory",
        run_ours=ours,
        run_peer=bare_forward,
        check=check,
        close=lambda: shutil.rmtree(runs, ignore_errors=True),
    )


def thresholds(size: Size) -> Contest:
    """Other thresholds for labels that are there, over the index alone; a rule of geometry has to read the labels."""
    runs, number, count, read = _folder(), itertools.count(), INDEXED[size], READ[size]
    known = _labels(runs, "known", frames_of(20, 20), _teacher(runs, NETWORKS["tiny"]))
    many, few = (_repeated(runs, known, rows) for rows in (count, read))

    def keep(labels: Commit, **rules: Any) -> Commit:
        attempt = Workspace(runs / f"kept-{next(number)}").stage(
            "pseudo_label", "x", version=1, recipe={}, inputs={}, seed=0
        )
        told: dict[str, Any] = {"name": "x", "taxonomy": CLASSES, "progress": SilentProgress()}
        return pseudo_label.pseudo_label(
            labels, threshold=Threshold(share=0.5), attempt=attempt.open(), **told, **rules
        )

    def check(mine: Commit, theirs: Commit) -> str:
        assert (mine.rows_out, theirs.rows_out) == (count, read)
        assert mine.seconds < 10, f"{mine.seconds} s"
        share = mine.summary["kept_share"]
        assert abs(share - theirs.summary["kept_share"]) < 1e-9
        return f"{100 * share:.1f} % kept"

    return Contest(
        name="label_thresholds",
        work=f"thresholds for {count:,} frames from their index",
        peer=f"the same with a rule of geometry, which reads the labels ({read:,} frames)",
        run_ours=lambda: keep(many),
        run_peer=lambda: keep(few, never_below={"sky": []}),
        check=check,
        ours_units=count,
        peer_units=read,
        close=lambda: shutil.rmtree(runs, ignore_errors=True),
    )


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="nightseg-benchmark-"))


def _size(network: Network) -> str:
    assert network.input_size is not None
    return f"{network.input_size[0]} x {network.input_size[1]}"


def _teacher(runs: Path, network: Network) -> Commit:
    torch.manual_seed(0)
    classes = taxonomy(CLASSES)
    attempt = Workspace(runs / "teacher").stage("train_segmenter", "x", version=1, recipe={}, inputs={}, seed=0).open()
    built = build_semantic_fpn(network, classes.num_classes)
    card = model_card(network, classes, built.body.mean, built.body.std)
    save_model(attempt.folder / "model", built.state_dict(), card)
    return attempt.finish(rows_in=0, rows_out=0, outputs=["model"])


def _labels(runs: Path, name: str, frames: pa.Table, teacher: Commit) -> Commit:
    stage = Workspace(runs / name).stage("label", "x", version=label.VERSION, recipe={}, inputs={}, seed=0)
    work: dict[str, Any] = {"compute": MapCompute(actors=0, batch=BATCH), "progress": SilentProgress()}
    return label.label(frames, teacher, taxonomy=CLASSES, attempt=stage.open(), **work)


def _repeated(runs: Path, known: Commit, count: int) -> Commit:
    """Real labels as often as are needed for `count` frames, in the shards of a pass."""
    attempt = Workspace(runs / f"repeated-{count}").stage("label", "x", version=1, recipe={}, inputs={}, seed=0).open()
    file = known.folder / "labels"
    for entry in file.list():
        (attempt.folder / f"labels/{entry.name}").write_bytes((file / entry.name).read_bytes())
    bins = known.table("histograms")
    more = [[pixels * count // known.rows_out for pixels in row] for row in bins["histogram"].to_pylist()]
    (attempt.folder / "histograms.parquet").write_table(bins.set_column(1, "histogram", pa.array(more)))
    rows = MapCompute().shard_rows
    for number in range(-(-count // rows)):
        taken = pa.array([row % known.rows_out for row in range(number * rows, min(count, (number + 1) * rows))])
        tables = {name: known.table(name).take(taken) for name in ("frames", "index")}
        attempt.write_shard(number, tables, rows_in=len(taken), seconds=0.0)
    outputs = ["histograms.parquet", "labels"]
    return attempt.finish(
        rows_in=count, rows_out=count, outputs=outputs, num_shards=-(-count // rows), summary=dict(known.summary)
    )
