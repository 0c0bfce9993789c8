"""What the commands share: the program, its options, tables and bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import __version__

app = typer.Typer(
    name="pirl",
    help="Self-supervised pretraining with PIRL: images in, an evaluated and registered trunk out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(width=None if sys.stdout.isatty() else 120)

RecipeName = Annotated[str, typer.Argument(help="Name of a recipe (`pirl recipes`) or path of a TOML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings to change.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Processes = Annotated[int, typer.Option(help="Processes on this machine; 0: as many as GPUs, else two.")]
BackendName = Annotated[
    Literal["local", "pytorchjob"], typer.Option(help="Train on this machine, or by a PyTorchJob on the cluster.")
]
JobItems = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Setting of the PyTorchJob (once for each): nodes=4, gpus=8, image=..."),
]
DRY_RUN_HELP = "Check everything, say what would be done, and stop."
DEFAULT_ROOT = "runs"


def version_callback(wanted: bool) -> None:
    if wanted:
        console.print(f"pirl {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=version_callback, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass


def show_rows(rows: list[dict[str, Any]], as_json: bool, hide: tuple[str, ...] = ()) -> None:
    """A list of dictionaries with the same keys as JSON, or as a table without the keys to `hide`."""
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        console.print("none")
        return
    table = Table()
    keys = [key for key in rows[0] if key not in hide]
    for key in keys:
        table.add_column(key.replace("_", " "), overflow="fold")
    for row in rows:
        values = (row[key] for key in keys)
        table.add_row(*("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line for every tenth where it is none."""
    if console.is_terminal:
        with Progress(
            TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        ) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    told = -1

    def advance(done: int, total: int) -> None:
        nonlocal told
        if total and done * 10 // total > told:
            told = done * 10 // total
            print(f"{what}: {done}/{total}", flush=True)

    yield advance
