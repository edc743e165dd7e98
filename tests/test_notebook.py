"""docs/nightseg.ipynb runs from the first cell to the last, and is committed without what it showed."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/nightseg.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """What the cell shows: the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names) if last is not None else None  # type: ignore[attr-defined]


def test_nothing_that_it_showed_is_committed() -> None:
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(code) >= 5 and not [cell for cell in code if cell["outputs"] or cell["execution_count"]]
    assert len(NOTEBOOK.read_bytes()) < 20_000


@pytest.mark.ray
def test_the_notebook_runs() -> None:
    names: dict[str, Any] = {}
    try:
        shown = [run_cell("".join(cell["source"]), names) for cell in CELLS if cell["cell_type"] == "code"]
        told = [repr(value) for value in shown if value is not None]
        for start in ("run /", "Segmenter(", "Segmented(a frame, 96 x 192", "<PIL.Image.Image", "{", "FolderScores(4"):
            assert any(text.startswith(start) for text in told), f"{start} is missing in {told}"
        assert names["labels"].shape == (96, 192) and set(names["result"].scores) == {"day_only"}
    finally:
        if "work" in names:
            shutil.rmtree(names["work"])
