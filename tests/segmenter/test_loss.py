"""The loss against its definition, pixel by pixel, and where it is delicate: no valid pixel, certainty, autocast.

Then as a training calls it: class weights and chunks against PyTorch's own loss, hard pixels by hand.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.segmenter.loss import (
    LossSum,
    combined_loss,
    hard_pixels,
    mixed_sum,
    negative_log_likelihood,
    segmentation_loss,
)
from nightseg.segmenter.network import upsample_logits
from nightseg.segmenter.settings import Loss, Ohem
from tests.rounding import assert_near, rounding

CROSS_ENTROPY = Loss()
COMBINED = Loss(kind="combined", alpha=0.4, focal_weight=0.7)
HARDEST = Ohem(share=0.3)
UNSURE = Ohem(confidence=0.2, min_kept=200)
WEIGHTS = (1.0, 2.0, 0.5, 0.0, 3.0)
OF_A_PIXEL = 64
"""Roundings in the loss of a pixel or its gradient, and in a logit's share of the pixels around it (8 x 8)."""

SHAPES = [(16, 20, 64, 80), (17, 20, 65, 77), (9, 8, 33, 32), (1, 1, 1, 3)]


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float32).requires_grad_()


@pytest.fixture
def target() -> Tensor:
    labels = torch.randint(0, 5, (2, 6, 7), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels[0, :2] = 255
    return labels


def mixed(alpha: float, gamma: float, focal_weight: float = 1.0) -> Loss:
    return Loss(kind="combined", alpha=alpha, gamma=gamma, focal_weight=focal_weight)


def loop_loss(logits_BKHW: Tensor, target_BHW: Tensor, alpha: float, gamma: float, weight: float) -> float:
    total, count = 0.0, 0
    batch, _, height, width = logits_BKHW.shape
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                true = int(target_BHW[b, y, x])
                if true == 255:
                    continue
                scores = [math.exp(float(value)) for value in logits_BKHW[b, :, y, x]]
                p = scores[true] / sum(scores)
                total += -alpha * math.log(p) - (1 - alpha) * weight * (1 - p) ** gamma * math.log(p)
                count += 1
    return total / count


def test_alpha_one_is_cross_entropy_and_so_is_its_gradient(logits: Tensor, target: Tensor) -> None:
    expected = F.cross_entropy(logits, target.long(), ignore_index=255)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    found = combined_loss(logits, target, 1.0, 2.0)
    (gradient,) = torch.autograd.grad(found, logits)
    assert_near(found.detach(), expected.detach(), 70 + OF_A_PIXEL)
    assert_near(gradient, expected_gradient, OF_A_PIXEL, magnitude=1 / 70)


@pytest.mark.parametrize(
    ("alpha", "gamma", "weight"), [(0.0, 2.0, 1.0), (0.5, 2.0, 1.0), (0.6, 0.5, 0.5), (0.0, 0.0, 1.0)]
)
def test_loss_is_its_definition(logits: Tensor, target: Tensor, alpha: float, gamma: float, weight: float) -> None:
    found = combined_loss(logits, target, alpha, gamma, weight)
    assert found.item() == pytest.approx(
        loop_loss(logits.detach(), target, alpha, gamma, weight), rel=rounding(70 + OF_A_PIXEL)
    )


@pytest.mark.parametrize(
    ("alpha", "gamma", "weight"), [(1.0, 2.0, 1.0), (0.3, 1.5, 0.7), (0.0, 0.5, 1.0), (0.5, 0.0, 2.0), (0.5, 3.0, 1.0)]
)
def test_gradient_is_that_of_finite_differences(alpha: float, gamma: float, weight: float) -> None:
    """In double precision; `gradcheck` asks twice for the gradient, so the graph is kept and may not be consumed."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.tensor([[[0, 1], [2, 255]], [[2, 2], [255, 0]]], dtype=torch.uint8)
    pixel_weights = torch.rand(2, 2, 2, dtype=torch.float64, generator=generator).masked_fill_(target == 255, 0.0)
    for weights in (None, pixel_weights):
        assert torch.autograd.gradcheck(
            lambda values, weights=weights: LossSum(
                mixed_sum(negative_log_likelihood(values, target), weights, mixed(alpha, gamma, weight)),
                torch.tensor(5.0, dtype=torch.float64) if weights is None else weights.sum(),
            ).mean(),
            (logits,),
            atol=1e-7,  # sums of 40 numbers around 1 round by 40 eps, and are divided by a step of 1e-6
            rtol=1e-6,
        )


def test_a_graph_that_is_kept_gives_its_gradient_again(logits: Tensor, target: Tensor) -> None:
    found = combined_loss(logits, target, 0.5, 2.0)
    kept = [torch.autograd.grad(found, logits, retain_graph=True)[0] for _ in range(2)]
    (last,) = torch.autograd.grad(found, logits)  # made in the memory of the log-probabilities
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], last)


def test_what_the_caller_holds_is_not_written_to(logits: Tensor, target: Tensor) -> None:
    before, labels = logits.detach().clone(), target.long()
    combined_loss(logits, labels, 0.5, 2.0).backward()
    assert torch.equal(logits.detach(), before)
    assert torch.equal(labels, target.long())


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_is_that_of_segmentation_models_pytorch(logits: Tensor, gamma: float) -> None:
    functional = pytest.importorskip("segmentation_models_pytorch.losses._functional")
    labels = torch.randint(0, 5, (2, 6, 7), generator=torch.Generator().manual_seed(2))
    expected = functional.softmax_focal_loss_with_logits(logits, labels, gamma=gamma)
    found = combined_loss(logits, labels, 0.0, gamma)
    assert_near(found.detach(), expected.detach(), 84 + OF_A_PIXEL)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_without_a_valid_pixel_loss_and_gradient_are_zero(logits: Tensor, gamma: float) -> None:
    found = combined_loss(logits, torch.full((2, 6, 7), 255, dtype=torch.uint8), 0.5, gamma)
    torch.autograd.backward(found)
    assert found.item() == 0
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad) == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_certain_pixels_give_no_nan(gamma: float) -> None:
    logits = torch.tensor([200.0, 0.0, 0.0]).view(1, 3, 1, 1).requires_grad_()
    found = combined_loss(logits, torch.zeros(1, 1, 1, dtype=torch.uint8), 0.0, gamma)
    torch.autograd.backward(found)
    assert found.item() == 0
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad) == 0


def test_wrong_and_certain_pixels_stay_finite() -> None:
    logits = torch.tensor([-500.0, 500.0]).view(1, 2, 1, 1).requires_grad_()
    found = combined_loss(logits, torch.zeros(1, 1, 1, dtype=torch.uint8), 0.5, 2.0)
    torch.autograd.backward(found)
    assert found.item() == pytest.approx(1000)
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([-1, 1])


def test_a_small_error_keeps_its_digits() -> None:
    # p_t = 1 - 2e-4: the focal factor (1 - p_t)^2 = 4e-8 would drown in the rounding of 1 - exp(-c) in float32.
    error = 2e-4
    logits = torch.tensor([0.0, math.log(error / (1 - error))]).view(1, 2, 1, 1)
    found = combined_loss(logits, torch.zeros(1, 1, 1, dtype=torch.uint8), 0.0, 2.0)
    # The sum below the softmax, 1 + error, is rounded to eps: that much of the error, to its third power.
    assert found.item() == pytest.approx(error**2 * -math.log1p(-error), rel=3 * rounding(1) / error)


def test_sums_of_parts_give_the_mean_of_the_whole(logits: Tensor, target: Tensor) -> None:
    whole = combined_loss(logits, target, 0.5, 2.0)
    totals = [
        mixed_sum(negative_log_likelihood(logits[i : i + 1], target[i : i + 1]), None, mixed(0.5, 2.0))
        for i in range(2)
    ]
    joined = (totals[0] + totals[1]) / (28 + 42)
    assert_near(joined.detach(), whole.detach(), 70)


def test_autocast_does_not_lower_the_precision(logits: Tensor, target: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = combined_loss(logits.bfloat16(), target, 0.5, 2.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, combined_loss(logits.bfloat16().float(), target, 0.5, 2.0))


def test_named_losses_are_points_of_the_mixture() -> None:
    assert Loss(kind="cross_entropy", alpha=0.5).cross_entropy_share == 1
    assert Loss(kind="focal", alpha=0.5).cross_entropy_share == 0
    assert Loss(kind="combined", alpha=0.6).cross_entropy_share == 0.6


def test_a_tiny_network_learns_in_twenty_steps() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 8, 8)
    target = (images[:, 0] > 0.5).to(torch.uint8)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = combined_loss(network(images), target, 0.5, 2.0)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


# -- as a training calls it: class weights and chunks against PyTorch's own loss on upsampled logits -------------------


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
    assert_near(value, expected.detach(), target.numel())
    assert_near(gradient, expected_gradient, 2 * OF_A_PIXEL)


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
        assert_near(value, whole[0], target.numel())
        assert_near(gradient, whole[2], 2 * OF_A_PIXEL)


@pytest.mark.parametrize("rows", [None, 8])
def test_channels_last_and_bfloat16_logits_are_those_numbers(rows: int | None) -> None:
    logits, target = inputs(*SHAPES[0])
    rounded = logits.bfloat16().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _, gradient = value_and_gradient(rounded, target, COMBINED, loss_chunk_rows=rows)
    expected, _, expected_gradient = value_and_gradient(rounded.float(), target, COMBINED, loss_chunk_rows=rows)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, expected_gradient.bfloat16(), rtol=2**-7, atol=1e-9)  # in the last place


@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("ohem", [None, HARDEST, UNSURE])
def test_a_batch_without_a_valid_pixel_teaches_nothing(rows: int | None, ohem: Ohem | None) -> None:
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
    assert_near(found.mean(), nll[:8].mean(), OF_A_PIXEL)


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


# -- weights of pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, 16])
@pytest.mark.parametrize("class_weights", [None, (1.0, 0.5, 2.0)])
def test_weights_of_pixels_multiply_those_of_classes(rows: int | None, class_weights: tuple[float, ...] | None) -> None:
    """Against F.cross_entropy without reduction, weighted and divided by hand; ignored pixels weigh nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, generator=generator, requires_grad=True)
    target = torch.randint(0, 3, (2, 32, 32), generator=generator).to(torch.uint8)
    target[0, :5] = 255
    weights = torch.rand(2, 32, 32, generator=generator)
    weights[1, :, :7] = 0
    found = segmentation_loss(
        logits, target, Loss(loss_chunk_rows=rows), class_weights, pixel_weights_BHW=weights
    ).mean()
    (gradient,) = torch.autograd.grad(found, logits)

    each = F.cross_entropy(upsample_logits(logits, 32, 32), target.long(), ignore_index=255, reduction="none")
    by_class = torch.tensor(class_weights or (1.0, 1.0, 1.0))[target.masked_fill(target == 255, 0).long()]
    combined = weights * by_class * (target != 255)
    expected = (each * combined).sum() / combined.sum()
    assert_near(found, expected.detach(), terms=target.numel())
    assert_near(gradient, torch.autograd.grad(expected, logits)[0], terms=target.numel())


def test_pixels_that_weigh_nothing_give_no_gradient() -> None:
    logits = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    target = torch.ones(1, 32, 32, dtype=torch.uint8)
    found = segmentation_loss(logits, target, Loss(), pixel_weights_BHW=torch.zeros(1, 32, 32))
    assert found.weight == 0 and found.mean() == 0
    assert torch.count_nonzero(torch.autograd.grad(found.mean(), logits)[0]) == 0
