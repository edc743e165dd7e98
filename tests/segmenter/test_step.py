"""One step: parts and workers make no difference, clipping is PyTorch's, and the gradient is that of the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nightseg.segmenter.encoders import IMAGENET_MEAN, IMAGENET_STD, normalise
from nightseg.segmenter.hard_pixels import HardPixels
from nightseg.segmenter.loss import Mixture
from nightseg.segmenter.optimizer import build_optimizer
from nightseg.segmenter.pixel_loss import PixelLoss, pixel_loss_sum
from nightseg.segmenter.step import StepFigures, parts_of, training_step

LOSS = PixelLoss(Mixture(0.5, 2.0, 1.0), (1.0, 0.5, 2.0))


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
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (4, 3, 16, 24), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 3, (4, 16, 24), generator=generator).to(torch.uint8)
    labels[0], labels[1, :11] = 255, 255  # frames of very different weight
    return images, labels


def step(
    batch: tuple[Tensor, Tensor], parts: int = 1, loss: PixelLoss = LOSS, **settings: Any
) -> tuple[Tiny, StepFigures]:
    network = Tiny()
    optimizer = build_optimizer(network, "sgd", learning_rate=0.5, momentum=0.0, weight_decay=0.0)
    figures = training_step(
        network, optimizer, parts_of(*batch, parts), loss, mean=IMAGENET_MEAN, std=IMAGENET_STD, **settings
    )
    return network, figures


def moved(network: Tiny) -> dict[str, Tensor]:
    """The gradient, as learning rate times it has moved the weights."""
    before = Tiny().state_dict()
    return {name: (before[name] - value) / 0.5 for name, value in network.state_dict().items()}


def gradient_of_mean(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    network = Tiny()
    logits = network(normalise(batch[0], IMAGENET_MEAN, IMAGENET_STD))
    mean = pixel_loss_sum(logits, batch[1], LOSS).mean()
    names, parameters = zip(*network.named_parameters(), strict=True)
    return mean.detach(), dict(zip(names, torch.autograd.grad(mean, parameters), strict=True))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_a_step_goes_down_the_gradient_of_the_mean(batch: tuple[Tensor, Tensor]) -> None:
    network, figures = step(batch)
    mean, gradient = gradient_of_mean(batch)
    assert figures.loss.item() == pytest.approx(mean.item(), rel=1e-6)
    norm = torch.stack([value.norm() for value in gradient.values()]).norm()
    assert figures.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    assert_close(moved(network), gradient)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("hard", [None, HardPixels(0.3, None, 0)])
def test_parts_are_one_batch(batch: tuple[Tensor, Tensor], parts: int, hard: HardPixels | None) -> None:
    loss = LOSS._replace(hard=hard)
    (whole, expected), (network, figures) = step(batch, 1, loss), step(batch, parts, loss)
    assert figures.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert figures.gradient_norm.item() == pytest.approx(expected.gradient_norm.item(), rel=1e-5)
    assert_close(moved(network), moved(whole))


def test_a_long_gradient_is_shortened_as_pytorch_does_it(batch: tuple[Tensor, Tensor]) -> None:
    _, gradient = gradient_of_mean(batch)
    reference = Tiny()
    for name, parameter in reference.named_parameters():
        parameter.grad = gradient[name].clone()
    limit = 0.1
    norm = nn.utils.clip_grad_norm_(reference.parameters(), limit)
    assert norm > limit
    network, figures = step(batch, clip_norm=limit)
    assert figures.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-5)  # before clipping
    assert_close(moved(network), {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})
    assert_close(moved(step(batch, clip_norm=100.0)[0]), gradient)


def test_two_workers_divide_by_the_weight_of_both(batch: tuple[Tensor, Tensor]) -> None:
    """As DDP does it: each worker has half of the batch, gradients of sums are averaged. Here: by hand."""
    images, labels = batch
    halves = [(images[rank::2], labels[rank::2]) for rank in range(2)]
    sums = []
    for half in halves:
        network = Tiny()
        found = pixel_loss_sum(network(normalise(half[0], IMAGENET_MEAN, IMAGENET_STD)), half[1], LOSS)
        sums.append(torch.stack([found.total, found.weight]).detach())
    steps = [step(half, world_size=2, sum_over_workers=lambda _: sums[0] + sums[1]) for half in halves]
    mean, gradient = gradient_of_mean(batch)
    assert [figures.loss.item() for _, figures in steps] == pytest.approx([mean.item()] * 2, rel=1e-6)
    both = [moved(network) for network, _ in steps]
    assert_close({name: (both[0][name] + both[1][name]) / 2 for name in gradient}, gradient)


def test_nothing_valid_moves_nothing(batch: tuple[Tensor, Tensor]) -> None:
    network, figures = step((batch[0], torch.full_like(batch[1], 255)), 2, clip_norm=1.0)
    assert (figures.loss.item(), figures.gradient_norm.item()) == (0, 0)
    assert all(torch.count_nonzero(value) == 0 for value in moved(network).values())


def test_bfloat16_is_close_and_the_loss_is_float32(batch: tuple[Tensor, Tensor]) -> None:
    _, expected = step(batch)
    _, figures = step(batch, precision=torch.bfloat16)
    assert figures.loss.dtype == torch.float32
    assert figures.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
