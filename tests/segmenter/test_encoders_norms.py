"""Frozen batch norms compute what a batch norm in evaluation mode does, and nothing changes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nightseg.segmenter.encoders import FrozenBatchNorm2d, build_encoder, choose_norm, freeze
from nightseg.storage import UserError
from tests.rounding import in_float64


@pytest.fixture
def trained() -> nn.BatchNorm2d:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5, eps=1e-3)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    norm.num_batches_tracked += 7
    return norm.eval()


def frozen(norm: nn.BatchNorm2d, counted: bool = False) -> FrozenBatchNorm2d:
    still = FrozenBatchNorm2d(norm.num_features, norm.eps, counted=counted)
    still.load_state_dict(dict(norm.state_dict()))
    return still.train()


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_frozen_is_batch_norm_in_evaluation_mode(trained: nn.BatchNorm2d, needs_gradient: bool) -> None:
    maps = torch.randn(2, 5, 4, 6, dtype=torch.float64, requires_grad=needs_gradient)
    torch.testing.assert_close(frozen(trained).double()(maps), trained.double()(maps))


def test_its_gradient_is_that_of_the_affine_map(trained: nn.BatchNorm2d) -> None:
    maps = torch.randn(2, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    frozen(trained).double()(maps).sum().backward()
    trained.double()
    scale = trained.weight / (trained.running_var + trained.eps).sqrt()
    torch.testing.assert_close(maps.grad, scale.detach().view(1, -1, 1, 1).expand_as(maps))


def test_bfloat16_stays_bfloat16(trained: nn.BatchNorm2d) -> None:
    maps = torch.randn(2, 5, 4, 6, requires_grad=True).bfloat16()
    assert frozen(trained)(maps).dtype == torch.bfloat16


def test_nothing_of_it_can_learn_and_a_batch_leaves_no_trace(trained: nn.BatchNorm2d) -> None:
    still = frozen(trained)
    before = {name: tensor.clone() for name, tensor in still.state_dict().items()}
    still(torch.randn(8, 5, 4, 4))
    assert not list(still.parameters())
    assert all(torch.equal(still.state_dict()[name], tensor) for name, tensor in before.items())


def test_only_a_norm_that_was_trainable_counts(trained: nn.BatchNorm2d) -> None:
    assert "num_batches_tracked" not in frozen(trained).state_dict()
    assert int(frozen(trained, counted=True).state_dict()["num_batches_tracked"]) == 7
    back = nn.BatchNorm2d(5)
    back.load_state_dict(dict(frozen(trained).state_dict()))
    assert int(back.num_batches_tracked) == 0


def test_freezing_children_leaves_their_neighbours() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(2)), nn.BatchNorm2d(2))
    freeze(network, "0", "1", "2")
    assert [name for name, _ in network.named_parameters()] == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert [parameter.requires_grad for parameter in network.parameters()] == [False, False, True, True]
    assert isinstance(network[2][0], FrozenBatchNorm2d)


@pytest.mark.parametrize(("norm", "kind"), [("frozen", "Frozen"), ("sync", "Sync")])
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_every_batch_norm_becomes_the_wanted_kind(name: str, norm: str, kind: str) -> None:
    plain, other = build_encoder(name).eval(), build_encoder(name, norm=norm).eval()  # type: ignore[arg-type]
    other.load_state_dict(dict(plain.state_dict()))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in other.modules())
    num_norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert sum(type(module).__name__.startswith(kind) for module in other.modules()) == num_norms
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for maps, wanted in zip(in_float64(other)(image), in_float64(plain)(image), strict=True):
            torch.testing.assert_close(maps, wanted)


def test_a_network_without_batch_norm_cannot_freeze_them() -> None:
    with pytest.raises(UserError, match="convnext has no batch norm"):
        choose_norm(nn.Sequential(nn.LayerNorm(3)), "frozen", "convnext")
