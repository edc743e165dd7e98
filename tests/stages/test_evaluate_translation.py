"""The evaluation of a translation whose masks, labels and features are made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.table import frame_table, vector_column
from nightseg.metrics.edges import edge_agreement
from nightseg.progress import SilentProgress
from nightseg.selection.frechet import Statistics, kernel_distance, moments_of, write_statistics
from nightseg.stages import evaluate_translation as stage
from nightseg.stages import predict
from nightseg.storage import Commit, UserError, Workspace

CLASSES = taxonomy("camvid11")
SKY, ROAD, CAR = 0, 3, 8
SIZE = (20, 30)
REAL = np.random.default_rng(9).normal(size=(40, 3)).astype(np.float32)


class Made(NamedTuple):
    """Everything that an evaluation is made from."""

    translated: pa.Table
    source: pa.Table
    masks: dict[str, Commit]
    features: dict[str, Commit]


def picture(index: int) -> np.ndarray:
    grey = np.random.default_rng(index).integers(40, 200, (4, 6), dtype=np.uint8)
    return np.repeat(np.kron(grey, np.ones((5, 5), np.uint8))[..., None], 3, axis=2)


def half_sky() -> np.ndarray:
    label = np.full(SIZE, ROAD, dtype=np.uint8)
    label[:10] = SKY
    return label


def wrong(pixels: int) -> np.ndarray:
    """The label, the first pixels of it taken for cars."""
    mask = half_sky()
    mask.reshape(-1)[:pixels] = CAR
    return mask


class Maker:
    """Three day frames, made darker; the segmenter errs in 30 pixels by day and in 60 and 90 at night."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workspace = folder, Workspace(folder / "run")

    def frames(self, dataset: str, prefix: str, change: Callable[[np.ndarray], np.ndarray], labelled: bool) -> pa.Table:
        rows = []
        for index in range(3):
            file = self.folder / f"{dataset} {index}.png"
            file.write_bytes(encode_png(change(picture(index))))
            row = {"frame_id": f"{prefix}day/{index}", "uri": str(file), "dataset": dataset, "domain": "day"}
            if labelled:
                label = self.folder / f"label {index}.png"
                label.write_bytes(encode_png(half_sky()))
                row |= {"label_uri": str(label), "label_encoding": "train_ids"}
            rows.append(row)
        return frame_table(rows)

    def seen(self, name: str, prefix: str, *errors: int) -> Commit:
        attempt, rows = self.attempt("predict", name), []
        for index, pixels in enumerate(errors):
            uri = f"masks/{index}.png"
            (attempt.folder / uri).write_bytes(encode_png(wrong(pixels), CLASSES.palette))
            rows.append({"frame_id": f"{prefix}day/{index}", "prediction_uri": uri})
        table = frame_table(rows, extra={"prediction_uri": pa.string()})
        (attempt.folder / "predictions.parquet").write_table(table)
        return attempt.finish(rows_in=3, rows_out=3, outputs=["predictions.parquet"])

    def scored(self, name: str, features: np.ndarray) -> Commit:
        attempt, moments = self.attempt("score", name), moments_of(features)
        (attempt.folder / "features.parquet").write_table(pa.table({"features": vector_column(features)}))
        outputs = ["features.parquet"]
        if moments.count > 1:
            statistics = Statistics(moments.mean, moments.cov, moments.count, "made-up", "clean", "")
            write_statistics(attempt.folder / "statistics.npz", statistics)
            outputs.append("statistics.npz")
        return attempt.finish(rows_in=moments.count, rows_out=moments.count, outputs=outputs)

    def attempt(self, stage: str, name: str) -> Any:
        return self.workspace.stage(stage, name, version=1, recipe={}, inputs={}, seed=0).open()

    def make(self, labelled: bool = True, back: bool = True) -> Made:
        shift = np.array([1.0, 2.0, 2.0], dtype=np.float32)
        return Made(
            self.frames("made", "made/", lambda image: image // 2, labelled),
            self.frames("day", "", lambda image: image, labelled),
            {"translated": self.seen("made", "made/", 30, 60, 90), "source": self.seen("day", "", 30, 30, 30)}
            | ({"back": self.seen("back", "made.back/made/", 30, 30, 60)} if back else {}),
            {
                "translated": self.scored("made", REAL + shift),
                "source": self.scored("day", REAL + 2 * shift),
                "real": self.scored("night", REAL),
            },
        )

    def evaluate(self, made: Made, max_bad_fraction: float = 0.0) -> Commit:
        return stage.evaluate_translation(
            made.translated,
            made.source,
            name="made",
            masks=made.masks,
            features=made.features,
            taxonomy="camvid11",
            attempt=self.attempt("evaluate_translation", "made"),
            progress=SilentProgress(),
            compute=MapCompute(actors=0, shard_rows=2),
            max_bad_fraction=max_bad_fraction,
        )


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


pytestmark = pytest.mark.usefixtures("shards_done")


def miou(errors: int, frames: int = 3) -> float:
    """IoU of sky 1 - errors / sky pixels, of road 1, of car 0: the mean of three classes."""
    return (1 - errors / (frames * 300) + 1 + 0) / 3


def test_the_numbers_are_those_of_the_definitions(maker: Maker) -> None:
    made = maker.make()
    commit = maker.evaluate(made)
    found = commit.json(stage.SCORES_NAME)
    assert (found["frames"], found["labelled"], found["has_back_translation"]) == (3, 3, True)
    assert commit.summary == {
        "fid": found["fid"]["translated"], "agreement": found["agreement"], "edges": found["edges"]
    }  # fmt: skip
    assert found["miou"] == pytest.approx({"source": miou(90), "translated": miou(180), "back": miou(120)})
    assert found["survival"] == pytest.approx(miou(120) / miou(90))
    # The first 30 pixels are cars to the segmenter in every picture; S(t) calls 30 + 60 more of S(x)'s sky cars.
    assert found["agreement"]["pixels"] == pytest.approx(1 - 90 / 1800)
    iou = {"sky": (900 - 90 - 90) / (900 - 90), "road": 1.0, "car": 90 / 180}
    assert found["agreement"]["miou"] == pytest.approx(sum(iou.values()) / 3)
    assert found["back_agreement"]["pixels"] == pytest.approx(1 - 30 / 1800)
    edges = [edge_agreement(picture(index), picture(index) // 2) for index in range(3)]
    assert found["edges"] == pytest.approx(np.mean(edges)) and found["edges"] > 0.9


def test_distances_stand_beside_those_of_the_source(maker: Maker) -> None:
    found = maker.evaluate(maker.make()).json(stage.SCORES_NAME)
    assert found["fid"]["translated"] == pytest.approx(9.0, rel=1e-4)  # the same spread, moved by (1, 2, 2)
    assert found["fid"]["source"] == pytest.approx(36.0, rel=1e-4)
    shift = np.array([1.0, 2.0, 2.0], dtype=np.float32)
    assert found["kid"]["translated"] == pytest.approx(kernel_distance(REAL + shift, REAL).kid)
    assert found["kid"]["source"] == pytest.approx(kernel_distance(REAL + 2 * shift, REAL).kid)
    assert found["compared"] == {"translated": 40, "source": 40, "real": 40}
    assert (found["extractor"], found["resize"]) == ("made-up", "clean")


def test_every_frame_keeps_its_own_measures(maker: Maker) -> None:
    rows = maker.evaluate(maker.make()).table("frame_scores").to_pylist()
    assert [row["frame_id"] for row in rows] == ["made/day/0", "made/day/1", "made/day/2"]
    assert [row["source_id"] for row in rows] == ["day/0", "day/1", "day/2"]
    assert [row["agreement"] for row in rows] == pytest.approx([1.0, 1 - 30 / 600, 1 - 60 / 600])
    assert [row["back_agreement"] for row in rows] == pytest.approx([1.0, 1.0, 1 - 30 / 600])
    matrix = np.reshape(rows[1]["label_translated"], (11, 11))
    assert (matrix[SKY, SKY], matrix[SKY, CAR], matrix[ROAD, ROAD]) == (240, 60, 300) and matrix.sum() == 600


def test_without_a_way_back_nothing_is_said_about_survival(maker: Maker) -> None:
    commit = maker.evaluate(maker.make(back=False))
    found = commit.json(stage.SCORES_NAME)
    assert found["survival"] is None and found["miou"]["back"] is None and not found["has_back_translation"]
    assert found["back_agreement"] == {"pixels": None, "miou": None}
    assert found["miou"]["translated"] == pytest.approx(miou(180))
    assert commit.table("frame_scores")["label_back"].null_count == 3


def test_without_labels_the_segmenter_still_compares_what_it_sees(maker: Maker) -> None:
    found = maker.evaluate(maker.make(labelled=False)).json(stage.SCORES_NAME)
    assert found["labelled"] == 0 and set(found["miou"].values()) == {None} and found["survival"] is None
    assert found["agreement"]["pixels"] == pytest.approx(1 - 90 / 1800)


def test_frames_that_a_pass_left_out_are_set_aside_here(maker: Maker) -> None:
    made = maker.make()
    (maker.folder / "day 1.png").unlink()
    fewer = made._replace(masks=made.masks | {"back": maker.seen("back 2", "made.back/made/", 30, 30)})
    commit = maker.evaluate(fewer, max_bad_fraction=0.7)
    assert (commit.rows_in, commit.rows_out, commit.quarantined) == (3, 1, 2)
    bad = {row["frame_id"]: row for row in commit.table("quarantine").to_pylist()}
    assert bad["made/day/1"]["reason"] == "missing" and "day 1.png is not there" in bad["made/day/1"]["detail"]
    assert "there is no back mask of it" in bad["made/day/2"]["detail"]
    assert commit.json(stage.SCORES_NAME)["frames"] == 1


def test_a_set_without_a_distance_and_an_evaluation_without_a_frame_are_refused(maker: Maker) -> None:
    made = maker.make()
    lonely = made._replace(features=made.features | {"real": maker.scored("alone", REAL[:1])})
    with pytest.raises(UserError, match="alone: 1 of its 1 frames could be read, and a distance needs at least 2"):
        maker.evaluate(lonely)
    for index in range(3):
        (maker.folder / f"made {index}.png").unlink()
    with pytest.raises(UserError, match=r"3 of 3 frames \(100.0%\) are bad"):
        maker.evaluate(made, max_bad_fraction=1.0)


def test_names_agree_with_the_stages_that_write_them() -> None:
    assert stage.PREDICTION_URI == predict.PREDICTION_URI
