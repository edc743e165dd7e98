"""Upsampling and convolution as one layer, against its plain definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nightseg.unit.upsampling import UpsamplingConvolution


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [(2, 2), (2, 5), (5, 7), (8, 3)])
def test_upsampling_convolution_equals_its_plain_form_and_gradients(size: tuple[int, int]) -> None:
    layer = UpsamplingConvolution(3, 4).double()
    features = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)

    def plain() -> Tensor:
        wide = F.interpolate(features, scale_factor=2, mode="nearest")
        return F.conv2d(F.pad(wide, (2, 2, 2, 2), mode="reflect"), layer.weight, layer.bias)

    torch.testing.assert_close(layer(features), plain(), rtol=1e-12, atol=1e-12)
    inputs = (features, layer.weight, layer.bias)
    ours = torch.autograd.grad(layer(features).pow(3).sum(), inputs)
    theirs = torch.autograd.grad(plain().pow(3).sum(), inputs)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_upsampling_convolution_refuses_a_single_row() -> None:
    with pytest.raises(ValueError, match="2x2"):
        UpsamplingConvolution(1, 1)(torch.zeros(1, 1, 1, 4))
