"""A finished run without a stage having run: real commits, made-up frames and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.stored_labels import STORED_SCHEMA, Kept, StoredLabel, packed, place_of
from nightseg.data.table import frame_table, quarantine_table
from nightseg.metrics.confusion import confusion_matrix, scores
from nightseg.metrics.seeds import over_seeds
from nightseg.storage import Attempt, Commit, Location, Workspace, sha256_of

CLASSES = taxonomy("camvid11")
MODELS = {"day_only": 0.45, "day_only_longer": 0.4, "self_trained": 0.12}  # and how wrong they are
Draw = Callable[[int, str], tuple[np.ndarray, np.ndarray]]


def blocks(index: int, domain: str) -> tuple[np.ndarray, np.ndarray]:
    """A sky over a road, with a car; 16 x 32."""
    label = np.full((16, 32), 3, dtype=np.uint8)
    label[:6] = 0
    label[8:12, 4 + index : 10 + index] = 8
    image = CLASSES.colourize(label)
    return (image // 4 if domain == "night" else image), label


class MadeUpRun:
    """Writes commits like the stages do, and the results.json that goes with them."""

    def __init__(self, folder: Location, draw: Draw = blocks, num_frames: int = 5) -> None:
        self.folder, self.draw, self.num_frames = folder, draw, num_frames
        self.random = np.random.default_rng(7)
        self.workspace = Workspace(folder)
        self.commits: dict[str, Commit] = {}
        day = self.collect("day", "day")
        self.collect("street", "night")
        night = self.collect("night_test", "night", bad=3)
        self.translate("day_at_night", day)
        for model in MODELS:
            self.simple("train_segmenter", model, seconds=210.0)
        self.pseudo_label("self_trained")
        for model, noise in MODELS.items():
            self.evaluate(model, "night", night, noise)
            self.evaluate(model, "day", day, noise / 3)
        self.predict("dusk", night)
        self.evaluate_translation("day_at_night", day)
        self.results = self.gather()

    def attempt(self, stage: str, name: str) -> Attempt:
        return self.workspace.stage(stage, name, version=1, recipe={}, inputs={}, seed=0).open()

    def keep(self, commit: Commit) -> Commit:
        self.commits[f"{commit.stage}/{commit.name}"] = commit
        return commit

    def simple(self, stage: str, name: str, seconds: float = 1.0) -> None:
        self.keep(self.attempt(stage, name).finish(rows_in=10, rows_out=10, seconds=seconds))

    def table(self, attempt: Attempt, name: str, table: pa.Table) -> str:
        (attempt.folder / f"{name}.parquet").write_table(table)
        return f"{name}.parquet"

    def write(self, attempt: Attempt, path: str, data: bytes) -> str:
        (attempt.folder / path).write_bytes(data)
        return path

    def collect(self, name: str, domain: str, bad: int = 0) -> list[dict[str, Any]]:
        attempt, rows = self.attempt("collect", name), []
        for index in range(self.num_frames):
            image, label = self.draw(index, domain)
            data = encode_png(image)
            rows.append(
                {
                    "frame_id": f"{name}/{index:03d}",
                    "uri": self.write(attempt, f"images/{index:03d}.png", data),
                    "label_uri": self.write(attempt, f"labels/{index:03d}.png", encode_png(label, CLASSES.palette)),
                    "dataset": name,
                    "domain": domain,
                    "height": image.shape[0],
                    "width": image.shape[1],
                    "sha256": sha256_of(data),
                    "label_encoding": "camvid12",
                }
            )
        broken = [
            {"frame_id": f"{name}/broken {index}", "uri": "/nowhere", "reason": reason, "detail": detail}
            for index, (reason, detail) in enumerate(
                [("truncated", "OSError: image file is truncated"), ("zero_bytes", "the file is empty"),
                 ("wrong_mode", "mode I;16 <script>alert(1)</script> & 16 bits")][:bad]
            )
        ]  # fmt: skip
        outputs = [self.table(attempt, "frames", frame_table(rows))]
        outputs.append(self.table(attempt, "quarantine", quarantine_table(broken)))
        self.keep(
            attempt.finish(rows_in=len(rows) + bad, rows_out=len(rows), quarantined=bad, outputs=outputs, seconds=2.5)
        )
        return [
            row | {"uri": f"{attempt.folder}/{row['uri']}", "label_uri": f"{attempt.folder}/{row['label_uri']}"}
            for row in rows
        ]

    def translate(self, name: str, source: list[dict[str, Any]]) -> None:
        attempt, rows = self.attempt("translate", name), []
        for index, row in enumerate(source):
            image, _ = self.draw(index, "night")
            uri = self.write(attempt, f"images/{index:03d}.png", encode_png(image))
            changed = {"frame_id": f"{name}/{row['frame_id']}", "uri": uri, "dataset": name, "domain": "night"}
            rows.append({**row, **changed})
        outputs = [self.table(attempt, "frames", frame_table(rows))]
        self.keep(attempt.finish(rows_in=len(rows), rows_out=len(rows), outputs=outputs, seconds=31.0))

    def guess(self, label: np.ndarray, noise: float) -> np.ndarray:
        """The label with blocks of it replaced: what a model might say."""
        height, width = label.shape
        coarse = (-(-height // 8), -(-width // 8))
        wrong = self.random.random(coarse) < noise * self.random.uniform(0.3, 1.7)
        instead = self.random.choice([0, 1, 3, 4, 5, 8], size=coarse).astype(np.uint8)
        grow = np.ones((8, 8), dtype=np.uint8)
        return np.where(np.kron(wrong, grow)[:height, :width], np.kron(instead, grow)[:height, :width], label)

    def pseudo_label(self, name: str) -> None:
        at, frames, labels, stored = self.attempt("label", f"day_night.{name}"), [], [], []
        source = self.commits["collect/street"]
        predicted, kept = np.zeros(11, dtype=np.int64), np.zeros(11, dtype=np.int64)
        for index, row in enumerate(source.table("frames").to_pylist()):
            _, label = self.draw(index, "night")
            label = np.where(label == 255, 3, label).astype(np.uint8)[::4, ::4]
            sure = self.random.random(label.shape)
            before, after = (np.bincount(part.ravel(), minlength=256)[:11] for part in (label, label[sure > 0.3]))
            predicted, kept = predicted + before, kept + after
            stored.append(packed(StoredLabel(label, (sure * 255).astype(np.uint8), label.shape)))
            row["uri"] = (source.folder / row["uri"]).uri
            row["label_sha256"] = sha256_of(stored[-1]["label"])
            frames.append({**row, "label_uri": place_of("labels/x.parquet", index), "label_encoding": "train_ids"})
            labels.append(
                {
                    "frame_id": row["frame_id"],
                    "kept": float((sure > 0.3).mean()),
                    "counts": before.tolist(),
                    "kept_counts": after.tolist(),
                }
            )
        (at.folder / "labels/x.parquet").write_table(pa.Table.from_pylist(stored, STORED_SCHEMA))
        outputs = [self.table(at, "frames", frame_table(frames)), "labels"]
        self.keep(at.finish(rows_in=len(frames), rows_out=len(frames), outputs=outputs, seconds=8.0))
        attempt = self.attempt("pseudo_label", name)
        (attempt.folder / "kept.json").write_bytes(Kept((77,) * 11).text.encode())
        self.evidence = {
            "teacher": {"name": "day_night", "key": "0" * 64},
            "labels": f"label/day_night.{name}",
            "threshold": {"kind": "class_balanced", "confidence": 0.9, "share": 0.6},
            "frames": len(frames),
            "pixels": int(predicted.sum()),
            "kept_share": float(kept.sum() / predicted.sum()),
            "by_class": {
                name: {"predicted": int(p), "kept": int(k), "kept_share": k / p if p else None, "threshold": 0.3}
                for name, p, k in zip(CLASSES.classes, predicted, kept, strict=True)
            },
            "warnings": ["the teacher never predicts sign and fence on these frames"],
        }
        outputs = [self.table(attempt, "labels", pa.Table.from_pylist(labels)), "kept.json"]
        self.keep(attempt.finish(rows_in=len(frames), rows_out=len(frames), outputs=outputs, seconds=0.1))

    def evaluate(self, model: str, test: str, source: list[dict[str, Any]], noise: float) -> None:
        attempt, rows = self.attempt("evaluate", f"{model}.{test}"), []
        total = np.zeros((11, 11), dtype=np.int64)
        for index, row in enumerate(source):
            label = CLASSES.to_train_ids(self.draw(index, row["domain"])[1], "camvid12")
            guess = self.guess(np.where(label == 255, 3, label).astype(np.uint8), noise)
            matrix = confusion_matrix(label, guess, 11)
            total += matrix
            uri = self.write(attempt, f"masks/{index:03d}.png", encode_png(guess, CLASSES.palette))
            counts = matrix.ravel().tolist()
            rows.append({**row, "prediction_uri": uri, "confusion": counts, "test_sets": [test]})
        found = scores(total)
        record = {key: getattr(found, key) for key in ("pa", "ca", "miou", "fwiou")}
        iou = {n: None if np.isnan(v) else v for n, v in zip(CLASSES.classes, found.iou, strict=True)}
        record |= {"iou": iou, "confusion": total.tolist(), "frames": len(rows), "absent_class": "cityscapes"}
        (attempt.folder / "scores.json").write_json(record)
        extra = {"prediction_uri": pa.string(), "confusion": pa.list_(pa.int64()), "test_sets": pa.list_(pa.string())}
        outputs = [self.table(attempt, "predictions", frame_table(rows, extra=extra)), "scores.json"]
        self.keep(attempt.finish(rows_in=len(rows), rows_out=len(rows), outputs=outputs, seconds=6.0))

    def predict(self, name: str, source: list[dict[str, Any]]) -> None:
        attempt, rows = self.attempt("predict", name), []
        for index, row in enumerate(source):
            guess = self.guess(np.minimum(self.draw(index, "night")[1], 8), 0.1)
            uri = self.write(attempt, f"masks/{index:03d}.png", encode_png(guess, CLASSES.palette))
            rows.append({**row, "prediction_uri": uri, "mean_confidence": 0.83})
        extra = {"prediction_uri": pa.string(), "mean_confidence": pa.float64()}
        outputs = [self.table(attempt, "predictions", frame_table(rows, extra=extra))]
        self.keep(attempt.finish(rows_in=len(rows), rows_out=len(rows), outputs=outputs, seconds=1.0))

    def evaluate_translation(self, name: str, source: list[dict[str, Any]]) -> None:
        """The segmenter day_only saw source and translation; frame i of the latter is 60 + 5 i percent as it was."""
        made = [{**row, "frame_id": f"{name}/{row['frame_id']}"} for row in source]
        self.predict("day_only.day", source)
        self.predict(f"day_only.{name}", made)
        rows = [
            {"frame_id": row["frame_id"], "source_id": before["frame_id"], "agreement": 0.6 + 0.05 * i, "edges": 0.71}
            for i, (row, before) in enumerate(zip(made, source, strict=True))
        ]
        attempt = self.attempt("evaluate_translation", name)
        outputs = [self.table(attempt, "frame_scores", pa.Table.from_pylist(rows))]
        self.keep(attempt.finish(rows_in=len(rows), rows_out=len(rows), outputs=outputs, seconds=2.0))

    # -- results.json ------------------------------------------------------------------------------------------------

    def gather(self) -> dict[str, Any]:
        street = [
            row | {"uri": f"{self.commits['collect/street'].folder}/{row['uri']}"}
            for row in self.commits["collect/street"].table("frames").to_pylist()
        ]
        return {
            "nightseg": "0.1.0",
            "recipe": "demo",
            "seed": 3,
            "taxonomy": {
                "name": "camvid11", "classes": list(CLASSES.classes), "palette": [list(c) for c in CLASSES.palette],
                "encodings": {key: {str(raw): i for raw, i in ids.items()} for key, ids in CLASSES.encodings.items()},
            },
            "versions": {"python": "3.11.2", "nightseg": "0.1.0", "torch": "2.14.1"},
            "hardware": {"machine": "x86_64", "cpus": 2, "system": "Linux"},
            "models": {
                "self_trained": self.model("self_trained", "street"),
                "day_only": self.model("day_only", None),
                "day_only_longer": self.model("day_only_longer", None),
            },
            "datasets": {"day": ["collect/day"], "night": ["collect/street:night"]},
            "splits": {"street": self.split_evidence(street)},
            "selections": {"self_trained": {"node": "select/self_trained", "evidence": self.selection(street)}},
            "pseudo_labels": {"self_trained": {"node": "pseudo_label/self_trained", "evidence": self.evidence}},
            "predictions": {"dusk": {"node": "predict/dusk", "dataset": "night_test", "model": "self_trained"}},
            "translations": {"day_at_night": self.translation_scores()},
            "quarantine": [
                {"stage": "collect", "name": "night_test", **row}
                for row in self.commits["collect/night_test"].table("quarantine").to_pylist()
            ],
            "commits": {node: self.facts(commit) for node, commit in self.commits.items()},
            "seconds": {node: commit.seconds for node, commit in self.commits.items()},
        }  # fmt: skip

    def model(self, name: str, pool: str | None) -> dict[str, Any]:
        published = {"night": ("7.1", 38.8), "day": ("", None)} if pool else {"night": ("", None), "day": ("", None)}
        learning = {"pool": pool, "teacher": None, "select": {"method": "pooled", "count": 160}} if pool else None
        return {
            "model": f"train_segmenter/{name}",
            "start": "day_night" if pool else "imagenet",
            "parents": ["day_night"] if pool else [],
            "about": "",
            "train": ["day", "day_at_night"] if pool else ["day"],
            "root": "imagenet",
            "line": ["day_only", name] if name != "day_only" else [name],
            "steps_in_all": 120 if name == "day_only" else 240,
            "frames_in_all": 960 if name == "day_only" else 1920,
            "network": {"encoder": "resnet18"},
            "training": {"batch": 8, "epochs": 2},
            "learned": {"domains": ["day"], "translated": bool(pool), "pool": bool(pool), "day_only": not pool},
            "loss": {"kind": "combined" if pool else "cross_entropy", "alpha": 0.5, "gamma": 2.0, "focal_weight": 1.0},
            "self_training": learning,
            "tests": {
                test: scores
                | over_seeds({0: scores, 1: scores | {"miou": scores["miou"] + (0.04 if pool else 0.01)}})
                | {"row": row, "published_miou": number, "node": f"evaluate/{name}.{test}"}
                for test, (row, number) in published.items()
                for scores in [self.commits[f"evaluate/{name}.{test}"].json("scores.json")]
            },
        }

    def translation_scores(self) -> dict[str, Any]:
        return {
            "node": "evaluate_translation/day_at_night",
            "translator": "unit", "kind": "unit", "to": "night", "source": "day", "real": "night",
            "segmenter": "day_only",
            "fid": {"translated": 61.25, "source": 98.5}, "kid": {"translated": 0.0123, "source": 0.0456},
            "kid_deviation": {"translated": 0.001, "source": 0.002}, "extractor": "efficientnet_lite0",
            "resize": "clean", "compared": {"translated": 5, "source": 5, "real": 5},
            "frames": 5, "labelled": 5, "has_back_translation": True,
            "miou": {"source": 0.55, "translated": 0.31, "back": 0.44}, "survival": 0.8,
            "agreement": {"pixels": 0.7, "miou": 0.52}, "back_agreement": {"pixels": 0.81, "miou": 0.66},
            "edges": 0.71, "models": {"self_trained": {"night": 0.4, "day": 0.6}},
        }  # fmt: skip

    def facts(self, commit: Commit) -> dict[str, Any]:
        names = ("key", "content", "seconds", "rows_in", "rows_out", "quarantined", "created", "code", "summary")
        return {name: getattr(commit, name) for name in names} | {"folder": commit.folder.uri, "skipped": False}

    def split_evidence(self, street: list[dict[str, Any]]) -> dict[str, Any]:
        edges = np.linspace(-1, 1, 41)
        places = {"day": (0.62, 0.17, 340), "night": (-0.6, 0.16, 310), "twilight": (0.0, 0.12, 60)}
        counts = {
            name: np.histogram(np.clip(self.random.normal(mean, sd, number), -1, 1), edges)[0].tolist()
            for name, (mean, sd, number) in places.items()
        }
        x = np.linspace(0, 1, 64)
        shapes = {"day": (0.55, 0.2), "night": (0.12, 0.09), "twilight": (0.33, 0.12)}
        curves = {name: np.exp(-(((x - mean) / sd) ** 2)) for name, (mean, sd) in shapes.items()}
        return {
            "margin": 0.2,
            "counts": {"day": 340, "night": 310, "twilight": 60},
            "histograms": {name: (curve / curve.sum()).tolist() for name, curve in curves.items()},
            "scores": {"edges": edges.tolist(), "counts": counts},
            "examples": {},
            "borderline": [{**row, "score": -0.19, "margin": 0.19 + 0.01 * i} for i, row in enumerate(street)],
        }

    def selection(self, street: list[dict[str, Any]]) -> dict[str, Any]:
        values = np.sort(self.random.gamma(6, 9, 310))
        edges = np.histogram_bin_edges(values, 40)
        rows = [{"frame_id": row["frame_id"], "uri": row["uri"], "score": 20.0 + i} for i, row in enumerate(street)]
        return {
            "method": "pooled",
            "count": 160,
            "pool": 310,
            "reference": 200,
            "extractor": "efficientnet_lite0",
            "resize": "clean",
            "fid": {"selection": 41.2, "random_mean": 47.9, "random_sd": 0.8, "random_draws": 20, "pool": 44.0,
                    "selection_biased": 40.9, "lower_bound": 40.7},
            "duplicates": 3,
            "rules": {"quota": None, "gap": None, "duplicates": 0.99},
            "curve": {"counts": [16, 160, 310], "fid": [61.0, 41.2, 44.0]},
            "plane": {"share": [0.3, 0.1], "points": {
                "pool": self.random.normal(size=(310, 2)).tolist(),
                "chosen": self.random.normal(size=(160, 2)).tolist(),
                "reference": self.random.normal(size=(200, 2)).tolist(),
            }},
            "scores": {
                "edges": edges.tolist(),
                "pool": np.histogram(values, edges)[0].tolist(),
                "chosen": np.histogram(values[:160], edges)[0].tolist(),
            },
            "cut": float(values[159]),
            "best": rows[:3], "last_chosen": rows[2:4], "first_left_out": rows[3:], "worst": rows[-2:],
        }  # fmt: skip


@pytest.fixture(scope="session")
def made_up_run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    return MadeUpRun(Location.of(tmp_path_factory.mktemp("run")))
