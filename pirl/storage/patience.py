"""Patience with a storage that is unavailable for a while.

A request that fails for a transient reason is repeated, for `PIRL_STORAGE_PATIENCE_S` seconds at most. Until a storage
has answered for the first time, its address may be wrong: then nothing is repeated but what the client repeats itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from pirl import logs
from pirl.errors import PirlError, StorageNotFoundError, UsageError
from pirl.storage.client import longest_request_s

SETTING = "PIRL_STORAGE_PATIENCE_S"
DEFAULT_S = 180.0
PAUSE_S = 2.0

P = ParamSpec("P")
T = TypeVar("T")


class Patient(Protocol):
    """Object whose requests may be repeated."""

    root: str
    """The part of its address that is available or not as a whole; empty for the file system."""
    patience_s: float | None
    """None: as in the setting, once it has answered."""


S = TypeVar("S", bound=Patient)


def retried(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Repeat a request of a storage while it fails for a transient reason."""

    @wraps(method)
    def call(storage: S, *args: P.args, **kwargs: P.kwargs) -> T:
        return retry(storage, lambda: method(storage, *args, **kwargs))

    return call


def retry(storage: Patient, request: Callable[[], T]) -> T:
    """Return what `request` returns, asked again as long as the patience of `storage` lasts."""
    started = time.monotonic()
    while True:
        try:
            answer = request()
        except PirlError as error:
            if isinstance(error, StorageNotFoundError):
                _answered(storage.root)
            limit_s = _limit_s(storage)
            pause_s = min(PAUSE_S, limit_s / 4)
            if not error.transient or time.monotonic() - started + pause_s > limit_s:
                raise
            _report(storage.root, error, limit_s)
            time.sleep(pause_s)
        else:
            _answered(storage.root)
            return answer


def has_answered(root: str) -> bool:
    """Return whether this process, or the one that it has its storage from, got an answer before."""
    return not root or root in _roots


def remember(root: str) -> None:
    """Count a storage as one that has answered."""
    _roots.add(root)


def patience_s() -> float:
    """Return the setting."""
    text = os.environ.get(SETTING, "")
    try:
        seconds = float(text) if text else DEFAULT_S
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"{SETTING} is not a number of seconds: {text!r}", f"unset it for the default, {DEFAULT_S:g}")
    return seconds


def longest_wait_s(uri: str) -> float:
    """Return the longest that a request of the storage at `uri` waits for an answer; 0 for a local one."""
    return patience_s() + longest_request_s() if uri.startswith("s3://") else 0.0


def _limit_s(storage: Patient) -> float:
    if storage.patience_s is not None:
        return storage.patience_s
    return patience_s() if has_answered(storage.root) else 0.0


_roots: set[str] = set()
_outages: dict[str, float] = {}
"""Storages that do not answer, and since when."""
_lock = threading.Lock()


def _answered(root: str) -> None:
    if root not in _outages and has_answered(root):
        return
    with _lock:
        remember(root)
        since = _outages.pop(root, None)
    if since is not None:
        logs.info(f"{root or 'the file system'} answers again, after {time.monotonic() - since:.0f} s")


def _report(root: str, error: PirlError, limit_s: float) -> None:
    """Log the start of an outage, once for each."""
    with _lock:
        begins = root not in _outages
        _outages.setdefault(root, time.monotonic())
    if begins:
        logs.warn(f"storage is unavailable, asking again for {limit_s:g} s: {error.what}")


def _forget_locks() -> None:
    """Give a forked child a lock that no lost thread holds."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_locks)
