"""What is held back from standard error is one line, and only that."""

from __future__ import annotations

import os

import pytest

from nightseg.cluster import ray as cluster
from nightseg.cluster.ray import _stderr_without, wants_logs


def test_other_lines_get_through(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), _stderr_without(b"noise"):
        os.write(2, b"before\nsome noise here\nafter, without an end")
        raise KeyError
    os.write(2, b"!\n")
    assert capfd.readouterr().err == "before\nafter, without an end!\n"


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("True", True), ("0", False), (None, False)])
def test_rays_own_switch_brings_the_logs_back(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool
) -> None:
    if value is None:
        monkeypatch.delenv("RAY_LOG_TO_DRIVER", raising=False)
    else:
        monkeypatch.setenv("RAY_LOG_TO_DRIVER", value)
    assert wants_logs() is expected


def test_statistics_of_ray_data_that_fail_do_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its actor is told each second how a pass goes; on a busy machine, or after a lost node, it does not answer."""
    from ray.data._internal import stats

    def gone() -> None:
        calls.append("gone")
        raise RuntimeError("_StatsActor does not answer")

    calls: list[str] = []
    monkeypatch.delenv("RAY_LOG_TO_DRIVER", raising=False)
    monkeypatch.setattr(cluster, "_let_out_actor_notice", lambda: None)
    monkeypatch.setattr(stats, "get_or_create_stats_actor", gone)
    cluster.hide_ray_data()
    stats._StatsManager.update_execution_metrics("pass", [], [], {})
    assert stats._StatsManager.gen_dataset_id_from_stats_actor()
    assert len(calls) == 2 and capfd.readouterr() == ("", "")
