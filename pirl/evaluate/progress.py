"""Progress of an evaluation: lines with throughput and ETA, and the record that a launcher follows."""

from __future__ import annotations

import time
from collections.abc import Callable

from pirl.lines import ProgressLine
from pirl.text import duration

REPORT_EVERY_S = 15.0


class Progress:
    """Units of work that are done, phase by phase. Rank 0 has one that prints; the others' are silent."""

    def __init__(
        self,
        say: Callable[[str], None] = lambda text: None,
        record: Callable[[ProgressLine], None] = lambda line: None,
        every_s: float = REPORT_EVERY_S,
    ) -> None:
        """`record` gets a line about every `every_s` seconds, whose number `step` grows over all phases."""
        self.note, self.record, self.every_s = say, record, every_s
        self.done_before = 0
        self.begin("start", 0, "units")

    def begin(self, phase: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a phase of `total` units, of which `done` were done by an earlier process."""
        self.done_before += getattr(self, "total", 0)
        self.phase, self.total, self.unit = phase, total, unit
        self.done = self.resumed = done
        self.started = self.reported = time.monotonic()

    def advance(self, units: int) -> None:
        """Count `units` of all ranks; report if the last report is long ago."""
        self.done = min(self.total, self.done + units)
        now = time.monotonic()
        if now - self.reported < self.every_s:
            return
        self.reported = now
        rate = max(1e-9, (self.done - self.resumed) / (now - self.started))
        eta = duration((self.total - self.done) / rate)
        self.note(f"{self.phase}: {self.done:,} of {self.total:,} {self.unit}  {rate:,.0f} {self.unit}/s  ETA {eta}")
        self.record(
            {
                "step": self.done_before + self.done,
                "phase": self.phase,
                "done": self.done,
                "total": self.total,
                "unit": self.unit,
                "rate": round(rate, 3),
            }
        )


def describe(line: ProgressLine) -> str:
    """Return a line of the record in words."""
    return (
        f"{line['phase']}: {line['done']:,} of {line['total']:,} {line['unit']}  {line['rate']:,.0f} {line['unit']}/s"
    )
