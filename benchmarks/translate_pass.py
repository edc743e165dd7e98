"""Translation on Ray Data, its actors' start included, against a bare loop of the same translator, same files."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import ray
import torch

from benchmarks.contest import Contest, Size
from benchmarks.ray_pass import frames_of
from nightseg.cluster import ray as cluster
from nightseg.cluster.settings import MapCompute
from nightseg.data.images import encode_png, read_image
from nightseg.data.table import resolve
from nightseg.networks.model_folder import save_model
from nightseg.progress import SilentProgress
from nightseg.stages import translate as stage
from nightseg.storage import Commit, Location, Workspace, sha256_of
from nightseg.unit.network import Generators, load_generators, to_uint8, to_unit_range

FRAMES: dict[Size, int] = {"tiny": 6, "default": 240, "full": 1500}
DISTINCT: dict[Size, int] = {"tiny": 3, "default": 60, "full": 100}
WIDTHS: dict[Size, int] = {"tiny": 2, "default": 16, "full": 16}


def contest(size: Size) -> Contest:
    frames = frames_of(FRAMES[size], DISTINCT[size])
    cores = torch.get_num_threads()
    runs = Path(tempfile.mkdtemp(prefix="nightseg-benchmark-"))
    number = itertools.count()
    cluster.connect(cores)
    translator = _translator(runs, WIDTHS[size])

    def ours() -> list[str]:
        node = Workspace(runs / str(next(number))).stage(
            "translate", "night", version=stage.VERSION, recipe={}, inputs={}, seed=0
        )
        commit = stage.translate(
            frames,
            translator,
            name="night",
            to="night",
            taxonomy="camvid11",
            attempt=node.open(),
            progress=SilentProgress(),
            compute=MapCompute(actors=cores, cpus_per_actor=1, batch=1, shard_rows=max(2, len(frames) // 40)),
            max_bad_fraction=0.0,
        )
        return list(resolve(commit.table("frames"), commit.folder)["uri"].to_pylist())

    generators = load_generators(translator.folder / "model")

    def bare_loop() -> list[str]:
        folder, made = Location.of(runs / str(next(number))), list[str]()
        for row in frames.to_pylist():
            image = torch.from_numpy(read_image(Location.of(row["uri"]))).permute(2, 0, 1)[None]
            with torch.inference_mode():
                night = to_uint8(generators.translate(to_unit_range(image), "night"))[0].permute(1, 2, 0)
            data = encode_png(night.numpy())
            sha256_of(data)
            file = folder / f"{len(made):06d}.png"
            file.write_bytes(data)
            made.append(file.uri)
        return made

    def check(mine: list[str], theirs: list[str]) -> str:
        assert len(mine) == len(theirs) == len(frames)
        worst = 0
        for first, second in zip(mine, theirs, strict=True):
            one, other = (read_image(Location.of(uri)).astype(int) for uri in (first, second))
            worst = max(worst, int(abs(one - other).max()))
        assert worst <= 1, worst
        return f"pixels {worst} apart"

    def close() -> None:
        ray.shutdown()
        shutil.rmtree(runs, ignore_errors=True)

    return Contest(
        name="translate_pass",
        work=f"translation of {len(frames):,} JPEG files to PNG, UNIT of width {WIDTHS[size]}, {cores} actors",
        peer=f"bare loop of the same translator, {cores} threads, same files written",
        run_ours=ours,
        run_peer=bare_loop,
        check=check,
        elsewhere=True,
        close=close,
    )


def _translator(runs: Path, width: int) -> Commit:
    torch.manual_seed(0)
    attempt = Workspace(runs / "unit").stage("train_translator", "unit", version=1, recipe={}, inputs={}, seed=0).open()
    card = {"kind": "unit", "width": width, "res_blocks": 4, "shared_blocks": 0}
    save_model(attempt.folder / "model", Generators(width, 4).state_dict(), card)
    return attempt.finish(rows_in=0, rows_out=0, outputs=["model"])
