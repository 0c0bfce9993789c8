"""What a training says about itself: a record beside its checkpoints, live metrics, and lines for who watches.

`record`: `metrics.jsonl` by step and `events.jsonl` by event, in the run's own storage. `table`: every `pirl_*` metric.
`telemetry`: their values in this process, served or written to a file. `training`: which of them a training sets.
"""

from __future__ import annotations

from ..run import read_lines
from .record import Log, peak_memory_bytes
from .telemetry import Telemetry, task
from .training import TrainingMetrics

__all__ = [
    "Log",
    "Telemetry",
    "TrainingMetrics",
    "peak_memory_bytes",
    "read_lines",
    "task",
]
