"""How far two results of one sum may lie apart on any processor: tolerances of tests are made here, not found by trial.

Every operation rounds by up to u = eps / 2 of its result, so a sum of n terms (products of a convolution or a mean,
in whatever order, with or without fused multiply-add, on whatever number of threads) is off by at most n u of the sum
of their magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), and two such sums lie n eps
apart. Roundings do not all push one way: beyond 16 sqrt(n) u of it lies less than one case in 10^50 (Higham and Mary,
SIAM J. Sci. Comput. 41, 2019, theorem 2.4), which is 8 sqrt(n) eps and less than n eps for n above 64.

A comparison of float64 results of short sums needs none of this: the default of `pytest.approx` (1e-6) and of
`torch.testing.assert_close` (1e-7) is more than 10^8 eps; of float32 results, 1e-6 is eight roundings. Deep networks,
in which rounding grows from layer to layer, are compared in float64 for the same reason, by `in_float64`; where that
would take too long, by the number of their roundings, `depth`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def rounding(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """As a share of the sum of magnitudes. `terms`: additions, products and functions on the longest way to a value."""
    return min(terms, 8 * terms**0.5) * torch.finfo(dtype).eps


def assert_near(found: Any, expected: Any, terms: int, magnitude: float | None = None) -> None:
    """Tensors, arrays or numbers of float32 (or more) that `terms` roundings may separate, and nothing else.

    `magnitude`: the largest sum of absolute values on the way to a value; by default the largest value expected, which
    is right where little cancels.
    """
    one, other = (
        (value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))).double()
        for value in (found, expected)
    )
    assert one.shape == other.shape
    size = float(other.abs().max()) if magnitude is None else magnitude
    apart = float((one - other).abs().max())
    assert apart <= rounding(terms) * size, f"{apart:.3g} apart, more than {rounding(terms):.3g} of {size:.3g}"


def depth(network: nn.Module) -> int:
    """Terms of all its convolutions and linear layers, as if they were one after another."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return sum(layer.weight[0].numel() for layer in layers)


def in_float64(network: nn.Module) -> nn.Module:
    """The network itself, computing in float64 whatever it is fed with."""
    network.register_forward_pre_hook(lambda _, inputs: tuple(one.double() for one in inputs))
    return network.double()
