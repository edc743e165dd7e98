"""What TensorBoard shows of a validation: scores, and pictures of some frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nightseg.data.images import encode_png
from nightseg.data.taxonomy import Taxonomy
from nightseg.segmenter.data import LabelledFrames
from nightseg.segmenter.network import SemanticFPN, upsample_logits
from nightseg.storage.events import Curves

SHEET_ROWS: Final = 3
TILE_WIDTH: Final = 384  # pixels at most
GAP: Final = 2


def draw_validation(
    curves: Curves, step: int, scored: Mapping[str, Any], network: SemanticFPN, frames: LabelledFrames
) -> None:
    """Scores, and some validation frames as the network predicts them now. Undefined scores leave a gap."""
    if curves.folder is None:
        return
    points = {f"validation/{key}": value for key, value in scored.items() if key != "iou"}
    points |= {f"iou/{name}": value for name, value in scored["iou"].items()}
    curves.scalars(step, {tag: value for tag, value in points.items() if value is not None})
    sheet = label_sheet(network, frames)
    curves.picture(step, "validation/frame_label_prediction", encode_png(sheet), *sheet.shape[:2])


@torch.inference_mode()
def label_sheet(network: SemanticFPN, frames: LabelledFrames) -> NDArray[np.uint8]:
    """uint8 HWC RGB: rows of frame, label, prediction, for frames spread over the table. Ignored pixels are black.

    The network must be in evaluation mode, and stays so.
    """
    device, rows = network.normalise.scale.device, []
    for index in np.unique(np.linspace(0, len(frames) - 1, SHEET_ROWS).round().astype(int)):
        image, label = frames[int(index)]
        logits_1Khw = network(network.normalise(image[None].to(device)))
        prediction_HW = upsample_logits(logits_1Khw, *image.shape[-2:])[0].argmax(dim=0).to("cpu", torch.uint8)
        tiles = [image, *(_coloured(part_HW, frames.classes) for part_HW in (label, prediction_HW))]
        rows.append([_tile(tile, *image.shape[-2:]) for tile in tiles])
    height, width = (max(row[0].shape[axis] for row in rows) for axis in (1, 2))
    sheet = torch.zeros(3, len(rows) * (height + GAP) - GAP, 3 * (width + GAP) - GAP, dtype=torch.uint8)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            top, left = y * (height + GAP), x * (width + GAP)
            sheet[:, top : top + tile.shape[1], left : left + tile.shape[2]] = tile
    return np.ascontiguousarray(sheet.permute(1, 2, 0).numpy())


def _coloured(label_HW: Tensor, classes: Taxonomy) -> Tensor:
    return torch.from_numpy(classes.colourize(label_HW.numpy())).permute(2, 0, 1)


def _tile(image_3HW: Tensor, height: int, width: int) -> Tensor:
    """The picture of a frame of height x width at the size of a tile. Nearest pixels: colours of classes never mix."""
    shown = min(TILE_WIDTH, width)
    size = (max(1, round(height * shown / width)), shown)
    return F.interpolate(image_3HW[None], size, mode="nearest")[0]
