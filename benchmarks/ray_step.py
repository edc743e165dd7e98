"""The segmenter's loop on two workers of Ray Train against the same loop under torchrun: gloo, same seed, same frames.

What is timed is a step, from one exchange of the loss to the next, after the first ones; how long workers take to start
is left out on both sides. The losses of all steps must be the same numbers.
"""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.contest import Contest, Size
from nightseg.cluster import ray as cluster
from nightseg.cluster.session import Session
from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.train import LocalSession, exchanging, fit
from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.scenes import scene
from nightseg.data.table import frame_table
from nightseg.networks.model_folder import save_model
from nightseg.progress import SilentProgress
from nightseg.segmenter.data import Part
from nightseg.segmenter.network import build_semantic_fpn, model_card
from nightseg.segmenter.settings import Augmentation, Loss, Network, Training
from nightseg.segmenter.train import Plan, learn
from nightseg.storage import Location

WORKERS = 2
ENCODER = "resnet18"
SHAPES: dict[Size, tuple[int, int]] = {"tiny": (32, 64), "default": (128, 256), "full": (256, 512)}
STEPS: dict[Size, int] = {"tiny": 4, "default": 60, "full": 200}
WARM_UP: dict[Size, int] = {"tiny": 1, "default": 10, "full": 10}  # steps that are not timed
FRAMES, BATCH = 16, 4


class Course(NamedTuple):
    """Loss of every step, and when each was known (seconds)."""

    losses: list[float]
    moments: list[float]


def contest(size: Size) -> Contest:
    folder = Path(tempfile.mkdtemp(prefix="nightseg-benchmark-"))
    (folder / "plan.pickle").write_bytes(pickle.dumps(_plan(size, Location.of(folder))))
    number = itertools.count()
    cluster.connect(max(WORKERS, torch.get_num_threads()))

    def ours() -> Course:
        place = folder / f"ray-{next(number)}"
        fit(
            _timed_learn,
            {"folder": str(folder), "course": str(place.with_suffix(".json"))},
            folder=Location.of(place),
            name="step",
            compute=TrainCompute(workers=WORKERS, max_failures=0),
            progress=SilentProgress(),
            title="step",
            total=STEPS[size],
            unit="steps",
        )
        return Course(**json.loads(place.with_suffix(".json").read_text()))

    def peer() -> Course:
        place = folder / f"torchrun-{next(number)}"
        words = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
        command = [sys.executable, "-m", *words, "-m", "benchmarks.ray_step", str(folder), str(place)]
        ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return Course(**json.loads(place.with_suffix(".json").read_text()))

    def check(mine: Course, theirs: Course) -> str:
        assert len(mine.losses) == STEPS[size] and mine.losses == theirs.losses, (mine.losses, theirs.losses)
        return f"{STEPS[size]} losses equal"

    def clock(course: Course) -> float:
        timed = course.moments[WARM_UP[size] :]
        return (timed[-1] - timed[0]) / (len(timed) - 1)

    def close() -> None:
        cluster.disconnect()
        shutil.rmtree(folder, ignore_errors=True)

    height, width = SHAPES[size]
    return Contest(
        name="ray_step",
        work=f"step on Ray Train, {ENCODER} Semantic FPN, {BATCH} x {height} x {width}, {WORKERS} gloo workers",
        peer=f"the same loop under torchrun, torch {torch.__version__}",
        run_ours=ours,
        run_peer=peer,
        check=check,
        clock=clock,
        elsewhere=True,
        close=close,
    )


def _plan(size: Size, folder: Location) -> Plan:
    """Street scenes as files, and a network to start from."""
    height, width = SHAPES[size]
    classes, rows = taxonomy("camvid11"), []
    for index in range(FRAMES):
        drawn = scene(0, index, "day", height, width)
        files = [folder / f"{index}.png", folder / f"{index}-label.png"]
        for file, pixels in zip(files, drawn, strict=True):
            file.write_bytes(encode_png(pixels))
        row = {"frame_id": f"scenes/{index}", "uri": files[0].uri, "label_uri": files[1].uri}
        rows.append(row | {"label_encoding": "camvid12", "width": width, "height": height})
    torch.manual_seed(0)
    settings = Network(encoder=ENCODER)
    network = build_semantic_fpn(settings, classes.num_classes)
    card = model_card(settings, classes, network.body.mean, network.body.std)
    save_model(folder / "start", network.state_dict(), card)
    training = Training(
        batch=BATCH,
        epochs=1,
        steps_per_epoch=STEPS[size],
        warmup_steps=0,
        crop=(height, width),
        augmentation=Augmentation(scale=(1.0, 1.0)),
    )
    return Plan(
        frame_table(rows), (Part.whole(len(rows)),), None, folder / "start", classes, settings, Loss(), training, seed=0
    )


class _Timed:
    """A session that notes the loss of every step, and when it was known."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.course = Course([], [])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def sum(self, tensor: Tensor) -> Tensor:
        total = self._session.sum(tensor)
        if total.shape == (2,):  # of loss and weight: once in every step
            self.course.losses.append(float(total[0] / total[1]))
            self.course.moments.append(time.perf_counter())
        return total


def _timed_learn(session: Session, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    timed = _Timed(session)
    plan = pickle.loads((Path(settings["folder"]) / "plan.pickle").read_bytes())
    learn(timed, {"plan": plan})
    if session.rank == 0:
        Path(settings["course"]).write_text(json.dumps(timed.course._asdict()))


class _TorchrunSession(LocalSession):
    """One process of torchrun's; rank 0 keeps the checkpoints, as on Ray."""

    def __init__(self, folder: Location) -> None:
        super().__init__(folder)
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def wrap(self, module: nn.Module) -> nn.Module:
        return exchanging(module, self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    def report(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> None:
        torch.distributed.barrier()
        super().report(metrics, state)


def _main(folder: str, place: str) -> None:
    torch.distributed.init_process_group("gloo")
    _timed_learn(_TorchrunSession(Location.of(place)), {"folder": folder, "course": f"{place}.json"})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
