"""Split and select from the command line, on real frames through Ray; and what is refused before Ray starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from nightseg.cluster.settings import MapCompute
from nightseg.data.images import encode_png
from nightseg.data.scenes.street import scene
from nightseg.pipeline import single
from nightseg.progress import SilentProgress
from nightseg.selection.settings import Extraction, Selection
from nightseg.storage import Location, UserError

COMPUTE = MapCompute(actors=0, batch=4, shard_rows=16)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four day and four night scenes, a broken image, and a file that is none."""
    folder = tmp_path_factory.mktemp("pool")
    for index in range(8):
        domain = "day" if index < 4 else "night"
        drawn = scene(0, index, domain, 32, 64)
        (folder / f"{domain} {index}.png").write_bytes(encode_png(drawn.image))
    (folder / "broken.png").write_bytes(encode_png(scene(0, 9, "day", 32, 64).image)[:60])
    (folder / "notes.txt").write_text("not a frame")
    return folder


def choose(pool: Path, out: Path, method: str = "histogram", reference: Path | None = None) -> dict[str, object]:
    selection = Selection(method=method, count=3, extractor=Extraction(name="efficientnet_lite0"))
    near = str(reference) if reference else None
    return single.select_frames(
        str(pool), near, str(out), selection=selection, seed=0, compute=COMPUTE, progress=SilentProgress()
    )


def test_a_pool_is_split_into_a_frame_table_with_its_evidence(pool: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "frames.parquet"
    found = single.split_folder(str(pool), str(out), margin=0.1, compute=COMPUTE, progress=SilentProgress())
    frames = Location.of(out).read_table()
    domains = dict(zip(frames["frame_id"].to_pylist(), frames["domain"].to_pylist(), strict=True))
    assert len(domains) == 8
    assert {domain for name, domain in domains.items() if "day" in name} == {"day"}
    assert {domain for name, domain in domains.items() if "night" in name} == {"night"}
    assert all(Path(uri).exists() for uri in frames["uri"].to_pylist())
    assert found == {"domains": {"day": 4, "night": 4}, "frames": str(out), "quarantined": 1}
    bad = Location.of(out.parent / "frames.quarantine.parquet").read_table().to_pylist()
    assert [Path(row["uri"]).name for row in bad] == ["broken.png"] and bad[0]["reason"] == "truncated"
    assert Location.of(out.parent / "frames.evidence.json").read_json()["margin"] == 0.1
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "frames.evidence.json", "frames.parquet", "frames.quarantine.parquet"
    ]  # fmt: skip


def test_the_frames_closest_to_the_reference_are_chosen(tmp_path: Path) -> None:
    pool, reference = tmp_path / "pool", tmp_path / "reference"
    for folder, levels in ((pool, (10, 40, 80, 90, 100, 160, 220)), (reference, (88, 92))):
        folder.mkdir()
        for level in levels:
            (folder / f"{level}.png").write_bytes(encode_png(np.full((16, 32, 3), level, np.uint8)))
    found = choose(pool, tmp_path / "chosen", reference=reference)
    frames = Location.of(tmp_path / "chosen/frames.parquet").read_table()
    assert frames["rank"].to_pylist() == [1, 2, 3]
    assert frames["frame_id"].to_pylist()[0] == "pool/90"
    assert set(frames["frame_id"].to_pylist()) == {"pool/80", "pool/90", "pool/100"}
    assert Location.of(tmp_path / "chosen/scores.parquet").read_table().num_rows == 7
    assert Location.of(tmp_path / "chosen/evidence.json").read_json()["method"] == "histogram"
    assert found.keys() == {"method", "chosen", "pool", "fid", "out"} and not (tmp_path / "chosen/.work").exists()
    assert (found["chosen"], found["pool"], found["out"]) == (3, 7, str(tmp_path / "chosen"))


def test_a_frame_table_made_by_hand_can_be_a_pool(pool: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in pool.glob("day*.png"))
    table = pa.table({"frame_id": names, "uri": [str(pool / name) for name in names]})
    Location.of(tmp_path / "pool.parquet").write_table(table)
    choose(tmp_path / "pool.parquet", tmp_path / "chosen", method="random")
    chosen = Location.of(tmp_path / "chosen/frames.parquet").read_table()["frame_id"].to_pylist()
    assert len(set(chosen)) == 3 and set(chosen) <= set(names)


