"""The boto3 client of a process, and the settings that it follows."""

from __future__ import annotations

import os
import threading
from typing import Any

from pirl import logs
from pirl.errors import UsageError

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 60.0

_lock = threading.Lock()
_clients: dict[float | None, tuple[int, Any]] = {}
_retries = 0


def s3_client(timeout_s: float | None = None) -> Any:
    """Return the client of this process and AWS environment, made at the first use (importing boto3 takes a while).

    `timeout_s`: the one that tries once, and waits at most so long to connect and for a byte.
    """
    with _lock:
        _clean_environment()
        environment = hash(frozenset(item for item in os.environ.items() if item[0].startswith(("AWS_", "PIRL_S3_"))))
        if timeout_s not in _clients or _clients[timeout_s][0] != environment:
            client = _make_client(timeout_s)
            if client._request_signer._credentials is None:
                return client  # the service that hands them out may answer next time
            _clients[timeout_s] = environment, client
        return _clients[timeout_s][1]


def _make_client(timeout_s: float | None) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts() if timeout_s is None else 1},
        connect_timeout=timeout_s or setting("PIRL_S3_CONNECT_TIMEOUT_S", CONNECT_TIMEOUT_S),
        read_timeout=timeout_s or setting("PIRL_S3_READ_TIMEOUT_S", READ_TIMEOUT_S),
        max_pool_connections=32,
        tcp_keepalive=True,
    )
    try:
        client = boto3.session.Session().client("s3", config=config)
    except BotoCoreError:
        raise
    except ValueError as error:
        raise UsageError(
            "The S3 endpoint is not a valid URL.",
            "Set AWS_ENDPOINT_URL to something like https://s3.example.org.",
        ) from error
    client.meta.events.register("needs-retry.s3", _count_attempt, unique_id="pirl")
    return client


def _clean_environment() -> None:
    """Strip blanks and line breaks around AWS settings, as a Secret made of files has them.

    They would end up in a header, which no client sends. The environment is changed, for child processes too.
    """
    for name, value in list(os.environ.items()):
        if not name.startswith("AWS_"):
            continue
        if (clean := value.strip()) != value:
            logs.warn(f"{name} has blanks or a line break around it: they are ignored")
            os.environ[name] = clean
        if clean and not clean.isprintable():
            raise UsageError(
                f"{name} holds a line break or another control character",
                "set it to the one value; a Secret made of a file holds all lines of the file",
            )
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if bundle and not os.path.isfile(bundle):
        raise UsageError(f"AWS_CA_BUNDLE names no file: {bundle!r}", "set it to a file with the certificate of the CA")


def retries() -> int:
    """Return how many requests this process has repeated, or given up, because the server or the network failed."""
    return _retries


def count_retry() -> None:
    """Count a request that is repeated."""
    global _retries
    with _lock:
        _retries += 1


def _count_attempt(attempts: int, response: Any, caught_exception: Any, **_: Any) -> None:
    """Count an attempt that has failed. botocore asks after each whether to repeat it; this has no opinion."""
    status = response[0].status_code if response else 0
    if caught_exception is not None or status in (429, 500, 502, 503, 504):
        count_retry()


def _forget_clients() -> None:
    """Drop the clients and the lock in a forked child.

    It must neither share its parent's connections nor wait for a lock that a lost thread holds.
    """
    global _clients, _lock
    _clients, _lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_forget_clients)


def setting(name: str, default: float) -> float:
    """Return the positive number that an environment variable holds."""
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{name}={text!r} is not a positive number.", f"Unset it for the default, {default:g}.")
    return value


def attempts() -> int:
    """Return the tries of one request, the first one included."""
    return max(1, int(setting("PIRL_S3_ATTEMPTS", 4)))


def longest_request_s() -> float:
    """Return the seconds until a request that gets no answer has failed, with all its tries and pauses."""
    tries = attempts()
    one = max(
        setting("PIRL_S3_CONNECT_TIMEOUT_S", CONNECT_TIMEOUT_S), setting("PIRL_S3_READ_TIMEOUT_S", READ_TIMEOUT_S)
    )
    return tries * one + 2.0**tries
