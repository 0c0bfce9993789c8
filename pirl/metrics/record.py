"""A run's own record: `metrics.jsonl` by step and `events.jsonl` by event, in its storage."""

from __future__ import annotations

import json
import math
import resource
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

from .. import logs
from ..errors import StorageError
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
            threading.Thread(target=self.flush, name="log", daemon=True).start()

    def event(self, kind: str, **values: Any) -> None:
        self.events.append({"time": round(time.time(), 3), "event": kind, **values})
        if self.live:
            self.live.event(kind, values)
        if not self.live or self.live.world.is_main:
            logs.event(kind, **values)

    def flush(self) -> None:
        """Write what there is, and wait for it. Any thread may do so."""
        with self._writing:
            for name, lines in ((METRICS, self.metrics), (EVENTS, self.events)):
                text = "".join(json.dumps(line) + "\n" for line in list(lines))
                try:
                    self.run.write_bytes(name, text.encode())
                except StorageError as error:  # the lines are kept, and written with the next ones
                    warnings.warn(f"{name} was not written, training goes on: {error}", stacklevel=2)
            self._flushed = time.monotonic()


def peak_memory_bytes() -> int:
    """Largest resident set of this process or of any one child that has ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024


def _rounded(value: float) -> float:
    return float(f"{value:.7g}") if isinstance(value, float) and math.isfinite(value) else value
