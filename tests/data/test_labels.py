"""The label of a row: train ids, nothing, or the reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightseg.data.images import BadFrame, encode_png
from nightseg.data.labels import train_ids_of
from nightseg.data.taxonomy import taxonomy
from nightseg.storage import sha256_of

CLASSES = taxonomy("camvid11")


@pytest.fixture
def row(tmp_path: Path) -> dict[str, Any]:
    data = encode_png(np.array([[0, 11], [8, 3]], dtype=np.uint8))
    (tmp_path / "label.png").write_bytes(data)
    return {"label_uri": str(tmp_path / "label.png"), "label_encoding": "camvid12", "label_sha256": sha256_of(data)}


def test_a_label_becomes_train_ids(row: dict[str, Any]) -> None:
    found = train_ids_of(row, CLASSES, (2, 2))
    assert found is not None and found.tolist() == [[0, 255], [8, 3]]


def test_a_row_without_label_has_none(row: dict[str, Any]) -> None:
    assert train_ids_of(row | {"label_uri": None}, CLASSES) is None
    assert train_ids_of({}, CLASSES) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label_uri": "/does/not/exist.png"}, "label_missing"),
        ({"label_sha256": "0" * 64}, "unreadable"),
        ({"label_encoding": "train_ids"}, "label_value"),
    ],
)
def test_a_bad_label_has_a_reason(row: dict[str, Any], change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadFrame) as caught:
        train_ids_of(row | change, CLASSES)
    assert caught.value.reason == reason
    with pytest.raises(BadFrame, match="label_size"):
        train_ids_of(row, CLASSES, (2, 3))
