"""Nearest upsampling by 2 and a 5x5 convolution with reflect padding, as one layer at 36 % of the multiplications.

Letters in tensor names: B batch, C channels, H, W size of the output, or of what is said.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.unit.winograd import convolve_3x3

# Rows: the three source pixels i-1, i, i+1; columns: the five kernel taps that fall on them after nearest upsampling.
EVEN_TAPS = ((1, 1, 0, 0, 0), (0, 0, 1, 1, 0), (0, 0, 0, 0, 1))
ODD_TAPS = ((1, 0, 0, 0, 0), (0, 1, 1, 0, 0), (0, 0, 0, 1, 1))


class UpsamplingConvolution(nn.Module):
    """Nearest upsampling by 2, then a 5x5 convolution with reflect padding, at 36 % of the multiplications.

    After nearest upsampling the five taps of a row or column fall on three source pixels, so each of the four output
    phases is a 3x3 convolution of the small image with summed weights. Only the outermost ring of output pixels sees
    the reflection differently; it is computed from two-pixel strips. The result equals the plain form to rounding.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        plain = nn.Conv2d(channels_in, channels_out, 5)
        self.weight, self.bias = plain.weight, plain.bias
        self.register_buffer("taps", torch.tensor([EVEN_TAPS, ODD_TAPS], dtype=torch.float32), persistent=False)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        if min(features_BCHW.shape[2:]) < 2:
            raise ValueError(f"UpsamplingConvolution needs at least 2x2 features, got {tuple(features_BCHW.shape)}")
        assert self.bias is not None
        taps = self.get_buffer("taps")
        phases = torch.einsum("pty,qux,oiyx->opqitu", taps, taps, self.weight).flatten(0, 2)
        output = F.pixel_shuffle(convolve_3x3(_replicated(features_BCHW), phases, self.bias.repeat_interleave(4)), 2)
        top = self._edge(features_BCHW[:, :, :2], self.weight)
        bottom = self._edge(features_BCHW[:, :, -2:].flip(2), self.weight.flip(2))
        columns, weight = features_BCHW.transpose(2, 3), self.weight.transpose(2, 3)
        left = self._edge(columns[:, :, :2], weight)
        right = self._edge(columns[:, :, -2:].flip(2), weight.flip(2))
        pasted: Tensor = _PasteRing.apply(output, top, bottom, left, right)
        return pasted

    def _edge(self, strip_BC2W: Tensor, weight: Tensor) -> Tensor:
        """First output row: the reflected taps 0..4 fall on source rows 1, 0, 0, 0, 1."""
        rows = torch.stack((weight[:, :, 1:4].sum(2), weight[:, :, 0] + weight[:, :, 4]), dim=2)
        wide = F.pad(strip_BC2W.repeat_interleave(2, dim=3), (2, 2, 0, 0), mode="reflect")
        return F.conv2d(wide, rows, self.bias)[:, :, 0]


def _replicated(features_BCHW: Tensor) -> Tensor:
    """One more pixel on every side, the same as its neighbour."""
    if not torch.compiler.is_compiling():
        return F.pad(features_BCHW, (1, 1, 1, 1), mode="replicate")
    # The compiler of PyTorch 2.14 takes the gradient of that padding for contiguous, and stops when it is not.
    for axis in (2, 3):
        first, last = features_BCHW.narrow(axis, 0, 1), features_BCHW.narrow(axis, -1, 1)
        features_BCHW = torch.cat((first, features_BCHW, last), axis)
    return features_BCHW


class _PasteRing(torch.autograd.Function):
    """Overwrites the outermost rows and columns; autograd's own slice assignment copies the image for each of them."""

    @staticmethod
    def forward(
        ctx: Any, output_BCHW: Tensor, top_BCW: Tensor, bottom_BCW: Tensor, left_BCH: Tensor, right_BCH: Tensor
    ) -> Tensor:
        ctx.mark_dirty(output_BCHW)
        output_BCHW[:, :, 0], output_BCHW[:, :, -1] = top_BCW, bottom_BCW
        output_BCHW[:, :, :, 0], output_BCHW[:, :, :, -1] = left_BCH, right_BCH  # these own the corners
        return output_BCHW

    @staticmethod
    def backward(ctx: Any, gradient_BCHW: Tensor) -> tuple[Tensor, ...]:
        inner_BCHW = gradient_BCHW.clone()
        inner_BCHW[:, :, :, 0] = inner_BCHW[:, :, :, -1] = 0.0
        rows = (inner_BCHW[:, :, 0].clone(), inner_BCHW[:, :, -1].clone())
        inner_BCHW[:, :, 0] = inner_BCHW[:, :, -1] = 0.0
        return inner_BCHW, *rows, gradient_BCHW[:, :, :, 0], gradient_BCHW[:, :, :, -1]
