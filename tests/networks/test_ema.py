"""The EMA against its closed form; statistics and counters of batch norms go along."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nightseg.networks.ema import ema_of, update_ema, warmed_up_decay


def test_the_mean_is_its_closed_form() -> None:
    line = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(line.weight, 5.0)
    ema, decay, values = ema_of(line), 0.8, [1.0, 4.0, -2.0, 7.0]
    for value in values:
        nn.init.constant_(line.weight, value)
        update_ema(ema, line, decay)
    shares = [decay ** (len(values) - 1 - n) * (1 - decay) for n in range(len(values))]
    expected = decay ** len(values) * 5.0 + sum(share * value for share, value in zip(shares, values, strict=True))
    assert ema.weight.item() == pytest.approx(expected, abs=1e-12)
    assert not ema.weight.requires_grad and not ema.training


def test_statistics_are_averaged_and_counters_copied() -> None:
    norm = nn.BatchNorm2d(1)
    ema = ema_of(norm)
    norm(torch.full((1, 1, 2, 2), 10.0))  # running mean 0 -> 1
    update_ema(ema, norm, 0.75)
    assert norm.running_mean is not None and ema.running_mean is not None
    assert (norm.running_mean.item(), ema.running_mean.item()) == (1.0, 0.25)
    assert ema.num_batches_tracked is not None
    assert ema.num_batches_tracked.item() == 1


def test_what_does_not_change_keeps_its_bits() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ema = ema_of(network)
    for _ in range(5):
        update_ema(ema, network, 0.999)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in ema.state_dict().items())


def test_little_is_kept_at_first() -> None:
    assert [warmed_up_decay(0.999, step) for step in (0, 8, 10**6)] == [0.1, 0.5, 0.999]
    assert warmed_up_decay(0.05, 0) == 0.05
