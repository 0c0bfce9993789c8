"""The launcher's eyes: a program's progress in storage, and the log of rank 0's pod."""

from __future__ import annotations

import json
import re
import time
from typing import Any

from ..errors import StorageError, StorageNotFoundError
from ..logs import info
from ..programs import Program
from ..storage import open_storage
from .cluster import Cluster, UnavailableError
from .diagnose import status
from .kind import Object

TAIL_BYTES = 16 << 10
TIMEOUT_S = 5.0


class Progress:
    """The newest line of a program's record, which it writes every few seconds."""

    def __init__(self, program: Program, every_s: float) -> None:
        self.program = program
        self.run = open_storage(program.out).hurried(TIMEOUT_S)  # the job is followed while storage is unavailable
        self.every_s = every_s
        self.last: dict[str, Any] = {}
        self.available = True
        """Storage answered the last request."""
        self._best = -1
        self._read_at = float("-inf")

    def advanced(self) -> bool:
        """Return whether a step was made for the first time: steps repeated after a restart do not count."""
        if time.monotonic() - self._read_at < self.every_s:
            return False
        self._read_at = time.monotonic()
        record = self.program.record
        try:
            size = self.run.size(record)
            tail = self.run.read_range(record, max(0, size - TAIL_BYTES), TAIL_BYTES)
            self.available = True
        except StorageNotFoundError:
            self.available = True
            return False
        except StorageError:  # the program has the same trouble, and its own retries
            self.available = False
            return False
        lines = tail.decode(errors="replace").splitlines()
        try:
            last = json.loads(lines[-1]) if lines else {}
        except ValueError:  # replaced between the two requests
            return False
        self.last = last if isinstance(last, dict) else {}
        before, self._best = self._best, max(self._best, self.last.get("step", -1))
        return self._best > before

    def __str__(self) -> str:
        return self.program.describe(self.last) if "step" in self.last else "no step yet"


def queue_reason(cluster: Cluster, name: str) -> str:
    """Return why the job `name` waits in its queue, in Kueue's words; it is in the events of the job's Workload."""
    created = [re.search(r"Workload: \S*?([^/\s]+)$", event.get("message", "")) for event in cluster.events(name)]
    workloads = [match[1] for match in created if match]
    reasons = re.compile("Pending|Evicted.*|Preempted|Admitted")
    events = cluster.events(workloads[-1]) if workloads else []
    events = [event for event in events if reasons.fullmatch(event.get("reason", ""))]
    if not events:
        return "in its queue: no reason reported yet"
    if events[-1]["reason"] == "Admitted":  # Kueue 0.17 cannot start the job of a Trainer before 2.2
        return "admitted, but not started -> check that the versions of Kueue and the operator fit"
    return f"in its queue: {events[-1]['message']}"


class LogStream:
    """The log of one pod, line by line, over restarts of its container and replacements of the pod.

    Each call reads the last seconds again and drops lines that were read before, by the time that the node has put
    before each. So a connection that broke, or a launcher that slept, loses nothing that the node still has.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._pod: Object | None = None
        self._restarts = 0
        self._seen = ""
        self._read_at: float | None = None
        self._wait_until = 0.0
        self.interrupted = False
        """The last attempt to read has failed."""

    def lines(self, pod: Object, final: bool = False) -> list[str]:
        """Return the lines since the last call; first the last ones of a pod that this one replaces.

        A log that could not be read is left alone for some seconds, unless this is the `final` call.
        """
        if final:
            self._wait_until = 0.0
        if time.monotonic() < self._wait_until or not {"running", "terminated"} & status(pod).get("state", {}).keys():
            return []
        new: list[str] = []
        if self._pod is None or pod["metadata"]["uid"] != self._pod["metadata"]["uid"]:
            if self._pod is not None:
                new = self._read(self._pod)
            self._restarts, self._seen, self._read_at = status(pod).get("restartCount", 0), "", None
        self._pod = pod
        new += self._read(pod)
        if final and self.interrupted:
            command = f"kubectl logs {pod['metadata']['name']} -n {self.cluster.namespace}"
            info(f"launcher: the last lines of rank 0 could not be read: `{command}` prints them while the pod exists")
        return new

    def _read(self, pod: Object) -> list[str]:
        """Return the lines of one pod that were not read before."""
        now, restarts = time.monotonic(), status(pod).get("restartCount", 0)
        since = None if self._read_at is None else int(now - self._read_at) + 10
        try:
            text = ""
            if restarts > self._restarts:
                text = self.cluster.log(pod, since, previous=True)
            text += self.cluster.log(pod, since)
        except UnavailableError:  # mostly a node that is cut off: do not wait for its timeout at every poll
            self._wait_until, self.interrupted = now + 15, True
            return []
        self.interrupted = False
        self._restarts, self._read_at = restarts, now
        new = [line for line in text.splitlines() if line.partition(" ")[0] > self._seen]
        if new:
            self._seen = max(line.partition(" ")[0] for line in new)
        return [line.partition(" ")[2] for line in new]
