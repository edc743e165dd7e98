"""Checkpoints as detectron2 would have them, and the golden files, for the tests of networks."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from nightseg.segmenter.detectron2 import their_name
from nightseg.segmenter.network import build_semantic_fpn
from nightseg.segmenter.settings import Network

GOLDEN = next(
    (place / "shared" / "golden" for place in Path(__file__).parents if (place / "shared" / "golden").is_dir()), None
)


class Golden(NamedTuple):
    """What detectron2 computed: its state dict, the input (1, 3, 96, 160) uint8 RGB and the logits (19, 96, 160)."""

    tensors: dict[str, Tensor]
    image: Tensor
    logits: Tensor


def golden_tensor(name: str, shape: list[int]) -> Tensor:
    """The weights of the golden files, as their README draws them."""
    rng, count = np.random.default_rng(zlib.crc32(name.encode())), int(np.prod(shape))
    if name.endswith(("norm.running_var", "norm.weight")):
        values = rng.uniform(0.5, 1.5, count)
    elif name.endswith(("norm.running_mean", ".bias")):
        values = rng.normal(0, 0.1, count)
    else:
        values = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])) * 0.7, count)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """The golden file of r50 or r101; the test is skipped where there are none."""
    if GOLDEN is None:
        pytest.skip("the golden files of detectron2 are not on this machine")
    folder = GOLDEN

    @functools.cache
    def read(name: str) -> Golden:
        with np.load(folder / f"d2_semantic_fpn_{name}.npz", allow_pickle=False) as file:
            shapes = {
                str(key): [int(number) for number in re.findall(r"\d+", str(shape))]
                for key, shape in zip(file["keys"], file["shapes"], strict=True)
            }
            logits = torch.from_numpy(file["logits"])
        image = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (1, 3, 96, 160), dtype=np.uint8))
        return Golden({name: golden_tensor(name, shape) for name, shape in shapes.items()}, image, logits)

    return read


@pytest.fixture(scope="session")
def drawn_as_golden() -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Every tensor of a state dict as the golden files draw it; counts stay."""

    def draw(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: golden_tensor(name, list(tensor.shape)) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }

    return draw


@pytest.fixture(scope="session")
def detectron2_tensors() -> Callable[..., dict[str, Tensor]]:
    """A state dict of detectron2's names and shapes for any ResNet; every number of conv1 is drawn, others count up."""

    def make(encoder: str, **settings: object) -> dict[str, Tensor]:
        sizes = {"num_classes": 3, "pyramid_channels": 8, "head_channels": 32, "norm": "frozen"} | settings
        num_classes = sizes.pop("num_classes")
        with torch.device("meta"):
            ours = build_semantic_fpn(Network(encoder=encoder, **sizes), num_classes).state_dict()  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        tensors = {}
        for place, (name, like) in enumerate(ours.items()):
            if name == "body.conv1.weight":
                values = torch.randn(like.shape, generator=generator)
            elif like.is_floating_point():
                values = (torch.arange(like.numel(), dtype=torch.float32).view(like.shape) + place) / 7e6
            else:
                values = torch.tensor(place)
            tensors[their_name(name)] = values
        return tensors

    return make
