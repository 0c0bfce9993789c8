"""The console of the DAG on this machine: one line a step, and all output of the executor in a file."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from .. import logs
from ..shards.fashion import cache_root
from ..storage import local_path, open_storage
from ..text import duration
from .app import plain_console

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result alone; steps are in the log file.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print all output of the steps and of the executor.")]

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STARTED = re.compile(r"INFO - Executing task '([\w-]+)'")
FINISHED = re.compile(r"(?:INFO|ERROR) - Task '([\w-]+)' finished with status (\w+)")
DONE_OF_TOTAL = re.compile(r"(?:^[\w -]+: |step )([\d,]+)(?:/| of )([\d,]+)")
THROUGHPUT, ETA = re.compile(r"[\d,]+ [a-z]+/s"), re.compile(r"ETA (.+)$")
INDENT = "    "  # of what a step prints
NAMES = {"shard": "shard train", "shard-2": "shard test", "linear-eval": "evaluate"}
TAIL = 20  # lines of a failed step that are shown


class StepConsole(io.TextIOBase):
    """A text stream for the executor: all lines go to a file, each step becomes one line of the console."""

    def __init__(self, log: Path, verbose: bool = False, quiet: bool = False) -> None:
        self.file = log.open("w", encoding="utf-8", errors="backslashreplace")
        self.console = plain_console(file=sys.stdout)
        self.stdout = sys.stdout
        self.verbose, self.quiet = verbose, quiet
        self.rest = ""
        self.step, self.since, self.tenth = "", 0.0, 0
        self.in_input = False
        self.recent: deque[str] = deque(maxlen=TAIL)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        if self.console.is_terminal and not self.console.is_dumb_terminal and not verbose and not quiet:
            self.bar = Progress(
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description:<12}", markup=False),
                BarColumn(24),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=self.console,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self.bar.start()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Take text of any length; whole lines are handled."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    def finish(self) -> None:
        """End the bar and close the file."""
        if self.rest:
            self._take(self.rest)
        if self.bar:
            self.bar.stop()
        self.file.close()

    def _take(self, line: str) -> None:
        plain = ESCAPE.sub("", line).rstrip()
        self.file.write(f"{plain}\n")
        self.file.flush()
        if self.verbose:
            colour = self.console.is_terminal and not self.console.no_color
            logs.write(self.stdout, f"{line if colour else plain}\n")
        if match := STARTED.search(plain):
            self._start(re.sub(r"^(register|report)-\d+$", r"\1", NAMES.get(match[1], match[1])))
        elif match := FINISHED.search(plain):
            self._end(match[2] == "SUCCESS")
        elif self.step and plain.startswith(INDENT):
            self._message(plain[len(INDENT) :])

    def _start(self, step: str) -> None:
        self.step, self.since, self.tenth = step, time.monotonic(), 0
        self.in_input = False
        self.recent.clear()
        if self.bar:
            self.task = self.bar.add_task(step, total=None, detail="")

    def _message(self, text: str) -> None:
        if self.in_input or text.startswith("[KFP Executor"):
            self.in_input = text != "}" if self.in_input else text.endswith("Got executor_input:")
            return
        if not text.strip():
            return
        match = DONE_OF_TOTAL.search(text)
        if match is None:
            self.recent.append(text)
            if text.startswith("warning: "):
                self._print(f"{self.step}: {text}")
            return
        done, total = (int(number.replace(",", "")) for number in match.groups())
        parts = [part[0] for pattern in (THROUGHPUT, ETA) if (part := pattern.search(text))]
        detail = "  ".join(parts)
        if self.bar:
            self.bar.update(self.task, completed=done, total=total or None, detail=detail)
        elif total and done * 10 // total > self.tenth:
            self.tenth = done * 10 // total
            self._print(f"{self.step}: {done:,} of {total:,}{'  ' if detail else ''}{detail}")

    def _end(self, success: bool) -> None:
        took = duration(time.monotonic() - self.since)
        if self.bar:
            total = self.bar.tasks[self.task].total or 1
            if success:
                self.bar.update(self.task, completed=total, total=total, detail="")
            else:
                self.bar.update(self.task, total=total, detail="failed")
            self.bar.stop_task(self.task)
        else:
            self._print(f"{self.step}: {'done' if success else 'failed'} after {took}")
        if not success and not self.verbose:
            for text in self.recent:
                self.console.print(text)
        self.step = ""

    def _print(self, text: str) -> None:
        if not self.quiet and not self.verbose:
            self.console.print(text)


@contextlib.contextmanager
def step_console(log: Path, verbose: bool = False, quiet: bool = False) -> Iterator[None]:
    """Send what is printed within to a log file, and show each step as one line."""
    stream = StepConsole(log, verbose, quiet)
    try:
        with contextlib.redirect_stdout(stream):
            yield
    finally:
        stream.finish()


def log_path(root: str, run: str) -> Path:
    """Return a new file in `ROOT/logs`, or where the root is not on this machine in the cache's `logs`."""
    local = local_path(open_storage(root))
    folder = Path(local) if local else cache_root() or Path.cwd()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    return folder / "logs" / f"{run}-{time.strftime('%Y%m%d-%H%M%S')}.log"
