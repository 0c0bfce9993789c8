"""What the launcher sees of a training: its progress in storage, and the log of rank 0's pod."""

from __future__ import annotations

import json
import time
from typing import Any

from ..errors import StorageError, StorageNotFoundError
from ..storage import Storage
from .cluster import Cluster, UnreachableError
from .diagnose import status
from .pod import Object

TAIL_BYTES = 16 << 10


class Progress:
    """The newest line of the run's `metrics.jsonl`, which the training writes every few seconds."""

    def __init__(self, run: Storage, every_s: float) -> None:
        self.run = run
        self.every_s = every_s
        self.last: dict[str, Any] = {}
        self.known = True
        """Whether storage answered when it was asked last."""
        self._best = -1
        self._asked = float("-inf")

    def advanced(self) -> bool:
        """Whether a step was made that was never made before: doing steps again after a restart does not count."""
        if time.monotonic() - self._asked < self.every_s:
            return False
        self._asked = time.monotonic()
        try:
            size = self.run.size("metrics.jsonl")
            tail = self.run.read_range("metrics.jsonl", max(0, size - TAIL_BYTES), TAIL_BYTES)
            self.known = True
        except StorageNotFoundError:
            self.known = True
            return False
        except StorageError:  # the training has the same trouble, and its own patience
            self.known = False
            return False
        lines = tail.decode(errors="replace").splitlines()
        try:
            self.last = json.loads(lines[-1]) if lines else {}
        except ValueError:  # replaced between the two requests
            return False
        before, self._best = self._best, max(self._best, self.last.get("step", -1))
        return self._best > before

    def __str__(self) -> str:
        if not self.last:
            return "no step yet"
        last = self.last
        return (
            f"epoch {last['epoch']:.2f}  step {last['step']}  loss {last['loss']:.4f}  "
            f"{last['images_per_s']:.0f} images/s"
        )


class LogStream:
    """The log of one pod, line by line, over restarts of its container and replacements of the pod.

    Each look asks for the last seconds again and drops what was seen, by the time that the node has put before each
    line. So a connection that broke, or a launcher that slept, loses nothing as long as the node still has it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._uid = ""
        self._restarts = 0
        self._seen = ""
        self._read_at: float | None = None
        self._wait_until = 0.0

    def lines(self, pod: Object) -> list[str]:
        """What is new."""
        now = time.monotonic()
        container = status(pod)
        if now < self._wait_until or not {"running", "terminated"} & container.get("state", {}).keys():
            return []
        restarts = container.get("restartCount", 0)
        if pod["metadata"]["uid"] != self._uid:
            self._uid, self._restarts, self._seen, self._read_at = pod["metadata"]["uid"], restarts, "", None
        since = None if self._read_at is None else int(now - self._read_at) + 10
        try:
            text = ""
            if restarts > self._restarts:
                text = self.cluster.log(pod["metadata"]["name"], since, previous=True)
            text += self.cluster.log(pod["metadata"]["name"], since)
        except UnreachableError:  # of a node that is cut off, as a rule: do not wait for it every time
            self._wait_until = now + 15
            return []
        self._restarts, self._read_at = restarts, now
        new = [line for line in text.splitlines() if line.partition(" ")[0] > self._seen]
        if new:
            self._seen = max(line.partition(" ")[0] for line in new)
        return [line.partition(" ")[2] for line in new]
