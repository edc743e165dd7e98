"""The module computes what the function computes, bit for bit, and is no part of a checkpoint."""

import torch

from nightseg.networks.normaliser import Normaliser
from nightseg.segmenter.encoders import IMAGENET_MEAN, IMAGENET_STD, LITE_MEAN, LITE_STD, normalise


def test_it_is_the_function() -> None:
    images_B3HW = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), (LITE_MEAN, LITE_STD)):
        module = Normaliser(mean, std)
        found = module(images_B3HW)
        assert torch.equal(found, normalise(images_B3HW, mean, std)) and found.dtype == torch.float32
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(module(images_B3HW.float()), found)
        assert module.state_dict() == {}
