"""`pirl_*` metrics of this process for Prometheus: served by a training, left in a file by a short task.

The ranks of one machine share a folder of memory-mapped values (prometheus_client's multiprocess mode), from which the
first rank serves all. A rank under a bare `torchrun`, which `pirl train` has not started, serves its own values only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import logs
from ..errors import UsageError
from ..launch import OUTCOME
from ..world import is_port
from .process import peak_memory_bytes
from .table import METRICS

PORT = "PIRL_METRICS_PORT"
FILE = "PIRL_METRICS_FILE"
SHARED = "PROMETHEUS_MULTIPROC_DIR"


class Telemetry:
    """The metrics of one run in this process. A name that the table lacks is a bug, and a KeyError."""

    def __init__(self, uri: str, rank: int | None = None) -> None:
        self.run = uri.rstrip("/").rpartition("/")[2]
        self.rank = rank
        self._client = _client()
        self._shared = SHARED in os.environ
        self.registry = self._client.CollectorRegistry()
        self._metrics: dict[str, Any] = {}

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._child(name, labels).set(value)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter."""
        self._child(name, labels).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count a value in a histogram."""
        self._child(name, labels).observe(value)

    def serve(self) -> None:
        """Answer at `PIRL_METRICS_PORT`, if it is set, until the process ends."""
        port = check_port()
        if port is None:
            return
        registry = self.registry
        if self._shared:
            from prometheus_client.multiprocess import MultiProcessCollector

            registry = self._client.CollectorRegistry()
            MultiProcessCollector(registry)
        try:
            self._client.start_http_server(port, registry=registry)
        except OSError as error:
            logs.warn(f"metrics are not served, training continues: port {port} cannot be used ({error})")

    def write(self, path: Path) -> None:
        """Write all metrics as a text file of node-exporter, in one step."""
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
        values = {"run": self.run, "rank": str(self.rank), **labels}
        return self._metrics[name].labels(**{label: values[label] for label in ("run", *spec.labels)})


def check_port() -> int | None:
    """Return the port to serve metrics at, None where it is not set; raise `UsageError` if it cannot be a port."""
    text = os.environ.get(PORT, "")
    if text and not is_port(text):
        raise UsageError(
            f"{PORT} is {text!r}, expected a number from 1 to 65535", "set it to a port, such as 9400, or unset it"
        )
    return int(text) if text else None


@contextmanager
def task(name: str, uri: str) -> Iterator[Telemetry]:
    """Yield a short task's metrics; write them to `PIRL_METRICS_FILE`, if it is set, when the task has succeeded."""
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
        logs.warn(f"metrics were not written to {path}: {error}")


def _client() -> Any:
    """Return prometheus_client, which reads the environment once, when it is first imported."""
    folder = os.environ.get(OUTCOME)
    if folder and SHARED not in os.environ:
        shared = Path(folder) / "metrics"  # the launcher's, new for each start and deleted at its end
        shared.mkdir(exist_ok=True)
        os.environ[SHARED] = str(shared)
    import prometheus_client

    prometheus_client.disable_created_metrics()  # their times would double the series
    return prometheus_client
