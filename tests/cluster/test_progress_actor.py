"""The notice board, as a plain object: which failure counts, and when."""

from __future__ import annotations

from nightseg.cluster.progress_actor import Board, Failure

BUG = Failure(False, "IndexError: 17", "trace")
LOST = Failure(False, "RuntimeError: connection closed by peer", "trace")
MISTAKE = Failure(True, "no frame; add one", "trace")


def test_figures_stay_until_replaced() -> None:
    board = Board()
    board.advance("a", 3, {"loss": 1.0})
    board.advance("a", 4, {"miou": 0.5})
    assert (board.read("a").done, board.read("a").figures) == (4, {"loss": 1.0, "miou": 0.5})
    assert board.read("b").done == 0
    board.forget("a")
    assert board.read("a").done == 0


def test_the_first_failure_counts_but_a_mistake_counts_more() -> None:
    board = Board()
    board.fail("a", BUG)
    board.fail("a", LOST)
    assert board.read("a").failure == BUG
    board.fail("a", MISTAKE)
    board.fail("a", LOST)
    assert board.read("a").failure == MISTAKE


def test_a_restart_forgets_failures_and_tells_the_reader_but_not_mistakes() -> None:
    board = Board()
    assert board.begin("a", 0) is None
    assert board.begin("a", 1) is None
    board.fail("a", BUG)
    assert board.begin("a", 0) is None
    assert board.read("a").failure is None
    assert board.read("a").messages == [
        "a worker failed (IndexError: 17); the training goes on after its last checkpoint"
    ]
    board.fail("a", MISTAKE)
    assert board.begin("a", 0) == MISTAKE
    assert len(board.read("a").messages) == 1
