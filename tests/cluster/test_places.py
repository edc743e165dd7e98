"""Paths that only some nodes see are named before anything runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightseg.cluster import places
from nightseg.errors import UserError


@pytest.fixture
def only_here() -> Iterator[str]:
    """A path that no other process has: a descriptor of this one."""
    handle = os.open("/", os.O_RDONLY)
    yield f"/proc/self/fd/{handle}"
    os.close(handle)


def test_what_a_node_sees(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"driver 1")
    (tmp_path / "other").write_bytes(b"driver 2")
    there, gone, mine, other = (str(tmp_path / name) for name in (".", "gone", "mine", "other"))
    seen = places.looked_at([there, gone], {mine: b"driver 1", other: b"driver 1", gone: b"driver 1"})
    assert seen == dict.fromkeys([gone, other], f"{tmp_path} is not the folder that this run writes to")
    assert places.looked_at([gone], {}) == {gone: "is not there"}


def test_key_path_and_nodes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"datasets.day.root": "/data/day", "weights": "/w.pt", "datasets.b.root": "/b"}
    other = "/runs/x is not the folder that this run writes to"
    answers: dict[str, places.Seen] = {
        "10.0.0.1 (aa)": {},
        "10.0.0.2 (bb)": {"/data/day": "is not there", "/runs/x/.note": other},
        "10.0.0.3 (cc)": {"/data/day": "is not there", "/w.pt": "may not be read"},
    }
    said: list[str] = []
    monkeypatch.setattr(places.cluster, "is_this_machine", lambda: False)
    monkeypatch.setattr(places.cluster, "connect", lambda: None)
    monkeypatch.setattr(places, "working_nodes", lambda: {"aa": "10.0.0.1", "bb": "10.0.0.2"})
    monkeypatch.setattr(places, "this_node", lambda: "aa")
    monkeypatch.setattr(places, "ask", lambda *_: (answers, ["10.0.0.4 (dd)"]))
    with pytest.raises(UserError) as caught:
        places.check_places(needed, {"/runs/x/.note": b""}, said.append)
    told = str(caught.value)
    assert "datasets.day.root: /data/day is not there on 2 of 3 nodes (10.0.0.2 (bb), 10.0.0.3 (cc))" in told
    assert "weights: /w.pt may not be read on 1 of 3 nodes (10.0.0.3 (cc))" in told
    assert "run folder: /runs/x is not the folder that this run writes to on 1 of 3 nodes (10.0.0.2 (bb))" in told
    assert "mount it there under the same path" in told and "/b" not in told.replace("/data/b", "")
    assert "10.0.0.4 (dd)" in said[0]


def test_one_machine_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(places.cluster, "connect", lambda: pytest.fail("Ray was started"))
    places.check_places({"datasets.day.root": "/nowhere"}, {}, print)


@pytest.mark.parametrize(
    ("working", "is_asked"),
    [((), False), (("here",), False), (("there",), True), (("here", "there"), True)],
    ids=["none yet", "only where we are", "one, and a head without work", "two"],
)
def test_nodes_are_asked_as_soon_as_one_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, working: tuple[str, ...], is_asked: bool
) -> None:
    asked, said = list[object](), list[str]()
    monkeypatch.setattr(places.cluster, "is_this_machine", lambda: False)
    monkeypatch.setattr(places.cluster, "connect", lambda: None)
    monkeypatch.setattr(places.cluster, "may_grow", lambda: True)
    monkeypatch.setattr(places, "working_nodes", lambda: dict.fromkeys(working, "10.0.0.2"))
    monkeypatch.setattr(places, "this_node", lambda: "here")
    monkeypatch.setattr(places, "ask", lambda *words: (asked.append(words), ({}, []))[1])
    places.check_places({"datasets.day.root": "/data"}, {}, said.append)
    assert bool(asked) == is_asked
    assert bool(said) == (not working) and all("datasets.day.root (/data)" in words for words in said)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_path_of_the_driver_alone_is_found_by_a_task_on_each_node(only_here: str, tmp_path: Path) -> None:
    (tmp_path / "note").write_bytes(b"mine")
    assert places.looked_at([only_here], {}) == {}
    answers, silent = places.ask(places.working_nodes(), [only_here, "/"], {str(tmp_path / "note"): b"mine"})
    assert places.this_node() in places.working_nodes()
    assert silent == [] and list(answers.values()) == [{only_here: "is not there"}]
