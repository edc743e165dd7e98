"""Nothing is fetched unless somebody said so: every place that could, and every way to say it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch

from nightseg.cli.output import EVERYWHERE
from nightseg.networks.downloads import ALLOW_DOWNLOAD, allow_downloads, may_download
from nightseg.pipeline import run as pipeline
from nightseg.progress import SilentProgress
from nightseg.recipe import load_recipe
from nightseg.segmenter.start import imagenet_weights
from nightseg.selection.features import identify
from nightseg.selection.settings import Extraction
from nightseg.storage import Location, UserError
from nightseg.unit.perceptual import build_perceptual
from tests.command_line import nightseg

FETCHING: dict[str, Callable[[], object]] = {
    "resnet18": lambda: imagenet_weights("resnet18"),
    "features of resnet18": lambda: identify(Extraction(name="resnet18")),
    "inception": lambda: identify(Extraction(name="inception")),
    "vgg16": lambda: build_perceptual("vgg16"),
    "timm, of its hub": lambda: imagenet_weights("timm/convnext_atto.d2_in1k"),
    "timm, by its url": lambda: imagenet_weights("timm/vit_small_patch16_224.augreg_in21k"),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights, no permission, and no way out: what is fetched all the same fails with another error."""

    def out(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.delenv(ALLOW_DOWNLOAD, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.urlopen", out)
    monkeypatch.setattr("socket.socket.connect", out)
    return tmp_path


@pytest.mark.parametrize("fetch", FETCHING.values(), ids=FETCHING)
def test_nothing_is_fetched_unasked(home: Path, fetch: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="nothing is downloaded unasked") as caught:
        fetch()
    assert "allow_download: true" in str(caught.value) and ALLOW_DOWNLOAD in str(caught.value)
    assert not list(home.rglob("*.pth"))


def test_weights_of_timm_that_are_in_its_cache_are_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, asked = timm.create_model, []

    def from_cache(name: str, pretrained: bool = False, **settings: object) -> torch.nn.Module:
        asked.append(pretrained)
        return create(name, pretrained=False, **settings)

    snapshot = home / "hub/models--timm--convnext_atto.d2_in1k/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setattr(timm, "create_model", from_cache)
    assert imagenet_weights("timm/convnext_atto.d2_in1k") and True in asked


def test_who_may_allow_it(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not may_download()
    monkeypatch.setenv(ALLOW_DOWNLOAD, "0")
    assert not may_download()
    allow_downloads()
    assert may_download()
    for words in (["--allow-download", "status", "nowhere"], ["status", "nowhere", "--allow-download"]):
        monkeypatch.setenv(ALLOW_DOWNLOAD, "0")
        nightseg(*words)
        assert may_download(), words
    assert "--allow-download" in EVERYWHERE


@pytest.mark.parametrize("allowed", [True, False])
def test_a_recipe_may_allow_it(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allowed: bool) -> None:
    """Before the graph is built: keys of stages are told which weights."""
    monkeypatch.setenv(ALLOW_DOWNLOAD, "0")
    file = tmp_path / "recipe.yaml"
    scenes = "{layout: scenes, count: 1}"
    file.write_text(f"name: x\nallow_download: {allowed}\ndatasets: {{d: {scenes}}}\nmodels: {{m: {{train: [d]}}}}\n")
    found = []

    def stop(*_: object) -> None:
        found.append(may_download())
        raise UserError("enough", cure="none")

    monkeypatch.setattr(pipeline.build, "build_graph", stop)
    with pytest.raises(UserError, match="enough"):
        pipeline.run(load_recipe(file), Location.of(tmp_path / "run"), progress=SilentProgress())
    assert found == [allowed]
