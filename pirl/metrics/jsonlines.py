"""A run's own record: `metrics.jsonl` by step and `events.jsonl` by event, in its storage."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping
from typing import Any, cast

from .. import logs
from ..errors import PirlError
from ..lines import Event, MetricsLine
from ..run import EVENTS, METRICS, Record
from .sink import Context, Sink

FLUSH_S = 15.0  # between two writes of the record


class JsonLines(Sink):
    """Two JSON-lines objects, held in memory and written as a whole, because object stores cannot append."""

    def __init__(self, context: Context, flush_s: float = FLUSH_S) -> None:
        super().__init__(context)
        self.run = context.run
        self.flush_s = flush_s
        self.metrics: list[MetricsLine] = []
        self.events: list[Event] = []
        self._flushed = time.monotonic()
        self._writing = threading.Lock()
        self._unwritten = ""
        """Error that kept the last lines from being written."""

    def resume(self, record: Record) -> None:
        """Continue the objects with these lines."""
        self.metrics, self.events = [*record.metrics], [*record.events]

    def step(self, values: Mapping[str, float]) -> None:
        """Add one line; write in the background what has waited for `flush_s`."""
        self.metrics.append(cast(MetricsLine, {key: _rounded(value) for key, value in values.items()}))
        if time.monotonic() - self._flushed > self.flush_s and not self._writing.locked():
            self._flushed = time.monotonic()
            try:
                threading.Thread(target=self.flush, name="log", daemon=True).start()
            except RuntimeError as error:  # this process may have no more threads for now
                self._report(str(error))

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Add one line."""
        self.events.append(cast(Event, {"time": values["time"], "event": kind, **values}))

    def flush(self, patience_s: float = 0.0) -> None:
        """Write all lines and wait for it. No error is raised: the next write has all lines again."""
        with self._writing:
            try:
                run = self.run.patient(patience_s)
                for name, lines in ((METRICS, self.metrics), (EVENTS, self.events)):
                    run.write_bytes(name, "".join(json.dumps(line) + "\n" for line in list(lines)).encode())
                self._report("")
            except Exception as error:
                self._report(error.what if isinstance(error, PirlError) else f"{type(error).__name__}: {error}")
            self._flushed = time.monotonic()

    def _report(self, problem: str) -> None:
        """Print once that the record cannot be written, and once that it is written again."""
        before, self._unwritten = self._unwritten, problem
        if problem and not before:
            logs.warn(f"the record of the run cannot be written, training continues: {problem}")
        elif before and not problem:
            logs.info("the record of the run is written again, nothing is missing")


def _rounded(value: float) -> float:
    return float(f"{value:.7g}") if isinstance(value, float) and math.isfinite(value) else value
