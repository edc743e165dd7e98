"""Batch norms that stay as they are, and which kind of batch norm an encoder has.

B images, C channels, h x w pixels of a map.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.storage import UserError

Norm = Literal["batch", "frozen", "sync"]


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics, weight and bias are buffers: no optimiser, no `train()` and no batch changes them.

    The same numbers as a batch norm in evaluation mode, under the same names. A norm that was trainable before it was
    frozen keeps its count of batches (`num_batches_tracked`), as in detectron2; one that never was has none.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, *, counted: bool = False) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0) if counted else None)

    def forward(self, maps_BChw: Tensor) -> Tensor:
        mean_C, variance_C = self.get_buffer("running_mean"), self.get_buffer("running_var")
        weight_C, bias_C = self.get_buffer("weight"), self.get_buffer("bias")
        if not maps_BChw.requires_grad:
            return F.batch_norm(maps_BChw, mean_C, variance_C, weight_C, bias_C, training=False, eps=self.eps)
        # batch_norm would keep its whole input for the gradient of weights that have none
        scale_C = weight_C * (variance_C + self.eps).rsqrt()
        shift_C = bias_C - mean_C * scale_C
        scale, shift = (vector_C.view(1, -1, 1, 1).to(maps_BChw.dtype) for vector_C in (scale_C, shift_C))
        return torch.addcmul(shift, maps_BChw, scale)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """Reads what a batch norm wrote, and the other way round."""
        count = prefix + "num_batches_tracked"
        if self._buffers["num_batches_tracked"] is None:
            state_dict.pop(count, None)
        else:
            state_dict.setdefault(count, torch.tensor(0))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def freeze(parent: nn.Module, *names: str) -> None:
    """Nothing in these children can learn any more: parameters get no gradient, batch norms are frozen."""
    for name in names:
        parent.get_submodule(name).requires_grad_(False)
        _freeze_norms(parent, name, counted=True)


def choose_norm(encoder: nn.Module, norm: Norm, name: str) -> None:
    """Turn the batch norms of an encoder, in place, into the wanted kind; its `name` is for messages.

    batch: statistics of each worker's own batch. sync: of the batches of all workers, which need GPUs. frozen: those
    of the weights stay. Raises UserError where frozen or sync has nothing to act on.
    """
    kinds = {type(module) for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)}
    if norm == "batch":
        return
    if not kinds:
        raise UserError(f"network.norm is {norm!r}, but {name} has no batch norm; leave network.norm at batch")
    if kinds != {nn.BatchNorm2d}:  # of timm, which also hold the activation that follows
        from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

        (freeze_batch_norm_2d if norm == "frozen" else convert_sync_batchnorm)(encoder)
    elif norm == "frozen":
        for name, _ in list(encoder.named_children()):
            _freeze_norms(encoder, name, counted=False)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(encoder)  # type: ignore[no-untyped-call]


def _freeze_norms(parent: nn.Module, name: str, *, counted: bool) -> None:
    child = parent.get_submodule(name)
    if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
        still = FrozenBatchNorm2d(child.num_features, child.eps, counted=counted)
        still.load_state_dict(dict(child.state_dict()))
        parent.add_module(name, still)
    for below, _ in list(child.named_children()):
        _freeze_norms(child, below, counted=counted)
