"""The house holds: imports run down only, the map names every module, nothing is called by a word that says nothing."""

import ast
from pathlib import Path

import nightseg

ROOT = Path(nightseg.__file__).parent
PROJECT = ROOT.parent

# Higher number = higher floor. A module imports from its own floor only within its own package, and else from below.
FLOORS: dict[str, int] = {
    "errors": 0, "progress": 0, "storage": 1, "workspace": 2, "config": 2,
    "frames": 3, "recipe": 4, "measures": 5, "networks": 5, "learning": 6, "compute": 6, "translators": 6,
    "stages": 7, "graph": 8, "rounds": 9, "rounds_translation": 9, "results": 9,
    "runner": 10, "report": 11, "trials": 11, "search": 12, "verbs": 12,
    "distance": 12, "folder_scores": 12, "masks": 12, "adapt": 12, "convert": 12, "doctor": 12, "console": 13,
    "cli_steps": 14, "cli_models": 14, "cli": 15,
}  # fmt: skip
NEIGHBOURS = (5, 6)  # floors whose rooms do not know each other
MAY_USE_RAY = {"compute", "search"}
MAY_USE_CONFIG = {room for room, floor in FLOORS.items() if floor >= FLOORS["stages"]} | {"recipe"}
MAY_USE_CONFIG |= {"config"}
NO_TORCH = {room for room, floor in FLOORS.items() if floor < FLOORS["frames"]}
FORBIDDEN = {"utils", "util", "helpers", "helper", "common", "core", "base", "misc", "tools"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


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
            if there != here and FLOORS[there] > FLOORS[here]:
                wrong.append(f"{module.relative_to(PROJECT)} imports {name}")
            if there != here and FLOORS[there] == FLOORS[here] and FLOORS[here] in NEIGHBOURS:
                wrong.append(f"{module.relative_to(PROJECT)} imports its neighbour {name}")
    assert not wrong, "\n".join(wrong)


def test_stages_do_not_know_each_other() -> None:
    wrong = [
        f"{module.name} imports {name}"
        for module in (ROOT / "stages").glob("*.py")
        for name in imports(module)
        if name.startswith("nightseg.stages")
    ]
    assert not wrong, "\n".join(wrong)


def test_ray_torch_and_config_stay_in_their_rooms() -> None:
    wrong = []
    for module in modules():
        here = room(module)
        for name in imports(module):
            package = name.split(".")[0]
            if package == "ray" and here not in MAY_USE_RAY:
                wrong.append(f"{module.relative_to(PROJECT)} imports {name}")
            if package in ("torch", "torchvision") and here in NO_TORCH:
                wrong.append(f"{module.relative_to(PROJECT)} imports {name}")
            if name.startswith("nightseg.config") and here not in MAY_USE_CONFIG:
                wrong.append(f"{module.relative_to(PROJECT)} imports {name}")
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


def test_no_name_says_nothing() -> None:
    places = [*ROOT.rglob("*"), *(PROJECT / "jobs").rglob("*"), *(PROJECT / "tests").rglob("*")]
    bad = [str(path) for path in places if path.stem.lstrip("_") in FORBIDDEN]
    assert not bad, "\n".join(bad)


def test_files_and_functions_stay_one_concept() -> None:
    wrong = []
    for module in [*modules(), *(PROJECT / "jobs").glob("*.py")]:
        text = module.read_text()
        lines = text.count("\n")
        if lines > LONGEST_FILE:
            wrong.append(f"{module.relative_to(PROJECT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
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
