"""A model folder survives the round trip bit for bit, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nightseg.networks.model_folder import load_card, load_tensors, save_model
from nightseg.storage import Location, UserError

CARD = {"kind": "semantic_fpn", "classes": ["road", "sky"]}


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return Location.of(tmp_path) / "model"


def test_tensors_and_card_come_back_exactly(folder: Location) -> None:
    tensors = {
        "weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "half": torch.randn(5).bfloat16(),
        "steps": torch.tensor(7),
    }
    save_model(folder, tensors, CARD)
    found, card = load_tensors(folder)
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
        name: (value.dtype, value.shape) for name, value in tensors.items()
    }
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert CARD.items() <= card.items()
    assert load_card(folder) == card


def test_the_same_model_is_the_same_bytes(folder: Location, tmp_path: Path) -> None:
    other = Location.of(tmp_path) / "other"
    for place in (folder, other):
        save_model(place, {"b": torch.arange(3.0), "a": torch.ones(2, 2)}, CARD)
    for file in ("model.safetensors", "model.json"):
        assert (folder / file).read_bytes() == (other / file).read_bytes()


def test_a_broken_model_is_not_saved(folder: Location) -> None:
    with pytest.raises(UserError, match=r"not finite, first weight"):
        save_model(folder, {"weight": torch.tensor([1.0, float("nan")])}, CARD)
    assert not folder.exists()


def test_damage_is_named(folder: Location) -> None:
    with pytest.raises(UserError, match=r"not a model folder"):
        load_tensors(folder)
    save_model(folder, {"weight": torch.ones(100)}, CARD)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_tensors(folder)
    (folder / "model.safetensors").delete()
    with pytest.raises(UserError, match=r"copy the whole model folder again"):
        load_tensors(folder)
    (folder / "model.json").write_bytes(b"{")
    with pytest.raises(UserError, match=r"model\.json is damaged"):
        load_card(folder)
    (folder / "model.json").write_bytes(json.dumps({"format": "nightseg-model-9"}).encode())
    with pytest.raises(UserError, match="nightseg-model-9"):
        load_card(folder)


def test_a_flipped_bit_anywhere_is_refused(folder: Location) -> None:
    save_model(folder, {"weight": torch.arange(12.0)}, CARD | {"mean": [0.485, 0.456]})
    for name in ("model.safetensors", "model.json"):
        whole = (folder / name).read_bytes()
        for bit in range(0, 8 * len(whole), 7):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(bytes(data))
            try:
                found, card = load_tensors(folder)
            except UserError as error:
                assert name in str(error)
            else:  # the name of the seal itself: then there is none, and nothing else was hit
                assert CARD.items() <= card.items() and card["mean"] == [0.485, 0.456]
                assert torch.equal(found["weight"], torch.arange(12.0))
        (folder / name).write_bytes(whole)


def test_folders_without_hashes_are_read(folder: Location) -> None:
    save_model(folder, {"weight": torch.ones(2)}, CARD)
    card = (folder / "model.json").read_json()
    (folder / "model.json").write_json({key: value for key, value in card.items() if "sha256" not in key})
    assert torch.equal(load_tensors(folder)[0]["weight"], torch.ones(2))


def test_a_model_made_from_another_has_its_own_hashes(folder: Location) -> None:
    save_model(folder, {"weight": torch.ones(2)}, CARD)
    save_model(folder, {"weight": torch.zeros(2)}, (folder / "model.json").read_json())
    assert torch.equal(load_tensors(folder)[0]["weight"], torch.zeros(2))
