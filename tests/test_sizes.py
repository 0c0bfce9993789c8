"""The size of files and functions: what fits a reader's screen and head."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for room in ("pirl", "components", "pipelines") for path in (ROOT / room).rglob("*.py"))
FILE_LINES = 350
FUNCTION_LINES = 60


def too_long(source: str) -> list[str]:
    """Return one line for the file, if it is too long, and for each function that is."""
    lines = source.count("\n")
    problems = [f"{lines} lines, expected at most {FILE_LINES}"] if lines > FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES:
                problems.append(f"{node.name}: {lines} lines, expected at most {FUNCTION_LINES}")
    return problems


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert too_long(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("x = 0\n" * FILE_LINES, 0),
        ("x = 0\n" * (FILE_LINES + 1), 1),
        ("def f():\n" + "    x = 0\n" * (FUNCTION_LINES - 1), 0),
        ("class A:\n    async def f(self):\n" + "        x = 0\n" * FUNCTION_LINES, 1),
    ],
)
def test_sizes_are_counted(source: str, count: int) -> None:
    assert len(too_long(source)) == count
