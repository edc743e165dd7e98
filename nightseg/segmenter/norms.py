"""Batch norms that take their statistics from frames of another domain: AdaBN (arXiv 1603.04779)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nightseg.segmenter.predict import Segmenter

Image = npt.NDArray[np.uint8]


def statistics_of(segmenter: Segmenter, batches: Iterable[Sequence[Image]], share: float = 1.0) -> dict[str, Tensor]:
    """The tensors of a segmenter, its batch norms' statistics those of `batches`: means over them, each weighed alike.

    `share` of them, the rest are the segmenter's own (arXiv 2006.16971, equation 2). Each norm sees what the network
    gives it while all norms before it use the statistics of the batch at hand. Frozen norms stay. The segmenter is left
    as it was.
    """
    network = segmenter.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: the mean over all batches
        norm.train()
    for batch in batches:
        segmenter.batch(batch)
    after = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    network.load_state_dict(before)
    return {name: _blend(before[name], value, share) for name, value in after.items()}


def has_norms(network: nn.Module) -> bool:
    """Whether there is a batch norm whose statistics can change."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in network.modules())


def _blend(own: Tensor, other: Tensor, share: float) -> Tensor:
    return own + share * (other - own) if other.is_floating_point() and share < 1 else other
