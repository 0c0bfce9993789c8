"""What a training says about itself: `metrics.jsonl` by step, `events.jsonl` by event, and lines on the terminal."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from typing import Any

from .storage import Storage


class Log:
    """Two JSON-lines objects of a run, kept whole in memory and written as a whole: object stores cannot append."""

    def __init__(self, run: Storage, flush_s: float = 15.0) -> None:
        self.run = run
        self.flush_s = flush_s
        self.metrics = read_lines(run, "metrics.jsonl")
        self.events = read_lines(run, "events.jsonl")
        self._flushed = time.monotonic()

    def resume_at(self, step: int) -> None:
        """Forget the steps after `step`: they will be made again."""
        self.metrics = [line for line in self.metrics if line["step"] <= step]

    def step(self, **values: float) -> None:
        self.metrics.append({key: _rounded(value) for key, value in values.items()})
        if time.monotonic() - self._flushed > self.flush_s:
            self.flush()

    def event(self, kind: str, **values: Any) -> None:
        self.events.append({"time": round(time.time(), 3), "event": kind, **values})

    def flush(self) -> None:
        for name, lines in (("metrics.jsonl", self.metrics), ("events.jsonl", self.events)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            self.run.write_bytes(name, text.encode())
        self._flushed = time.monotonic()


def read_lines(run: Storage, name: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; an empty list where there is none."""
    if not run.exists(name):
        return []
    return [json.loads(line) for line in run.read_bytes(name).decode().splitlines() if line.strip()]


def say(text: str) -> None:
    """One line for the person who watches, at once, also through a pipe."""
    print(text, file=sys.stdout, flush=True)


def duration(seconds: float) -> str:
    """12 s, 3:05, 2:03:04"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def peak_memory_bytes() -> int:
    """Largest resident set of this process or of any one child that has ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024


def _rounded(value: float) -> float:
    return float(f"{value:.7g}") if isinstance(value, float) and math.isfinite(value) else value
