"""Single-writer lease of a run, with a fencing number and a heartbeat.

    lease/00000003.json     its holder, with a counter that the holder raises every few seconds

Each holder has a number of its own, made by a conditional write, so that of several that want the lease one gets it. A
higher number ends the lower ones: a holder that was cut off sees it and writes no more. Nobody compares clocks: a
holder counts as dead when its counter has stood still for a while on the watcher's own monotonic clock, or when it was
a process of this machine that is gone.

Storage that is unavailable:
    to all           The holder trains on and tries to write its heartbeat each second or so. A watcher counts the time
                     of a silent holder only while storage answers, and from the start after each outage: the holder,
                     whose requests end within one heartbeat, shows itself before that.
    to the holder    A watcher that sees storage takes over. When the holder sees it again, it finds the higher number,
                     stops at its next step and writes nothing more. What it learned since its last checkpoint is lost;
                     what the other one made since is not.
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

from pirl import logs
from pirl.errors import PirlError, StorageError, StorageNotFoundError, TrainingError, UsageError
from pirl.storage import Storage, encode_json
from pirl.storage.patience import PAUSE_S, patience_s

BEAT_S = 5.0
STALE_BEATS = 4.0
LEAST_TIMEOUT_S = 2.0  # of a request of the heartbeat, which has one heartbeat's time
SAME_RUN_BEATS = 1.5  # the restart of a job whose launcher has ended the process before: one look is enough


class Lease:
    """Held from `claim` to `release`, or as a context; kept alive by a thread."""

    def __init__(self, run: Storage, number: int, content: dict[str, Any], beat_s: float) -> None:
        self.run, self.number = run, number
        self._folder, self._content, self._beat_s = _folder(run, beat_s), content, beat_s
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)

    @classmethod
    def claim(cls, run: Storage, beat_s: float = BEAT_S) -> Lease:
        """Take the lease of a run. `UsageError` where a living training holds it; waits to learn whether it lives."""
        folder, content = (run / "lease").patient(), _introduction()
        while True:
            names = _holders(folder)
            number = int(names[-1].partition(".")[0]) if names else 0
            if names:
                _wait_until_free(run, _folder(run, beat_s), names[-1], content, beat_s)
            if folder.create(f"{number + 1:08d}.json", encode_json(content)):
                break  # else somebody else was faster
        for name in names:
            folder.delete(name)
        lease = cls(run, number + 1, content, beat_s)
        with suppress(StorageError):
            lease.confirm()  # makes the client of the heartbeat, so that the first one is in time
        lease._thread.start()
        return lease

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()

    @property
    def lost(self) -> bool:
        """True once another training has taken over, as far as this one has seen."""
        return self._lost

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
        """Write heartbeats until the lease is lost or released, whatever fails; warn once that they fail."""
        failing_since: float | None = None
        while not self._ended.wait(self._beat_s if failing_since is None else self._beat_s / 4):
            try:
                self.confirm()
                self._write(beat=self._content["beat"] + 1)
            except Exception as error:
                if self._lost:
                    return
                if failing_since is None:
                    failing_since = time.monotonic()
                    problem = error.what if isinstance(error, PirlError) else f"{type(error).__name__}: {error}"
                    logs.warn(f"the lease of {self.run.uri} cannot be renewed, training continues: {problem}")
            else:
                if failing_since is not None:
                    logs.info(f"the lease is renewed again, after {time.monotonic() - failing_since:.0f} s")
                failing_since = None


def _folder(run: Storage, beat_s: float) -> Storage:
    """Return where the leases are, for requests that end within one heartbeat."""
    return (run / "lease").hurried(max(beat_s, LEAST_TIMEOUT_S))


def _holders(folder: Storage) -> list[str]:
    """Return the names of the leases, the newest last; leave out other files."""
    return [name for name in folder.list() if re.fullmatch(r"\d{8}\.json", name)]


def _wait_until_free(run: Storage, folder: Storage, name: str, lease: dict[str, Any], beat_s: float) -> None:
    """Return when the holder has gone, or does not beat any more; `UsageError` when it lives."""
    first = before = _read_patiently(folder, name)[0]
    same_run = bool(lease["job"]) and lease["job"] == before.get("job")
    silence_s = beat_s * (SAME_RUN_BEATS if same_run else STALE_BEATS)
    silent_since = time.monotonic()
    while True:
        local = before.get("machine") == lease["machine"] != ""
        if not before or before.get("released") or (local and not _is_alive(before)):
            return
        if local or before != first:
            raise UsageError(
                f"another training writes to {run.uri}: process {before.get('pid')} on {before.get('host')}, "
                f"since {before.get('since')}",
                "wait for it, stop it, or give another --out",
            )
        if time.monotonic() - silent_since > silence_s:
            return
        time.sleep(min(0.2, beat_s / 4))
        before, took_s = _read_patiently(folder, name)
        if took_s > beat_s:  # an outage, which may have kept the holder's heartbeats from being written
            silent_since = time.monotonic()


def _read_patiently(folder: Storage, name: str) -> tuple[dict[str, Any], float]:
    """Return the content, and how many seconds it took until storage answered."""
    started = time.monotonic()
    while True:
        try:
            return _read(folder, name), time.monotonic() - started
        except StorageError as error:
            if not error.transient or time.monotonic() - started > patience_s():
                raise
        time.sleep(PAUSE_S)


def _read(folder: Storage, name: str) -> dict[str, Any]:
    """Return the content; {} if it is gone or damaged."""
    try:
        content = json.loads(folder.read_bytes(name))
    except (StorageNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _introduction() -> dict[str, Any]:
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return {
        "holder": secrets.token_hex(8),
        "job": "" if job == "none" else job,  # torchrun's value without an id
        "machine": _machine(),
        "pid": os.getpid(),
        "process_started": _process_started(os.getpid()),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),  # for people
        "beat": 0,
        "released": False,
    }


def _machine() -> str:
    """Return the same text for processes that see each other by their numbers; "" if that cannot be read."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_alive(content: dict[str, Any]) -> bool:
    return _process_started(content.get("pid", 0)) == content.get("process_started") != ""


def _process_started(pid: int) -> str:
    """Return when a process of this machine started, in ticks since the boot; "" if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
