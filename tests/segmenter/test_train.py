"""One step: parts and workers make no difference, clipping is PyTorch's, and the gradient is that of the mean."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nightseg.cluster.session import parts_of
from nightseg.networks.normaliser import Normaliser
from nightseg.progress import format_metrics
from nightseg.segmenter.data import Batch
from nightseg.segmenter.encoders import IMAGENET_MEAN, IMAGENET_STD
from nightseg.segmenter.loss import segmentation_loss
from nightseg.segmenter.optimizer import build_optimizer
from nightseg.segmenter.settings import Loss, Ohem, Training
from nightseg.segmenter.train import Pace, StepMetrics, _figures, step_seed, training_step
from tests.rounding import assert_near, rounding

LOSS = Loss(kind="combined")
WEIGHTS = (1.0, 0.5, 2.0)
TRAINING = Training(learning_rate=0.5, momentum=0.0, weight_decay=0.0, batch=4)
PIXELS = 4 * 16 * 24
"""The longest sums here: of losses, and of the gradients that pixels give to a weight."""

normalise = Normaliser(IMAGENET_MEAN, IMAGENET_STD)


class Tiny(nn.Module):
    """A quarter of the size, as a segmenter; no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(images_B3HW)))
        return logits


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (4, 3, 16, 24), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 3, (4, 16, 24), generator=generator).to(torch.uint8)
    labels[0], labels[1, :11] = 255, 255  # frames of very different weight
    return Batch(images, labels)


def step(
    batch: Batch, loss: Loss = LOSS, changed: dict[str, Any] | None = None, **cluster: Any
) -> tuple[Tiny, StepMetrics]:
    network = Tiny()
    training = TRAINING.model_copy(update=changed or {})
    optimizer = build_optimizer(network, training)
    return network, training_step(
        network, optimizer, normalise, batch, loss, training, class_weights=WEIGHTS, **cluster
    )


def moved(network: Tiny) -> dict[str, Tensor]:
    """The gradient, as learning rate times it has moved the weights."""
    before = Tiny().state_dict()
    return {name: (before[name] - value) / 0.5 for name, value in network.state_dict().items()}


