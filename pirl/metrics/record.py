"""A run's own record: `metrics.jsonl` by step and `events.jsonl` by event, in its storage."""

from __future__ import annotations

import json
import math
import resource
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from .. import logs
from ..errors import PirlError
from ..run import EVENTS, METRICS, Run
from ..storage import Storage

if TYPE_CHECKING:
    from .training import TrainingMetrics


class Log:
    """Two JSON-lines objects of a run, kept whole in memory and written as a whole: object stores cannot append.

    What goes in goes to `live` too, the metrics for Prometheus. Whoever logs waits for no storage.
    """

    def __init__(self, run: Storage, live: TrainingMetrics | None = None, flush_s: float = 15.0) -> None:
        self.run = run
        self.live = live
        self.flush_s = flush_s
        record = Run(run).record()
        self.metrics, self.events = record.metrics, record.events
        self._flushed = time.monotonic()
        self._writing = threading.Lock()
        self._unwritten = ""
        """What kept the last lines from being written."""
        if live and live.world.is_main:
            live.replay(self.events)

    def resume_at(self, step: int) -> None:
        """Forget the steps after `step`: they will be made again."""
        self.metrics = [line for line in self.metrics if line["step"] <= step]

    def step(self, **values: float) -> None:
        self.metrics.append({key: _rounded(value) for key, value in values.items()})
        if self.live:
            self.live.line(values)
        if time.monotonic() - self._flushed > self.flush_s and not self._writing.locked():
            self._flushed = time.monotonic()
            try:
                threading.Thread(target=self.flush, name="log", daemon=True).start()
            except RuntimeError as error:  # this process may have no more threads for now
                self._report(str(error))

    def event(self, kind: str, **values: Any) -> None:
        self.events.append({"time": round(time.time(), 3), "event": kind, **values})
        if self.live:
            self.live.event(kind, values)
        if not self.live or self.live.world.is_main:
            logs.event(kind, **values)

    def flush(self, patience_s: float = 0.0) -> None:
        """Write what there is, and wait for it, also for a storage that is unavailable for `patience_s`.

        Any thread may do so. No error ends the training: the lines are kept, and written with the next ones.
        """
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
            logs.say("the record of the run is written again, nothing is missing")


def peak_memory_bytes() -> int:
    """Largest resident set of this process or of any one child that has ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, else KiB
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit


def _rounded(value: float) -> float:
    return float(f"{value:.7g}") if isinstance(value, float) and math.isfinite(value) else value
