"""What one sees of a segmenter in training: curves of its steps, scores and pictures of its validation frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nightseg.data.images import encode_png
from nightseg.data.taxonomy import Taxonomy
from nightseg.segmenter.data import LabelledFrames
from nightseg.segmenter.label_sheet import label_sheet
from nightseg.segmenter.learner import Lap, Learner, Recent
from nightseg.storage.events import Curves


def draw_steps(curves: Curves, step: int, recent: Recent, learning_rate: float, lap: Lap) -> None:
    """One point of each curve for the last steps."""
    points = {"train/loss": recent.loss, "train/gradient_norm": recent.gradient_norm}
    points |= {"train/learning_rate": learning_rate}
    points |= {"pace/images_per_second": lap.images_per_second, "pace/data_wait_share": lap.waited}
    curves.scalars(step, points)
    curves.flush_if_due()


def draw_validation(
    curves: Curves, learner: Learner, scored: Mapping[str, Any], frames: LabelledFrames, classes: Taxonomy
) -> None:
    """Scores, and some validation frames as the network sees them now. Undefined scores leave a gap."""
    points = {f"validation/{key}": value for key, value in scored.items() if key != "iou"}
    points |= {f"iou/{name}": value for name, value in scored["iou"].items()}
    curves.scalars(learner.step, {tag: value for tag, value in points.items() if value is not None})
    sheet = label_sheet(learner.judged, frames, classes, learner.figures.device)
    curves.picture(learner.step, "validation/frame_label_prediction", encode_png(sheet), *sheet.shape[:2])
