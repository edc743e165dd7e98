"""What the command line says when something goes wrong, and that names in files cannot change what it shows."""

import json
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from rich.text import Text

from nightseg.cli import greeting, output
from nightseg.cli.main import main
from nightseg.errors import UserError
from nightseg.pipeline.graph import NodeId
from nightseg.pipeline.plan import Planned
from nightseg.pipeline.search import Found
from nightseg.storage import Location
from tests.command_line import refused
from tests.programs import started


def fail_with(error: BaseException, *words: str) -> Result:
    @click.group(cls=output.Failures)
    @click.option("--debug", is_flag=True)
    def group(debug: bool) -> None:
        pass

    @group.command()
    def work() -> None:
        raise error

    return CliRunner().invoke(group, ["work", *words])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a.yaml: what, where, why. Cure: this."), 2, "nightseg: a.yaml: what, where, why. Cure: this.\n"),
        (PermissionError(13, "Permission denied", "/secret"), 2, "nightseg: /secret: Permission denied. Cure: "),
        (NotADirectoryError(20, "Not a directory", "/file"), 2, "nightseg: /file: Not a directory. Cure: "),
        (RuntimeError("a worker died"), 1, "nightseg: RuntimeError: a worker died\n(--debug shows where)\n"),
        (FileNotFoundError(2, "No such file", "/gone"), 1, "nightseg: FileNotFoundError"),  # we lost it, not the user
        (KeyboardInterrupt(), 1, "nightseg: stopped; the same command continues"),
        (click.UsageError("no such thing"), 2, "Error: no such thing"),
    ],
)
def test_errors_become_a_message_and_an_exit_code(error: BaseException, code: int, message: str) -> None:
    result = fail_with(error)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("error", [UserError("wrong"), ValueError("broken")])
def test_debug_adds_the_traceback_and_keeps_the_exit_code(error: Exception) -> None:
    plain, debug = fail_with(error), fail_with(error, "--debug")
    assert debug.exit_code == plain.exit_code
    assert "Traceback" in debug.stderr and "raise error" in debug.stderr
    assert str(error) in debug.stderr.splitlines()[-1]


def test_words_come_from_the_command_line_unless_they_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nightseg", "status", "/does/not/exist"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "/does/not/exist: there is no such run folder" in capsys.readouterr().err


def test_names_of_files_cannot_steer_the_terminal() -> None:
    result = fail_with(UserError("frame \x1b[2Jevil\rname\n  second line"))
    assert result.stderr == "nightseg: frame [2Jevil name\n  second line\n"


def test_a_reader_that_went_away_is_no_error_to_report() -> None:
    script = (
        "import os, sys; from nightseg.cli import output; import click\n"
        "@click.group(cls=output.Failures)\ndef group(): pass\n"
        "@group.command()\ndef work():\n"
        "    for number in range(100000): click.echo('line of text')\n"
        "group(['work'])"
    )
    with started([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode not in (0, -signal.SIGPIPE)


# -- answers ----------------------------------------------------------------------------------------------------------


def answer_of(content: dict[str, Any], *words: str) -> Result:
    """What is seen of a verb that answers this, while a library prints."""

    @click.command()
    @output.answers
    def verb() -> dict[str, Any]:
        print("chatter")
        return content

    return CliRunner().invoke(verb, words)


def test_json_is_one_object_on_one_line_and_never_nan() -> None:
    out = answer_of({"name": "nächtlich\n", "fid": 1.5}, "--json").stdout
    assert json.loads(out) == {"name": "nächtlich\n", "fid": 1.5}
    assert out.count("\n") == 1 and out.isascii()
    assert "JSON compliant" in str(answer_of({"fid": float("nan")}, "--json").exception)


def test_answers_for_people_are_lines_without_what_a_library_prints() -> None:
    found = answer_of({"fid": 12.345678901, "n": None, "counts": {"day": 2, "night": 3}, "save": ["a", "b"]})
    assert found.stdout == "fid: 12.3457\nn: -\ncounts: day 2, night 3\nsave: a, b\n"
    assert found.stderr == "chatter\n"


def test_cells_of_a_table_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table("runs/[bold]a", ["frame"], [["[red]x[/red] \x1b[31m"], [Text("ours", "green")], [3]])
    out = capsys.readouterr().out
    assert "runs/[bold]a\n" in out and "[red]x[/red] [31m" in out and "ours" in out and "3" in out
    assert "\x1b" not in out


def test_a_plan_says_what_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        Planned(NodeId("collect", "day"), "committed", (), 4, "1 actor x 1 CPU"),
        Planned(NodeId("split", "pool"), "runs", ("recipe.margin",), None, "1 actor x 1 CPU"),
        Planned(NodeId("train_segmenter", "m"), "waits", (), 4, "1 worker x 2 CPU"),
    ]
    output.print_plan(Location.of("/runs/a"), lines)
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["collect/day", "committed", "4", "1 actor x 1 CPU", ""],
        ["split/pool", "runs", "?", "1 actor x 1 CPU", "recipe.margin"],
        ["train_segmenter/m", "runs later", "4", "1 worker x 2 CPU", ""],
    ]


