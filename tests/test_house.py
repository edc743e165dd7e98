"""The house holds: imports run down only, the map names every module, nothing is called by a word that says nothing."""

import ast
import re
from pathlib import Path

import click

import nightseg
from nightseg.cli.main import main

ROOT = Path(nightseg.__file__).parent
PROJECT = ROOT.parent

# Higher number = higher floor. A module imports from its own floor only within its own room, and else from below.
FLOORS: dict[str, int] = {
    "errors": 0, "progress": 0, "settings": 0, "storage": 1, "cluster": 2, "data": 3, "metrics": 3, "networks": 4,
    "segmenter": 5, "unit": 6, "translators": 6, "selection": 6, "interop": 6, "recipe": 7, "stages": 8,
    "report": 9, "pipeline": 10, "cli": 11,
}  # fmt: skip
MAY_USE_RAY = {"cluster", "pipeline"}
TORCH_FREE_ROOMS = {"errors", "progress", "settings", "storage", "data", "metrics", "report"}
FORBIDDEN = {"utils", "util", "helpers", "helper", "common", "core", "base", "misc", "tools"}
LONGEST_FUNCTION = 60
MOST_ROOT_MODULES = 4


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room(module: Path) -> str:
    """The package or module directly inside nightseg that a file belongs to."""
    return module.relative_to(ROOT).with_suffix("").parts[0]


def imports(module: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def dotted(module: Path) -> str:
    return ".".join(("nightseg", *module.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def project_imports(module: Path, known: set[str]) -> set[str]:
    """The project's modules that a module imports, inside functions as well; a name of a module or in a module."""
    found = set()
    for name in imports(module):
        while name and name not in known:
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found - {"nightseg"}


def test_imports_run_down_only() -> None:
    wrong = []
    for module in modules():
        here = room(module)
        if here == "__init__":
            continue
        for name in imports(module):
            parts = name.split(".")
            if parts[0] != "nightseg" or len(parts) < 2 or parts[1] not in FLOORS:
                continue
            there = parts[1]
            if there != here and FLOORS[there] >= FLOORS[here]:
                wrong.append(f"{module.relative_to(PROJECT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Files of one room, too; an import inside a function or for types counts like any other."""
    known = {dotted(module): module for module in modules()}
    left = {name: project_imports(module, set(known)) - {name} for name, module in known.items() if name != "nightseg"}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in circles, or above one: {sorted(left)}"


def options_of(command: click.Command) -> set[str]:
    own = {text for option in command.params for text in (*option.opts, *option.secondary_opts) if text[:2] == "--"}
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return own.union(*(options_of(verb) for verb in below))


def test_lower_rooms_name_no_option_of_the_command_line() -> None:
    """An option in the message of a lower room misleads whoever came by a recipe, a job or Python."""
    options, wrong = options_of(main), []
    for module in modules():
        if room(module) == "cli":
            continue
        tree = ast.parse(module.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                named = options.intersection(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", node.value))
                wrong += [f"{module.relative_to(PROJECT)}:{node.lineno}: {option}" for option in sorted(named)]
    assert not wrong, "\n".join(wrong)


def test_stages_do_not_know_each_other() -> None:
    wrong = [
        f"{module.name} imports {name}"
        for module in (ROOT / "stages").glob("*.py")
        for name in imports(module)
        if name.startswith("nightseg.stages")
    ]
    assert not wrong, "\n".join(wrong)


def test_ray_and_torch_stay_in_their_rooms() -> None:
    wrong = []
    for module in modules():
        here = room(module)
        for name in imports(module):
            package = name.split(".")[0]
            if package == "ray" and here not in MAY_USE_RAY:
                wrong.append(f"{module.relative_to(PROJECT)} imports {name}")
            if package in ("torch", "torchvision") and (here in TORCH_FREE_ROOMS or module.stem == "settings"):
                wrong.append(f"{module.relative_to(PROJECT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_settings_stand_on_nothing_but_settings() -> None:
    """What a recipe may say is read without any network, table or store."""
    low = ("nightseg.settings", "nightseg.errors")
    wrong = [
        f"{module.relative_to(PROJECT)} imports {name}"
        for module in ROOT.glob("*/settings.py")
        for name in imports(module)
        if name.startswith("nightseg.") and not name.startswith(low) and ".settings." not in name
    ]
    assert not wrong, "\n".join(wrong)


def test_the_map_names_every_module_and_nothing_else() -> None:
    text = (nightseg.__doc__ or "").splitlines()
    named = {
        line.split()[0] for line in text if line.startswith("    ") and line.split() and line.split()[0].endswith(".py")
    }
    real = {str(module.relative_to(ROOT)) for module in modules() if module.name != "__init__.py"}
    assert named == real, f"not in the map: {sorted(real - named)}; in the map only: {sorted(named - real)}"


def test_every_room_has_a_floor() -> None:
    rooms = {room(module) for module in modules()} - {"__init__"}
    assert rooms == set(FLOORS), f"differs: {sorted(rooms ^ set(FLOORS))}"
    assert len(list(ROOT.glob("*.py"))) <= MOST_ROOT_MODULES


def test_no_name_says_nothing() -> None:
    places = [*ROOT.rglob("*"), *(PROJECT / "jobs").rglob("*"), *(PROJECT / "tests").rglob("*")]
    bad = [str(path) for path in places if path.stem.lstrip("_") in FORBIDDEN]
    assert not bad, "\n".join(bad)


def test_functions_are_short_and_swallow_no_error() -> None:
    wrong = []
    for module in [*modules(), *(PROJECT / "jobs").glob("*.py")]:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    wrong.append(f"{module.relative_to(PROJECT)}:{node.lineno} {node.name}: {length} lines")
            if isinstance(node, ast.ExceptHandler) and all(isinstance(step, ast.Pass) for step in node.body):
                wrong.append(f"{module.relative_to(PROJECT)}:{node.lineno}: an error is swallowed")
    assert not wrong, "\n".join(wrong)


def test_jobs_are_thin() -> None:
    for job in (PROJECT / "jobs").glob("*.py"):
        assert job.read_text().count("\n") <= 40, f"{job.name} is longer than 40 lines"


def test_every_error_of_the_user_names_its_cure() -> None:
    wrong = []
    for module in modules():
        for node in ast.walk(ast.parse(module.read_text())):
            is_error = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError"
            if is_error and "cure" not in [keyword.arg for keyword in node.keywords]:
                wrong.append(f"{module.relative_to(PROJECT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)
