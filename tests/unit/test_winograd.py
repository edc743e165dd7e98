"""Winograd's convolution against the direct one: values, gradients, any size; and when it is not used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nightseg.unit import winograd
from nightseg.unit.winograd import FEWEST_CHANNELS, convolve_3x3


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def any_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 1)


def tensors(height: int, width: int, channels: tuple[int, int], batch: int = 2) -> tuple[torch.Tensor, ...]:
    padded = torch.randn(batch, channels[0], height + 2, width + 2, dtype=torch.float64)
    return padded, torch.randn(channels[1], channels[0], 3, 3, dtype=torch.float64), torch.randn(channels[1]).double()


@pytest.mark.usefixtures("any_channels")
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (1, 1), (5, 7), (9, 4), (2, 11)])
def test_values_and_gradients_are_those_of_a_direct_convolution(size: tuple[int, int]) -> None:
    inputs = [tensor.requires_grad_() for tensor in tensors(*size, channels=(3, 5))]
    ours, direct = convolve_3x3(*inputs), F.conv2d(*inputs)
    torch.testing.assert_close(ours, direct, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(ours.pow(3).sum(), inputs)
    for mine, expected in zip(found, torch.autograd.grad(direct.pow(3).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("any_channels")
def test_gradients_only_of_what_asks_for_one() -> None:
    padded, weight, bias = tensors(4, 8, (2, 3))
    direct = torch.autograd.grad(F.conv2d(padded.requires_grad_(), weight, bias).sin().sum(), padded)
    torch.testing.assert_close(torch.autograd.grad(convolve_3x3(padded, weight, bias).sin().sum(), padded), direct)
    padded = padded.detach()
    direct = torch.autograd.grad(F.conv2d(padded, weight.requires_grad_(), None).sin().sum(), weight)
    torch.testing.assert_close(torch.autograd.grad(convolve_3x3(padded, weight, None).sin().sum(), weight), direct)


@pytest.mark.usefixtures("any_channels")
def test_strips_without_gradients_are_the_same_image(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(22, 13, (3, 2))
    direct = F.conv2d(*inputs)
    for tiles in (1, 9, 1000):
        monkeypatch.setattr(winograd, "TILES_AT_ONCE", tiles)
        torch.testing.assert_close(convolve_3x3(*inputs), direct, rtol=1e-12, atol=1e-12)


def test_float32_is_exact_to_a_few_1e_5_and_channels_stay_last() -> None:
    padded, weight, bias = tensors(16, 16, (FEWEST_CHANNELS, FEWEST_CHANNELS), batch=1)
    direct = F.conv2d(padded, weight, bias)
    last = padded.float().to(memory_format=torch.channels_last)
    ours = convolve_3x3(last, weight.float(), bias.float())
    assert (ours - direct).abs().max() < 1e-4 * direct.std()
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(ours, F.conv2d(last, weight.float(), bias.float()))  # it is another sum


def test_few_channels_and_other_types_take_the_direct_way() -> None:
    padded, weight, bias = (tensor.float() for tensor in tensors(8, 8, (FEWEST_CHANNELS - 1, FEWEST_CHANNELS), batch=1))
    assert torch.equal(convolve_3x3(padded, weight, bias), F.conv2d(padded, weight, bias))
    wide = [tensor.float() for tensor in tensors(8, 8, (FEWEST_CHANNELS, FEWEST_CHANNELS), batch=1)]
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve_3x3(*wide).dtype == torch.bfloat16
    low = [tensor.bfloat16() for tensor in wide]
    assert torch.equal(convolve_3x3(*low), F.conv2d(*low))
