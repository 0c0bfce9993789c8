"""Sinks of a training's metrics, and the log that passes each metric and event to all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .. import logs
from ..config import Recipe
from ..memory import MemoryBank
from ..run import Record, Run
from ..storage import Storage
from ..world import World


@dataclass(frozen=True)
class Context:
    """A training on one rank, as its sinks see it."""

    run: Storage
    world: World = field(default_factory=World)
    steps: int = 0
    """Steps of the whole training."""
    epochs: int = 0
    """Epochs of the whole training."""
    model: nn.Module | None = None
    bank: MemoryBank | None = None
    recipe: Recipe | None = None


class Sink:
    """A place for metrics and events. A kind overrides what it needs, and is one line of `SINKS`.

    No method may wait for a network: a slow place needs a thread of its own. `event` and `flush` are also called from
    the thread that saves checkpoints.
    """

    every_rank = False
    """True where each rank opens one; else rank 0 alone."""

    def __init__(self, context: Context) -> None:
        """Open the place; nothing is read or written before `resume`."""

    def resume(self, record: Record) -> None:
        """Continue a run that has this record: its events, and its metrics up to the checkpoint that was loaded."""

    def step(self, values: Mapping[str, float]) -> None:
        """Take one line of metrics, by the names of `metrics.jsonl`."""

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Take one event of this rank; `values` has its Unix `time`."""

    def tick(self, images: int, seconds: float) -> None:
        """Take one optimiser step of all ranks on `images`, which has taken `seconds`."""

    def interval(self, parts: Mapping[str, float]) -> None:
        """Take this rank's seconds by part of a step since the last call; all ranks log at the same steps."""

    def flush(self, patience_s: float = 0.0) -> None:
        """Write what is held back, and wait `patience_s` for a storage that is unavailable."""

    def close(self) -> None:
        """Release what is open, at the end of the training."""


class Log:
    """The metrics and events of a run. A sink that raises is reported once and left out; training continues."""

    def __init__(self, run: Storage, sinks: Iterable[Sink]) -> None:
        self.run = run
        self.sinks = tuple(sinks)
        self._dropping = threading.Lock()

    def resume(self, step: int) -> None:
        """Continue the run's record at `step`: later metrics will be made again."""
        record = Run(self.run).record()
        record = Record([line for line in record.metrics if line["step"] <= step], record.events)
        self._each(lambda sink: sink.resume(record))

    def step(self, **values: float) -> None:
        """Log one line of metrics."""
        self._each(lambda sink: sink.step(values))

    def event(self, kind: str, **values: Any) -> None:
        """Log one event."""
        timed = {"time": round(time.time(), 3), **values}
        self._each(lambda sink: sink.event(kind, timed))

    def tick(self, images: int, seconds: float) -> None:
        """Count one step."""
        self._each(lambda sink: sink.tick(images, seconds))

    def interval(self, parts: Mapping[str, float]) -> None:
        """Log where this rank's time has gone."""
        self._each(lambda sink: sink.interval(parts))

    def flush(self, patience_s: float = 0.0) -> None:
        """Write what sinks hold back."""
        self._each(lambda sink: sink.flush(patience_s))

    def close(self) -> None:
        """Close all sinks; nothing is logged after it."""
        self._each(lambda sink: sink.close())
        self.sinks = ()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in self.sinks:
            try:
                call(sink)
            except Exception as error:
                self._drop(sink, error)

    def _drop(self, sink: Sink, error: Exception) -> None:
        with self._dropping:  # two threads log
            if sink not in self.sinks:
                return
            self.sinks = tuple(other for other in self.sinks if other is not sink)
        report_failure(type(sink).__name__, error)
        with suppress(Exception):
            sink.close()


class Console(Sink):
    """Events as JSON lines of the console; a person reads of them in other lines."""

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Print the event, with the console's own time."""
        logs.event(kind, **{name: value for name, value in values.items() if name != "time"})


def report_failure(name: str, error: Exception) -> None:
    """Warn that a sink is left out."""
    logs.warn(f"metrics sink {name} failed and is left out, training continues: {type(error).__name__}: {error}")
