"""A GPU for tests on machines without one: the shapes, types and devices of tensors, but no numbers.

`fake_cuda`   tensors that say they are on cuda:0 (torch's FakeTensorMode). An operation that mixes devices raises.
              Autograd's engine asks the driver, so backward passes do not work.
`meta_gpu`    the meta device, on which backward passes work. It knows no other device's tensors as strangers, so every
              operation is watched: one that mixes it with the CPU raises (but copies, and numbers with no dimension).

On both a read-back (`item`, `tolist`, `cpu`, a mask as an index, `if tensor`) raises: on a GPU it is a wait.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, META = torch.device("cuda:0"), torch.device("meta")
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default}


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within, all new tensors are fakes, also those of the CPU. Modules move by `to`, autocast works as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_apply", _applied)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(Tensor, "pin_memory", lambda self, *_: self)
        patch.setattr(torch.optim, "SGD", partial(_unfused, torch.optim.SGD))
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copy.deepcopy does
            yield


@contextmanager
def meta_gpu() -> Iterator[None]:
    """Within, work on the meta device is watched. Autocast does nothing there: types are `fake_cuda`'s matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", partial(_no_autocast, torch.autocast))
        for name in ("SGD", "Adam", "AdamW"):
            patch.setattr(torch.optim, name, partial(_unfused, getattr(torch.optim, name)))
        with _Watched():
            yield


class _Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        parts = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        if func not in COPIES and len({part.device.type for part in parts}) > 1:
            raise RuntimeError(f"{func} mixes devices: {', '.join(str(part.device) for part in parts)}")
        return func(*args, **kwargs or {})


def _no_autocast(real: Callable[..., Any], device_type: str, *given: Any, **named: Any) -> Any:
    return real("cpu", enabled=False) if device_type == "meta" else real(device_type, *given, **named)


def _unfused(real: Callable[..., Any], *given: Any, fused: bool, **named: Any) -> Any:
    """Torch has shapes, but no fused kernels, for these optimisers on this device."""
    return real(*given, foreach=fused, **named)


def _applied(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module's own swaps tensors in place, which fakes refuse."""
    for child in self.children() if recurse else ():
        child._apply(change)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            self._parameters[name] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = change(buffer)
    return self
