"""Files of weights: names are freed of what wrappers put before them, and of two networks none is chosen in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from nightseg.networks.model_folder import load_tensors, save_model
from nightseg.networks.weights import read_state_dict, the_network, unwrapped
from nightseg.storage import Location, UserError

PLAIN = {"stem.weight": torch.ones(2), "head.0.bias": torch.zeros(1)}


def under(prefix: str, tensors: dict[str, Tensor] = PLAIN) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "ema.", "teacher.", "model."),
        *("_fsdp_wrapped_module.", "module._checkpoint_wrapped_module."),
        *("model_ema.module._orig_mod.", "student.module.", "module.module."),
    ],
)
def test_what_all_names_share_goes(prefix: str) -> None:
    found = unwrapped(under(prefix), "here")
    assert list(found) == list(PLAIN) and all(found[name] is PLAIN[name] for name in PLAIN)


def test_a_compiled_part_of_a_network_is_that_part() -> None:
    assert list(unwrapped({"stem._orig_mod.weight": torch.ones(1), "head.bias": torch.ones(1)}, "here")) == [
        "stem.weight",
        "head.bias",
    ]


def test_the_average_of_pytorch_loses_its_counter() -> None:
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    assert list(unwrapped(average.state_dict(), "here")) == ["weight", "bias"]


def test_a_prefix_that_only_some_names_have_is_part_of_the_name() -> None:
    mixed = {"module.weight": torch.ones(1), "weight": torch.ones(1)}
    assert list(unwrapped(mixed, "here")) == list(mixed)


def test_two_networks_are_an_error_that_names_both() -> None:
    both = under("student.") | under("teacher.")
    for tensors in (both, under("module.", both)):
        with pytest.raises(UserError, match="several networks: student, teacher"):
            unwrapped(tensors, "here")
    with pytest.raises(UserError, match="several networks: model, model_ema"):
        the_network({"model": PLAIN, "model_ema": PLAIN, "epoch": 3}, "here")


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        under("module._orig_mod."),
        {"state_dict": under("module."), "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
        {"model": under("_orig_mod."), "args": {"lr": 0.1}},
    ],
)
def test_a_training_checkpoint_gives_its_network(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "a.pth")
    found = read_state_dict(tmp_path / "a.pth", "resnet18")
    assert {name: value.tolist() for name, value in found.items()} == {"stem.weight": [1, 1], "head.0.bias": [0]}


def test_a_compiled_network_in_a_model_folder_or_safetensors_file_opens(tmp_path: Path) -> None:
    save_model(Location.of(tmp_path / "model"), under("_orig_mod."), {"kind": "semantic_fpn"})
    assert sorted(load_tensors(Location.of(tmp_path / "model"))[0]) == sorted(PLAIN)
    (tmp_path / "a.safetensors").write_bytes(safetensors.torch.save(under("module.")))
    assert sorted(read_state_dict(tmp_path / "a.safetensors", "resnet18")) == sorted(PLAIN)


def test_flipped_bits_of_a_pth_file_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.arange(64.0)}, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    for bit in range(0, 8 * len(whole), 37):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "b.pth").write_bytes(bytes(data))
        try:
            found = read_state_dict(tmp_path / "b.pth", "resnet18")
        except UserError:
            continue
        assert torch.equal(found["weight"], torch.arange(64.0)), "only padding and times of the archive are free"
