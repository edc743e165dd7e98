"""The module computes its formula, and is no part of a checkpoint."""

import pytest
import torch

from nightseg.networks.normaliser import Normaliser
from nightseg.segmenter.encoders import IMAGENET_MEAN, IMAGENET_STD, LITE_MEAN, LITE_STD


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), (LITE_MEAN, LITE_STD), ((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))]
)
def test_it_is_its_formula(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images_B3HW = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    module = Normaliser(mean, std)
    found = module(images_B3HW)
    wanted = (images_B3HW.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Three roundings of constants and two of the result, none of which exceeds (|image| + |mean|) / std <= 5.
    assert (found - wanted).abs().max() <= 5 * 5 * torch.finfo(torch.float32).eps
    assert torch.equal(module(images_B3HW.float()), found)
    assert module.state_dict() == {}
