"""The loss against its definition, pixel by pixel, and where it is delicate: no valid pixel, certainty, autocast."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.segmenter.loss import LossSum, Mixture, combined_loss, mixed_sum, mixture, negative_log_likelihood
from nightseg.segmenter.settings import Loss


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float32).requires_grad_()


@pytest.fixture
def target() -> Tensor:
    labels = torch.randint(0, 5, (2, 6, 7), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels[0, :2] = 255
    return labels


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
    found = combined_loss(logits, target, alpha=1.0, gamma=2.0)
    (gradient,) = torch.autograd.grad(found, logits)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert torch.allclose(gradient, expected_gradient, atol=1e-8)


@pytest.mark.parametrize(
    ("alpha", "gamma", "weight"), [(0.0, 2.0, 1.0), (0.5, 2.0, 1.0), (0.6, 0.5, 0.5), (0.0, 0.0, 1.0)]
)
def test_loss_is_its_definition(logits: Tensor, target: Tensor, alpha: float, gamma: float, weight: float) -> None:
    found = combined_loss(logits, target, alpha, gamma, weight)
    assert found.item() == pytest.approx(loop_loss(logits.detach(), target, alpha, gamma, weight), rel=1e-5)


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
                mixed_sum(negative_log_likelihood(values, target), weights, Mixture(alpha, gamma, weight)),
                torch.tensor(5.0, dtype=torch.float64) if weights is None else weights.sum(),
            ).mean(),
            (logits,),
            atol=1e-9,
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
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


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
    assert found.item() == pytest.approx(error**2 * -math.log1p(-error), rel=2e-3)


def test_sums_of_parts_give_the_mean_of_the_whole(logits: Tensor, target: Tensor) -> None:
    whole = combined_loss(logits, target, 0.5, 2.0)
    totals = [
        mixed_sum(negative_log_likelihood(logits[i : i + 1], target[i : i + 1]), None, Mixture(0.5, 2.0, 1.0))
        for i in range(2)
    ]
    joined = (totals[0] + totals[1]) / (28 + 42)
    assert torch.allclose(joined, whole, rtol=1e-6)


def test_autocast_does_not_lower_the_precision(logits: Tensor, target: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = combined_loss(logits.bfloat16(), target, 0.5, 2.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, combined_loss(logits.bfloat16().float(), target, 0.5, 2.0))


def test_named_losses_are_points_of_the_mixture() -> None:
    assert mixture(Loss(kind="cross_entropy", alpha=0.5)).alpha == 1
    assert mixture(Loss(kind="focal", alpha=0.5, focal_weight=0.25)) == (0.0, 2.0, 0.25)
    assert mixture(Loss(kind="combined", alpha=0.6, focal_weight=0.5)) == (0.6, 2.0, 0.5)


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
