"""ImageNet, nothing, or another model; what is kept and what is re-initialised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nightseg.data.taxonomy import Taxonomy
from nightseg.networks.model_folder import load_tensors, save_model
from nightseg.segmenter.network import SemanticFPN, model_card
from nightseg.segmenter.settings import Network
from nightseg.segmenter.start import PREDICTOR, imagenet_weights, starting_network, weights_identity
from nightseg.storage import Location, UserError

CLASSES = Taxonomy("two", ("a", "b"), ((0, 0, 0), (1, 1, 1)), {"train_ids": {0: 0, 1: 1}})


SMALL = Network(encoder="resnet18", pyramid_channels=8, head_channels=8)


def start(
    place: str | Location,
    said: list[str] | None = None,
    *,
    classes: Taxonomy = CLASSES,
    seed: int = 0,
    **changed: Any,
) -> SemanticFPN:
    say = [].append if said is None else said.append
    return starting_network(place, SMALL.model_copy(update=changed), classes, seed=seed, say=say)


def save(folder: Location, **changed: Any) -> SemanticFPN:
    network = start("scratch", seed=9, **changed)
    card = model_card(SMALL.model_copy(update=changed), CLASSES, network.body.mean, network.body.std)
    save_model(folder, network.state_dict(), card)
    return network


@pytest.fixture
def teacher(tmp_path: Path) -> Location:
    folder = Location.of(tmp_path) / "teacher"
    save(folder)
    return folder


def same(one: SemanticFPN, other: SemanticFPN) -> list[str]:
    """Names of the tensors that differ."""
    mine, yours = one.state_dict(), other.state_dict()
    return [name for name in mine if not torch.equal(mine[name], yours[name])]


def test_random_weights_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second, other = start("scratch"), start("scratch"), start("scratch", seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert same(first, second) == []
    assert "body.conv1.weight" in same(first, other)


def test_imagenet_fills_the_encoder_only() -> None:
    network = start("imagenet", encoder="efficientnet_lite0")
    weights = imagenet_weights("efficientnet_lite0")
    assert all(torch.equal(network.body.state_dict()[name], value) for name, value in weights.items())


def test_another_model_is_kept_whole(teacher: Location) -> None:
    said: list[str] = []
    assert same(start(teacher, said), start("scratch", seed=9)) == []
    assert said == []


def test_a_folder_may_be_given_as_text(teacher: Location) -> None:
    assert same(start(str(teacher)), start("scratch", seed=9)) == []


@pytest.mark.parametrize(
    "classes",
    [
        Taxonomy("three", ("a", "b", "c"), ((0, 0, 0),) * 3, CLASSES.encodings),
        replace(CLASSES, name="swapped", classes=("b", "a")),
    ],
)
def test_other_classes_renew_the_predictor_alone_and_say_so(teacher: Location, classes: Taxonomy) -> None:
    said: list[str] = []
    network = start(teacher, said, classes=classes)
    kept = start("scratch", seed=9).state_dict()
    ours = network.state_dict()
    assert ours["head.predictor.weight"].shape[0] == classes.num_classes
    assert all(torch.equal(ours[name], kept[name]) for name in kept if name not in PREDICTOR)
    assert "predictor is re-initialised" in said[0]
    assert classes.name in said[0]
    assert len(said) == 1


def test_another_architecture_is_refused_by_name(teacher: Location) -> None:
    with pytest.raises(UserError, match=r"encoder 'resnet18'.*'resnet34'.*network\.encoder"):
        start(teacher, encoder="resnet34")
    with pytest.raises(UserError, match=r"network\.head_channels"):
        start(teacher, head_channels=16)


def test_where_the_strides_lie_and_frozen_norms_are_not_changed_on_the_way(tmp_path: Path) -> None:
    folder = Location.of(tmp_path) / "msra"
    msra: dict[str, Any] = {"encoder": "resnet50", "norm": "frozen", "stride_in_1x1": True}
    network = save(folder, **msra)
    assert same(start(folder, **msra, freeze_at=2), network) == []
    with pytest.raises(UserError, match=r"network\.stride_in_1x1"):
        start(folder, **(msra | {"stride_in_1x1": False}))
    with pytest.raises(UserError, match=r"network\.norm: frozen, or unfreeze"):
        start(folder, **(msra | {"norm": "batch"}))


def test_a_model_with_trained_norms_may_be_frozen(teacher: Location) -> None:
    frozen = start(teacher, norm="frozen")
    kept = start("scratch", seed=9).state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in frozen.state_dict().items())


def test_imagenet_weights_with_the_stride_in_the_3x3_are_not_taken_for_others() -> None:
    with pytest.raises(UserError, match=r"network\.encoder_weights"):
        start("imagenet", encoder="resnet50", stride_in_1x1=True)


def test_encoder_weights_count_by_their_content_and_only_where_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    file.write_bytes(b"one")
    first = weights_identity(str(file), "imagenet")
    file = file.rename(tmp_path / "moved.pth")
    assert weights_identity(str(file), "imagenet") == first
    file.write_bytes(b"two")
    assert weights_identity(str(file), "imagenet") not in (first, None)
    assert weights_identity(str(file), "scratch") is weights_identity(None, "imagenet") is None
    assert weights_identity(str(tmp_path / "gone"), "imagenet") == str(tmp_path / "gone")


@pytest.mark.parametrize(("size", "part"), [(None, "in their own size"), ((64, 96), "as 64 x 96")])
def test_a_start_that_saw_frames_in_another_size_is_said(
    teacher: Location, size: tuple[int, int] | None, part: str
) -> None:
    tensors, card = load_tensors(teacher)
    save_model(teacher, tensors, card | {"shortest_edge": [800, 1333]})
    said: list[str] = []
    start(teacher, said, input_size=size)
    assert len(said) == 1 and "a shorter side of 800, a longer one of at most 1333" in said[0] and part in said[0]
