"""A training step as nightseg takes it on a CPU, against the same network in float32 and PyTorch's default layout.

Ours: channels-last memory, bfloat16 where the processor has instructions for it, our loss. The peer: the plain loop
that most segmentation code has. Both go on from the same weights and see the same batches; after fifty steps their
losses must be the same within two percent, or the time would not count: float32 in two memory layouts, which only
round differently, was four percent apart at five times this rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import Contest, Size
from nightseg.data.scenes import scene
from nightseg.segmenter.data import Batch
from nightseg.segmenter.network import SemanticFPN, build_semantic_fpn
from nightseg.segmenter.optimizer import build_optimizer, linear_warmup, set_learning_rate
from nightseg.segmenter.settings import Loss, Network, Training
from nightseg.segmenter.train import training_step

ENCODER: dict[Size, str] = {"tiny": "resnet18", "default": "resnet50", "full": "resnet101"}
SIZES: dict[Size, tuple[int, int]] = {"tiny": (64, 64), "default": (256, 512), "full": (512, 1024)}
BATCH = 4
STEPS: dict[Size, int] = {"tiny": 3, "default": 50, "full": 50}  # after which the losses are compared
BATCHES = 5  # that come again and again: enough to learn from, quick to make
FIRST_STEPS: dict[Size, int] = {"tiny": 2, "default": 60, "full": 60}  # before, by AdamW, the same for both
RATE, WARM_UP, MOMENTUM, CLASSES = 0.002, 10, 0.9, 11  # the warm-up is in steps; at 0.01 the loss climbs first
LOSS = Loss()  # cross-entropy, as the peer's
TOLERANCE = 0.02
LAST = 10  # losses of so many last steps are averaged: one step's depends on its batch


def contest(size: Size) -> Contest:
    batches = _batches(size)
    start = _start(size, batches)
    ours, peer = _ours(size, batches, start), _peer(size, batches, start)
    fast = _precision()

    def check(first: float, second: float) -> str:
        assert abs(first / second - 1) < TOLERANCE, (first, second)  # before anything was learned
        losses = [([first], ours), ([second], peer)]
        for values, step in losses:
            values += [step() for _ in range(STEPS[size] - 1)]
        means = [float(np.mean(values[-LAST:])) for values, _ in losses]
        apart = abs(means[0] / means[1] - 1)
        assert apart < TOLERANCE, f"loss after {STEPS[size]} steps: {means[0]:.4f} against {means[1]:.4f}"
        return f"loss after {STEPS[size]} steps {means[0]:.4f} and {means[1]:.4f}, {apart:.2%} apart"

    height, width = SIZES[size]
    return Contest(
        name="training_step",
        work=f"training step, {ENCODER[size]} Semantic FPN, {BATCH} x {height} x {width}, channels last, {fast}",
        peer=f"same network, eager float32 NCHW loop, torch {torch.__version__}",
        run_ours=ours,
        run_peer=peer,
        check=check,
    )


def _precision() -> Literal["bfloat16", "float32"]:
    """bfloat16 where the processor computes with it; emulated it would be slower than float32."""
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def _rates() -> Iterator[float]:
    """Learning rate of every step, the same for both."""
    return (RATE * linear_warmup(step, WARM_UP) for step in itertools.count())


def _start(size: Size, batches: list[Batch]) -> dict[str, Tensor]:
    """Weights that are past the first descent. It is chaotic: from random weights even two float32 layouts, which round
    differently, are percents apart after fifty steps, and nothing could be said about ours."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_semantic_fpn(Network(encoder=ENCODER[size]), CLASSES)
    network.to(memory_format=torch.channels_last).train()
    training = Training(optimizer="adamw", learning_rate=1e-3, weight_decay=0.0, precision=_precision())
    optimizer = build_optimizer(network, training)
    for batch in itertools.islice(itertools.cycle(batches), FIRST_STEPS[size]):
        training_step(network, optimizer, network.normalise, batch, LOSS, training)
    return network.state_dict()


def _network(size: Size, start: dict[str, Tensor]) -> SemanticFPN:
    network = build_semantic_fpn(Network(encoder=ENCODER[size]), CLASSES)
    network.load_state_dict(start)
    return network.train()


def _batches(size: Size) -> list[Batch]:
    """Street scenes: frames that can be learned, as uint8."""
    height, width = SIZES[size]
    parts = []
    for number in range(BATCHES):
        drawn = [scene(0, number * BATCH + index, "day", height, width) for index in range(BATCH)]
        images = torch.from_numpy(np.stack([one.image for one in drawn])).permute(0, 3, 1, 2)
        parts.append(Batch(images, torch.from_numpy(np.stack([one.label for one in drawn]))))
    return parts


def _ours(size: Size, batches: list[Batch], start: dict[str, Tensor]) -> Callable[[], float]:
    network = _network(size, start).to(memory_format=torch.channels_last)
    training = Training(learning_rate=RATE, momentum=MOMENTUM, weight_decay=0.0, precision=_precision())
    optimizer = build_optimizer(network, training)
    stream, rates = itertools.cycle(batches), _rates()

    def step() -> float:
        set_learning_rate(optimizer, next(rates))
        return float(training_step(network, optimizer, network.normalise, next(stream), LOSS, training).loss)

    return step


def _peer(size: Size, batches: list[Batch], start: dict[str, Tensor]) -> Callable[[], float]:
    network = _network(size, start)  # in the layout it is built in
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM)
    stream, rates = itertools.cycle(batches), _rates()

    def step() -> float:
        images, labels, _ = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = next(rates)
        inputs: Tensor = network.normalise(images).contiguous()
        logits = F.interpolate(network(inputs), scale_factor=4, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels.long(), ignore_index=255)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        return float(loss.detach())

    return step
