"""A pool of many small frames through collect, split, score, select, label and pseudo_label, each in a process.

    python -m benchmarks.scale --frames 2000 --folder /tmp/scale-2000
    python -m benchmarks.scale --frames 20000 --folder /tmp/scale-20000 --beside /tmp/scale-2000

The frames are scenes under noise, written once to the folder, which is yours to remove; a call that was interrupted
continues. Printed are CPU seconds, frames a CPU second and peak memory of each stage; with `--beside` also how many
times the CPU time for a frame and the memory of the same stage there these are. CPU time, because wall time on a shared
machine says nothing; no actors, so that all of a stage is in its process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.scenes.street import scene
from nightseg.data.settings import FolderDataset
from nightseg.data.table import resolve
from nightseg.networks.model_folder import save_model
from nightseg.progress import SilentProgress
from nightseg.segmenter.network import build_semantic_fpn, model_card
from nightseg.segmenter.settings import Network, Threshold
from nightseg.selection.settings import Extraction, Selection
from nightseg.stages import collect, label, pseudo_label, score, select, split
from nightseg.storage import Commit, Workspace

HEIGHT, WIDTH, DISTINCT = 48, 64, 200  # scenes take longer to draw than all that is measured here
CHOSEN = 1600  # of 14,937 in the thesis
CLASSES = "camvid11"
EXTRACTION = Extraction(name="efficientnet_lite0", mode="fast")
STAGES = ("collect", "split", "score", "select", "select_histogram", "label", "pseudo_label")


def frames(folder: Path, count: int) -> Path:
    """So many PNGs, each other than the rest: three of four are night, the others day."""
    place = folder / "frames"
    place.mkdir(parents=True, exist_ok=True)
    if (folder / "frames.json").exists():
        return place
    drawn = [scene(0, index, "night" if index % 4 else "day", HEIGHT, WIDTH).image for index in range(DISTINCT)]
    for index in range(count):
        noise = np.random.default_rng(index).integers(-6, 7, (HEIGHT, WIDTH, 3))
        image = np.clip(drawn[index % DISTINCT] + noise, 0, 255).astype(np.uint8)
        (place / f"{index:06d}.png").write_bytes(encode_png(image))
    (folder / "frames.json").write_text(json.dumps(count))
    return place


def teacher(space: Workspace) -> Commit:
    """A small network with random weights: its labels are as large and as many as those of a trained one."""
    stage = space.stage("train_segmenter", "teacher", version=1, recipe={}, inputs={}, seed=0)
    if (found := stage.commit()) is not None:
        return found
    torch.manual_seed(0)
    settings, classes, attempt = (
        Network(encoder="resnet18", pyramid_channels=16, head_channels=16),
        taxonomy(CLASSES),
        stage.open(),
    )
    network = build_semantic_fpn(settings, classes.num_classes)
    card = model_card(settings, classes, network.body.mean, network.body.std)
    save_model(attempt.folder / "model", network.state_dict(), card)
    return attempt.finish(rows_in=0, rows_out=0, outputs=["model"])


class Pool:
    """The stages of one folder. What a stage needs was made by an earlier process and is read here."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count, self.space = folder, count, Workspace(folder / "run")
        self.work: dict[str, Any] = {
            "compute": MapCompute(actors=0, batch=16, shard_rows=64),
            "progress": SilentProgress(),
        }

    def done(self, name: str) -> Commit:
        commit = self.space.stage(name, "pool", version=1, recipe={}, inputs={}, seed=0).commit()
        assert commit is not None, f"{name} comes first"
        return commit

    def run(self, name: str) -> dict[str, float]:
        stage = self.space.stage(name, "pool", version=1, recipe={}, inputs={}, seed=0)
        if stage.commit() is None:
            before, started = time.process_time(), time.monotonic()
            made = getattr(self, name)(attempt=stage.open())
            measured = {
                "frames": made.rows_in,
                "cpu": time.process_time() - before,
                "wall": time.monotonic() - started,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
            (self.folder / f"{name}.json").write_text(json.dumps(measured))
        return dict(json.loads((self.folder / f"{name}.json").read_text()))

    def collect(self, **work: Any) -> Commit:
        dataset = FolderDataset.of_images(str(frames(self.folder, self.count)))
        return collect.collect(dataset, name="pool", taxonomy=CLASSES, **self.work, **work)

    def split(self, **work: Any) -> Commit:
        return split.split(self.frames("collect"), margin=0.2, **self.work, **work)

    def score(self, **work: Any) -> Commit:
        return score.score(self.frames("collect"), EXTRACTION, **self.work, **work)

    def select(self, method: str = "fid-subset", **work: Any) -> Commit:
        """Close to the frames of the pool itself: the hardest case, as no frame is far from it."""
        chosen = Selection(method=method, count=min(CHOSEN, self.count // 2), reference="pool", extractor=EXTRACTION)
        known, progress = self.done("score"), self.work["progress"]
        return select.select(
            self.frames("collect"), known, known, selection=chosen, seed=0, progress=progress, **work
        )  # fmt: skip

    def select_histogram(self, **work: Any) -> Commit:
        return self.select("histogram", **work)

    def label(self, **work: Any) -> Commit:
        return label.label(self.frames("collect"), teacher(self.space), taxonomy=CLASSES, **self.work, **work)

    def pseudo_label(self, **work: Any) -> Commit:
        told: dict[str, Any] = {"name": "pool", "taxonomy": CLASSES, "progress": self.work["progress"]}
        return pseudo_label.pseudo_label(self.done("label"), threshold=Threshold(share=0.5), **told, **work)

    def frames(self, name: str) -> Any:
        commit = self.done(name)
        return resolve(commit.table("frames"), commit.folder)


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=2000, metavar="N")
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="of frames and run, kept")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="folder of a smaller pool to compare with")
    parser.add_argument("--stage", choices=STAGES, help="this one alone, in this process")
    asked = parser.parse_args()
    if asked.stage is not None:
        Pool(asked.folder, asked.frames).run(asked.stage)
        return 0
    frames(asked.folder, asked.frames)
    row("stage", "frames", "CPU s", "frames / CPU s", "peak MiB", "CPU a frame", "peak")
    row(*["---"] * 7)
    for name in STAGES:
        words = ["--frames", str(asked.frames), "--folder", str(asked.folder), "--stage", name]
        subprocess.run([sys.executable, "-m", "benchmarks.scale", *words], check=True)
        found, more = json.loads((asked.folder / f"{name}.json").read_text()), ["", ""]
        if asked.beside is not None:
            small = json.loads((asked.beside / f"{name}.json").read_text())
            each = [one["cpu"] / one["frames"] for one in (found, small)]
            more = [f"{each[0] / each[1]:.2f}x", f"{found['peak_mib'] / small['peak_mib']:.2f}x"]
        pace = found["frames"] / found["cpu"]
        row(name, str(found["frames"]), f"{found['cpu']:.1f}", f"{pace:.0f}", f"{found['peak_mib']:.0f}", *more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
