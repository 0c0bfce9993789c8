"""The right to write to a run: one training at a time.

    lease/00000003.json     who holds it, with a counter that the holder raises every few seconds

Each holder has a number of its own, made by a conditional write, so that of several that want the lease one gets it. A
higher number ends the lower ones: a holder that was cut off sees it and writes no more. Nobody compares clocks: a
holder counts as dead when its counter has stood still for a while on the watcher's own monotonic clock, or when it was
a process of this machine that is gone.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pirl.errors import StorageError, StorageNotFoundError, TrainingError, UsageError
from pirl.storage import Storage, encode_json

BEAT_S = 5.0
STALE_BEATS = 4.0
SAME_RUN_BEATS = 1.5  # the restart of a job whose launcher has ended the process before: one look is enough


class Lease:
    """Held from `claim` to `release`, or as a context; kept alive by a thread."""

    def __init__(self, run: Storage, number: int, content: dict[str, Any], beat_s: float) -> None:
        self.run, self.number = run, number
        self._folder, self._content, self._beat_s = run / "lease", content, beat_s
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)

    @classmethod
    def claim(cls, run: Storage, beat_s: float = BEAT_S) -> Lease:
        """Take the lease of a run. `UsageError` where a living training holds it; waits to learn whether it lives."""
        folder, content = run / "lease", _introduction()
        while True:
            names = _holders(folder)
            number = int(names[-1].partition(".")[0]) if names else 0
            if names:
                _wait_until_free(run, folder, names[-1], content, beat_s)
            if folder.create(f"{number + 1:08d}.json", encode_json(content)):
                break  # else somebody else was faster
        for name in names:
            folder.delete(name)
        lease = cls(run, number + 1, content, beat_s)
        lease._thread.start()
        return lease

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()

    def check(self) -> None:
        """Raise `TrainingError` when another training is known to have taken over. Costs nothing."""
        if self._lost:
            raise TrainingError(
                f"another training has taken over {self.run.uri}: this one did not show itself for a while, or was "
                "thought to be gone",
                "look which of them should run; what the other one saves is not touched any more",
            )

    def confirm(self) -> None:
        """Ask the storage whether the lease is still held; raises as `check` does."""
        self._lost = self._lost or any(name > self._name for name in _holders(self._folder))
        self.check()

    def release(self) -> None:
        """Let the next one in at once."""
        self._ended.set()
        self._thread.join()
        with suppress(StorageError):
            if not self._lost:
                self._write(released=True)

    @property
    def _name(self) -> str:
        return f"{self.number:08d}.json"

    def _write(self, **changes: Any) -> None:
        self._content = {**self._content, **changes}
        self._folder.write_bytes(self._name, encode_json(self._content))

    def _keep_alive(self) -> None:
        while not self._lost and not self._ended.wait(self._beat_s):
            with suppress(StorageError, TrainingError):  # a storage that is away keeps others out, too
                self.confirm()
                self._write(beat=self._content["beat"] + 1)


def _holders(folder: Storage) -> list[str]:
    """Names of the leases there are, the newest last; other files are none of ours."""
    return [name for name in folder.list() if re.fullmatch(r"\d{8}\.json", name)]


def _wait_until_free(run: Storage, folder: Storage, name: str, mine: dict[str, Any], beat_s: float) -> None:
    """Return when the holder has gone, or does not beat any more; `UsageError` when it lives."""
    first = before = _read(folder, name)
    same_run = bool(mine["job"]) and mine["job"] == before.get("job")
    deadline = time.monotonic() + beat_s * (SAME_RUN_BEATS if same_run else STALE_BEATS)
    while True:
        here = before.get("machine") == mine["machine"] != ""
        if not before or before.get("released") or (here and not _is_alive(before)):
            return
        if here or before != first:
            raise UsageError(
                f"another training writes to {run.uri}: process {before.get('pid')} on {before.get('host')}, "
                f"since {before.get('since')}",
                "wait for it, stop it, or give another --out",
            )
        if time.monotonic() > deadline:
            return
        time.sleep(min(0.2, beat_s / 4))
        before = _read(folder, name)


def _read(folder: Storage, name: str) -> dict[str, Any]:
    """The content; empty where it is gone or not what it should be."""
    try:
        content = json.loads(folder.read_bytes(name))
    except (StorageNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _introduction() -> dict[str, Any]:
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return {
        "holder": secrets.token_hex(8),
        "job": "" if job == "none" else job,  # what torchrun says where it was given none
        "machine": _machine(),
        "pid": os.getpid(),
        "process_started": _process_started(os.getpid()),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),  # for people
        "beat": 0,
        "released": False,
    }


def _machine() -> str:
    """The same for processes that can see each other by their numbers, empty where that is not known."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_alive(content: dict[str, Any]) -> bool:
    return _process_started(content.get("pid", 0)) == content.get("process_started") != ""


def _process_started(pid: int) -> str:
    """When a process of this machine started, in ticks since the boot; empty when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
