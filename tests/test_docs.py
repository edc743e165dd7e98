"""README.md and docs/: commands parse, recipe parts load, links lead somewhere; what is cheap runs."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml

from nightseg.cli.main import main
from nightseg.data.class_list import taxonomy
from nightseg.pipeline import run as run_module
from nightseg.pipeline import search as search_module
from nightseg.pipeline.run import Outcome
from nightseg.pipeline.search import Found, Search
from nightseg.recipe import RecipeError, load, load_recipe, load_settings
from nightseg.recipe.renamed import RENAMED
from nightseg.recipe.types import Recipe
from nightseg.storage import Location
from tests.command_line import good, json_of, nightseg

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
CONFIGS = PROJECT / "configs"
MOST_README_LINES = 120
NO_DATA = ("demo", "translators", "unit_scenes")  # recipes that draw their frames


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if match[1] == language:
                found.append(Block(page, text[: match.start()].count("\n") + 1, language, match[2]))
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Where it stands, and its words, for every command of the sh blocks; && separates two, \\ joins lines."""
    for block in blocks("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.replace("<this repository>", "REPOSITORY"), posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, "&&"]:
                if set(word) <= set("&|;"):
                    if words:
                        yield str(block), words
                    words = []
                else:
                    words.append(word)


COMMANDS = list(commands())


def of(*programs: str) -> list[Any]:
    """The commands of these programs, as parameters of a test."""
    return [
        pytest.param(words[1:], id=f"{where} {' '.join(words)[:60]}")
        for where, words in COMMANDS
        if words[0].removeprefix(".venv/bin/") in programs
    ]


def parsed(command: click.Command, words: list[str]) -> click.Context:
    """The context of the verb at the end of a group of verbs; raises click's UsageError."""
    name = "nightseg"
    while isinstance(command, click.Group):
        while words[0].startswith("-"):  # options of the group, which take no value here
            assert any(words[0] in option.opts for option in command.params), f"unknown option {words[0]}"
            words = words[1:]
        name, *words = words
        assert name in command.commands, f"unknown verb {name}"
        command = command.commands[name]
    return command.make_context(name, list(words))


def test_the_pages_have_what_this_module_looks_for() -> None:
    counts = {language: len(blocks(language)) for language in ("sh", "yaml", "python")}
    assert min(counts.values()) >= 2 and len(of("nightseg")) >= 30, counts
    fences = sum(page.read_text().count("\n```") for page in PAGES)
    known = sum(len(blocks(language)) for language in ("sh", "yaml", "python", "json", "text"))
    assert fences == 2 * known, "a fenced block is not closed, or of a language that nothing checks"


def in_headers() -> list[Any]:
    """The commands of nightseg in the comments on top of the configs."""
    found = []
    for file in (*sorted(CONFIGS.rglob("*.yaml")), PROJECT / "cluster.yaml"):
        text = file.read_text().replace("\\\n#", " ")
        for line in re.findall(r"^#   (nightseg .*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            found.append(pytest.param(words[1:], id=f"{file.name} {' '.join(words)[:60]}"))
    return found


@pytest.mark.parametrize("words", of("nightseg") + in_headers())
def test_a_command_of_nightseg_parses(words: list[str]) -> None:
    assert parsed(main, words).params
    for word in words:
        if word.startswith("configs/") or word == "cluster.yaml":
            assert (PROJECT / word).is_file(), f"there is no {word}"
    if words[0] == "submit" and "--until" in words:
        assert (PROJECT / f"jobs/{words[words.index('--until') + 1]}.py").is_file()


def test_a_wrong_command_would_be_found() -> None:
    with pytest.raises(click.UsageError):
        parsed(main, shlex.split("run configs/demo.yaml --dry"))
    with pytest.raises(click.UsageError):
        parsed(main, shlex.split("select a --count 3 --method fid --out b"))
    with pytest.raises(AssertionError, match="unknown verb"):
        parsed(main, ["judge"])


@pytest.mark.parametrize("words", [found for found in of("nightseg") if found.values[0][0] in ("run", "search")])
def test_overrides_of_a_command_fit_the_recipe(words: list[str]) -> None:
    """Nothing but the folders of the reader's data may be missing."""
    given = parsed(main, words).params
    file = PROJECT / str(given.get("recipe") or given["search_file"])
    if not file.is_relative_to(CONFIGS):
        return  # what a command before it writes
    if "search_file" in given:
        load_settings(Search, file, given["overrides"])
        return
    try:
        models = load_recipe(file, given["overrides"]).models
    except RecipeError as error:
        assert not [line for line in str(error).splitlines()[1:] if "there is no folder '/data/" not in line]
    else:
        assert given["only"] is None or given["only"] in models


@pytest.mark.parametrize("words", [found for found in of("nightseg") if found.values[0][0] in ("fid", "select")])
def test_a_command_says_where_weights_come_from(words: list[str]) -> None:
    """The default extractor needs a file: as printed, a command without one would be refused."""
    given = parsed(main, words).params
    needs_none = given["extractor"] == "efficientnet_lite0" or given.get("method") == "random"
    assert needs_none or given["weights"] or "--allow-download" in words


@pytest.mark.parametrize("words", of("nightseg"))
def test_a_command_uses_models_that_can_do_it(words: list[str]) -> None:
    """Models of the demo are EfficientNet-Lite0, which detectron2 does not have; and they have their names."""
    for word in words:
        run, _, name = word.partition(":")
        if run.startswith("runs/") and name:
            file = CONFIGS / f"{run.removeprefix('runs/')}.yaml"
            assert name in yaml.safe_load(file.read_text())["models"], f"{file.name} has no model {name}"
            assert words[:2] != ["convert", "to-detectron2"]


def test_extras_are_installed_from_the_checkout() -> None:
    """There is no package of that name in a registry."""
    texts = {page: page.read_text() for page in [*PAGES, *(PROJECT / "docs").glob("*.py")]}
    assert not [page.name for page, text in texts.items() if "nightseg[" in text]


@pytest.mark.parametrize("words", of("make"))
def test_a_target_of_make_exists(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert words and set(words) <= set(targets)


@pytest.mark.parametrize("words", of("ray"))
def test_a_command_of_ray_parses_and_the_job_takes_its_options(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = importlib.import_module("ray.scripts.scripts")
    given = parsed(scripts.cli, words).params
    if "entrypoint" not in given:
        return
    place = Location.of("/r")
    adapted = run_module.Adapted(place, Outcome({}, 1, 0, 1.0), place / "report.html")
    monkeypatch.setattr(run_module, "adapt", lambda *_, **__: adapted)
    monkeypatch.setattr(search_module, "search", lambda *_, **__: Found(place, {"label": "", "miou": 0.5}, [], place))
    monkeypatch.setenv("NIGHTSEG_RUNS", "/r")
    program, job, *rest = given["entrypoint"]
    assert program == "python" and (PROJECT / rest[0]).is_file()
    monkeypatch.setattr(sys, "argv", [job, *rest])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROJECT / job), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("words", of("pip"))
def test_what_pip_installs_is_there(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-build-isolation", action="store_true")
    parser.add_argument("-r", dest="file")
    parser.add_argument("what", nargs="*")
    given = parser.parse_args(words[1:])
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install" and (given.what or given.file)
    assert given.file is None or (PROJECT / given.file).is_file()
    assert all(re.fullmatch(r"\.\[(\w+)\]", what)[1] in extras for what in given.what)  # type: ignore[index]


@pytest.mark.parametrize("words", of("kubectl"))
def test_what_kubectl_is_told_of_is_in_the_file(words: list[str]) -> None:
    objects = yaml.safe_load((CONFIGS / "cluster/kuberay.yaml").read_text())["items"]
    named = {(one["kind"], one["metadata"]["name"]) for one in objects}
    match words:
        case ["apply" | "delete", "-f", file]:
            assert file == "configs/cluster/kuberay.yaml"
        case ["logs", "-f", "-l", label]:
            assert ("RayJob", label.removeprefix("batch.kubernetes.io/job-name=")) in named
        case ["port-forward", service, "8265"]:  # KubeRay names it after the cluster
            name = service.removeprefix("service/").removesuffix("-head-svc")
            assert ("RayCluster", name) in named and service == f"service/{name}-head-svc"
        case _:
            raise AssertionError(words)


@pytest.mark.parametrize("words", of("docker"))
def test_what_docker_is_told_of_is_in_the_dockerfile(words: list[str]) -> None:
    arguments = [words[place + 1] for place, word in enumerate(words) if word == "--build-arg"]
    image = yaml.safe_load((PROJECT / "cluster.yaml").read_text())["docker"]["image"]
    assert words[0] in ("build", "push") and arguments in ([], [f"BASE={image}"])
    assert "ARG BASE=" in (PROJECT / "Dockerfile").read_text()


@pytest.mark.parametrize("words", of("aws"))
def test_what_aws_is_told_to_make_is_what_the_cluster_file_names(words: list[str]) -> None:
    file, page = (PROJECT / "cluster.yaml").read_text(), (PROJECT / "docs/cluster.md").read_text()
    if words[0] == "s3":
        assert words[1:] in (["mb", "s3://BUCKET"],)
        return
    assert words[0] in ("ec2", "iam")
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert all(option.startswith("--") and not value.startswith("--") for option, value in options.items())
    for option in ("--role-name", "--instance-profile-name"):
        assert option not in options or f"instance-profile/{options[option]}" in file
    assert options.get("--cidr") != "0.0.0.0/0"
    for value in options.values():
        assert not value.startswith("file://") or f"\n{value.removeprefix('file://')}: " in page


@pytest.mark.parametrize("words", of("helm"))
def test_what_helm_installs_is_the_operator_that_the_cluster_file_needs(words: list[str]) -> None:
    if words[0] == "install":
        least = re.search(r"KubeRay ([\d.]+) or newer", (CONFIGS / "cluster/kuberay.yaml").read_text())
        assert least is not None and words[1:] == [
            "kuberay-operator",
            "kuberay/kuberay-operator",
            "--version",
            least[1],
        ]
    else:
        assert words == ["repo", "add", "kuberay", "https://ray-project.github.io/kuberay-helm/"]


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_a_policy_of_a_role_parses(block: Block) -> None:
    policy = json.loads(block.text)
    assert policy["Version"] == "2012-10-17" and policy["Statement"]
    for allowed in policy["Statement"]:
        assert allowed["Effect"] == "Allow" and "*" not in allowed["Action"]


def test_there_is_no_command_that_nothing_checks() -> None:
    checked = {"nightseg", "make", "ray", "pip", "kubectl", "docker", "aws", "helm"}
    plain = {"git", "cd", "source", "export", "tensorboard"}  # tensorboard --logdir FOLDER
    unchecked = [(where, words) for where, words in COMMANDS if words[0].removeprefix(".venv/bin/") not in checked]
    assert not [found for found in unchecked if found[1][0] not in plain]
    assert all(words[1] == "--logdir" and len(words) == 3 for _, words in unchecked if words[0] == "tensorboard")


def check_yaml(file: Path) -> None:
    """Raises if the file is neither part of a recipe, nor a search, nor a class list."""
    keys = yaml.safe_load(file.read_text()).keys()
    if "space" in keys:
        load_settings(Search, file)
    elif "classes" in keys:
        assert taxonomy(str(file)).num_classes > 1
    else:
        source = load._whole(file, ())
        source.data.setdefault("name", "part")
        source.data.setdefault("datasets", {"frames": {"layout": "scenes", "count": 1}})
        load._typed(Recipe, source, [])


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_yaml_block_loads(block: Block, tmp_path: Path) -> None:
    file = tmp_path / f"{block.page.stem}.yaml"
    file.write_text(block.text.replace("base: configs/", f"base: {CONFIGS}/"))
    check_yaml(file)


@pytest.mark.parametrize(
    "text",
    ["models: {m: {train: day}}", "loss: {kind: focall}", "traning: {}", "training: {preset: tesis}", "seed: -1"],
)
def test_a_wrong_yaml_block_would_be_found(text: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(RecipeError):
        check_yaml(tmp_path / "wrong.yaml")


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_python_block_compiles_and_its_names_import(block: Block) -> None:
    tree = ast.parse(block.text)
    compile(tree, str(block), "exec")
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), str(block), "exec"), names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            assert hasattr(names[node.value.id], node.attr), f"{node.value.id} has no {node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_no_key_has_its_old_name(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    assert not [old for old in RENAMED if re.search(rf"`{re.escape(old)}[`:]", text)]


def test_readme_is_short_and_links_every_page() -> None:
    readme = PAGES[0].read_text()
    assert len(readme.splitlines()) <= MOST_README_LINES
    assert not [page.name for page in PAGES[1:] if f"]({page.relative_to(PROJECT)})" not in readme]
    assert not [config.name for config in CONFIGS.glob("*.yaml") if f"](configs/{config.name})" not in readme]


# -- what is cheap runs ------------------------------------------------------------------------------------------------


def test_help_and_doctor_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    verbs = good("--help").output
    assert all(re.search(rf"^  {verb}\b", verbs, re.MULTILINE) for verb in main.commands)
    answer = nightseg("doctor", "--json")
    assert answer.exit_code in (0, 1) and '"findings"' in answer.stdout  # 1: a full disk is no fault of the page
    assert "CHANGE-ME" in nightseg("doctor", "--cluster", PROJECT / "cluster.yaml").output


@pytest.mark.parametrize("name", NO_DATA)
def test_the_plan_of_a_recipe_is_shown(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = json_of("run", CONFIGS / f"{name}.yaml", "--dry-run")
    assert plan["run_dir"] == str(tmp_path / "runs" / name)
    assert {"collect", "train_translator"} <= {stage["node"].partition("/")[0] for stage in plan["stages"]}
    assert f"runs/{name}" in good("run", CONFIGS / f"{name}.yaml", "--dry-run").output


def test_plans_that_pages_show_for_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = [words[1:] for _, words in COMMANDS if words[:3] == ["nightseg", "run", "configs/demo.yaml"]]
    found = [words for words in found if "--dry-run" in words]
    assert found
    for words in found:
        good(*(str(PROJECT / word) if word.startswith("configs/") else word for word in words))
