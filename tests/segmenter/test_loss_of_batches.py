"""Class weights and chunks against PyTorch's own loss on upsampled logits; hard pixels by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nightseg.segmenter.loss import hard_pixels, segmentation_loss
from nightseg.segmenter.network import upsample_logits
from nightseg.segmenter.settings import Loss, Ohem

CROSS_ENTROPY = Loss()
COMBINED = Loss(kind="combined", alpha=0.4, focal_weight=0.7)
HARDEST = Ohem(share=0.3)
UNSURE = Ohem(confidence=0.2, min_kept=200)
WEIGHTS = (1.0, 2.0, 0.5, 0.0, 3.0)
SHAPES = [(16, 20, 64, 80), (17, 20, 65, 77), (9, 8, 33, 32), (1, 1, 1, 3)]


def inputs(h: int, w: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(h)
    target = torch.randint(0, 5, (2, height, width), generator=generator).to(torch.uint8)
    target[0, : height // 3] = 255
    return torch.randn(2, 5, h, w, generator=generator), target


def value_and_gradient(
    logits: Tensor, target: Tensor, loss: Loss, weights: tuple[float, ...] | None = None, **changed: object
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    found = segmentation_loss(leaf, target, loss.model_copy(update=changed), weights)
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
    value, _, gradient = value_and_gradient(logits, target, CROSS_ENTROPY, weights, loss_chunk_rows=rows)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ohem", [None, HARDEST, UNSURE])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_chunks_give_the_same_loss_and_gradient(
    shape: tuple[int, int, int, int], ohem: Ohem | None, weights: tuple[float, ...] | None
) -> None:
    logits, target = inputs(*shape)
    whole = value_and_gradient(logits, target, COMBINED, weights, ohem=ohem)
    for rows in (4, 12, 32, 256):
        value, weight, gradient = value_and_gradient(logits, target, COMBINED, weights, ohem=ohem, loss_chunk_rows=rows)
        assert torch.equal(weight, whole[1])  # the very same pixels
        torch.testing.assert_close(value, whole[0], rtol=1e-6, atol=0)
        assert (gradient - whole[2]).abs().max() <= 1e-6 * whole[2].abs().max()


@pytest.mark.parametrize("rows", [None, 8])
def test_channels_last_and_bfloat16_logits_are_those_numbers(rows: int | None) -> None:
    logits, target = inputs(*SHAPES[0])
    rounded = logits.bfloat16().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _, gradient = value_and_gradient(rounded, target, COMBINED, loss_chunk_rows=rows)
    expected, _, expected_gradient = value_and_gradient(rounded.float(), target, COMBINED, loss_chunk_rows=rows)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, expected_gradient.bfloat16(), rtol=8e-3, atol=1e-9)


@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("ohem", [None, HARDEST, UNSURE])
def test_without_a_valid_pixel_loss_and_gradient_are_zero(rows: int | None, ohem: Ohem | None) -> None:
    logits, target = inputs(*SHAPES[0])
    nothing = torch.full_like(target, 255)
    value, weight, gradient = value_and_gradient(logits, nothing, COMBINED, WEIGHTS, ohem=ohem, loss_chunk_rows=rows)
    assert (value.item(), weight.item()) == (0, 0)
    assert torch.count_nonzero(gradient) == 0


def test_only_hard_pixels_count() -> None:
    """Stride 4 in one column: 4 x 4 pixels of each logit; the wrong class everywhere, surest at the top."""
    logits = torch.tensor([3.0, 1.0]).view(1, 1, 2, 1) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    target = torch.ones(1, 8, 4, dtype=torch.uint8)
    full = upsample_logits(logits, 8, 4)
    nll = F.cross_entropy(full, target.long(), reduction="none").flatten().sort(descending=True).values
    found = segmentation_loss(logits, target, Loss(ohem=Ohem(share=0.25)))
    assert found.weight.item() == 8  # two rows of four
    assert found.mean().item() == pytest.approx(nll[:8].mean().item(), rel=1e-6)


def test_a_class_without_weight_teaches_nothing() -> None:
    logits, target = inputs(*SHAPES[0])
    only = torch.where(target == 3, target, torch.full_like(target, 255))
    value, weight, gradient = value_and_gradient(logits, only, CROSS_ENTROPY, WEIGHTS)
    assert (value.item(), weight.item(), int(torch.count_nonzero(gradient))) == (0, 0, 0)


# -- hard pixels, on frames small enough to count ---------------------------------------------------------------------

NLL = torch.tensor([[[0.1, 3.0, 0.5, 2.0], [1.0, 0.2, 9.0, 0.4]], [[0.3, 0.3, 0.3, 0.3], [0.1, 0.1, 0.1, 0.1]]])
VALID = torch.ones(2, 2, 4, dtype=torch.bool)
VALID[0, 1, 2] = False  # the hardest is ignored


def kept(ohem: Ohem, valid: Tensor = VALID) -> list[list[int]]:
    found = hard_pixels(NLL, valid, ohem)
    assert found.dtype == torch.bool and found.shape == valid.shape
    return [row.flatten().nonzero().flatten().tolist() for row in found]


def test_a_share_of_each_frame() -> None:
    assert kept(Ohem(share=3 / 7)) == [[1, 3, 4], [0, 1, 2, 3]]  # of 7 and of 8; equal ones all or none
    assert kept(Ohem(share=1.0))[0] == [0, 1, 2, 3, 4, 5, 7]
    assert kept(Ohem(share=1e-6))[0] == [1]  # never none of a frame that has some


def test_below_a_confidence_but_at_least_so_many() -> None:
    half = Ohem(confidence=math.exp(-1.0), min_kept=1)
    assert kept(half) == [[1, 3, 4], [0, 1, 2, 3]]  # no pixel of the second frame: its hardest, which are four
    assert kept(half.model_copy(update={"min_kept": 4}))[0] == [1, 2, 3, 4]
    assert kept(half.model_copy(update={"min_kept": 100})) == [[0, 1, 2, 3, 4, 5, 7], list(range(8))]


def test_a_frame_without_a_valid_pixel_gives_none() -> None:
    for ohem in (Ohem(share=0.5), Ohem(confidence=0.5, min_kept=5)):
        assert kept(ohem, torch.zeros_like(VALID)) == [[], []]


def test_a_frame_does_not_depend_on_its_neighbours() -> None:
    ohem = Ohem(share=0.25)
    alone = [hard_pixels(NLL[n : n + 1], VALID[n : n + 1], ohem) for n in range(2)]
    assert torch.equal(torch.cat(alone), hard_pixels(NLL, VALID, ohem))
