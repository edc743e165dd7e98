"""The progress actor, as a plain object: which failure counts, and when."""

from __future__ import annotations

from nightseg.cluster.progress_actor import Failure, ProgressActor
from nightseg.errors import UserError

BUG = Failure(None, "IndexError: 17", "trace")
LOST = Failure(None, "RuntimeError: connection closed by peer", "trace")
MISTAKE = Failure(UserError("no frame; add one"), "no frame; add one", "trace")


def test_metrics_stay_until_replaced() -> None:
    actor = ProgressActor()
    actor.advance("a", 3, {"loss": 1.0})
    actor.advance("a", 4, {"miou": 0.5})
    assert (actor.read("a").done, actor.read("a").metrics) == (4, {"loss": 1.0, "miou": 0.5})
    assert actor.read("b").done == 0
    actor.forget("a")
    assert actor.read("a").done == 0


def test_the_first_failure_counts_but_a_mistake_counts_more() -> None:
    actor = ProgressActor()
    actor.fail("a", BUG)
    actor.fail("a", LOST)
    assert actor.read("a").failure == BUG
    actor.fail("a", MISTAKE)
    actor.fail("a", LOST)
    assert actor.read("a").failure == MISTAKE


def test_a_restart_forgets_failures_and_tells_the_reader_but_not_mistakes() -> None:
    actor = ProgressActor()
    assert actor.begin("a", 0) is None
    assert actor.begin("a", 1) is None
    actor.fail("a", BUG)
    assert actor.begin("a", 0) is None
    assert actor.read("a").failure is None
    assert actor.read("a").messages == [
        "a worker failed (IndexError: 17); the training goes on after its last checkpoint"
    ]
    actor.fail("a", MISTAKE)
    assert actor.begin("a", 0) == MISTAKE
    assert len(actor.read("a").messages) == 1


def test_workers_that_start_again_to_be_more_have_not_failed() -> None:
    actor = ProgressActor()
    actor.begin("a", 0)
    actor.resizes("a")
    assert actor.begin("a", 0) is None
    assert actor.read("a").messages == []


def test_a_lost_connection_is_told_in_words() -> None:
    actor = ProgressActor()
    actor.begin("a", 0)
    actor.fail("a", Failure(None, "RuntimeError: [/pytorch/third_party/gloo/pair.cc:561] Connection closed", ""))
    actor.begin("a", 0)
    assert actor.read("a").messages == [
        "a worker failed (it lost its connection to another one); the training goes on after its last checkpoint"
    ]
