"""The program `pirl`: each verb parses its arguments and calls one function of the library."""

from __future__ import annotations

import sys

from rich.text import Text

from .. import logs
from ..errors import PirlError
from .app import app, plain_console

# each import adds its commands to the program; in this order --help lists them
from . import dag  # isort: skip
from . import shard  # isort: skip
from . import plan  # isort: skip
from . import train  # isort: skip
from . import evaluate  # isort: skip
from . import models  # isort: skip
from . import embed  # isort: skip
from . import retrain  # isort: skip
from . import look  # isort: skip
from . import compile  # isort: skip
from . import submit  # isort: skip
from . import schedule  # isort: skip

__all__ = ["app", "compile", "dag", "embed", "evaluate", "look", "main", "models"]
__all__ += ["plan", "retrain", "schedule", "shard", "submit", "train"]


def main() -> None:
    """Run the program: a `PirlError` is a message and an exit code, a bug is a traceback."""
    try:
        logs.configure()
        app()
    except PirlError as error:
        _show(error)
        sys.exit(error.exit_code)


def _show(error: PirlError) -> None:
    if logs.is_json():
        logs.error(str(error))
        return
    console = plain_console(stderr=True)
    console.print(Text.assemble(("error:", "bold red"), f" {logs.shown(logs.with_options(error.what))}"))
    if error.hint:
        console.print(f"  -> {logs.shown(logs.with_options(error.hint))}")
