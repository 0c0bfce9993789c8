"""The program `pirl`: each verb parses its arguments and calls one function of the library."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape

from ..errors import PirlError
from .app import app

# each import adds its commands to the program; in this order --help lists them
from . import dag  # isort: skip
from . import shard  # isort: skip
from . import plan  # isort: skip
from . import train  # isort: skip
from . import evaluate  # isort: skip
from . import models  # isort: skip
from . import retrain  # isort: skip
from . import look  # isort: skip
from . import compile  # isort: skip
from . import submit  # isort: skip
from . import schedule  # isort: skip

__all__ = ["app", "compile", "dag", "evaluate", "look", "main", "models"]
__all__ += ["plan", "retrain", "schedule", "shard", "submit", "train"]


def main() -> None:
    """Run the program: a `PirlError` is a message and an exit code, a bug is a traceback."""
    try:
        app()
    except PirlError as error:
        _tell(error.what, error.hint)
        sys.exit(error.exit_code)


def _tell(what: str, hint: str) -> None:
    text = Console(stderr=True, soft_wrap=True)
    text.print(f"[bold red]error:[/] {escape(what)}", highlight=False)
    if hint:
        text.print(f"  -> {escape(hint)}", highlight=False)
