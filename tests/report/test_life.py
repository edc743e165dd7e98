"""The life of a frame, as the commits of a run tell it: committed by hand, so that every answer is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.stored_labels import STORED_SCHEMA, Kept, StoredLabel, packed, place_of
from nightseg.data.table import frame_table, quarantine_table
from nightseg.report.life import Life, frame_ids, life_of
from nightseg.report.life_page import life_page, lines
from nightseg.storage import Commit, Location, UserError, Workspace, sha256_of

CLASSES = taxonomy("camvid11")
NAMES = {"classes": list(CLASSES.classes)}
ROAD, SKY = CLASSES.classes.index("road"), CLASSES.classes.index("sky")
WEIRD = 'drive 1/<img src=x onerror="alert(1)">'
# name in the pool -> sequence, domain by the split, margin, score of the selection (None: it repeats a), rank
POOL: dict[str, tuple[str, str, float, float | None, int | None]] = {
    "a": ("one", "night", 0.5, 1.0, 1),
    "b": ("one", "night", 0.5, 2.0, None),
    "c": ("one", "night", 0.5, 6.0, None),
    "copy": ("one", "night", 0.5, None, None),
    WEIRD: ("two", "night", 0.25, 4.0, 2),
    "late": ("two", "night", 0.5, 9.0, None),
    "noon": ("two", "day", 0.5, None, None),
    "dusk": ("two", "twilight", 0.15, None, None),
}


class Made:
    """A run of one pool, a labelled set, its translation, a selection with a gap, two models and their scores."""

    def __init__(self, folder: Path) -> None:
        self.outside, self.root = folder / "pool", Location.of(folder / "run")
        self.workspace, self.commits = Workspace(self.root), dict[str, Commit]()
        self.model_facts: dict[str, Any] = {}
        self.collect()
        self.choose()
        self.learn()

    @property
    def results(self) -> dict[str, Any]:
        told = ("key", "created", "rows_in", "quarantined", "summary")
        encodings = {name: {str(raw): ids[raw] for raw in ids} for name, ids in CLASSES.encodings.items()}
        palette = [list(color) for color in CLASSES.palette]
        return {
            "taxonomy": {"name": "camvid11", **NAMES, "palette": palette, "encodings": encodings},
            "models": {},
            "commits": {
                node: {"folder": commit.folder.uri} | {name: getattr(commit, name) for name in told}
                for node, commit in self.commits.items()
            },
        }

    def life(self, name: str, model: str | None = None) -> Life:
        return life_of(self.root, self.results, name, model)

    def text(self, name: str, model: str | None = None) -> dict[str, str]:
        """What -> its lines."""
        found: dict[str, str] = {}
        for what, text in lines(self.life(name, model)):
            found[what] = f"{found[what]}\n{text}" if what in found else text
        return found

    def commit(
        self,
        node: str,
        recipe: dict[str, Any],
        tables: dict[str, pa.Table],
        files: dict[str, bytes] | None = None,
        evidence: Any = None,
        **summary: Any,
    ) -> None:
        stage, _, name = node.partition("/")
        attempt = self.workspace.stage(stage, name, version=1, recipe=recipe, inputs={}, seed=0).open()
        files = dict(files or {}) | ({} if evidence is None else {"evidence.json": json.dumps(evidence).encode()})
        for path, data in files.items():
            (attempt.folder / path).write_bytes(data)
        for table, rows in tables.items():
            (attempt.folder / f"{table}.parquet").write_table(rows)
        bad = tables["quarantine"].num_rows if "quarantine" in tables else 0
        self.commits[node] = attempt.finish(
            rows_in=9 + bad, rows_out=9, quarantined=bad, outputs=[*files, *(f"{t}.parquet" for t in tables)],
            summary=summary,
        )  # fmt: skip

    def collect(self) -> None:
        self.outside.mkdir()
        pool = []
        for index, (name, (sequence, *_)) in enumerate(POOL.items()):
            data = encode_png(np.full((8, 16, 3), 20 + index, dtype=np.uint8))
            file = self.outside / f"{name.replace('/', ' ')}.png"
            file.write_bytes(data)
            pool.append(self.row(f"pool/{name}", str(file), data) | {"sequence": sequence})
        (self.outside / "bad.png").write_bytes(b"")
        bad = {"frame_id": "pool/bad", "uri": f"{self.outside}/bad.png", "reason": "zero_bytes", "detail": "empty"}
        self.commit("collect/pool", {}, {"frames": frame_table(pool), "quarantine": quarantine_table([bad])})
        image, label = np.full((8, 16, 3), 200, dtype=np.uint8), np.full((8, 16), ROAD, dtype=np.uint8)
        labelled = self.row("day/0", "images/0.png", encode_png(image))
        labelled |= {"label_uri": "labels/0.png", "label_encoding": "train_ids", "domain": "day"}
        files = {"images/0.png": encode_png(image), "labels/0.png": encode_png(label)}
        self.commit("collect/day", {}, {"frames": frame_table([labelled])}, files)
        self.pool = [row | {"domain": POOL[name][1]} for name, row in zip(POOL, pool, strict=True)]
        margins = [facts[2] for facts in POOL.values()]
        rows = [row | {"score": -m, "margin": m} for row, m in zip(self.pool, margins, strict=True)]
        scored = {"score": pa.float64(), "margin": pa.float64()}
        self.commit("split/pool", {"margin": 0.2, "pool": ["collect/pool"]}, {"frames": frame_table(rows, scored)})
        night = self.row("day_at_night/day/0", "images/0.png", encode_png(image // 8))
        recipe = {"source": ["collect/day"], "translator": {"kind": "photometric"}}
        night |= {"label_uri": f"{self.commits['collect/day'].folder}/labels/0.png", "label_encoding": "train_ids"}
        refused = {"frame_id": "day_at_night/day/1", "uri": "/nowhere", "reason": "missing", "detail": "no file"}
        tables = {"frames": frame_table([night]), "quarantine": quarantine_table([refused])}
        files = {"images/0.png": encode_png(image // 8)}
        self.commit("translate/day_at_night", recipe, tables, files, translator="photometric", to="night")

    def row(self, name: str, uri: str, data: bytes) -> dict[str, Any]:
        facts = {"dataset": name.partition("/")[0], "domain": "unknown", "width": 16, "height": 8, "bytes": len(data)}
        return {"frame_id": name, "uri": uri, "sha256": sha256_of(data), **facts}

    def choose(self) -> None:
        night = [(f"pool/{name}", *facts) for name, facts in POOL.items() if facts[1] == "night"]
        scores = [
            {"frame_id": name, "score": score, "rank": rank, "repeats": None if score else "pool/a"}
            for name, _, _, _, score, rank in night
        ]
        selection = {"method": "pooled", "count": 2, "gap": 2, "duplicates": 0.9}
        recipe = {"pool_frames": ["split/pool:night"], "reference_scores": "score/day_at_night", "selection": selection}
        self.commit("score/day_at_night", {"frames": ["translate/day_at_night"]}, {})
        evidence = {"method": "pooled", "cut": 4.0, "count": 2}
        chosen = frame_table([row for row in self.pool if row["frame_id"] in ("pool/a", f"pool/{WEIRD}")])
        tables = {"scores": pa.Table.from_pylist(scores), "frames": chosen}
        self.commit("select/second", recipe, tables, evidence=evidence)
        by_class = {name: {"threshold": 0.5} for name in CLASSES.classes}
        threshold = {"kind": "fixed", "confidence": 0.5}
        evidence = {"teacher": {"name": "first"}, "threshold": threshold, "by_class": by_class}
        counts = np.zeros(11, dtype=np.int64)
        counts[[ROAD, SKY]] = 96, 32
        label = np.full((8, 16), ROAD, dtype=np.uint8)
        stored = packed(StoredLabel(label, np.full((8, 16), 200, dtype=np.uint8), (8, 16)))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([stored], STORED_SCHEMA), sink)
        taught = chosen.to_pylist()[0] | {"label_uri": place_of("labels/x.parquet", 0), "label_encoding": "train_ids"}
        self.commit(
            "label/first.night.second",
            {"frames": ["select/second"], "teacher": "train_segmenter/first", "taxonomy": NAMES},
            {"frames": frame_table([taught])},
            {"labels/x.parquet": sink.getvalue().to_pybytes()},
        )
        labels = {
            "frame_id": "pool/a", "kept": 0.75, "mean_confidence": 0.623, "counts": counts.tolist(),
            "kept_counts": np.where(np.arange(11) == ROAD, counts, 0).tolist(),
        }  # fmt: skip
        self.commit(
            "pseudo_label/second",
            {"labels": "label/first.night.second", "taxonomy": NAMES},
            {"labels": pa.Table.from_pylist([labels])},
            {"kept.json": Kept((128,) * 11).text.encode()},
            evidence | {"labels": "label/first.night.second"},
        )

    def learn(self) -> None:
        first = {"train": {"day": ["collect/day"]}, "start": "scratch", "validate": ["collect/day"]}
        self.commit("train_segmenter/first", first, {})
        parts = {"day_at_night": ["translate/day_at_night"], "(pseudo-labels)": ["label/first.night.second"]}
        fresh = {"optics": ["collect/day"]}
        second = {"train": parts | fresh, "start": "train_segmenter/first", "fresh": {"optics": {}}}
        for name in ("second", "second.seed1"):
            self.commit(f"train_segmenter/{name}", second, {})
        online = {"train": {"day": ["collect/day"]}, "pool": ["split/pool:night"], "start": "train_segmenter/first"}
        self.commit("train_segmenter/taught", online, {})
        heir = {"frames": ["collect/day"], "start": "train_segmenter/taught"}
        self.commit("adapt_norms/heir", heir, {})
        confusion = np.zeros((11, 11), dtype=np.int64)
        confusion[ROAD, ROAD], confusion[ROAD, SKY] = 96, 32
        seen = {"prediction_uri": "m.png", "confusion": confusion.ravel().tolist(), "test_sets": ["day"]}
        columns = {
            "prediction_uri": pa.string(), "confusion": pa.list_(pa.int64()), "test_sets": pa.list_(pa.string())
        }  # fmt: skip
        commit = self.commits["collect/day"]
        row = commit.table("frames").to_pylist()[0] | seen
        row |= {"uri": f"{commit.folder}/images/0.png", "label_uri": f"{commit.folder}/labels/0.png"}
        mask = {"m.png": encode_png(np.full((8, 16), SKY, dtype=np.uint8))}
        recipe = {"model": "train_segmenter/first", "taxonomy": NAMES, "evaluation": {"absent_class": "cityscapes"}}
        self.commit("evaluate/first", recipe, {"predictions": frame_table([row], columns)}, mask)
        sure = {"prediction_uri": pa.string(), "mean_confidence": pa.float64()}
        rows = [row | {"prediction_uri": "m.png", "mean_confidence": 0.5} for row in self.pool[:1]]
        recipe = {"model": "train_segmenter/second", "frames": ["split/pool"]}
        self.commit("predict/night", recipe, {"predictions": frame_table(rows, sure)}, mask)


@pytest.fixture
def run(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_a_chosen_frame_is_told_from_its_file_to_its_prediction(run: Made) -> None:
    text, life = run.text("pool/a"), run.life("pool/a")
    assert text["file"] == f"{run.outside}/a.png, {life.source['bytes']} bytes, 16 x 8 pixels, as it was collected"
    assert text["sha256"] == sha256_of((run.outside / "a.png").read_bytes())
    assert text["dataset"] == "pool, domain unknown, sequence one"
    assert "night by split/pool: score -0.500" in text["split"] and "0.300 above the limit of 0.2" in text["split"]
    assert "chosen, rank 1 of 2, score 1 (place 1 of 5)" in text["selection"]
    assert text["pseudo-label"].startswith("second, by first: 75.0 % of the pixels kept, mean confidence 62.3 %; ")
    assert text["pseudo-label"].endswith("kept of road 100 % (of 75 % of the frame), sky 0 % (of 25 % of the frame)")
    assert text["learned by"].split("\n") == [
        "second, second.seed1: with its pseudo-label",
        "taught: pool of online self-training",
        "heir: through a model that it starts from or is taught by",
    ]
    assert text["prediction"] == "second on night: mean confidence 50.0 %"
    (label,) = life.pseudo_labels
    assert label["mean_confidence"] == 0.623
    assert label["by_class"]["road"] == {"share": 0.75, "kept": 1.0, "threshold": 0.5}


def test_why_a_frame_was_not_chosen(run: Made) -> None:
    why = {name: run.life(f"pool/{name}").selections[0]["why_not"] for name in POOL}
    assert why["a"] is None and why[WEIRD] is None
    assert why["b"] == "pool/a, 1 place away in its sequence, was chosen (gap 2)"
    assert why["copy"] == "it is a near duplicate of pool/a"
    assert why["c"] == why["late"] == "2 frames come before it: the last one that was chosen has the score 4"
    assert why["noon"] == "the pool is the night frames of split/pool, and this one is day"
    assert why["dusk"] == "the pool is the night frames of split/pool, and this one is twilight"
    assert "0.050 below the limit of 0.2" in run.text("pool/dusk")["split"]


def test_a_labelled_frame_its_translation_and_its_scores(run: Made) -> None:
    text, life = run.text("day/0"), run.life("day/0")
    assert text["translation"] == "day_at_night/day/0, by photometric"
    learned = text["learned by"].split("\n")
    assert "second: reference of this selection, as day_at_night/day/0" in learned
    assert "heir: batch norms were adapted to it" in learned
    assert "first, taught: with its label" in learned and "first: validation" in learned
    assert "second, second.seed1: translated, with the label of its source, as day_at_night/day/0" in learned
    assert "second, second.seed1: translated anew with every sample" in learned
    (seen,) = life.predictions
    # road: 96 of 128, sky: predicted and nowhere in the label, so 0 of 32
    assert seen["pa"] == 0.75 and seen["iou"] == {"road": 0.75, "sky": 0.0} and seen["miou"] == 0.375
    assert text["prediction"] == "first on day: 75.0 % of the pixels right, mIoU 37.5 %"
    made = run.text("day_at_night/day/0")
    assert made["made from"] == "day/0, by photometric"
    assert "second, second.seed1: translated, with the label of its source" in made["learned by"]


def test_a_refused_frame_has_a_reason(run: Made) -> None:
    assert run.text("pool/bad")["quarantine"] == "collect/pool: zero_bytes empty"
    assert run.text("day_at_night/day/1")["quarantine"] == "translate/day_at_night: missing no file"
    assert run.text("pool/bad")["file"] == f"{run.outside}/bad.png, still there"


def test_only_one_model(run: Made) -> None:
    of_second = run.life("pool/a", "second")
    assert {row["model"] for row in of_second.learned_by} == {"second", "second.seed1"}
    of_seed = run.life("pool/a", "second.seed1")
    assert {row["model"] for row in of_seed.learned_by} == {"second.seed1"} and of_seed.predictions == []
    assert of_seed.selections == of_second.selections != []
    assert run.life("day/0", "first").selections == [] and run.life("day/0", "taught").predictions == []
    with pytest.raises(UserError, match="none of this name, did you mean 'second'"):
        run.life("day/0", "secnd")


def test_a_file_that_is_not_what_was_collected_is_told(run: Made) -> None:
    (run.outside / "b.png").write_bytes(b"other")
    assert run.life("pool/b").source["file"] == "changed"
    (run.outside / "b.png").unlink()
    assert run.text("pool/b")["file"].endswith("gone since it was collected")


def test_a_commit_that_is_gone_is_left_out_and_named(run: Made) -> None:
    results = run.results
    run.commits["select/second"].folder.parent.delete()
    life = life_of(run.root, results, "pool/a")
    assert life.missing == ["select/second"] and life.selections == [] and life.pseudo_labels
    assert ("not there", "select/second: its commit is gone, so what it knew is left out") in lines(life)


def test_a_moved_run_tells_the_same(run: Made, tmp_path: Path) -> None:
    before, results = run.life("day/0"), run.results
    shutil.move(tmp_path / "run", tmp_path / "moved ü")
    after = life_of(Location.of(tmp_path / "moved ü"), results, "day/0")
    assert after.learned_by == before.learned_by and after.missing == []
    assert after.source["file"] == "unchanged" and "moved ü" in after.source["uri"]


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_frame_is_found_by_id_file_and_name(run: Made) -> None:
    for text in ("pool/copy", "copy", "copy.png", f"{run.outside}/copy.png", "pool/copy.png"):
        assert run.life(text).frame_id == "pool/copy"
    assert run.life("0").frame_id == "day/0", "a frame comes before its translations"
    assert run.life("day/0").frame_id == "day/0"
    label = f"{run.commits['collect/day'].folder}/labels/0.png"
    assert run.life(label).frame_id == "day/0"
    image = f"{run.commits['translate/day_at_night'].folder}/images/0.png"
    assert run.life(image).frame_id == "day_at_night/day/0"


def test_a_name_of_several_frames_is_asked_about(run: Made) -> None:
    again = run.row("other/copy", f"{run.outside}/copy.png", b"")
    run.commit("collect/other", {}, {"frames": frame_table([again])})
    for text in ("copy", f"{run.outside}/copy.png"):
        with pytest.raises(UserError, match=r"2 frames are called so: pool/copy, other/copy\. Cure: give an id; "):
            run.life(text)
    assert run.life("other/copy").frame_id == "other/copy"


@pytest.mark.parametrize(("text", "meant"), [("pool/cop", "pool/copy"), ("duks", "pool/dusk"), ("dya/0", "day/0")])
def test_an_unknown_frame_is_answered_with_what_was_meant(run: Made, text: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"no such frame, did you mean '{meant}'.*lists the ids"):
        run.life(text)


def test_ids_of_all_frames_are_listed(run: Made) -> None:
    ids = frame_ids(run.root, run.results)
    assert ids == sorted(ids) and {"pool/bad", "day/0", "day_at_night/day/0", f"pool/{WEIRD}"} < set(ids)


def test_a_run_without_frames_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such frame"):
        life_of(Location.of(tmp_path), {"models": {}, "commits": {}}, "a")


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_shows_every_picture_and_needs_no_network(run: Made) -> None:
    shown = life_page(run.root, run.results, run.life("day/0")).read_bytes().decode()
    for caption in ("frame", "label", "translation", "first sees", "over the frame"):
        assert f'alt="{caption}' in shown
    assert shown.count('src="data:') == shown.count("<img") == 5
    assert "default-src 'none'" in shown and "http" not in shown.replace("http-equiv", "")
    taught = life_page(run.root, run.results, run.life("pool/a")).read_bytes().decode()
    assert "pseudo-label for second" in taught and "confidence of first" in taught


def test_names_are_no_markup_and_no_way_out_of_the_folder(run: Made) -> None:
    page = life_page(run.root, run.results, run.life(f"pool/{WEIRD}"))
    assert "<img src=x" not in page.read_bytes().decode()
    assert page.uri.startswith(f"{run.root}/explained/pool/drive 1/")
