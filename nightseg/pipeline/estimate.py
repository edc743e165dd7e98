"""What a run will cost: time by a few steps of the real networks on this machine, room on disk and in memory by size.

Estimates, and told as such. What is not measured (translators that learn, features, reading the frames) is named.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nightseg.data import table as frame
from nightseg.data.class_list import taxonomy
from nightseg.data.settings import ScenesDataset
from nightseg.pipeline.execute import expected_room
from nightseg.pipeline.graph import Graph, Node, NodeId, frames_at_most
from nightseg.pipeline.schedule import seconds_of
from nightseg.recipe.types import Recipe
from nightseg.segmenter.network import build_semantic_fpn
from nightseg.segmenter.settings import Network, Training
from nightseg.stages.collect import Look

MEASURED_PIXELS: Final = 128 * 256  # of the frame that is measured; larger ones take as much longer as they are larger
MOST_MEASURED: Final = 4  # different networks; the others are told to be left out
BYTES_OF_PIXEL: Final = 1.7  # of a photograph as PNG
BYTES_OF_MASK: Final = 0.1
BYTES_OF_LABEL: Final = 0.06  # class and confidence of a sixteenth of the pixels
PASSES: Final = ("evaluate", "predict", "label", "consistency")
READING: Final = ("collect", "split", "select", "pseudo_label")


class Measured(NamedTuple):
    """Of one frame, for each of its pixels: seconds of a training step and of a prediction, bytes kept for the
    gradient. And the bytes of all weights."""

    step: float
    forward: float
    saved: float
    weights: int


def measure(network: Network, num_classes: int, device: torch.device, threads: int) -> Measured:
    """Two steps of the network with random weights, on one frame of noise."""
    height = max(64, min(network.input_size[0] if network.input_size else 128, 128) // 32 * 32)
    width = MEASURED_PIXELS // height // 32 * 32
    before = torch.get_num_threads()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    try:
        torch.set_num_threads(max(1, threads))
        with torch.random.fork_rng(devices=[]):
            built = build_semantic_fpn(network, num_classes).to(device).train()
            images = torch.randn(2, 3, height, width, device=device)
            target = torch.randint(num_classes, (2, height, width), device=device)
        seconds = []
        for turn in range(2):
            began = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(
                keep if turn == 0 else lambda tensor: tensor, lambda tensor: tensor
            ):
                logits = built(images)
                loss = F.cross_entropy(F.interpolate(logits, (height, width)), target)
            loss.backward()  # type: ignore[no-untyped-call]
            _wait(device)
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        with torch.no_grad():
            built(images)
        _wait(device)
        forward = time.perf_counter() - began
    finally:
        torch.set_num_threads(before)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in built.parameters())
    pixels = images[:, 0].numel()
    saved = max(0, sum(kept.values()) - weights)
    return Measured(min(seconds) / pixels, forward / pixels, saved / pixels, weights)


def _wait(device: torch.device) -> None:
    """Until what was queued is done: a clock that is read earlier measures the queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def costs(
    recipe: Recipe,
    graph: Graph,
    looks: Mapping[str, Look],
    folder: Any,
    warnings: list[str],
    done: Collection[NodeId] = (),
) -> dict[str, Any]:
    """Seconds (None: nothing could be measured), bytes on disk and in memory, and what is there of both. Stages that
    will run side by side take the time of the slowest line of them."""
    nodes = [node for node in graph.nodes.values() if node.id not in done]
    rows, pixels = frames_at_most(graph), _pixels(recipe, graph, looks)
    found = _seconds(recipe, nodes, graph, rows, pixels)
    disk = sum(_bytes_of(node, rows, pixels) for node in nodes) + found["disk"]
    place = Path(str(folder))
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free if folder.is_local else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if free is not None and disk > free:
        warnings.append(f"room: the run needs some {gigabytes(disk)} in {folder}, and {gigabytes(free)} are free there")
    if found["memory"] > memory:
        warnings.append(
            f"memory: a training needs some {gigabytes(found['memory'])}, and this machine has {gigabytes(memory)}; a "
            "smaller training.batch or crop, or training.accumulate, needs less"
        )
    return {**found, "disk": round(disk), "disk_free": free, "memory_total": memory}


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _pixels(recipe: Recipe, graph: Graph, looks: Mapping[str, Look]) -> dict[NodeId, float]:
    """Pixels of a frame of each node, on average."""
    known: dict[NodeId, float] = {}
    for node in graph.nodes.values():
        dataset, look = recipe.datasets.get(node.id.name), looks.get(node.id.name)
        if node.id.stage == "collect" and isinstance(dataset, ScenesDataset):
            known[node.id] = float(dataset.size[0] * dataset.size[1])
        elif node.id.stage == "collect" and look is not None and look.frames.num_rows:
            sizes = zip(look.frames[frame.HEIGHT].to_pylist(), look.frames[frame.WIDTH].to_pylist(), strict=True)
            known[node.id] = sum(height * width for height, width in sizes) / look.frames.num_rows
        elif below := [known[need] for need in node.takes if need in known]:
            known[node.id] = sum(below) / len(below)
    return known


