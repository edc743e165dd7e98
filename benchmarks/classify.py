"""From logits to labels and confidence at a frame's size: in chunks, against the plain way, everything at full size.

The network's own work is the same for both and left out. The plain way is what most segmentation code does: upsample
all logits, softmax, maximum; over several passes the sum of all probabilities, over windows a sum and a count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import Contest, Size
from nightseg.segmenter.predict import TiledLogits, classify, tiled_logits
from nightseg.segmenter.settings import Inference

NUM_CLASSES, STRIDE = 19, 4
SHAPES: dict[Size, tuple[int, int]] = {"tiny": (64, 96), "default": (512, 1024), "full": (1024, 2048)}
SCALES = (0.75, 1.0, 1.25)


def whole(size: Size) -> Contest:
    """One pass over the whole frame: today's default."""
    height, width = SHAPES[size]
    (one,) = _passes((height, width), Inference(), (1.0,))[:1]

    def plain() -> tuple[Tensor, Tensor]:
        probabilities_KHW = _plain_logits(one, (height, width)).softmax(dim=0)
        highest = probabilities_KHW.max(dim=0)
        return highest.indices, highest.values

    return Contest(
        name="classify_whole",
        work=f"labels and confidence of {width} x {height} from logits, {NUM_CLASSES} classes, one pass",
        peer=f"upsampling, softmax, max of torch {torch.__version__}",
        run_ours=torch.inference_mode()(lambda: classify([one], (height, width), STRIDE)),
        run_peer=torch.inference_mode()(plain),
        check=_check,
    )


def many(size: Size) -> Contest:
    """Three scales, mirrored too, each in windows that overlap by a quarter."""
    height, width = SHAPES[size]
    passes = _passes((height, width), Inference(window=(height // 2, width // 2)), SCALES)

    def plain() -> tuple[Tensor, Tensor]:
        total_KHW = torch.zeros(NUM_CLASSES, height, width)
        for one in passes:
            total_KHW += _plain_logits(one, (height, width)).softmax(dim=0)
        highest = (total_KHW / len(passes)).max(dim=0)
        return highest.indices, highest.values

    return Contest(
        name="classify_many",
        work=f"the same of six passes in windows ({', '.join(f'{scale:g}' for scale in SCALES)}, mirrored too)",
        peer=f"sums at full size, torch {torch.__version__}",
        run_ours=torch.inference_mode()(lambda: classify(passes, (height, width), STRIDE)),
        run_peer=torch.inference_mode()(plain),
        check=_check,
    )


def _passes(size: tuple[int, int], inference: Inference, scales: tuple[float, ...]) -> list[TiledLogits]:
    random = torch.Generator().manual_seed(0)

    def network(images_BCHW: Tensor) -> Tensor:
        high, wide = (-(-side // STRIDE) for side in images_BCHW.shape[2:])
        return 4 * torch.randn(len(images_BCHW), NUM_CLASSES, high, wide, generator=random)

    seen = [torch.zeros(1, 1, *(round(side * scale) for side in size)) for scale in scales]
    return [tiled_logits(network, image, inference, mirrored=turned)[0] for image in seen for turned in (False, True)]


def _plain_logits(one: TiledLogits, size: tuple[int, int]) -> Tensor:
    total_KHW = torch.zeros(NUM_CLASSES, one.height, one.width)
    count_HW = torch.zeros(one.height, one.width)
    for tile in one.tiles:
        down, across = slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width)
        full_1KHW = F.interpolate(tile.logits[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)
        total_KHW[:, down, across] += full_1KHW[0, :, : tile.height, : tile.width]
        count_HW[down, across] += 1
    mean_KHW = total_KHW / count_HW
    mean_KHW = mean_KHW.flip(-1) if one.mirrored else mean_KHW
    return F.interpolate(mean_KHW[None], size, mode="bilinear", align_corners=False)[0]


def _check(ours: tuple[Tensor, Tensor], peer: tuple[Tensor, Tensor]) -> str:
    difference = float((ours[1] - peer[1]).abs().max())
    agreement = float((ours[0] == peer[0]).float().mean())
    assert difference < 1e-4, f"passes: confidences differ by {difference}"
    assert agreement > 0.999, f"passes: {agreement:.2%} of the labels are equal"
    return f"{difference:.0e}, {agreement:.3%} of labels"
