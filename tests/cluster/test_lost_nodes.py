"""A training on a real cluster whose nodes vanish goes on with what is left, and with all of them when they are back.

Stages that lose nodes: tests/stages/test_lost_nodes.py. The test has a process of its own, whose cluster it is.
"""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nightseg.cluster.session import Session
from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.train import FitResult, LocalSession, fit
from nightseg.storage import Location
from tests.nodes import Said, connected, in_a_process, until
from tests.rounding import assert_near

STEPS, BATCH, STEPS_A_REPORT = 120, 6, 5


def line(session: Session, settings: dict[str, Any]) -> None:
    """A line through y = 2x; in every step each worker has its share of the same six points."""
    torch.manual_seed(0)
    line = torch.nn.Linear(1, 1).to(session.device)
    state, begin = session.restore(), 0
    if state is not None:
        line.load_state_dict(state["line"])
        begin = int(state["step"])
    model = session.wrap(line)
    for step in range(begin, STEPS):
        time.sleep(settings["seconds"])
        x = torch.arange(float(BATCH))[session.rank :: session.world_size, None]
        loss = ((model(x) - 2 * x) ** 2).sum() * session.world_size / BATCH
        line.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in line.parameters():
                parameter.sub_(parameter.grad, alpha=0.02)  # type: ignore[arg-type]
        points = int(session.sum(torch.tensor([len(x)])))
        session.progress(step + 1)
        if (step + 1) % STEPS_A_REPORT == 0:
            report = {"step": step + 1, "points": points, "workers": session.world_size}
            session.report(report, {"line": line.state_dict(), "step": step + 1})


def trained(place: Path, said: Said) -> FitResult:
    return fit(
        line, {"seconds": 0.5}, folder=Location.of(place / "trainer"), name="line", compute=TrainCompute(workers=2),
        progress=said, title="train line", total=STEPS, unit="steps",
    )  # fmt: skip


def workers_of(history: list[dict[str, Any]]) -> list[int]:
    return [int(row["workers"]) for row in history]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_loses_a_node_shrinks_and_grows_again(tmp_path: Path) -> None:
    print(in_a_process(lose_one_of_two, tmp_path))


def lose_one_of_two(folder: str) -> None:
    """None comes back until it has gone on with one worker; then another node joins."""
    place = Path(folder)
    alone = LocalSession(Location.of(place / "alone"))
    line(alone, {"seconds": 0.0})
    said, results = Said(), list[FitResult]()
    with connected(2) as nodes:
        training = threading.Thread(target=lambda: results.append(trained(place, said)))
        training.start()
        until(lambda: said.done >= 20)
        killed = time.monotonic()
        nodes.kill()
        until(lambda: any("goes on with 1 of 2 workers" in message for message in said.messages))
        before = said.done
        until(lambda: said.done > before)
        seconds = time.monotonic() - killed
        nodes.add()
        training.join()
    (result,) = results
    print(f"{seconds:.0f} s until the next new step; {said.messages}; {workers_of(result.history)}")
    assert [int(row["step"]) for row in result.history] == list(range(STEPS_A_REPORT, STEPS + 1, STEPS_A_REPORT))
    assert {int(row["points"]) for row in result.history} == {BATCH}
    changes = [size for size, _ in itertools.groupby(workers_of(result.history))]
    assert changes == [2, 1, 2]
    assert any("waits for nodes: 2 workers" in message for message in said.messages)
    state = alone.restore()
    assert state is not None
    assert_near(result.load()["line"]["weight"], state["line"]["weight"], STEPS * 16)
