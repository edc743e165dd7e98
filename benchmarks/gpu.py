"""All that runs on a GPU, in less than six minutes: is it right, does a step wait for nothing, how fast is it.

    python -m benchmarks.gpu              a machine with an NVIDIA GPU
    python -m benchmarks.gpu --tiny       any machine: tries the script itself; its times say nothing

Speed: a training step of the segmenter and of UNIT, features and predictions, each ours (bfloat16, channels last; eager
and compiled) beside the plain loop in PyTorch's defaults (float32, NCHW), by turns. A round is timed from an idle GPU
to an idle GPU. Right: no step reads anything back (torch's sync debug mode raises where one does), gradients go
through NCCL, batches are pinned. What fails is named and the exit status is 1; the figures go to
benchmarks/results/gpu-TIME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.unit_step import Naive
from nightseg.cluster.train import exchanging
from nightseg.segmenter.data import Batch
from nightseg.segmenter.network import build_semantic_fpn
from nightseg.segmenter.optimizer import build_optimizer
from nightseg.segmenter.predict import tiled_logits
from nightseg.segmenter.settings import Inference, Loss, Network, Training
from nightseg.segmenter.train import training_step
from nightseg.selection.features import Extractor, build_extractor
from nightseg.selection.settings import Extraction
from nightseg.unit.loss import TermMeans, build_networks, discriminator_step, generator_step, latent_noise
from nightseg.unit.settings import LossWeights, Translator

RESULTS = Path(__file__).parent / "results"
CLASSES = 19


class Sizes(NamedTuple):
    encoder: str
    batch: int
    crop: tuple[int, int]
    unit_width: int
    unit_crop: tuple[int, int]
    frames: int  # for features and predictions
    frame: tuple[int, int]
    steps: int  # of a round
    rounds: int


FULL = Sizes("resnet101", 8, (512, 1024), 64, (256, 256), 128, (720, 1280), 10, 5)
TINY = Sizes("resnet18", 2, (64, 64), 8, (64, 64), 2, (48, 64), 1, 2)

Step = Callable[[], Any]


class Way(NamedTuple):
    """One way of doing the work; `images` in one step."""

    name: str
    images: int
    step: Step
    reads_back: bool = False  # what it returns; a step may not


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small networks and frames, also on a CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes half of the time")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the JSON goes")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA GPU here; --tiny tries the script on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, compiles = TINY if options.tiny else FULL, not options.no_compile
    faults, rows = dict[str, str](), list[dict[str, Any]]()
    races: dict[str, Callable[[], list[Way]]] = {
        "step of the segmenter": lambda: segmenter_steps(sizes, device, compiles),
        "step of UNIT": lambda: unit_steps(sizes, device, compiles),
        "predictions": lambda: predictions(sizes, device),
        "features": lambda: features(sizes, device),
    }
    checks: dict[str, Callable[[], Any]] = {
        "gradients through the process group": lambda: exchanged(sizes, device),
        "pinned batches arrive faster": lambda: pinned(sizes, device),
    }
    for name, ways in races.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            rows += raced(name, ways(), sizes, device)
        except Exception as error:  # the other figures are not lost
            faults[name] = f"{type(error).__name__}: {error}"
    for name, check in checks.items():
        try:
            rows.append({"work": name, "told": check()})
        except Exception as error:
            faults[name] = f"{type(error).__name__}: {error}"
    content: dict[str, Any] = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(device)}
    content |= {"sizes": sizes._asdict(), "rows": rows, "faults": faults}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"gpu-{datetime.now(UTC):%Y%m%dT%H%M%S%f}.json"
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(table(rows))
    for name, fault in faults.items():
        print(f"FAILED {name}: {fault}", file=sys.stderr)
    print(f"all figures: {file}", file=sys.stderr)
    return 1 if faults else 0


# -- how it is measured -----------------------------------------------------------------------------------------------


def raced(work: str, ways: list[Way], sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Median images a second of each way, by turns; the first is the peer."""
    for way in ways:
        for _ in range(3 if device.type == "cuda" else 1):  # compiles, picks convolutions, fills the allocator
            way.step()
        if not way.reads_back:
            with waits_for_nothing(device):
                way.step()
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    peaks: dict[str, float] = {}
    for number in range(sizes.rounds):
        for way in ways if number % 2 == 0 else ways[::-1]:
            idle(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            for _ in range(sizes.steps):
                way.step()
            idle(device)
            seconds[way.name].append((time.perf_counter() - began) / sizes.steps)
            if device.type == "cuda":
                peaks[way.name] = torch.cuda.max_memory_allocated(device) / 2**30
    speeds = {way.name: way.images / statistics.median(seconds[way.name]) for way in ways}
    peer = speeds[ways[0].name]
    return [
        {"work": work, "way": name, "images_per_second": speed, "times": speed / peer, "peak_gib": peaks.get(name)}
        for name, speed in speeds.items()
    ]


def idle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def waits_for_nothing(device: torch.device) -> Iterator[None]:
    """RuntimeError, from torch, where the host waits for the GPU."""
    if device.type != "cuda":
        yield
        return
    idle(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| work | way | images/s | times the first way | peak GiB |", "|---|---|---:|---:|---:|"]
    for row in rows:
        if "told" in row:
            lines.append(f"| {row['work']} | {row['told']} | | | |")
            continue
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        speed = f"{row['images_per_second']:.1f} | {row['times']:.2f}"
        lines.append(f"| {row['work']} | {row['way']} | {speed} | {peak} |")
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, Any]:
    told: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count(), "device": str(device)}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        told |= {"gpu": found.name, "memory_gib": found.total_memory / 2**30, "cuda": torch.version.cuda}
        told |= {"cudnn": torch.backends.cudnn.version(), "nccl": list(torch.cuda.nccl.version())}  # type: ignore[no-untyped-call]
    return told


