"""UNIT on two gloo workers against one, a core each, at the same global batch: the product's loop in both.

The workers are started before anything is timed and wait between runs, so the start of processes does not count.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.contest import Contest, Size
from nightseg.data.images import encode_png
from nightseg.data.scenes import scene
from nightseg.unit.data import FrameRef
from nightseg.unit.settings import LossWeights, Translator
from nightseg.unit.train import Plan, learn

ITERATIONS: dict[Size, int] = {"tiny": 2, "default": 12, "full": 40}
WIDTHS: dict[Size, int] = {"tiny": 2, "default": 32, "full": 64}
SIDES: dict[Size, int] = {"tiny": 64, "default": 128, "full": 256}
FRAMES = 4
BATCH = 2
History = list[dict[str, float]]


def contest(size: Size) -> Contest:
    folder = Path(tempfile.mkdtemp(prefix="nightseg-benchmark-"))
    plan = _plan(folder, size)
    pools = {count: Pool(count, plan, folder) for count in (1, 2)}

    def check(mine: History, theirs: History) -> str:
        assert [row["iteration"] for row in mine] == [row["iteration"] for row in theirs]
        apart = max(abs(row["total"] / other["total"] - 1) for row, other in zip(mine, theirs, strict=True))
        assert apart < 1e-2, (mine, theirs)
        return f"loss curves {apart:.1g} apart"

    def close() -> None:
        for pool in pools.values():
            pool.close()
        shutil.rmtree(folder, ignore_errors=True)

    iterations, width, side = ITERATIONS[size], WIDTHS[size], SIDES[size]
    return Contest(
        name="unit_workers",
        work=f"{iterations} UNIT iterations, width {width}, {side} x {side}, batch {BATCH}, two gloo workers",
        peer="one worker, the same global batch; a thread a worker",
        run_ours=pools[2].run,
        run_peer=pools[1].run,
        check=check,
        elsewhere=True,
        close=close,
    )


def _plan(folder: Path, size: Size) -> Plan:
    refs: dict[str, list[FrameRef]] = {"day": [], "night": []}
    side = SIDES[size]
    for domain, number in ((domain, number) for domain in ("day", "night") for number in range(FRAMES)):
        file = folder / f"{domain}-{number}.png"
        file.write_bytes(encode_png(np.asarray(scene(0, number, domain, side, 2 * side)[0])))
        refs[domain].append(FrameRef(f"{domain}/{number}", str(file), side, 2 * side))
    settings = Translator(
        day="day",
        night="night",
        width=WIDTHS[size],
        discriminator_width=WIDTHS[size],
        weights=LossWeights(perceptual=0.0),
        iterations=ITERATIONS[size],
        batch=BATCH,
        short_side=None,
        crop=(side, side),
    )
    return Plan(tuple(refs["day"]), tuple(refs["night"]), settings, seed=0, threads=1)


class GlooSession:
    """One process of a pool, as the training loop sees it; nothing is kept."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.workers = rank, world_size, world_size
        self.history: History = []

    def wrap(self, module: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(module) if self.world_size > 1 else module

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def restore(self) -> None:
        return None

    def report(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> None:
        if state is not None:
            self.history = state["history"]

    def say(self, message: str) -> None:
        pass

    def progress(self, done: int, **metrics: float) -> None:
        self.done = done


class Pool:
    """Processes that train whenever they are told to."""

    def __init__(self, count: int, plan: Plan, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.lines, self.processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            place = f"file://{folder}/gloo-{count}"
            process = context.Process(target=_train_on_demand, args=(there, rank, count, place, plan), daemon=True)
            process.start()
            self.lines.append(here)
            self.processes.append(process)
        for line in self.lines:
            assert line.recv() == "ready"

    def run(self) -> History:
        for line in self.lines:
            line.send("train")
        histories = [line.recv() for line in self.lines]
        history: History = histories[0]
        return history

    def close(self) -> None:
        for line in self.lines:
            with suppress(OSError):  # it died, and its error is told
                line.send("end")
        for process in self.processes:
            process.join()


def _train_on_demand(line: Any, rank: int, world_size: int, place: str, plan: Plan) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world_size)
    line.send("ready")
    while line.recv() == "train":
        session = GlooSession(rank, world_size)
        learn(session, {"plan": plan})
        line.send(session.history)
    if world_size > 1:
        dist.destroy_process_group()
