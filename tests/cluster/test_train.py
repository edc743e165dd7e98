"""Trainings on Ray: resumed after every kind of death, errors as they were raised, the same result on two workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nightseg.cluster import train as training_module
from nightseg.cluster.session import Session
from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.train import FitResult, LocalSession, fit
from nightseg.errors import UserError
from nightseg.storage import Location
from tests.rounding import assert_near

EPOCHS = 4
ROUNDINGS = EPOCHS * 16  # of sums of four points, a step and a mean each


def learn(session: Session, settings: dict[str, Any]) -> None:
    """A line through y = 2x by full-batch gradient descent; each worker has every `world_size`th point."""
    torch.manual_seed(session.rank)  # the wrapped module takes rank 0's weights
    line = torch.nn.Linear(1, 1).to(session.device)
    state = session.restore()
    start = 0
    if state is not None:
        line.load_state_dict(state["line"])
        start = int(state["epoch"])
    model = session.wrap(line)
    x = torch.arange(4.0, device=session.device)[session.rank :: session.world_size, None]
    for epoch in range(start, EPOCHS):
        _mishap(settings, epoch, session)
        loss = ((model(x) - 2 * x) ** 2).mean()
        line.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in line.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.05)
        total = float(session.sum(loss.detach().clone())) / session.world_size
        session.progress(epoch + 1, loss=total)
        session.report({"epoch": epoch + 1, "loss": total}, {"line": line.state_dict(), "epoch": epoch + 1})


def _mishap(settings: dict[str, Any], epoch: int, session: Session) -> None:
    mishap = settings.get("mishap", "")
    if epoch != 2 or not mishap:
        return
    mark = Path(settings["folder"]) / f"{mishap}-{session.rank}"
    with mark.open("a") as stream:
        stream.write("x")
    is_first = mark.stat().st_size == 1
    if mishap == "dies once" and is_first:
        os._exit(1)
    if mishap == "dies always":
        os._exit(1)
    if mishap == "user error":
        raise UserError("class 7 has no pixel; choose another train set")
    if mishap == "bug":
        raise IndexError("17")
    if mishap == "waits" and is_first:
        time.sleep(300)


class Display:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.done = 0
        self.metrics: dict[str, float | str] = {}
        self.messages: list[str] = []

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Display]:
        assert (title, total, unit) == ("train line", EPOCHS, "epochs")
        yield self

    def advance(self, count: int = 1, **metrics: float | str) -> None:
        self.done += count
        self.metrics.update(metrics)

    def say(self, message: str) -> None:
        self.messages.append(message)


def train(folder: Path, mishap: str = "", display: Display | None = None, **changes: Any) -> FitResult:
    compute = TrainCompute(**{"max_failures": 1} | changes)
    return fit(
        learn,
        {"mishap": mishap, "folder": str(folder)},
        folder=Location.of(folder) / "trainer",
        name="line",
        compute=compute,
        progress=display or Display(),
        title="train line",
        total=EPOCHS,
        unit="epochs",
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> LocalSession:
    """The undisturbed training, without Ray."""
    torch.set_num_threads(1)
    session = LocalSession(Location.of(tmp_path_factory.mktemp("local")))
    learn(session, {})
    return session


def same(result: FitResult, expected: LocalSession) -> bool:
    state = expected.restore()
    assert state is not None
    mine = result.load()["line"]
    assert result.history == expected.history
    return all(torch.equal(mine[name], value) for name, value in state["line"].items())


@pytest.mark.parametrize(
    ("grows", "has_lost", "seconds"),
    [(True, False, 1800.0), (True, True, 30.0), (False, True, 5.0), (False, False, 5.0)],
)
def test_how_long_a_first_start_waits(
    monkeypatch: pytest.MonkeyPatch, grows: bool, has_lost: bool, seconds: float
) -> None:
    monkeypatch.setattr("nightseg.cluster.nodes.has_lost", lambda: has_lost)
    assert training_module._patience(grows) == seconds


@pytest.mark.ray
def test_ray_and_local_end_alike_and_nothing_is_printed(
    ray_cluster: None, tmp_path: Path, expected: LocalSession, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    display = Display()
    result = train(tmp_path, display=display)
    assert same(result, expected)
    assert result.metrics == expected.history[-1] and result.metrics["epoch"] == EPOCHS
    assert (display.done, display.metrics, display.messages) == (EPOCHS, {"loss": result.metrics["loss"]}, [])
    assert signal.getsignal(signal.SIGINT) is before
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert sorted(path.name for path in (tmp_path / "trainer").iterdir()) == ["line"]  # nothing of Ray's is left

    again = train(tmp_path, mishap="bug")  # finished: the loop has nothing to do, so it does not even meet the bug
    assert same(again, expected)


@pytest.mark.ray
def test_a_worker_that_dies_is_replaced_and_goes_on(ray_cluster: None, tmp_path: Path, expected: LocalSession) -> None:
    display = Display()
    assert same(train(tmp_path, "dies once", display), expected)
    assert display.done == EPOCHS
    assert display.messages == ["train line: a worker failed; the training goes on after its last checkpoint"]


@pytest.mark.ray
def test_a_users_mistake_is_not_tried_again(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(tmp_path, "user error", max_failures=3)
    assert str(caught.value) == "class 7 has no pixel; choose another train set"
    assert "Traceback" in caught.value.__notes__[0]
    assert (tmp_path / "user error-0").read_text() == "x"


@pytest.mark.ray
def test_other_errors_are_tried_again_and_come_out(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        train(tmp_path, "bug")
    assert str(caught.value) == "train line: IndexError: 17"
    assert (tmp_path / "bug-0").read_text() == "xx"


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_always_dies_ends_the_training(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError,
        match=r"train line: a worker process died, and neither Ray nor .* memory ran out: somebody killed it",
    ):
        train(tmp_path, "dies always", max_failures=0)


@pytest.mark.ray
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(
    ray_cluster: None, tmp_path: Path, expected: LocalSession
) -> None:
    learn(LocalSession(Location.of(tmp_path / "trainer/line")), {})
    (tmp_path / "trainer/line/report-00000004/state.pt").write_bytes(b"damaged")
    display = Display()
    assert same(train(tmp_path, display=display), expected)
    assert len(display.messages) == 1
    assert "report-00000004 is damaged and left out" in display.messages[0]


@pytest.mark.ray
def test_two_workers_learn_what_one_learns(ray_cluster: None, tmp_path: Path, expected: LocalSession) -> None:
    result = train(tmp_path, workers=2)
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]
    assert_near([row["loss"] for row in result.history], [row["loss"] for row in expected.history], ROUNDINGS)
    # only rank 0's state is kept, and it continues on one worker
    both = result.load()["line"]["weight"]
    (tmp_path / "trainer/line/report-00000004").rename(tmp_path / "away")
    alone = LocalSession(Location.of(tmp_path / "trainer/line"))
    learn(alone, {})
    assert alone.done == EPOCHS
    state = alone.restore()
    assert state is not None
    assert_near(state["line"]["weight"], both, ROUNDINGS)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("max_failures", [0, 2])
def test_a_users_mistake_on_two_workers(ray_cluster: None, tmp_path: Path, max_failures: int) -> None:
    with pytest.raises(UserError, match="class 7 has no pixel"):
        train(tmp_path, "user error", workers=2, max_failures=max_failures)
    assert (tmp_path / "user error-0").read_text() == "x"


@pytest.mark.ray
@pytest.mark.parametrize(("changes", "key"), [({"workers": 3}, "cpus"), ({"gpus_per_worker": 1.0}, "gpus")])
def test_workers_that_never_fit_are_refused(
    ray_cluster: None, tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(
        UserError, match=rf"compute.train: [13] workers.*compute.train.workers or compute.train.{key}_per_worker"
    ):
        train(tmp_path, **changes)


DRIVER = """
import sys
from pathlib import Path
from nightseg.cluster import ray as cluster
from tests.cluster.test_train import train
cluster.connect(num_cpus=1)
train(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_when_it_is_run_again(tmp_path: Path, expected: LocalSession) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, "-c", DRIVER, str(tmp_path), "waits"]
    driver = subprocess.Popen(command, env=environment, cwd=tmp_path)
    mark = tmp_path / "waits-0"
    deadline = time.monotonic() + 150
    while not mark.exists() and time.monotonic() < deadline:
        assert driver.poll() is None, "the driver ended before it could be killed"
        time.sleep(0.2)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "trainer/line").iterdir()) == ["report-00000001", "report-00000002"]

    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert mark.read_text() == "xx"  # the epoch that was under way is the first that was done again
    result = LocalSession(Location.of(tmp_path / "trainer/line"))
    state, whole = result.restore(), expected.restore()
    assert state is not None and whole is not None
    assert result.history == expected.history
    assert torch.equal(state["line"]["weight"], whole["line"]["weight"])


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupt_is_not_a_success(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = str(root)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), "waits"], env=environment, cwd=tmp_path, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 150
    while not (tmp_path / "waits-0").exists() and time.monotonic() < deadline:
        assert driver.poll() is None
        time.sleep(0.2)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode != 0
    assert said.endswith(b"KeyboardInterrupt\n")


@pytest.mark.parametrize(
    "owner", ["model=../../../x", "encoder=a/b", 300 * "a", 120 * "\N{LATIN SMALL LETTER U WITH DIAERESIS}"]
)
def test_the_name_of_a_training_is_one_folder_whatever_a_search_calls_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: str
) -> None:
    monkeypatch.setattr(training_module, "_owner", "")
    training_module.name_trainings(owner)
    name = training_module._shown("adapted")
    (tmp_path / name).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name] and name.endswith(" adapted")
    training_module.name_trainings("")
    assert training_module._shown("adapted") == "adapted"