def test_scores_are_percent_with_the_published_value_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    score = {"miou": 0.388, "pa": 0.9, "ca": 0.5, "fwiou": None, "published_miou": 38.8}
    output.print_scores({"models": {"m": {"tests": {"night": score}}, "untested": {"tests": {}}}})
    row = next(line for line in capsys.readouterr().out.splitlines() if "night" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["m", "", "night", "38.8", "90.0", "50.0", "-", "38.8"]


def test_scores_of_several_seeds_have_their_spread_and_their_steps(capsys: pytest.CaptureFixture[str]) -> None:
    score: dict[str, object] = {"miou": 0.4, "pa": 0.9, "ca": 0.5, "fwiou": None, "published_miou": None}
    score |= {"seeds": {"0": 0.4, "1": 0.5}, "mean": score | {"miou": 0.45}, "std": {"miou": 0.0707, "pa": 0.0}}
    output.print_scores({"models": {"m": {"steps_in_all": 480, "tests": {"night": score}}}})
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "night" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["m", "480", "night", "45.0 ± 7.1", "90.0 ± 0.0", "50.0", "-", ""]
    assert "mean ± standard deviation of 2 seeds" in out


def test_translations_stand_below_the_scores(capsys: pytest.CaptureFixture[str]) -> None:
    translated = {"kind": "fourier", "fid": {"translated": 12.345}, "kid": {"translated": 0.00678}, "survival": None,
              "agreement": {"pixels": 0.9}, "edges": 0.876}  # fmt: skip
    output.print_scores({"models": {}, "translations": {"made": translated}})
    row = next(line for line in capsys.readouterr().out.splitlines() if "made" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["made", "fourier", "12.35", "6.78", "-", "90.0", "0.88"]


def test_trials_are_named_by_the_last_word_of_their_keys(capsys: pytest.CaptureFixture[str]) -> None:
    trial = {"trial": "ab", "values": {"models.m.loss.alpha": 0.123456789, "models.m.loss.kind": "focal"},
             "miou": 0.5, "epochs": 2, "end": "done", "error": None}  # fmt: skip
    failed = trial | {"trial": "cd", "miou": None, "end": "failed", "error": "too few frames"}
    seeds = trial | {"trial": "ef", "std": 0.012}
    output.print_trials(Found(Location.of("/s"), trial, [trial, seeds, failed], Location.of("/s/best.yaml")))
    captured = capsys.readouterr()
    assert "50.0 ± 1.2" in captured.out
    assert "alpha" in captured.out and "models.m" not in captured.out and "0.123456789" in captured.out
    assert "best recipe: /s/best.yaml\n" in captured.out
    assert captured.err == "trial cd failed: too few frames\n"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_control_c_again_and_again_shows_no_traceback(sent: signal.Signals) -> None:
    """And as little what batch systems send: in the work, while it clears up, while Python waits for a thread and for
    what `atexit` was given."""
    script = (
        "import atexit, signal, sys, threading, time; from nightseg.cli import output; import click\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored in the background
        "@click.group(cls=output.Failures)\ndef group(): pass\n"
        "@group.command()\ndef work():\n"
        "    atexit.register(time.sleep, 30)\n"
        "    threading.Thread(target=time.sleep, args=(30,)).start()\n"
        "    try:\n        print('working', flush=True); time.sleep(30)\n"
        "    finally:\n        print('clearing up', flush=True); time.sleep(30)\n"
        "sys.argv[1:] = ['work']; group()"
    )
    words = [sys.executable, "-c", script]
    with started(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        told = ""
        for heard, where in ((process.stdout, "working"), (process.stdout, "clearing"), (process.stderr, "stopped")):
            while where not in told:
                told += heard.readline()
            process.send_signal(sent)
        told += process.stderr.read()
        assert process.wait(timeout=20) == 1 and told.split("\n\n")[1].count("\n") == 1, told


HUNG_UP = (
    "import signal, sys, time; from nightseg.cli import output; import click\n"
    "@click.group(cls=output.Failures)\ndef group(): pass\n"
    "@group.command()\ndef work():\n"
    "    try:\n        print('working', flush=True); time.sleep(SECONDS)\n"
    "    finally:\n        print('clearing up', flush=True); time.sleep(1); print('cleared up', flush=True)\n"
    "sys.argv[1:] = ['work']; group()"
)


def test_a_terminal_that_is_closed_leaves_time_to_clear_up() -> None:
    """The system tells the program, and then the shell does, too."""
    words = [sys.executable, "-c", HUNG_UP.replace("SECONDS", "30")]
    with started(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for heard in ("working\n", "clearing up\n"):
            assert process.stdout.readline() == heard
            process.send_signal(signal.SIGHUP)
        assert process.stdout.read() == "cleared up\n"
        assert process.wait(timeout=20) == 1 and "Traceback" not in process.stderr.read()


def test_a_command_under_nohup_goes_on_without_its_terminal() -> None:
    words = ["nohup", sys.executable, "-c", HUNG_UP.replace("SECONDS", "1")]
    with started(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=20) == 0


def test_a_split_says_what_its_numbers_mean(capsys: pytest.CaptureFixture[str]) -> None:
    done = {"domains": {"day": 3, "night": 1}, "frames": "/a/f.parquet", "quarantined": 2}
    output.print_split(done, 0.2)
    out = capsys.readouterr().out
    assert "day: 3 frames, 75.0 % of 4" in out and "score (-1 to 1)" in out and "margin below 0.2" in out
    assert "2 frames could not be read" in out and "/a/f.parquet" in out


def test_a_selection_says_what_its_distances_mean(capsys: pytest.CaptureFixture[str]) -> None:
    fid: dict[str, Any] = dict.fromkeys(("selection", "random_mean", "random_sd", "pool", "lower_bound"))
    done = {"method": "random", "pool": 9, "chosen": 3, "out": "/o", "fid": {**fid, "random_draws": 0}}
    output.print_selection(done)
    assert "no distances: there was no reference" in capsys.readouterr().out
    fid |= {"selection": 10.0, "random_mean": 14.0, "random_sd": 2.0, "random_draws": 8, "pool": 7.0}
    output.print_selection(done | {"fid": fid})
    out = capsys.readouterr().out
    assert "3 of 9 frames" in out and "  10  the chosen frames" in out and "2.0 standard deviations better" in out
    assert "  7  the whole pool; few frames have a larger FID" in out and "no choice of this size" not in out
    output.print_selection(done | {"fid": fid | {"selection": 15.0, "lower_bound": 8.0, "selection_biased": 9.0}})
    out = capsys.readouterr().out
    assert "0.5 standard deviations worse" in out and "less than 8, and this one has 9" in out


def test_a_command_that_takes_its_time_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(greeting, "SECONDS_TO_WORDS", 0.01)
    done = threading.Event()
    monkeypatch.setattr(greeting, "_say", lambda message: (print(message, file=sys.stderr), done.set()))

    @click.group(cls=output.Failures)
    def group() -> None:
        """A program."""

    @group.command()
    def slow() -> None:
        assert done.wait(10)

    monkeypatch.setattr(sys, "argv", ["nightseg", "slow"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its handlers
    group()
    assert capsys.readouterr().err == "nightseg slow: at work\n"


def test_the_installed_command_says_so_before_its_imports() -> None:
    """Imports take seconds on a busy machine: here they take as long as it takes until the first line is there."""
    code = (
        "import importlib.abc, sys, time; import nightseg.cli as cli; hello = cli.greeting; said = []\n"
        "hello.SECONDS_TO_WORDS = 0.01\n"
        "write, hello._say = hello._say, lambda message: (write(message), said.append(message))\n"
        "class Slow(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        while name == 'nightseg.cli.main' and not said: time.sleep(0.01)\n"
        "assert not {'click', 'numpy', 'pyarrow'} & sys.modules.keys()\n"
        "sys.meta_path.insert(0, Slow()); sys.argv = ['nightseg', 'doctor', '--help']; cli.start()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stderr == "nightseg doctor: at work\n" and "Check this machine" in ran.stdout
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"nightseg": "nightseg.cli:start"}


def test_a_command_that_is_done_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.group(cls=output.Failures)
    def group() -> None:
        """A program."""

    @group.command()
    def quick() -> None:
        """Nothing."""

    monkeypatch.setattr(sys, "argv", ["nightseg", "quick"])
    group()
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(10)
    assert capsys.readouterr().err == ""


def test_no_message_repeats_credentials() -> None:
    """Of a wrong option, of a wrong place, of a recipe: the first is click's own."""
    for words in (
        ["run", "x.yaml", "--only=a", "--sett", "s3://AKIA:geheim@bucket"],
        ["status", "s3://AKIA:geheim@bucket/run"],
        ["run", "s3://bucket/r.yaml?secret_key=geheim"],
        ["s3://AKIA:geheim@bucket"],
    ):
        assert "geheim" not in refused(*words)
