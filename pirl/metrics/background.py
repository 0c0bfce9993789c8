"""A sink whose place may be slow or unavailable: a thread of its own writes, and the training never waits."""

from __future__ import annotations

import queue
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import logs
from ..extras import require
from ..run import SINKS, Record
from ..storage import local_path
from ..text import count
from .sink import Context, Sink, report_failure

LINES = 10_000  # that wait for the place; more are dropped
UPLOAD_S = 60.0  # between two copies of the files to a remote storage
CLOSE_S = 30.0  # that the end of a training waits for the last lines


class Background(Sink):
    """A sink with a library of its own, imported and used by one thread.

    A kind overrides `open`, `write` and `finish`. Its files are in `folder`: RUN/sinks/NAME, or where the run is remote
    a temporary folder that is copied there once a minute and at the end.
    """

    name = ""
    """Name in `SINKS`, and the extra of its library."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._lines: queue.Queue[dict[str, float] | None] = queue.Queue(LINES)
        self._dropped = 0
        self._last_event = ""
        self._thread: threading.Thread | None = None
        self._place = context.run / SINKS / self.name
        local = local_path(self._place)
        self._temporary = None if local else tempfile.TemporaryDirectory(prefix=f"pirl-{self.name}-")
        self.folder = local or Path(self._temporary.name if self._temporary else "")
        self._uploaded: dict[Path, int] = {}

    def open(self, step: int) -> None:
        """Open the place for the metrics after `step`; in the sink's own thread, as `write` and `finish`."""

    def write(self, values: Mapping[str, float]) -> None:
        """Write one line of metrics."""

    def finish(self, state: str) -> None:
        """Close the place after the last event of the run: "done", "preempted" or another."""

    def resume(self, record: Record) -> None:
        """Start the thread."""
        step = int(record.metrics[-1]["step"]) if record.metrics else 0
        self._thread = threading.Thread(target=self._run, args=(step,), name=f"sink-{self.name}", daemon=True)
        self._thread.start()

    def step(self, values: Mapping[str, float]) -> None:
        """Leave one line to the thread; drop it where too many wait."""
        if self._thread and self._thread.is_alive():
            try:
                self._lines.put_nowait(dict(values))
            except queue.Full:
                self._dropped += 1

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Keep the last event, which decides how the run ends."""
        self._last_event = kind

    def close(self) -> None:
        """Wait for the last lines, a limited time."""
        if not self._thread:
            return
        deadline = time.monotonic() + CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._lines.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self._thread.join(max(0.0, deadline - time.monotonic()))
        waiting = self._lines.qsize() if self._thread.is_alive() else 0
        if self._dropped or waiting:
            lines = count(self._dropped + waiting, "line")
            logs.warn(f"metrics sink {self.name} was too slow: {lines} of metrics left out (metrics.jsonl has all)")

    def _run(self, step: int) -> None:
        try:
            require(self.name, f"metrics sink {self.name}")
            self.folder.mkdir(parents=True, exist_ok=True)
            self.open(step)
            copied = time.monotonic()
            while (values := self._lines.get()) is not None:
                self.write(values)
                if self._temporary and time.monotonic() - copied > UPLOAD_S:
                    self._upload()
                    copied = time.monotonic()
            self.finish(self._last_event)
            if self._temporary:
                self._upload()
                self._temporary.cleanup()
        except Exception as error:  # whatever a foreign library raises, the training continues
            report_failure(type(self).__name__, error)

    def _upload(self) -> None:
        """Copy the files that have changed to the run's storage."""
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and self._uploaded.get(path) != path.stat().st_mtime_ns:
                self._uploaded[path] = path.stat().st_mtime_ns
                self._place.upload(path, path.relative_to(self.folder).as_posix())
