"""3x3 convolutions on a CPU with a quarter of the multiplications: Winograd's minimal filtering, F(4x4, 3x3).

Each 4x4 tile of the output comes from a 6x6 tile of the input; transformed to 36 numbers a channel, a convolution is
36 matrix products (Lavin & Gray, arXiv 1509.09308, section 4). In float32 it is 4 to 10 times less exact than a direct
convolution, a few 1e-5 of the output's deviation. The transformed input kept for gradients is 2.25 times the input.

Letters: B batch, C channels in, K channels out, H, W size; h, w tiles a column and a row; T = B h w; P = 36, Q = 16.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE: Final = 4
REACH: Final = TILE + 2  # pixels a side of the input that a tile of the output comes from
FEWEST_CHANNELS: Final = 128  # in and out: below it the transforms cost what the products save
TILES_AT_ONCE: Final = 512  # without gradients: they and their products stay in the cache

_INPUT = (  # B transposed in the paper, of one dimension
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = (  # G
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = (  # A transposed
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def _in_two_dimensions(matrix: tuple[tuple[float, ...], ...]) -> dict[torch.dtype, Tensor]:
    exact = torch.tensor(matrix, dtype=torch.float64)
    both = torch.kron(exact, exact)
    return {torch.float64: both, torch.float32: both.float()}


INPUT_PP, KERNEL_P9, OUTPUT_QP = (_in_two_dimensions(matrix) for matrix in (_INPUT, _KERNEL, _OUTPUT))


def convolve_3x3(padded_BCHW: Tensor, weight_KC33: Tensor, bias_K: Tensor | None) -> Tensor:
    """`F.conv2d(padded, weight, bias)`: (B, C, H, W) -> (B, K, H - 2, W - 2).

    On a CPU in float32 or float64, with FEWEST_CHANNELS or more, by Winograd's method and channels last in memory;
    anywhere else (CUDA, autocast, few channels) by PyTorch's.
    """
    if not _pays(padded_BCHW, weight_KC33):
        return F.conv2d(padded_BCHW, weight_KC33, bias_K)
    height, width = padded_BCHW.shape[2] - 2, padded_BCHW.shape[3] - 2
    if height % TILE or width % TILE:
        padded_BCHW = F.pad(padded_BCHW, (0, -width % TILE, 0, -height % TILE))
    tensors = (padded_BCHW, weight_KC33) if bias_K is None else (padded_BCHW, weight_KC33, bias_K)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        output_BKHW: Tensor = _Winograd.apply(padded_BCHW, weight_KC33)
        if bias_K is not None:
            output_BKHW = output_BKHW + bias_K.view(-1, 1, 1)
    else:
        output_BKHW = _in_strips(padded_BCHW, weight_KC33, bias_K)
    return output_BKHW[:, :, :height, :width]


def _pays(padded_BCHW: Tensor, weight_KC33: Tensor) -> bool:
    return (
        padded_BCHW.device.type == "cpu"
        and padded_BCHW.dtype in INPUT_PP
        and weight_KC33.dtype == padded_BCHW.dtype
        and min(weight_KC33.shape[:2]) >= FEWEST_CHANNELS
        and not torch.is_autocast_enabled("cpu")
    )


class _Winograd(torch.autograd.Function):
    """Both gradients are products of the same 36 numbers, so nothing is transformed twice."""

    @staticmethod
    def forward(ctx: Any, padded_BCHW: Tensor, weight_KC33: Tensor) -> Tensor:
        input_PTC, kernel_PKC = _input(padded_BCHW), _kernel(weight_KC33)
        ctx.save_for_backward(input_PTC, kernel_PKC)
        ctx.shape = padded_BCHW.shape
        return _output(torch.bmm(input_PTC, kernel_PKC.transpose(1, 2)), padded_BCHW.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BKHW: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input_PTC, kernel_PKC = ctx.saved_tensors
        num_channels = kernel_PKC.shape[2]
        batch, channels_out, height, width = gradient_BKHW.shape
        tiles_QTK = (
            gradient_BKHW.permute(0, 2, 3, 1)
            .reshape(batch, height // TILE, TILE, width // TILE, TILE, channels_out)
            .permute(2, 4, 0, 1, 3, 5)
            .reshape(TILE * TILE, -1)
        )
        gradient_PTK = (OUTPUT_QP[gradient_BKHW.dtype].T @ tiles_QTK).view(REACH * REACH, -1, channels_out)
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = _laid_over(torch.bmm(gradient_PTK, kernel_PKC), ctx.shape)
        if ctx.needs_input_grad[1]:
            of_kernel = torch.bmm(gradient_PTK.transpose(1, 2), input_PTC).view(REACH * REACH, -1)
            of_weight = (KERNEL_P9[of_kernel.dtype].T @ of_kernel).view(3, 3, channels_out, num_channels)
            of_weight = of_weight.permute(2, 3, 0, 1)
        return of_input, of_weight


def _in_strips(padded_BCHW: Tensor, weight_KC33: Tensor, bias_K: Tensor | None) -> Tensor:
    """Without gradients, a few rows of tiles at a time."""
    batch, _, height, width = padded_BCHW.shape
    kernel_PCK = _kernel(weight_KC33).transpose(1, 2)
    rows = TILE * max(1, TILES_AT_ONCE * TILE // (batch * (width - 2)))
    strips = []
    for top in range(0, height - 2, rows):
        strip_BCHW = padded_BCHW[:, :, top : top + rows + 2]
        strips.append(_output(torch.bmm(_input(strip_BCHW), kernel_PCK), strip_BCHW.shape))
    output_BKHW = strips[0] if len(strips) == 1 else torch.cat(strips, dim=2)
    return output_BKHW if bias_K is None else output_BKHW.add_(bias_K.view(-1, 1, 1))


def _input(padded_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (36, T, C): every 6x6 tile, four pixels apart, transformed."""
    tiles_BhwC66 = padded_BCHW.permute(0, 2, 3, 1).unfold(1, REACH, TILE).unfold(2, REACH, TILE)
    tiles_PTC = tiles_BhwC66.permute(4, 5, 0, 1, 2, 3).reshape(REACH * REACH, -1)
    return (INPUT_PP[tiles_PTC.dtype] @ tiles_PTC).view(REACH * REACH, -1, padded_BCHW.shape[1])


