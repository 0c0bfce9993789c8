"""The order of the library's modules: each imports only what stands before it, and none what stands above them all."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import pirl

ROOT = Path(pirl.__file__).parent
ORDER = (
    "errors extras text logs settings storage sections config device world launch | heads shards views order data "
    "loader | model negatives twister memory rowsums terms loss optim | "
    "checkpoint lines results layer_results gains collapse run runs comparison outputs metrics training train plan | "
    "evaluate export report plan_steps | registry embedding initial gate arguments | programs jobs backends | "
    "retraining reference doctor api cli"
)
POSITION = {name: index for index, name in enumerate(ORDER.replace("|", "").split())}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem not in ("__init__", "__main__"))


def imports(tree: ast.AST, package: list[str]) -> list[tuple[str, bool]]:
    """(absolute dotted name, whether inside a function) of every import; of names too, as they may be modules."""
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            found.extend((".".join([*base, alias.name]), lazy) for alias in node.names)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def violations(text: str, module: str, package: list[str]) -> list[str]:
    problems = []
    for name, lazy in imports(ast.parse(text), package):
        parts = name.split(".")
        if parts[0] in ("kfp", "components", "pipelines") and not (module == "cli" and lazy):
            problems.append(f"{module} imports {name}")  # the command line starts them, when a verb asks for it
        if parts[0] == "pirl" and len(parts) > 1 and parts[1] in POSITION and POSITION[parts[1]] > POSITION[module]:
            problems.append(f"{module} imports {parts[1]}, which stands after it")
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_order(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    assert parts[0] in POSITION, f"{parts[0]} has no place in the order of modules"
    package = ["pirl", *parts[:-1]]
    assert violations(path.read_text(), parts[0], package) == []


@pytest.mark.parametrize(
    ("text", "module", "wrong"),
    [
        ("from .train import train", "data", True),
        ("from . import cli", "train", True),
        ("import pirl.evaluate", "loss", True),
        ("from pirl import report", "model", True),
        ("def f():\n    from .report import x", "model", True),
        ("from .config import Recipe", "data", False),
        ("from . import __version__", "train", False),
        ("import kfp", "jobs", True),
        ("from kfp import local", "cli", True),
        ("def f():\n    from kfp import local", "cli", False),
        ("def f():\n    import kfp", "train", True),
        ("def f():\n    from pipelines.local import run_local", "cli", False),
        ("from pipelines.local import run_local", "evaluate", True),
    ],
)
def test_the_check_itself(text: str, module: str, wrong: bool) -> None:
    assert bool(violations(text, module, ["pirl"])) == wrong


def test_no_module_warns_by_the_warnings_module() -> None:
    """Under `PYTHONWARNINGS=error` a warning would end the work: `logs.warn` never raises."""
    sources = {path.relative_to(ROOT): path.read_text() for path in ROOT.rglob("*.py")}
    assert [str(name) for name, text in sources.items() if "warnings.warn(" in text] == []


FILES_OF_A_RUN = "config.toml DONE.json metrics.jsonl events.jsonl warm.json report.html registered.json eval.json"
FILES_OF_A_RUN += " eval_zoo.json eval_champion.json gate.json"
NAMES_OF_A_RUN = re.compile(
    rf"(^|[/ ])({'|'.join(map(re.escape, FILES_OF_A_RUN.split()))})(?![.\w])"
    r"|^(checkpoints|steps)/|/(checkpoints|steps)(/|$)"
)


def names_of_a_run(text: str) -> list[str]:
    """Return the strings of a module with names in a run's folder, docstrings and hints with a command apart."""
    tree = ast.parse(text)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts = [node.value for node in strings if id(node) not in prose and "`pirl" not in node.value]
    return [text for text in texts if NAMES_OF_A_RUN.search(text)]


@pytest.mark.parametrize("room", ["pirl", "components", "pipelines"])
def test_one_module_has_the_names_in_a_runs_folder(room: str) -> None:
    paths = sorted((ROOT.parent / room).rglob("*.py"))
    assert paths
    holders = {str(path): held for path in paths if (held := names_of_a_run(path.read_text()))}
    assert set(holders) == ({str(ROOT / "run.py")} if room == "pirl" else set()), holders


@pytest.mark.parametrize(
    ("text", "count"),
    [('x = run / "DONE.json"', 1), ('x = f"{run}/checkpoints/{name}"', 1), ('"""The marker DONE.json."""', 0)],
)
def test_names_in_a_runs_folder_are_detected(text: str, count: int) -> None:
    assert len(names_of_a_run(text)) == count
