"""Progress of a training in the status of its TrainJob, by the status server of Kubeflow Trainer 2.2 and later.

Trainer sets the variables below in the pods where its feature gate TrainJobStatus is on. Reports are posted from a
thread of their own. A failure is warned of once, and the next report is tried all the same.
"""

from __future__ import annotations

import json
import math
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import logs
from .sink import Context, Sink

URL = "KUBEFLOW_TRAINER_SERVER_URL"
CA_FILE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN_FILE = "KUBEFLOW_TRAINER_SERVER_TOKEN"
EVERY_S = 5.0
TIMEOUT_S = 5.0
NAMES = ("loss", "lr", "epoch", "images_per_s")


class TrainerStatus(Sink):
    """Progress, ETA and some metrics of rank 0, posted at most every `every_s`; a no-op without a server."""

    every_s = EVERY_S

    def __init__(self, context: Context) -> None:
        self.steps = context.steps
        self.url = os.environ.get(URL, "")
        self._first: tuple[float, float] | None = None  # time and step of this process's first report
        self._report: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._post_all, name="trainer-status", daemon=True)
        if self.url:
            self._thread.start()

    def step(self, values: Mapping[str, float]) -> None:
        """Keep the newest values for the next post."""
        if not self.url or not self.steps:
            return
        step, now = values["step"], time.monotonic()
        self._first = self._first or (now, step)
        report: dict[str, Any] = {
            "progressPercentage": max(0, min(100, int(100 * step / self.steps))),
            "metrics": [
                {"name": name, "value": str(values[name])}
                for name in NAMES
                if name in values and math.isfinite(values[name])
            ],
            "lastUpdatedTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if step > self._first[1]:
            per_step = (now - self._first[0]) / (step - self._first[1])
            report["estimatedRemainingSeconds"] = max(0, round((self.steps - step) * per_step))
        with self._lock:
            self._report = report
        self._wake.set()

    def close(self) -> None:
        """Post the last values, within the time of one request."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(TIMEOUT_S)

    def _post_all(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            with self._lock:
                report, self._report = self._report, None
            if report is not None:
                self._post(report)
            if self._closing.is_set() and not self._wake.is_set():
                return
            self._closing.wait(self.every_s)

    def _post(self, report: Mapping[str, Any]) -> None:
        """Post one report; a failure never reaches the training."""
        try:
            headers = {"Content-Type": "application/json"}
            if path := os.environ.get(TOKEN_FILE):
                headers["Authorization"] = f"Bearer {Path(path).read_text().strip()}"
            context = ssl.create_default_context(cafile=os.environ.get(CA_FILE)) if self.url[:6] == "https:" else None
            body = json.dumps({"trainerStatus": report}).encode()
            request = urllib.request.Request(self.url, body, headers, method="POST")
            with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context):
                pass
        except Exception as error:  # a wrong variable, file or certificate, or any answer of a server
            if not self._warned:
                self._warned = True
                logs.warn(f"progress cannot be posted to Trainer's status server {self.url}: {error}")