def gradient_of_mean(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    network = Tiny()
    logits = network(normalise(batch.images))
    mean = segmentation_loss(logits, batch.labels, LOSS, WEIGHTS).mean()
    names, parameters = zip(*network.named_parameters(), strict=True)
    return mean.detach(), dict(zip(names, torch.autograd.grad(mean, parameters), strict=True))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert_near(found[name], value, terms=PIXELS)


def near(value: Tensor) -> Any:
    return pytest.approx(value.item(), rel=rounding(PIXELS))


def test_a_step_goes_down_the_gradient_of_the_mean(batch: Batch) -> None:
    network, metrics = step(batch)
    mean, gradient = gradient_of_mean(batch)
    assert metrics.loss.item() == near(mean)
    norm = torch.stack([value.norm() for value in gradient.values()]).norm()
    assert metrics.gradient_norm.item() == near(norm)
    assert_close(moved(network), gradient)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("ohem", [None, Ohem(share=0.3)])
def test_parts_are_one_batch(batch: Batch, parts: int, ohem: Ohem | None) -> None:
    loss = LOSS.model_copy(update={"ohem": ohem})
    (whole, expected), (network, metrics) = step(batch, loss), step(batch, loss, {"accumulate": parts})
    assert metrics.loss.item() == near(expected.loss)
    assert metrics.gradient_norm.item() == near(expected.gradient_norm)
    assert_close(moved(network), moved(whole))


def test_a_long_gradient_is_shortened_as_pytorch_does_it(batch: Batch) -> None:
    _, gradient = gradient_of_mean(batch)
    reference = Tiny()
    for name, parameter in reference.named_parameters():
        parameter.grad = gradient[name].clone()
    limit = 0.1
    norm = nn.utils.clip_grad_norm_(reference.parameters(), limit)
    assert norm > limit
    network, metrics = step(batch, changed={"clip_norm": limit})
    assert metrics.gradient_norm.item() == near(norm)  # before clipping
    assert_close(moved(network), {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})
    assert_close(moved(step(batch, changed={"clip_norm": 100.0})[0]), gradient)


def test_two_workers_divide_by_the_weight_of_both(batch: Batch) -> None:
    """As DDP does it: each worker has half of the batch, gradients of sums are averaged. Here: by hand."""
    images, labels, _ = batch
    halves = [Batch(images[rank::2], labels[rank::2]) for rank in range(2)]
    sums = []
    for half in halves:
        network = Tiny()
        found = segmentation_loss(network(normalise(half.images)), half.labels, LOSS, WEIGHTS)
        sums.append(torch.stack([found.total, found.weight]).detach())
    steps = [step(half, world_size=2, sum_over_workers=lambda _: sums[0] + sums[1]) for half in halves]
    mean, gradient = gradient_of_mean(batch)
    assert [metrics.loss.item() for _, metrics in steps] == [near(mean)] * 2
    both = [moved(network) for network, _ in steps]
    assert_close({name: (both[0][name] + both[1][name]) / 2 for name in gradient}, gradient)


@pytest.mark.parametrize(
    ("accumulate", "workers", "world_size", "parts"),
    [(1, 3, 2, 2), (2, 3, 1, 6), (1, 4, 3, 2), (2, 4, 4, 2), (1, 1, 1, 1)],
)
def test_fewer_workers_take_more_and_no_larger_parts(
    accumulate: int, workers: int, world_size: int, parts: int
) -> None:
    session = SimpleNamespace(workers=workers, world_size=world_size)
    assert parts_of(session, accumulate) == parts  # type: ignore[arg-type]
    for of_part in (1, 2, 5):
        batch = of_part * workers * accumulate
        shares = [len(range(rank, batch, world_size)) for rank in range(world_size)]
        assert sum(shares) == batch
        assert max(-(-share // parts) for share in shares) <= of_part


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_is_the_same_however_many_workers_are_left(batch: Batch, world_size: int) -> None:
    """As DDP does it, by hand: gradients of the shares, even or not, are averaged. Planned were four workers."""
    shares = [Batch(batch.images[rank::world_size], batch.labels[rank::world_size]) for rank in range(world_size)]
    sums = []
    for share in shares:
        found = segmentation_loss(Tiny()(normalise(share.images)), share.labels, LOSS, WEIGHTS)
        sums.append(torch.stack([found.total, found.weight]).detach())
    total = torch.stack(sums).sum(dim=0)
    parts = parts_of(SimpleNamespace(workers=4, world_size=world_size), 1)  # type: ignore[arg-type]
    steps = [step(share, world_size=world_size, sum_over_workers=lambda _: total, parts=parts) for share in shares]
    mean, gradient = gradient_of_mean(batch)
    assert [metrics.loss.item() for _, metrics in steps] == [near(mean)] * world_size
    all_moved = [moved(network) for network, _ in steps]
    assert_close({name: sum(one[name] for one in all_moved) / world_size for name in gradient}, gradient)


def test_nothing_valid_moves_nothing(batch: Batch) -> None:
    network, metrics = step(
        Batch(batch.images, torch.full_like(batch.labels, 255)), changed={"accumulate": 2, "clip_norm": 1.0}
    )
    assert (metrics.loss.item(), metrics.gradient_norm.item()) == (0, 0)
    assert all(torch.count_nonzero(value) == 0 for value in moved(network).values())


def test_bfloat16_is_close_and_the_loss_is_float32(batch: Batch) -> None:
    _, expected = step(batch)
    _, metrics = step(batch, changed={"precision": "bfloat16"})
    assert metrics.loss.dtype == torch.float32
    # Weights, input, features and logits are rounded once each, and a sum of 48 products if it is kept in bfloat16.
    assert metrics.loss.item() == pytest.approx(expected.loss.item(), rel=(4 + 48**0.5) * 2**-8)


def test_the_random_numbers_of_a_step_follow_from_seed_step_and_worker() -> None:
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)}
    assert len(seeds) == 8 and step_seed(1, 1, 0) in seeds
    assert all(0 <= seed < 2**63 for seed in seeds)  # torch.manual_seed takes no more


def test_waiting_time_is_counted(batch: Batch) -> None:
    pace = Pace()
    assert len(list(pace.timed(iter([batch] * 3)))) == 3
    points = pace.lap(12)
    assert 0 <= pace.waiting_seconds <= pace.seconds < 1 and pace.frames == 12
    assert points["pace/images_per_second"] == pytest.approx(12 / pace.seconds)
    assert points["pace/data_wait_share"] == pytest.approx(pace.waiting_seconds / pace.seconds)


def test_a_validation_is_told_with_all_its_scores() -> None:
    """mIoU by its name, the others by names that a display leaves out; nothing that is not defined."""
    found = _figures({"miou": 0.5, "pa": 0.75, "ca": None, "iou": {"road": 0.25, "rider": None}})
    assert found == {"miou": 0.5, "validation/pa": 0.75, "validation/iou.road": 0.25}
    assert format_metrics(found) == "miou 0.5" and _figures({}) == {}
