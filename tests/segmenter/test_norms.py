"""Statistics of batch norms are those of the frames they are taken from, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nightseg.data.class_list import taxonomy
from nightseg.networks.model_folder import save_model
from nightseg.segmenter.network import build_semantic_fpn, model_card
from nightseg.segmenter.norms import has_norms, statistics_of
from nightseg.segmenter.predict import Segmenter
from nightseg.segmenter.settings import Network
from nightseg.storage import Location

CLASSES = taxonomy("camvid11")
BATCHES = [[np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8) for seed in pair]
           for pair in ((0, 1), (2, 3))]  # fmt: skip


@pytest.fixture
def segmenter(tmp_path: Path) -> Segmenter:
    torch.manual_seed(0)
    settings = Network(encoder="resnet18", pyramid_channels=8, head_channels=8)
    network = build_semantic_fpn(settings, CLASSES.num_classes)
    save_model(Location.of(tmp_path), network.state_dict(), {
        **model_card(settings, CLASSES, network.body.mean, network.body.std), "weights": "last",
    })  # fmt: skip
    return Segmenter(Location.of(tmp_path), "cpu")


def test_the_first_norm_has_the_mean_and_the_variance_of_what_it_sees(segmenter: Segmenter) -> None:
    found = statistics_of(segmenter, BATCHES)
    network = segmenter.network
    means, variances = [], []
    for batch in BATCHES:
        images = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
        with torch.no_grad():
            seen = network.body.conv1(network.normalise(images)).double()  # type: ignore[union-attr, operator]
        means.append(seen.mean(dim=(0, 2, 3)))
        variances.append(seen.var(dim=(0, 2, 3), unbiased=True))
    # float32 sums over 2 x 32 x 48 values of size 1: rounding of one part in 2^24, grown by less than 200.
    torch.testing.assert_close(found["body.bn1.running_mean"].double(), sum(means) / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["body.bn1.running_var"].double(), sum(variances) / 2, rtol=1e-5, atol=1e-5)


def test_weights_stay_and_so_does_the_segmenter(segmenter: Segmenter) -> None:
    before = {name: value.clone() for name, value in segmenter.network.state_dict().items()}
    once = segmenter(BATCHES[0][0]).confidence
    found = statistics_of(segmenter, BATCHES)
    changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert changed and all("running" in name or "num_batches" in name for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in segmenter.network.state_dict().items())
    assert np.array_equal(segmenter(BATCHES[0][0]).confidence, once)


def test_a_share_of_them_is_blended_with_the_networks_own(segmenter: Segmenter) -> None:
    own = {name: value.clone() for name, value in segmenter.network.state_dict().items()}
    whole, quarter = (statistics_of(segmenter, BATCHES, share) for share in (1.0, 0.25))
    for name in ("body.bn1.running_mean", "body.layer4.1.bn2.running_var"):
        torch.testing.assert_close(quarter[name], 0.75 * own[name] + 0.25 * whole[name])


def test_frozen_norms_and_networks_without_norms_have_none_to_change() -> None:
    settings = Network(encoder="resnet18", pyramid_channels=8, head_channels=8)
    for changes, expected in (({}, True), ({"norm": "frozen"}, False), ({"encoder": "timm/convnext_atto"}, False)):
        network = build_semantic_fpn(settings.model_copy(update=changes), 3)
        assert has_norms(network) is expected
