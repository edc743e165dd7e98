"""FID and KID of folders, frame tables and files of statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from nightseg.cluster.settings import MapCompute
from nightseg.pipeline.single import distance
from nightseg.progress import SilentProgress
from nightseg.selection.features import build_extractor
from nightseg.selection.frechet import Statistics, frechet_distance, kernel_distance, read_statistics, write_statistics
from nightseg.selection.settings import Extraction
from nightseg.storage import Location, UserError
from tests.frames_on_disk import folder_of, image

LITE0 = "efficientnet_lite0"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured(a: Path | str, b: Path | str, tmp_path: Path, **settings: Any) -> dict[str, Any]:
    how = {key: settings.pop(key) for key in ("mode", "resize") if key in settings}
    extraction = Extraction(name=settings.pop("extractor", LITE0), **how)
    settings = {"extraction": extraction, "progress": SilentProgress(), "compute": MapCompute(actors=0)} | settings
    return distance(str(a), str(b), work=Location.of(tmp_path / "work"), **settings)


def test_fid_of_folder_table_and_file_agree(tmp_path: Path) -> None:
    folder_of(tmp_path / "a" / "nested", range(5))
    table = folder_of(tmp_path / "b", range(5, 9))
    with_scores = table.append_column("margin", pa.array([0.5] * table.num_rows))  # as `split` writes it
    Location.of(tmp_path / "b.parquet").write_table(with_scores)
    got = measured(tmp_path / "a", tmp_path / "b.parquet", tmp_path)
    assert (got["n_a"], got["n_b"], got["extractor"], got["resize"]) == (5, 4, LITE0, "clean")
    features = [
        build_extractor(Extraction(name=LITE0))([image(seed) for seed in seeds]).astype(np.float64)
        for seeds in (range(5), range(5, 9))
    ]
    sides = [(rows.mean(0), np.cov(rows.T)) for rows in features]
    assert got["fid"] == pytest.approx(frechet_distance(*sides[0], *sides[1]), rel=1e-5)
    kernel = kernel_distance(*features)
    assert (got["kid"], got["kid_deviation"]) == (
        pytest.approx(kernel.kid, rel=1e-4),
        pytest.approx(kernel.deviation, rel=1e-4),
    )
    weights = build_extractor(Extraction(name=LITE0)).identity.weights_sha256
    write_statistics(Location.of(tmp_path / "b.npz"), Statistics(*sides[1], 4, LITE0, "clean", weights))
    half = measured(tmp_path / "a", tmp_path / "b.npz", tmp_path, save_statistics=(str(tmp_path / "a.npz"), None))
    assert half["fid"] == pytest.approx(got["fid"], rel=1e-5) and half["kid"] is None
    kept = measured(tmp_path / "a.npz", tmp_path / "b.npz", tmp_path)
    # The files go by a factored covariance. What rounding leaves of its null directions is cut off below d eps of the
    # largest; anything that is not cut off adds at most the root of that, for each of the 5 frames, to a distance that
    # is no smaller than a tenth of the traces.
    rounding = 10 * 2 * 5 * (1280 * np.finfo(np.float64).eps) ** 0.5
    assert kept["fid"] == pytest.approx(half["fid"], rel=rounding) and kept["n_a"] == 5
    assert measured(tmp_path / "a", tmp_path / "a", tmp_path)["fid"] == pytest.approx(0, abs=1e-6)
    assert not list((tmp_path / "work").iterdir())  # nothing is left behind


def test_fid_of_two_files_needs_no_network_and_no_weights(tmp_path: Path) -> None:
    for name, shift in (("a", 0.0), ("b", 2.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(6, shift), sigma=np.eye(6))
    got = measured(tmp_path / "a.npz", tmp_path / "b.npz", tmp_path, extractor="inception")
    sizes, kid = {"n_a": None, "n_b": None}, {"kid": None, "kid_deviation": None}
    making = {"extractor": "unknown", "resize": "unknown", "origin": {"a": "unknown", "b": "unknown"}}
    assert got == {"fid": pytest.approx(24), **sizes, **making, **kid}


def test_an_extractor_that_was_asked_for_is_not_ignored_beside_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    files = (tmp_path / "a.npz", tmp_path / "b.npz", tmp_path)
    assert measured(*files)["extractor"] == "unknown"
    assert measured(*files, extractor="inception", insist=True)["fid"] == 0.0
    with pytest.raises(UserError, match=r"a\.npz: .* 2048 dimensions, efficientnet_lite0 has 1280"):
        measured(*files, insist=True)
    for name in ("a", "b"):
        made = Statistics(np.zeros(2048), np.eye(2048), 9, "inception", "pytorch-fid", "")
        write_statistics(Location.of(tmp_path / f"{name}.npz"), made)
    with pytest.raises(UserError, match=r"a\.npz: .* made with inception, not with resnet50"):
        measured(*files, extractor="resnet50", insist=True)
    with pytest.raises(UserError, match=r"a\.npz: .* made with pytorch-fid, not with clean.*ask for a resize rule"):
        measured(*files, extractor="inception", resize="clean")


ORIGINS = [
    # what the file b says, what is asked for beside it: what is then known of b, and how; None: refused
    ({}, {}, ("inception", "pytorch-fid", "assumed")),
    ({}, {"resize": "clean"}, None),  # a is of pytorch-fid's rule
    ({}, {"extractor": "inception", "insist": True}, ("inception", "pytorch-fid", "assumed")),
    ({}, {"resize": "pytorch-fid"}, ("inception", "pytorch-fid", "assumed")),
    (
        {},
        {"extractor": "inception", "insist": True, "resize": "pytorch-fid"},
        ("inception", "pytorch-fid", "stated"),
    ),
    ({"extractor": "inception", "resize": "pytorch-fid"}, {}, ("inception", "pytorch-fid", "file")),
    ({"extractor": "resnet50"}, {}, None),
    ({"resize": "clean"}, {}, None),
]


@pytest.mark.parametrize(("fields", "asked", "known"), ORIGINS)
def test_what_a_file_does_not_say_is_stated_or_assumed_and_said(
    tmp_path: Path, fields: dict[str, str], asked: dict[str, Any], known: tuple[str, str, str] | None
) -> None:
    write_statistics(
        Location.of(tmp_path / "a.npz"), Statistics(np.zeros(2048), np.eye(2048), 9, "inception", "pytorch-fid", "")
    )
    np.savez(tmp_path / "b.npz", mu=np.ones(2048), sigma=np.eye(2048), **fields)
    files = (tmp_path / "a.npz", tmp_path / "b.npz", tmp_path)
    if known is None:
        with pytest.raises(UserError):
            measured(*files, **asked)
        return
    got = measured(*files, **asked, save_statistics=(None, str(tmp_path / "known.npz")))
    assert got["fid"] == pytest.approx(2048) and got["origin"] == {"a": "file", "b": known[2]}
    kept = read_statistics(Location.of(tmp_path / "known.npz"))
    assert (kept.extractor, kept.resize) == known[:2]


def test_a_file_that_says_nothing_is_not_taken_for_another_resize_rule(tmp_path: Path) -> None:
    """The public report: `fid clean.npz x.npz --resize clean`, where x holds mu and sigma alone."""
    write_statistics(
        Location.of(tmp_path / "clean.npz"), Statistics(np.zeros(2048), np.eye(2048), 9, "inception", "clean", "")
    )
    np.savez(tmp_path / "x.npz", mu=np.ones(2048), sigma=np.eye(2048))
    files = (tmp_path / "clean.npz", tmp_path / "x.npz", tmp_path)
    with pytest.raises(UserError, match=r"resize rule of .*clean\.npz is clean, of .*x\.npz unknown.*state what"):
        measured(*files)
    got = measured(*files, resize="clean")
    assert (got["resize"], got["origin"]) == ("clean", {"a": "file", "b": "assumed"})  # the extractor is assumed


def test_both_sets_are_looked_for_before_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)2 problems:.*no such folder: .*/x.*y\.npz: there is no such file"):
        measured(tmp_path / "x", tmp_path / "y.npz", tmp_path)
    with pytest.raises(UserError, match=r"^no such folder"):
        measured(tmp_path / "x", tmp_path / "x", tmp_path)


def test_fid_refuses_what_does_not_compare(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", range(2))
    np.savez(tmp_path / "pytorch_fid.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match=r"extractor of .*a is efficientnet_lite0"):
        measured(tmp_path / "a", tmp_path / "pytorch_fid.npz", tmp_path)
    folder_of(tmp_path / "one", range(1))
    with pytest.raises(UserError, match="one: it holds 1 frames, and a distance needs at least 2"):
        measured(tmp_path / "one", tmp_path / "a", tmp_path)
    for name in ("first", "second"):  # of two tables the wrong ones are named
        Location.of(tmp_path / f"{name}.parquet").write_table(pa.table({"frame_id": ["1", "1"], "uri": ["a", "b"]}))
    with pytest.raises(UserError, match=r"(?s)2 problems:.*first\.parquet: 1 frame ids .*second\.parquet: 1 frame"):
        measured(tmp_path / "first.parquet", tmp_path / "second.parquet", tmp_path)
    for missing in ("absent", "absent.parquet", "absent.npz"):
        with pytest.raises(UserError, match="absent"):
            measured(tmp_path / missing, tmp_path / "a", tmp_path)
    folder_of(tmp_path / "bad", range(2), broken=1)
    with pytest.raises(UserError, match="not_an_image"):
        measured(tmp_path / "bad", tmp_path / "a", tmp_path)


def test_one_bad_frame_of_seven_is_left_out_if_so_many_are_allowed(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", range(7), broken=1)
    folder_of(tmp_path / "b", range(7, 10))
    sides = (tmp_path / "a", tmp_path / "b", tmp_path)
    with pytest.raises(UserError, match=r"(?s)1 of 8 frames.*max_bad_fraction to 0\.125 or more"):
        measured(*sides)
    assert measured(*sides, max_bad_fraction=0.125)["n_a"] == 7
