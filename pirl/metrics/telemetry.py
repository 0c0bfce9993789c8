"""`pirl_*` metrics of this process, for Prometheus: served while a training goes on, left in a file by short tasks.

The ranks of one machine share a folder of memory-mapped values (prometheus_client's multiprocess mode), out of which
the first of them serves all. A rank that `pirl train` has not started, under a bare `torchrun`, speaks for itself only.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..launch import OUTCOME
from .record import peak_memory_bytes
from .table import METRICS

PORT = "PIRL_METRICS_PORT"
FILE = "PIRL_METRICS_FILE"
SHARED = "PROMETHEUS_MULTIPROC_DIR"


class Telemetry:
    """The metrics of one run in this process. A name that is not in the table is a bug, and a KeyError."""

    def __init__(self, uri: str, rank: int | None = None) -> None:
        self.run = uri.rstrip("/").rpartition("/")[2]
        self.rank = rank
        self._client = _client()
        self._shared = SHARED in os.environ
        self.registry = self._client.CollectorRegistry()
        self._metrics: dict[str, Any] = {}

    def set(self, name: str, value: float, **labels: str) -> None:
        """A gauge's value."""
        self._child(name, labels).set(value)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """To a counter."""
        self._child(name, labels).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """In a histogram."""
        self._child(name, labels).observe(value)

    def serve(self) -> None:
        """Answer at `PIRL_METRICS_PORT`, if it is set, until the process ends."""
        text = os.environ.get(PORT, "")
        if not text:
            return
        if not text.isdigit() or not 0 < int(text) < 65536:
            raise UsageError(f"{PORT} is {text!r}", "set it to a port, 9400 for instance, or not at all")
        registry = self.registry
        if self._shared:
            from prometheus_client.multiprocess import MultiProcessCollector

            registry = self._client.CollectorRegistry()
            MultiProcessCollector(registry)
        try:
            self._client.start_http_server(int(text), registry=registry)
        except OSError as error:
            warnings.warn(f"no metrics: port {text} cannot be used ({error}); training goes on", stacklevel=2)

    def write(self, path: Path) -> None:
        """All metrics as a text file of node-exporter, in one step."""
        self._client.write_to_textfile(str(path), self.registry)

    def _child(self, name: str, labels: dict[str, str]) -> Any:
        spec = METRICS[name]
        if name not in self._metrics:
            kind = {"counter": "Counter", "gauge": "Gauge", "histogram": "Histogram"}[spec.kind]
            options: dict[str, Any] = {"registry": self.registry}
            if spec.buckets:
                options["buckets"] = spec.buckets
            if spec.kind == "gauge":
                options["multiprocess_mode"] = "mostrecent"  # one process sets each: rank 0, or the rank that it names
            self._metrics[name] = getattr(self._client, kind)(name, spec.help, ("run", *spec.labels), **options)
        known = {"run": self.run, "rank": str(self.rank), **labels}
        return self._metrics[name].labels(**{label: known[label] for label in ("run", *spec.labels)})


@contextmanager
def task(name: str, uri: str) -> Iterator[Telemetry]:
    """A short task's metrics: written to `PIRL_METRICS_FILE`, if it is set, when the task has ended well."""
    telemetry = Telemetry(uri)
    started = time.perf_counter()
    yield telemetry
    path = os.environ.get(FILE)
    if not path:
        return
    telemetry.set("pirl_task_duration_seconds", time.perf_counter() - started, task=name)
    telemetry.set("pirl_task_last_success_timestamp_seconds", time.time(), task=name)
    telemetry.set("pirl_task_peak_memory_bytes", peak_memory_bytes(), task=name)
    try:
        telemetry.write(Path(path.replace("{task}", name)))
    except OSError as error:
        warnings.warn(f"metrics were not written to {path}: {error}", stacklevel=3)


def _client() -> Any:
    """prometheus_client, which looks at the environment once, when it is first imported."""
    folder = os.environ.get(OUTCOME)
    if folder and SHARED not in os.environ:
        shared = Path(folder) / "metrics"  # the launcher's, new for each start and deleted at its end
        shared.mkdir(exist_ok=True)
        os.environ[SHARED] = str(shared)
    import prometheus_client

    prometheus_client.disable_created_metrics()  # their times would double the series
    return prometheus_client
