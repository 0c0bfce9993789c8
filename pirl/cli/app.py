"""Parts that the commands share: the program, its options, tables and bars."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from .. import __version__, logs
from ..backends import BACKENDS
from ..text import with_paths


class Commands(TyperGroup):
    """Commands whose messages name their own options."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        parameters = command.params if command else ()
        names = {each.name: each.opts[0] for each in parameters if each.name}
        logs.name_options({name: option if option.startswith("-") else name.upper() for name, option in names.items()})
        return name, command, rest


app = typer.Typer(
    name="pirl",
    cls=Commands,
    help="Self-supervised pretraining with PIRL: images in, an evaluated and registered trunk out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class PlainConsole(Console):
    """Console with paths in place of `file://` URIs."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print texts and tables."""
        super().print(*(with_paths(each) if isinstance(each, str) else each for each in objects), **settings)


def plain_console(**settings: Any) -> Console:
    """Return a console that prints names as they are: no markup, no emoji, no folded lines."""
    return PlainConsole(markup=False, emoji=False, highlight=False, soft_wrap=True, **settings)


console = plain_console(width=None if logs.is_terminal() else 120)

RecipeName = Annotated[str, typer.Argument(help="Name of a recipe (`pirl recipes`) or path of a TOML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings to change.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BackendName = Annotated[
    str, typer.Option(metavar="NAME", help=f"Train on this machine, or by a job on the cluster: {', '.join(BACKENDS)}.")
]
JobItems = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Setting of the cluster job (once for each): nodes=4, gpus=8, image=..."),
]
DRY_RUN_HELP = "Check everything, print what would be done, and stop."
DEFAULT_ROOT = "runs"


def version_callback(requested: bool) -> None:
    if requested:
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
    """Print a list of dictionaries with the same keys as JSON, or as a table without the keys to `hide`."""
    if as_json:
        logs.output(f"{json.dumps(rows)}\n")
        return
    if not rows:
        console.print("none")
        return
    table = Table()
    keys = [key for key in rows[0] if key not in hide]
    for key in keys:
        table.add_column(key.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[key]) for key in keys))
    show_table(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else with_paths(str(value))


def show_table(table: Table) -> None:
    """Print a table within the width of the console."""
    console.print(table, soft_wrap=False)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, elsewhere print a line for every tenth."""
    if console.is_terminal:
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    yield logs.progress(what)
