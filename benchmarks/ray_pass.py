"""The scoring pass on Ray Data, its actors' start included, against a bare loop of the same extractor, same files."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from PIL import Image

from benchmarks.contest import Contest, Size
from nightseg.cluster import ray as cluster
from nightseg.cluster.settings import MapCompute
from nightseg.data.images import read_image
from nightseg.data.scenes import scene
from nightseg.data.table import frame_table, vectors
from nightseg.progress import SilentProgress
from nightseg.selection.features import build_extractor
from nightseg.selection.settings import Extraction
from nightseg.stages import score as stage
from nightseg.storage import Location, Workspace

FRAMES: dict[Size, int] = {"tiny": 12, "default": 1000, "full": 6000}
DISTINCT: dict[Size, int] = {"tiny": 4, "default": 100, "full": 200}
HEIGHT, WIDTH = 288, 512  # of the JPEG files
BATCH = 16
EXTRACTOR = "efficientnet_lite0"


def contest(size: Size) -> Contest:
    frames, cores = frames_of(FRAMES[size], DISTINCT[size]), torch.get_num_threads()
    passes = Passes(frames, cores)
    extractor = build_extractor(Extraction(name=EXTRACTOR))

    def bare_loop() -> npt.NDArray[np.float32]:
        files = frames["uri"].to_pylist()
        parts = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
        return np.concatenate([extractor([read_image(Location.of(file)) for file in part]) for part in parts])

    def check(mine: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> str:
        apart = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
        # Sums of some 10^4 products through all layers, added up in another order: 8 * 100 eps of float32.
        assert mine.shape == theirs.shape and apart < 1e-4, apart
        return f"features {apart:.1g} apart"

    return Contest(
        name="ray_pass",
        work=f"{passes.work}, {cores} actors",
        peer=f"bare loop of the same extractor, {cores} threads, kept in memory",
        run_ours=lambda: passes.features(cores),
        run_peer=bare_loop,
        check=check,
        elsewhere=True,
        close=passes.close,
    )


def actors(size: Size) -> Contest:
    """What a second actor is worth, where there is a core for it: two cores, starting included."""
    passes = Passes(frames_of(FRAMES[size], DISTINCT[size]), 2)

    def check(mine: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> str:
        assert np.array_equal(mine, theirs)
        return "features equal"

    return Contest(
        name="ray_actors",
        work=f"{passes.work}, 2 actors",
        peer="the same pass with 1 actor",
        run_ours=lambda: passes.features(2),
        run_peer=lambda: passes.features(1),
        check=check,
        elsewhere=True,
        close=passes.close,
    )


class Passes:
    """Scoring passes over the same frames, each in a run folder of its own."""

    def __init__(self, frames: pa.Table, cores: int) -> None:
        self.frames = frames
        self.work = f"scoring of {len(frames):,} JPEG files {WIDTH} x {HEIGHT} by {EXTRACTOR}"
        self._runs = Path(tempfile.mkdtemp(prefix="nightseg-benchmark-"))
        self._number = itertools.count()
        cluster.connect(cores)

    def features(self, num_actors: int) -> npt.NDArray[np.float32]:
        shard_rows = max(4, len(self.frames) // 60)
        compute = MapCompute(actors=num_actors, cpus_per_actor=1, batch=BATCH, shard_rows=shard_rows)
        node = Workspace(self._runs / str(next(self._number))).stage(
            "score", "pool", version=stage.VERSION, recipe={}, inputs={}, seed=0
        )
        commit = stage.score(
            self.frames,
            Extraction(name=EXTRACTOR),
            attempt=node.open(),
            progress=SilentProgress(),
            compute=compute,
            max_bad_fraction=0.0,
        )
        return vectors(commit.table("features")["features"])

    def close(self) -> None:
        ray.shutdown()
        shutil.rmtree(self._runs, ignore_errors=True)


@cache
def frames_of(count: int, distinct: int) -> pa.Table:
    """A pool of `count` files; scenes take time to draw, so they recur."""
    folder = Path(tempfile.mkdtemp(prefix="nightseg-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for index in range(distinct):
        pixels = np.asarray(scene(0, index, "day", HEIGHT, WIDTH)[0])
        Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=90)
    rows = []
    for index in range(count):
        file = folder / f"{index:06d}.jpg"
        os.link(folder / f"{index % distinct}.jpg", file)
        rows.append({"frame_id": f"pool/{index:06d}", "uri": str(file), "domain": "unknown"})
    return frame_table(rows)
