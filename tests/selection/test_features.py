from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nightseg.selection.extractors import build_extractor
from nightseg.selection.features import Extractor, fold_batch_norms, resized, round_weights


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lite0() -> Extractor:
    return build_extractor("efficientnet_lite0")


def images(sizes: list[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((h // 4, w // 4, 1))).astype(np.uint8) for h, w in sizes]


# -- features ----------------------------------------------------------------------------------------------


def test_mixed_sizes_and_no_frames(lite0: Extractor) -> None:
    got = lite0(images([(40, 60), (120, 48), (224, 224)]))
    assert got.shape == (3, 1280) and got.dtype == np.float32 and np.isfinite(got).all()
    assert len({row.tobytes() for row in got}) == 3
    assert lite0([]).shape == (0, 1280)


def test_features_do_not_depend_on_the_company(lite0: Extractor) -> None:
    frames = images([(40, 60)] * 9)
    together = lite0(frames)
    alone = np.concatenate([lite0([frames[row]]) for row in (0, 8)])
    # A library may still place sums differently within a batch; anything larger would be another convolution.
    np.testing.assert_allclose(alone, together[[0, 8]], rtol=0, atol=1e-6 * np.abs(together).max())


def test_positions_average_to_the_features(lite0: Extractor) -> None:
    frames = images([(40, 60)] * 9)
    features, maps = lite0.with_positions(frames)
    assert maps.shape == (9, 49, 1280)
    assert np.array_equal(features, lite0(frames))
    np.testing.assert_allclose(maps.mean(axis=1), features, rtol=1e-4, atol=1e-5)
    assert lite0.with_positions([])[0].shape == (0, 1280)


def test_bfloat16_is_close_and_a_probe_says_whether_it_pays(lite0: Extractor) -> None:
    frames = images([(40, 60), (64, 64)])
    fast = build_extractor("efficientnet_lite0", precision="bfloat16")
    apart = np.linalg.norm(fast(frames) - lite0(frames)) / np.linalg.norm(lite0(frames))
    assert 0 < apart < 0.1
    assert lite0.faster_precision() in ("float32", "bfloat16")
    assert lite0.precision == "float32"


def test_rounding_errors_of_a_filter_cancel() -> None:
    convolution = nn.Conv2d(4, 2, 3)
    nn.init.constant_(convolution.weight, 1 + 2**-9)  # bfloat16 has nothing between 1 and 1 + 2^-7
    exact = convolution.weight.detach().clone()
    round_weights(nn.Sequential(convolution))
    assert torch.equal(convolution.weight.bfloat16().float(), convolution.weight)
    assert torch.equal(exact.bfloat16().float(), torch.ones_like(exact))  # one by one, all are lost
    left_over = (convolution.weight - exact).sum(dim=(1, 2, 3)).abs()
    assert left_over.max() <= 2**-8  # half a step, whatever the number of weights
    assert convolution.weight.unique().tolist() == [1.0, 1 + 2**-7]


def test_folding_changes_nothing_but_the_last_digits() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    network = network.eval().requires_grad_(False)
    batch = torch.randn(2, 3, 16, 16)
    wanted = network(batch)
    folded = fold_batch_norms(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(batch), wanted, rtol=1e-4, atol=1e-5)


# -- resizing -------------------------------------------------------------------------------------------------


def test_resize_rules_differ_where_they_should() -> None:
    stripes = np.zeros((300, 300, 3), dtype=np.uint8)
    stripes[:, ::3] = 255
    skipped, averaged = resized(stripes, 100, "pytorch-fid"), resized(stripes, 100, "clean")
    assert averaged.std() < 0.02 and averaged.mean() == pytest.approx(1 / 3, abs=0.01)
    assert abs(float(skipped.mean()) - 1 / 3) > 0.1  # every third pixel: all black or all white
    for rule in ("pytorch-fid", "clean"):
        same = resized(np.full((50, 70, 3), 51, dtype=np.uint8), 32, rule)
        assert same.shape == (3, 32, 32) and torch.allclose(same, torch.tensor(0.2))


def test_pytorch_fids_rule_is_its_interpolation() -> None:
    (image,) = images([(80, 120)])
    wanted = F.interpolate(torch.from_numpy(image.transpose(2, 0, 1).copy())[None] / 255, (299, 299), mode="bilinear")
    assert torch.allclose(resized(image, 299, "pytorch-fid"), wanted[0], atol=1e-6)


def test_only_rgb_bytes_are_images() -> None:
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8 image"):
            resized(wrong, 8, "clean")