# -- the work ---------------------------------------------------------------------------------------------------------


def batch_of(sizes: Sizes, device: torch.device) -> Batch:
    shape = (sizes.batch, *sizes.crop)
    images = torch.randint(0, 256, (sizes.batch, 3, *sizes.crop), dtype=torch.uint8)
    return Batch(images, torch.randint(0, CLASSES, shape, dtype=torch.uint8)).to(device)


def segmenter_steps(sizes: Sizes, device: torch.device, compiles: bool) -> list[Way]:
    batch, loss = batch_of(sizes, device), Loss(kind="combined", alpha=0.5, gamma=2.0)

    def ours(compiled: bool) -> Step:
        training = Training(precision="bfloat16", clip_norm=1.0)
        network = build_semantic_fpn(Network(encoder=sizes.encoder), CLASSES).to(device)
        network.to(memory_format=torch.channels_last).train()
        optimizer = build_optimizer(network, training, encoder=network.body)
        model: Any = torch.compile(network, dynamic=False) if compiled else network
        return lambda: training_step(model, optimizer, network.normalise, batch, loss, training)

    network = build_semantic_fpn(Network(encoder=sizes.encoder), CLASSES).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def plain() -> None:
        inputs = network.normalise(batch.images).contiguous()
        logits = F.interpolate(network(inputs), scale_factor=4, mode="bilinear", align_corners=False)
        nll = F.cross_entropy(logits, batch.labels.long(), ignore_index=255, reduction="none")
        total = (nll * (0.5 + 0.5 * (1 - torch.exp(-nll)) ** 2)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    ways = [Way("plain float32 loop", sizes.batch, plain), Way("ours", sizes.batch, ours(False))]
    return [*ways, Way("ours, compiled", sizes.batch, ours(True))] if compiles else ways


def unit_steps(sizes: Sizes, device: torch.device, compiles: bool) -> list[Way]:
    settings = Translator(
        day="day",
        night="night",
        width=sizes.unit_width,
        discriminator_width=sizes.unit_width,
        discriminator_norm="layer",
        weights=LossWeights(perceptual=0.0),
    )
    crops = [torch.rand(1, 3, *sizes.unit_crop, device=device) * 2 - 1 for _ in range(2)]
    latent_Chw = (4 * settings.width, sizes.unit_crop[0] // 4, sizes.unit_crop[1] // 4)
    precision = torch.autocast(device.type, torch.bfloat16)

    def ours(compiled: bool) -> Step:
        networks, means = build_networks(settings, 0, device), TermMeans(device)
        last = [crop.to(memory_format=torch.channels_last) for crop in crops]
        modules = (networks.generators, networks.discriminators)
        generators, discriminators = (torch.compile(module) if compiled else module for module in modules)

        def step() -> None:
            noise = latent_noise(0, 0, [0], latent_Chw, device)
            with precision:
                translation = generators(*last, noise, settings.weights.needs_cycle)
            given: tuple[Any, ...] = (*last, translation, settings, precision)
            of_discriminators = discriminator_step(networks, discriminators, *given)
            means.add(of_discriminators, generator_step(networks, discriminators, None, *given))

        return step

    naive = Naive(build_networks(settings, 0, device), None)
    noise = latent_noise(0, 0, [0], latent_Chw, device)
    ways = [
        Way("naive float32 formulation", 2, lambda: naive.learn(crops[0], crops[1], noise, settings.weights)),
        Way("ours", 2, ours(False)),
    ]
    return [*ways, Way("ours, compiled", 2, ours(True))] if compiles else ways


def predictions(sizes: Sizes, device: torch.device) -> list[Way]:
    """The network alone, frames already there: what reading and writing cost is a matter of the CPUs."""
    frames = torch.randint(0, 256, (sizes.batch, 3, *(32 * -(-side // 32) for side in sizes.frame)), dtype=torch.uint8)
    frames = frames.to(device)

    def way(name: str, precision: Any, memory: torch.memory_format) -> Way:
        network = build_semantic_fpn(Network(encoder=sizes.encoder), CLASSES).to(device).eval()
        network.to(memory_format=memory)
        inference = Inference(precision=precision)

        @torch.inference_mode()
        def step() -> list[Tensor]:
            def logits(images: Tensor) -> Tensor:
                found: Tensor = network(network.normalise(images).contiguous(memory_format=memory))
                return found

            return [seen.tiles[0].logits for seen in tiled_logits(logits, frames, inference, mirrored=False)]

        return Way(name, sizes.batch, step)

    return [
        way("plain float32", "float32", torch.contiguous_format),
        way("ours, float32", "float32", torch.channels_last),
        way("ours, bfloat16", "bfloat16", torch.channels_last),
    ]


def features(sizes: Sizes, device: torch.device) -> list[Way]:
    """From decoded frames in memory to features in memory."""
    frames = [
        np.random.default_rng(index).integers(0, 256, (*sizes.frame, 3), dtype=np.uint8)
        for index in range(sizes.frames)
    ]
    extraction = Extraction(name="efficientnet_lite0", mode="fast")

    def way(name: str, extractor: Extractor) -> Way:
        return Way(name, len(frames), lambda: extractor(frames), reads_back=True)

    return [
        way("float32", build_extractor(extraction, device)),
        way("bfloat16", build_extractor(extraction, device, precision="bfloat16")),
    ]


# -- what must be right -----------------------------------------------------------------------------------------------


def exchanged(sizes: Sizes, device: torch.device) -> str:
    """A step through DistributedDataParallel in a group of one process changes the weights as one without it does."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    training, batch = Training(learning_rate=0.01), batch_of(sizes, device)
    weights = []
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            for is_wrapped in (False, True):
                torch.manual_seed(0)
                network = build_semantic_fpn(Network(encoder="resnet18"), CLASSES).to(device)
                network.to(memory_format=torch.channels_last).train()
                optimizer = build_optimizer(network, training, encoder=network.body)
                model = exchanging(network, device) if is_wrapped else network
                training_step(model, optimizer, network.normalise, batch, Loss(), training)
                weights.append([parameter.detach().clone() for parameter in network.parameters()])
            counted = torch.ones(3, device=device)
            torch.distributed.all_reduce(counted)
        finally:
            torch.distributed.destroy_process_group()
    assert counted.tolist() == [1.0] * 3, counted
    apart = max(float((one - other).abs().max()) for one, other in zip(*weights, strict=True))
    assert apart < 1e-3, f"weights are {apart:.2g} apart after one step with and without the exchange"
    return f"{backend}: weights {apart:.1g} apart after a step with and without it"


def pinned(sizes: Sizes, device: torch.device) -> str:
    """Copies of batches from pinned and from ordinary memory, timed."""
    shape = (sizes.batch, 3, *sizes.crop)
    if device.type != "cuda":
        return "no GPU: not measured"
    sources = {name: torch.empty(shape, dtype=torch.uint8, pin_memory=name == "pinned") for name in ("plain", "pinned")}
    assert sources["pinned"].is_pinned() and not sources["plain"].is_pinned()
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(sizes.rounds + 1):
        for name, source in sources.items():
            idle(device)
            began = time.perf_counter()
            for _ in range(20):
                source.to(device, non_blocking=True)
            idle(device)
            seconds[name].append((time.perf_counter() - began) / 20)
    speeds = {name: source.numel() / statistics.median(seconds[name][1:]) / 2**30 for name, source in sources.items()}
    return f"{speeds['pinned']:.1f} GiB/s pinned, {speeds['plain']:.1f} GiB/s not"


if __name__ == "__main__":
    sys.exit(main())
