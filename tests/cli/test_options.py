"""Every argument and option of every verb reaches the function that the verb calls; one that is added later without
that, or without a line here, fails by itself."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import pytest

from nightseg.cli import commands
from nightseg.cli.main import main
from tests.command_line import forbid_ray, nightseg, refused


class Verb(NamedTuple):
    """The function a verb calls, arguments and required options, and another value of each option; None for a flag."""

    target: str
    words: tuple[str, ...]
    options: dict[str, str | None]


SINGLE: Final = "nightseg.pipeline.single:"
DETECTRON2: Final = "nightseg.interop.detectron2:"
FEATURES: Final = {"--extractor": "resnet18", "--weights": "w.pth", "--resize": "clean", "--fast": None}
INPUT: Final = ("--channels", "BGR", "--pixel-mean", "1,2,3", "--pixel-std", "1,1,1", "--stride-in-1x1")
PLACES: Final = {"--set": "seed=3", "--run-dir": "other", "--only": "day_only"}
DEMO: Final = str(Path(__file__).parents[2] / "configs/demo.yaml")

VERBS: Final = {
    "run": Verb("nightseg.pipeline.run:adapt", ("r.yaml",), {**PLACES, "--log": "wandb"}),
    "run until a stage": Verb(
        "nightseg.pipeline.run:work_until", ("r.yaml", "--until", "score"), {**PLACES, "--until": "select"}
    ),
    "run --dry-run": Verb("nightseg.pipeline.plan:plan", (DEMO,), {**PLACES, "--until": "score"}),
    "check": Verb("nightseg.pipeline.check:check", (DEMO,), {**PLACES, "--frames": "3"}),
    "recipe": Verb("nightseg.recipe.load:as_it_is", (DEMO,), {"--set": "seed=3"}),
    "search": Verb(
        "nightseg.pipeline.search:search", ("s.yaml",), {"--set": "trials=3", "--run-dir": "other", "--log": "wandb"}
    ),
    "submit": Verb(
        "nightseg.pipeline.submit:submit",
        ("r.yaml",),
        {**PLACES, "--until": "score", "--address": "http://head:8265", "--no-wait": None, "--max-tries": "3"},
    ),
    "report": Verb("nightseg.report:write_report", ("run1",), {"--out": "page.html"}),
    "explain": Verb("nightseg.report.life:life_of", ("run1", "f"), {"--model": "m"}),
    "status": Verb("nightseg.cli.main:Workspace", ("run1",), {}),
    "verify": Verb("nightseg.pipeline.verify:verify", ("run1",), {}),
    "doctor": Verb("nightseg.cli.doctor:examine", (), {"--cluster": "c.yaml"}),
    "init": Verb(
        "nightseg.recipe.starter:write_starter",
        ("d", "n"),
        {"--labels": "l", "--taxonomy": "camvid11", "--out": "o.yaml", "--overwrite": None},
    ),
    "split": Verb(
        SINGLE + "split_folder",
        ("i", "--out", "f.parquet"),
        {"--out": "g.parquet", "--margin": "0.1", "--actors": "2", "--max-bad-fraction": "0.5"},
    ),
    "fid": Verb(
        SINGLE + "distance",
        ("a", "b"),
        {
            **FEATURES,
            "--actors": "2",
            "--max-bad-fraction": "0.5",
            "--save-a": "a.npz",
            "--save-b": "b.npz",
            "--work": "w",
        },
    ),
    "select": Verb(
        SINGLE + "select_frames",
        ("p", "--count", "3", "--out", "o"),
        {
            **FEATURES,
            "--actors": "2",
            "--max-bad-fraction": "0.5",
            "--count": "4",
            "--out": "o2",
            "--reference": "r",
            "--method": "pooled",
            "--quota": "2",
            "--gap": "3",
            "--duplicates": "0.9",
            "--seed": "4",
        },
    ),
    "evaluate": Verb(
        SINGLE + "evaluate_folders",
        ("p", "l", "--taxonomy", "camvid11"),
        {
            "--taxonomy": "cityscapes19",
            "--label-encoding": "camvid12",
            "--absent-class": "detectron2",
            "--boundary": None,
            "--max-bad-fraction": "0.5",
            "--actors": "2",
            "--work": "w",
        },
    ),
    "evaluate with boundaries": Verb(
        SINGLE + "evaluate_folders", ("p", "l", "--taxonomy", "camvid11", "--boundary"), {"--boundary-distance": "0.1"}
    ),
    "predict": Verb(
        SINGLE + "predict_frames",
        ("model1", "i", "--out", "o"),
        {
            "--out": "o2",
            "--save": "color",
            "--overlay-video": None,
            "--legend": None,
            "--device": "cpu",
            "--batch": "3",
            "--actors": "2",
            "--max-bad-fraction": "0.5",
            "--window": "32x64",
            "--overlap": "0.5",
            "--flip": None,
            "--scales": "1,2",
            "--precision": "bfloat16",
        },
    ),
    "convert detectron2": Verb(
        DETECTRON2 + "convert_from_detectron2",
        ("c.pth", "o", *INPUT),
        {
            "--taxonomy": "camvid11",
            "--unfreeze": None,
            "--channels": "RGB",
            "--stride-in-3x3": None,
            "--pixel-mean": "3,2,1",
            "--pixel-std": "2,2,2",
            "--min-size-test": "512",
            "--max-size-test": "900",
        },
    ),
    "convert detectron2 by its config": Verb(
        DETECTRON2 + "convert_from_detectron2", ("c.pth", "o", "--config", "a.yaml"), {"--config": "b.yaml"}
    ),
    "convert to-detectron2": Verb(DETECTRON2 + "convert_to_detectron2", ("model1", "o.pth"), {}),
    "export": Verb(
        "nightseg.interop.onnx:export_onnx",
        ("model1", "--out", "o.onnx"),
        {"--out": "p.onnx", "--size": "32x64", "--output": "logits", "--tolerance": "0.1"},
    ),
}
OTHERWISE: Final = {  # options that say how a verb answers, and the places where that is tested
    "--json": "test_main.py",
    "--open": "test_main.py",
    "--out": "of `explain`: test_main.py",
    "--schema": "test_main.py",
    "--page": "tests/pipeline/test_check.py",
    "--dry-run": "a verb of its own here",
}
ANOTHER: Final = {"run1": "run2", "model1": "model2", DEMO: str(Path(DEMO).with_name("translators.yaml"))}


def start_of(name: str) -> list[str]:
    return [word for word in name.split() if word in ("--dry-run", *main.commands, *commands.convert.commands)]


def command_of(name: str) -> click.Command:
    command: Any = main
    for word in start_of(name):
        command = command if word == "--dry-run" else command.commands[word]
    assert isinstance(command, click.Command)
    return command


def leaves(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from leaves(command)
        else:
            yield command


class Called(Exception):  # noqa: N818 (what is wanted)
    """Ends the verb, so that nothing has to be answered."""


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forbid_ray(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for name in ("run1", "run2", "model1", "model2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text("{}")
        (tmp_path / name / "recipe.yaml").write_text("")
        (tmp_path / name / "results.json").write_text(json.dumps({"models": {}, "commits": {}, "of": name}))


def handed(monkeypatch: pytest.MonkeyPatch, name: str, words: tuple[str, ...]) -> dict[str, Any]:
    """What the function behind a verb is called with."""
    asked: dict[str, Any] = {}

    def target(*arguments: Any, **named: Any) -> None:
        asked.update({str(place): value for place, value in enumerate(arguments)} | named)
        raise Called

    verb = VERBS[name]
    module, _, attribute = verb.target.partition(":")
    monkeypatch.setattr(importlib.import_module(module), attribute, target)
    result = nightseg(*start_of(name), *words)
    assert result.exit_code == 1 and "Called" in result.stderr, result.output
    asked.pop("progress", None)
    return asked


@pytest.mark.parametrize("name", VERBS)
def test_everything_a_verb_is_given_reaches_its_function(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    verb = VERBS[name]
    plain = handed(monkeypatch, name, verb.words)
    assert handed(monkeypatch, name, verb.words) == plain
    for option, value in verb.options.items():
        more = (option,) if value is None else (option, value)
        assert handed(monkeypatch, name, (*verb.words, *more)) != plain, option
    arguments = [parameter for parameter in command_of(name).params if isinstance(parameter, click.Argument)]
    for place in range(len(arguments)):
        words = list(verb.words)
        words[place] = ANOTHER.get(words[place], words[place] + "2")
        assert handed(monkeypatch, name, tuple(words)) != plain, arguments[place].name


def test_no_option_is_forgotten_here() -> None:
    for command in leaves(main):
        known = {option for name, verb in VERBS.items() if command_of(name) is command for option in verb.options}
        for parameter in command.params:
            names = {*parameter.opts, *parameter.secondary_opts}
            assert isinstance(parameter, click.Argument) or names & {*known, *OTHERWISE}, f"{command.name}: {names}"


@pytest.mark.parametrize("name", VERBS)
def test_what_a_verb_needs_is_asked_for(name: str) -> None:
    words = VERBS[name].words
    for parameter in command_of(name).params:
        if not isinstance(parameter, click.Argument) and parameter.required:
            place = words.index(parameter.opts[0])
            message = refused(*start_of(name), *words[:place], *words[place + 2 :])
            assert f"Missing option '{parameter.opts[0]}'" in message
    if any(isinstance(argument, click.Argument) and argument.required for argument in command_of(name).params):
        assert "Missing argument" in refused(*start_of(name))


def test_defaults_stand_in_the_help() -> None:
    for command in leaves(main):
        context = click.Context(command, parent=click.Context(main, **main.context_settings))
        for parameter in command.params:
            default = parameter.get_default(context, call=False)
            if isinstance(parameter, click.Option) and isinstance(default, str | int | float) and not parameter.is_flag:
                _, shown = parameter.get_help_record(context) or ("", "")
                assert f"[default: {default}" in shown, f"{command.name}: {parameter.opts}"