def _bytes_of(node: Node, rows: Mapping[NodeId, int | None], pixels: Mapping[NodeId, float]) -> float:
    area = (rows[node.id] or 0) * pixels.get(node.id, 0.0)
    match node.id.stage:
        case "collect":
            return area * BYTES_OF_PIXEL if isinstance(node.settings["dataset"], ScenesDataset) else 0.0
        case "translate":
            return area * BYTES_OF_PIXEL
        case "label":
            return area * BYTES_OF_LABEL
        case "predict" | "evaluate":
            return area * BYTES_OF_MASK
    return 0.0


def _seconds(
    recipe: Recipe,
    nodes: Collection[Node],
    graph: Graph,
    rows: Mapping[NodeId, int | None],
    pixels: Mapping[NodeId, float],
) -> dict[str, Any]:
    known: dict[Network, Measured | None] = {}
    networks: dict[NodeId, Network] = {}
    seconds = dict.fromkeys((node.id for node in nodes), 0.0)
    memory, disk, without = 0.0, 0.0, dict[str, None]()
    for node in nodes:
        if node.id.stage == "train_segmenter":
            network, training = node.settings["network"], node.settings["training"]
            networks[node.id] = network
            if network not in known:
                known[network] = _measured(recipe, network) if len(known) < MOST_MEASURED else None
            steps = training.epochs * training.steps_of_epoch(rows[node.id] or 0)
            if (found := known[network]) is None or not steps:
                without[str(node.id)] = None
                continue
            crop = training.crop[0] * training.crop[1]
            taught = node.settings["teaching"].online.frames(training) if "teaching" in node.settings else 0
            share = (training.batch + taught) / recipe.compute.train.workers
            each = share * found.step + taught * found.forward / recipe.compute.train.workers
            seconds[node.id] = steps * crop * each
            held = found.weights * _copies(training) + found.saved * crop * share / training.accumulate
            memory, disk = max(memory, held * recipe.compute.train.workers), disk + 4 * found.weights
        elif node.id.stage in PASSES:
            model = node.inputs.get("model") or node.inputs.get("teacher")
            network = networks.get(model) if isinstance(model, NodeId) else None
            if network is None or (found := known.get(network)) is None:
                without[str(node.id)] = None
                continue
            area = network.input_size[0] * network.input_size[1] if network.input_size else pixels.get(node.id, 0.0)
            inference = node.settings.get("inference")
            turns = sum(scale**2 for scale in inference.scales) * (2 if inference.flip else 1) if inference else 1
            work = (rows[node.id] or 0) * area * found.forward * turns
            seconds[node.id] = work / max(1, recipe.compute.map.actors)
        elif node.id.stage not in READING:
            without[node.id.stage] = None
    is_measured = any(found is not None for found in known.values())
    needs = {node.id: node.needs for node in nodes}
    together = seconds_of(seconds, needs, expected_room(graph, recipe.compute.concurrent))
    return {
        "seconds": round(together, 1) if is_measured else None,
        "without": [*without, *(["reading the frames"] if is_measured else [])],
        "memory": round(memory),
        "disk": disk,
    }


def _copies(training: Training) -> int:
    """Of the weights: themselves, gradient, state of the optimiser, EMA."""
    return 2 + (2 if training.optimizer == "adamw" else 1) + (1 if training.ema_decay else 0)


def _measured(recipe: Recipe, network: Network) -> Measured | None:
    """None: it would run on GPUs, and this machine has none."""
    compute = recipe.compute.train
    if compute.gpus_per_worker and not torch.cuda.is_available():
        return None
    device = torch.device("cuda" if compute.gpus_per_worker else "cpu")
    return measure(network, taxonomy(recipe.taxonomy).num_classes, device, int(compute.cpus_per_worker))