def test_what_was_done_is_kept_for_the_next_try(pool: Path, tmp_path: Path) -> None:
    small = tmp_path / "pool"
    small.mkdir()
    for path in [pool / "broken.png", *sorted(pool.glob("day*.png"))[:2]]:
        (small / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="the pool has 2 frames, 3 were asked for"):
        choose(small, tmp_path / "chosen", method="random")
    assert (tmp_path / "chosen/.work/stages/score").is_dir()  # the frames need not be looked at again


def test_of_frames_that_are_all_bad_the_first_are_told_with_their_reasons(pool: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in "ab":
        (bad / f"{name}.png").write_text("hello")
    (bad / "c.png").write_bytes((pool / "broken.png").read_bytes())
    out = str(tmp_path / "frames.parquet")

    def split() -> object:
        return single.split_folder(str(bad), out, margin=0.1, compute=COMPUTE, progress=SilentProgress())

    for work in (split, lambda: choose(bad, tmp_path / "chosen", method="random")):
        with pytest.raises(UserError) as caught:
            work()
        lines = str(caught.value).split("\n")
        assert lines[0] == "collect/pool: none of the 3 frames can be used (2 not_an_image, 1 truncated)"
        assert {line.split(": ")[0].strip() for line in lines[1:]} == {str(bad / f"{name}.png") for name in "abc"}
        assert "Cure: mend what these lines say" in lines[-1] and "quarantine" not in str(caught.value)
    (bad / "a.png").write_bytes(next(pool.glob("day*.png")).read_bytes())
    split()
    with pytest.raises(UserError, match="the pool has 1 frames, 3 were asked for"):  # not that of before
        choose(bad, tmp_path / "chosen", method="random")


# -- before Ray starts ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from nightseg.cluster import ray as cluster

    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray must not start"))


@pytest.mark.usefixtures("no_ray")
def test_wrong_requests_leave_nothing_behind(pool: Path, tmp_path: Path) -> None:
    out, few = tmp_path / "out", tmp_path / "few.parquet"
    Location.of(few).write_table(pa.table({"frame_id": ["a", "b"], "uri": ["/a.png", "/b.png"]}))
    for frames, method, reference, message in (
        (few, "random", None, "count 3: the pool .* has 2 frames"),
        (pool, "histogram", None, "method histogram needs a reference"),
        (tmp_path / "nowhere", "random", None, "no such folder"),
        (tmp_path / "no.parquet", "random", None, "there is no such frame table"),
        (pool, "pooled", tmp_path / "nowhere", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            choose(frames, out, method, reference)
    with pytest.raises(UserError) as refused:
        choose(tmp_path / "nowhere", out, "pooled", tmp_path / "no.parquet")
    assert [str(problem).partition(": ")[2] for problem in refused.value.problems] == [
        f"{tmp_path}/nowhere. Cure: check the path.", "there is no such frame table. Cure: check the path.",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"(?s)2 problems:.*ends in \.parquet.*no such folder"):
        single.split_folder(str(tmp_path / "nowhere"), "a.csv", margin=0.1, compute=COMPUTE, progress=SilentProgress())
    for images, table, message in ((tmp_path / "nowhere", "a.parquet", "no such folder"), (pool, "a.csv", "ends in")):
        with pytest.raises(UserError, match=message):
            single.split_folder(str(images), str(out / table), margin=0.1, compute=COMPUTE, progress=SilentProgress())
    assert not out.exists()


@pytest.mark.usefixtures("no_ray")
def test_weights_that_are_not_at_hand_are_missed_before_a_frame_is_read(pool: Path, tmp_path: Path) -> None:
    selection = Selection(method="random", count=3, extractor=Extraction(weights="/no/weights.pth"))
    with pytest.raises(UserError, match=r"there is no weights file /no/weights\.pth"):
        single.select_frames(
            str(pool),
            None,
            str(tmp_path / "o"),
            selection=selection,
            seed=0,
            compute=COMPUTE,
            progress=SilentProgress(),
        )
