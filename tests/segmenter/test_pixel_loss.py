"""Class weights and strips against PyTorch's own loss on upsampled logits; hard pixels by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nightseg.segmenter.hard_pixels import HardPixels
from nightseg.segmenter.loss import Mixture
from nightseg.segmenter.network import upsample_logits
from nightseg.segmenter.pixel_loss import PixelLoss, pixel_loss_sum

CROSS_ENTROPY = Mixture(1.0, 2.0, 1.0)
COMBINED = Mixture(0.4, 2.0, 0.7)
WEIGHTS = (1.0, 2.0, 0.5, 0.0, 3.0)
SHAPES = [(16, 20, 64, 80), (17, 20, 65, 77), (9, 8, 33, 32), (1, 1, 1, 3)]


def inputs(h: int, w: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(h)
    target = torch.randint(0, 5, (2, height, width), generator=generator).to(torch.uint8)
    target[0, : height // 3] = 255
    return torch.randn(2, 5, h, w, generator=generator), target


def value_and_gradient(logits: Tensor, target: Tensor, loss: PixelLoss) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    found = pixel_loss_sum(leaf, target, loss)
    (gradient,) = torch.autograd.grad(found.mean(), leaf)
    return found.mean().detach(), found.weight, gradient


@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_is_that_of_pytorch(rows: int | None, weights: tuple[float, ...] | None) -> None:
    logits, target = inputs(*SHAPES[1])
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(
        upsample_logits(leaf, *target.shape[-2:]),
        target.long(),
        weight=None if weights is None else torch.tensor(weights),
        ignore_index=255,
    )
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    value, _, gradient = value_and_gradient(logits, target, PixelLoss(CROSS_ENTROPY, weights, None, rows))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hard", [None, HardPixels(0.3, None, 0), HardPixels(None, 0.2, 200)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_strips_give_the_same_loss_and_gradient(
    shape: tuple[int, int, int, int], hard: HardPixels | None, weights: tuple[float, ...] | None
) -> None:
    logits, target = inputs(*shape)
    whole = value_and_gradient(logits, target, PixelLoss(COMBINED, weights, hard))
    for rows in (4, 12, 32, 256):
        value, weight, gradient = value_and_gradient(logits, target, PixelLoss(COMBINED, weights, hard, rows))
        assert torch.equal(weight, whole[1])  # the very same pixels
        torch.testing.assert_close(value, whole[0], rtol=1e-6, atol=0)
        assert (gradient - whole[2]).abs().max() <= 1e-6 * whole[2].abs().max()


@pytest.mark.parametrize("rows", [None, 8])
def test_channels_last_and_bfloat16_logits_are_those_numbers(rows: int | None) -> None:
    logits, target = inputs(*SHAPES[0])
    rounded = logits.bfloat16().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _, gradient = value_and_gradient(rounded, target, PixelLoss(COMBINED, None, None, rows))
    expected, _, expected_gradient = value_and_gradient(rounded.float(), target, PixelLoss(COMBINED, None, None, rows))
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, expected_gradient.bfloat16(), rtol=8e-3, atol=1e-9)


@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("hard", [None, HardPixels(0.3, None, 0), HardPixels(None, 0.2, 200)])
def test_without_a_valid_pixel_loss_and_gradient_are_zero(rows: int | None, hard: HardPixels | None) -> None:
    logits, target = inputs(*SHAPES[0])
    nothing = torch.full_like(target, 255)
    value, weight, gradient = value_and_gradient(logits, nothing, PixelLoss(COMBINED, WEIGHTS, hard, rows))
    assert (value.item(), weight.item()) == (0, 0)
    assert torch.count_nonzero(gradient) == 0


def test_only_hard_pixels_count() -> None:
    """Stride 4 in one column: 4 x 4 pixels of each logit; the wrong class everywhere, surest at the top."""
    logits = torch.tensor([3.0, 1.0]).view(1, 1, 2, 1) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    target = torch.ones(1, 8, 4, dtype=torch.uint8)
    full = upsample_logits(logits, 8, 4)
    surprises = F.cross_entropy(full, target.long(), reduction="none").flatten().sort(descending=True).values
    found = pixel_loss_sum(logits, target, PixelLoss(CROSS_ENTROPY, None, HardPixels(0.25, None, 0)))
    assert found.weight.item() == 8  # two rows of four
    assert found.mean().item() == pytest.approx(surprises[:8].mean().item(), rel=1e-6)


def test_a_class_without_weight_teaches_nothing() -> None:
    logits, target = inputs(*SHAPES[0])
    only = torch.where(target == 3, target, torch.full_like(target, 255))
    value, weight, gradient = value_and_gradient(logits, only, PixelLoss(CROSS_ENTROPY, WEIGHTS))
    assert (value.item(), weight.item(), int(torch.count_nonzero(gradient))) == (0, 0, 0)
