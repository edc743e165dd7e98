"""Inception features of JPEG files: nightseg against pytorch-fid's get_activations, random weights."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytorch_fid.inception
import torch
from PIL import Image
from pytorch_fid.fid_score import get_activations

from benchmarks.contest import Contest, Size
from nightseg.data.images import read_image
from nightseg.data.scenes import scene
from nightseg.selection.features import Extractor, Identity, fold_batch_norms, inception_network
from nightseg.selection.frechet import gaussian_distance, gaussian_of_features
from nightseg.storage import Location

FILES: dict[Size, int] = {"tiny": 4, "default": 60, "full": 500}
DIMS: dict[Size, int] = {"tiny": 192, "default": 2048, "full": 2048}  # 192: the network ends at an earlier block
HEIGHT, WIDTH = 288, 512  # of the JPEG files
BATCH = 50  # pytorch-fid's default
# Relative, of the FID between the two halves of the files. A random network makes more of rounding than a trained one:
# with 60, 200 and 500 files fast features were 0.1, 0.03 and 0.17 percent apart.
TOLERANCE: dict[str, dict[Size, float]] = {
    "exact": {"tiny": 1e-4, "default": 1e-4, "full": 1e-4},
    "fast": {"tiny": 2e-2, "default": 5e-3, "full": 5e-3},
}
CALIBRATION: dict[Size, int] = {"tiny": 4, "default": 16, "full": 16}  # frames
LOADERS = 2  # processes that read for pytorch-fid


def exact(size: Size) -> Contest:
    return _contest(size, "exact")


def fast(size: Size) -> Contest:
    return _contest(size, "fast")


def _contest(size: Size, mode: str) -> Contest:
    files, dims = _files(FILES[size]), DIMS[size]
    theirs, ours = inception_network_of_the_peer(size)[0], inception_extractor(size)
    if mode == "fast":
        ours = inception_extractor(size, ours.faster_precision())

    def run_ours() -> npt.NDArray[np.float32]:
        parts = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
        return np.concatenate([ours([read_image(Location.of(file)) for file in part]) for part in parts])

    def check(mine: npt.NDArray[np.float32], peer: npt.NDArray[np.float64]) -> str:
        distances = [_halves(features) for features in (mine, peer)]
        apart = abs(distances[0] - distances[1]) / distances[1]
        assert apart <= TOLERANCE[mode][size], f"extraction {mode}: FID of the halves {distances}, {apart:.2g} apart"
        return f"FID between the halves {apart:.1g} apart"

    return Contest(
        name=f"extraction_{mode}",
        work=f"Inception features of {len(files)} JPEG files {WIDTH} x {HEIGHT}, {mode} mode ({ours.precision})",
        peer=f"pytorch-fid {version('pytorch-fid')} get_activations, batch {BATCH}, {LOADERS} loaders",
        run_ours=run_ours,
        run_peer=lambda: get_activations(files, theirs, min(BATCH, len(files)), dims, "cpu", num_workers=LOADERS),
        check=check,
    )


def _halves(features: npt.NDArray[Any]) -> float:
    middle = len(features) // 2
    return gaussian_distance(gaussian_of_features(features[:middle]), gaussian_of_features(features[middle:]))


@cache
def _files(count: int) -> list[str]:
    folder = Path(tempfile.mkdtemp(prefix="nightseg-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    files = []
    for index in range(count):
        pixels = np.asarray(scene(0, index, "day" if index < count // 2 else "night", HEIGHT, WIDTH)[0])
        file = folder / f"{index:04d}.jpg"
        Image.fromarray(pixels).save(file, quality=90)
        files.append(str(file))
    return files


def inception_extractor(size: Size, precision: str = "float32") -> Extractor:
    """Ours, with the weights of the peer's network."""
    network = fold_batch_norms(inception_network(dict(inception_network_of_the_peer(size)[1]), DIMS[size]).eval())
    identity = Identity("inception", DIMS[size], "pytorch-fid", "", Location.of("."))
    return Extractor(identity, network, side=299, precision=precision)


@cache
def inception_network_of_the_peer(size: Size) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """pytorch-fid's network with random weights, and these weights.

    Its batch norms are set by frames, as training would: else the features of a random network hardly differ from frame
    to frame, and the rounding error of a fast mode drowns what is left.
    """
    made: list[torch.nn.Module] = []
    original = pytorch_fid.inception._inception_v3

    def build(*arguments: Any, **options: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        made.append(original(*arguments, **options))
        for module in made[0].modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        return made[0]

    with (
        mock.patch.object(pytorch_fid.inception, "_inception_v3", build),
        mock.patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: made[0].state_dict()),
    ):
        peer = pytorch_fid.inception.InceptionV3
        network = peer([peer.BLOCK_INDEX_BY_DIM[DIMS[size]]])
    frames = [scene(1, index, ("day", "night")[index % 2], HEIGHT, WIDTH)[0] for index in range(CALIBRATION[size])]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean over what it sees
    with torch.no_grad():
        network.train()(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255)
    # The wrapper's blocks are the very modules of the network that was built.
    return network.eval(), {name: value.clone() for name, value in made[0].state_dict().items()}