def _kernel(weight_KC33: Tensor) -> Tensor:
    """(K, C, 3, 3) -> (36, K, C)."""
    taps_9KC = weight_KC33.permute(2, 3, 0, 1).reshape(9, -1)
    return (KERNEL_P9[taps_9KC.dtype] @ taps_9KC).view(REACH * REACH, *weight_KC33.shape[:2])


def _output(products_PTK: Tensor, padded_shape: torch.Size) -> Tensor:
    """(36, T, K) -> (B, K, H - 2, W - 2), channels last in memory."""
    batch, _, height, width = padded_shape
    rows, columns, channels_out = (height - 2) // TILE, (width - 2) // TILE, products_PTK.shape[2]
    tiles_QTK = OUTPUT_QP[products_PTK.dtype] @ products_PTK.view(REACH * REACH, -1)
    pixels_BHWK = (
        tiles_QTK.view(TILE, TILE, batch, rows, columns, channels_out)
        .permute(2, 3, 0, 4, 1, 5)
        .reshape(batch, height - 2, width - 2, channels_out)
    )
    return pixels_BHWK.permute(0, 3, 1, 2)


def _laid_over(gradient_PTC: Tensor, padded_shape: torch.Size) -> Tensor:
    """(36, T, C) -> (B, C, H, W): the gradients of the tiles, summed where tiles overlap."""
    batch, channels, height, width = padded_shape
    rows, columns = (height - 2) // TILE, (width - 2) // TILE
    tiles = (INPUT_PP[gradient_PTC.dtype].T @ gradient_PTC.view(REACH * REACH, -1)).view(
        REACH, REACH, batch, rows, columns, channels
    )
    summed_BHWC = gradient_PTC.new_zeros(batch, height, width, channels)
    for down in range(REACH):
        for right in range(REACH):
            bottom, end = down + TILE * (rows - 1) + 1, right + TILE * (columns - 1) + 1
            summed_BHWC[:, down:bottom:TILE, right:end:TILE] += tiles[down, right]
    return summed_BHWC.permute(0, 3, 1, 2)
