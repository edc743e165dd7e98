"""A training of UNIT that begins from trained weights: what is read, what is refused, what is written for the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from nightseg.networks.model_folder import save_model
from nightseg.storage import Location, UserError, Workspace
from nightseg.unit.network import DISCRIMINATORS, Discriminators, Generators, load_generators
from nightseg.unit.start import load_start, start_sha256, write_start

CARD = {"kind": "unit", "width": 2, "res_blocks": 1, "shared_blocks": 1, "key": "abc", "seed": 4}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def networks() -> tuple[Generators, Discriminators]:
    return Generators(2, 1, 1), Discriminators(2, 1)


def trained(run: Path) -> tuple[Generators, Discriminators, Location]:
    """A run folder with a translator `unit`; its networks and its model folder."""
    generators, discriminators = networks()
    attempt = Workspace(run).stage("train_translator", "unit", version=1, recipe={}, inputs={}, seed=4).open()
    parts = {DISCRIMINATORS + name: tensor for name, tensor in discriminators.state_dict().items()}
    folder = attempt.folder / "model"
    save_model(folder, generators.state_dict() | parts, CARD | {"training": {"iterations": 7}})
    attempt.finish(rows_in=1, rows_out=1, outputs=["model/model.safetensors", "model/model.json"])
    return generators, discriminators, folder


def assert_same(first: torch.nn.Module, second: torch.nn.Module, tolerance: float = 0.0) -> None:
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_model_folder_gives_both_networks_back_and_still_translates(tmp_path: Path) -> None:
    generators, discriminators, folder = trained(tmp_path)
    fresh = networks()
    for start in (folder.uri, (folder / "model.safetensors").uri):
        load_start(start, *fresh)
        assert_same(fresh[0], generators)
        assert_same(fresh[1], discriminators)
    assert start_sha256(folder.uri) == start_sha256((folder / "model.safetensors").uri)
    assert start_sha256(None) is None
    assert_same(load_generators(folder), generators)


def test_the_written_file_is_half_as_large_and_says_where_it_comes_from(tmp_path: Path) -> None:
    generators, discriminators, _ = trained(tmp_path / "run")
    file = tmp_path / "start.safetensors"
    assert write_start(tmp_path / "run", "unit", file)["iterations"] == "7"
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.float16}  # noqa: SIM118
    assert (metadata["kind"], metadata["key"], metadata["seed"]) == ("unit", "abc", "4")
    fresh = networks()
    load_start(str(file), *fresh)
    for one, other in zip(fresh, (generators, discriminators), strict=True):
        assert all(parameter.dtype == torch.float32 for parameter in one.parameters())
        assert_same(one, other, tolerance=2**-11)  # half a unit in the last place of float16, of weights below 1
    write_start(tmp_path / "run", "unit", file, discriminators=False)
    random = networks()
    before = [parameter.clone() for parameter in random[1].parameters()]
    load_start(str(file), *random)
    assert_same(random[0], generators, tolerance=2**-11)
    assert all(torch.equal(now, then) for now, then in zip(random[1].parameters(), before, strict=True))
    with pytest.raises(UserError, match="no trained translator 'unet'; it has unit"):
        write_start(tmp_path / "run", "unet", file)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, _, folder = trained(tmp_path)
    with pytest.raises(
        UserError, match=r"weights of the generators of this recipe: day_encoder.layers.0.weight is \(2, 3"
    ):
        load_start(folder.uri, Generators(4, 1, 1), Discriminators(2, 1))
    with pytest.raises(UserError, match="discriminators of this recipe"):
        load_start(folder.uri, Generators(2, 1, 1), Discriminators(2, 2))
    with pytest.raises(UserError, match=r"no file .*gone.*Cure: give a model folder"):
        load_start(str(tmp_path / "gone.safetensors"), *networks())
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="damaged"):
        load_start(str(file), *networks())
