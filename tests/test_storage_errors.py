"""Every error of a storage's client comes out as a `StorageError` with `transient` right, or as a `UsageError`."""

from __future__ import annotations

import errno
import http.client
import importlib
import inspect
import multiprocessing
import os
import pickle
import pkgutil
import ssl
import string
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3.exceptions
import botocore.exceptions
import botocore.parsers
import pytest
import s3transfer.exceptions
import urllib3.exceptions
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401
from urllib3 import HTTPConnectionPool

import pirl
from pirl.errors import PirlError, StorageError, StorageNotFoundError, UsageError
from pirl.shards import ShardReader
from pirl.storage import Storage, open_storage
from pirl.storage.client import s3_client

MODULES = (botocore.exceptions, boto3.exceptions, s3transfer.exceptions, urllib3.exceptions)
BUILTIN = (ConnectionResetError, ConnectionRefusedError, BrokenPipeError, TimeoutError, ssl.SSLError)

TRANSIENT = """
botocore: CapacityNotAvailableError ChecksumError ConnectTimeoutError ConnectionClosedError ConnectionError
    CredentialRetrievalError EndpointConnectionError FlexibleChecksumError HTTPClientError IncompleteReadError
    MetadataRetrievalError ProxyConnectionError ReadTimeoutError ResponseStreamingError SSLError ResponseParserError
s3transfer: S3DownloadFailedError S3ValidationError
urllib3: ClosedPoolError ConnectTimeoutError DecodeError EmptyPoolError FullPoolError IncompleteRead InvalidChunkLength
    MaxRetryError NameResolutionError NewConnectionError PoolError ProtocolError ProxyError ReadTimeoutError
    RequestError ResponseError ResponseNotChunked SSLError TimeoutError
http: IncompleteRead RemoteDisconnected
builtins: ConnectionResetError ConnectionRefusedError BrokenPipeError TimeoutError
ssl: SSLError
"""
USAGE = """
botocore: BaseEndpointResolverError ConfigNotFound ConfigParseError EndpointProviderError EndpointResolutionError
    EndpointVariantError InfiniteLoopConfigError InvalidChecksumConfigError InvalidConfigError InvalidDefaultsMode
    InvalidEndpointConfigurationError InvalidEndpointDiscoveryConfigurationError InvalidIMDSEndpointError
    InvalidIMDSEndpointModeError InvalidMaxRetryAttemptsError InvalidProxiesConfigError InvalidRegionError
    InvalidRetryConfigurationError InvalidRetryModeError InvalidS3AddressingStyleError
    InvalidS3UsEast1RegionalEndpointConfigError InvalidSTSRegionalEndpointsConfigError NoRegionError ProfileNotFound
    UnknownEndpointError UnknownEndpointResolutionBuiltInName UnknownFIPSEndpointError UnknownRegionError
    UnsupportedS3ConfigurationError
boto3: InvalidCrtTransferConfigError
urllib3: LocationParseError LocationValueError ProxySchemeUnknown ProxySchemeUnsupported URLSchemeUnknown
"""


def table(text: str) -> set[str]:
    """Return the names of a table as PACKAGE.CLASS."""
    names, package = set(), ""
    for word in text.split():
        if word.endswith(":"):
            package = word[:-1]
        else:
            names.add(f"{package}.{word}")
    return names


def classes() -> dict[str, type[Exception]]:
    """Return all exception classes that the client's packages define or raise, by PACKAGE.CLASS."""
    extra = [*BUILTIN, http.client.RemoteDisconnected, http.client.IncompleteRead, CancelledError]
    extra.append(botocore.parsers.ResponseParserError)
    for module in MODULES:
        own = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, Exception)]
        extra += [kind for kind in own if kind.__module__.partition(".")[0] == module.__name__.partition(".")[0]]
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}": kind for kind in extra}


def instance(kind: type[Exception]) -> Exception:
    """Return an error of a class as its package makes it."""
    pool, cause = HTTPConnectionPool("localhost"), ConnectionResetError(errno.ECONNRESET, "reset")
    if issubclass(kind, botocore.exceptions.ClientError):
        return kind({"Error": {"Code": "Teapot"}, "ResponseMetadata": {"HTTPStatusCode": 418}}, "GetObject")
    if issubclass(kind, botocore.exceptions.BotoCoreError):
        fields = [field for _, field, _, _ in string.Formatter().parse(kind.fmt) if field]
        with suppress(TypeError):
            return kind(**dict.fromkeys(fields, "x") | {"error": cause})
    made: dict[str, Callable[[], Exception]] = {
        "MaxRetryError": lambda: kind(pool, "/", cause),
        "NewConnectionError": lambda: kind(pool, "refused"),
        "NameResolutionError": lambda: kind("host", pool, OSError("no such host")),
        "MissingServiceIdError": lambda: kind(service_name="x"),
        "HostChangedError": lambda: kind(pool, "/", 3),
        "ReadTimeoutError": lambda: kind(pool, "/", "timed out"),
        "RequestError": lambda: kind(pool, "/", "x"),
        "ProxyError": lambda: kind("proxy", cause),
        "InvalidChunkLength": lambda: kind(type("Answer", (), {"tell": lambda self: 3, "length_remaining": 4})(), b"z"),
        "HeaderParsingError": lambda: kind([], ""),
        "RetriesExceededError": lambda: kind(botocore.exceptions.ParamValidationError(report="x")),
    }
    if kind.__name__ in made:
        return made[kind.__name__]()
    if issubclass(kind, urllib3.exceptions.PoolError):
        return kind(pool, "x")
    if issubclass(kind, http.client.IncompleteRead):
        return kind(*((3, 4) if "urllib3" in kind.__module__ else (b"half", 3)))
    for arguments in (("x",), (), ("x", "x"), ("x", "x", "x")):
        with suppress(TypeError):
            return kind(*arguments)
    raise AssertionError(f"no instance of {kind}")


def outcome(error: PirlError) -> str:
    """Return the column of the table that an error belongs to."""
    assert error.hint
    assert "Traceback" not in str(error)
    return "usage" if isinstance(error, UsageError) else "transient" if error.transient else "permanent"


EXPECTED = {
    name: "transient" if name in table(TRANSIENT) else "usage" if name in table(USAGE) else "permanent"
    for name in classes()
}


def test_the_table_names_classes_that_exist() -> None:
    missing = (table(TRANSIENT) | table(USAGE)) - classes().keys()
    assert not missing
    assert len(classes()) > 120


@pytest.fixture
def storage(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Storage:  # noqa: F811
    monkeypatch.setenv("PIRL_S3_ATTEMPTS", "1")
    storage = open_storage(bucket)
    storage.write_bytes("x", b"whole")
    return storage


CALLS: dict[str, Callable[[Storage, Path], object]] = {
    "read": lambda storage, _: storage.read_bytes("x"),
    "write": lambda storage, _: storage.write_bytes("x", b"new"),
    "create": lambda storage, _: storage.create("y", b"new"),
    "list": lambda storage, _: storage.list(),
    "size": lambda storage, _: storage.size("x"),
    "download": lambda storage, folder: storage.download("x", folder / "x"),
}


@pytest.mark.parametrize("call", CALLS)
def test_any_error_in_a_request(storage: Storage, tmp_path: Path, call: str) -> None:
    """Raised where the client sends its request."""
    events = s3_client().meta.events
    wrong: dict[str, str] = {}
    for name, kind in classes().items():

        def fail(kind: type[Exception] = kind, **_: Any) -> None:
            raise instance(kind)

        events.register("before-send.s3", fail)
        try:
            CALLS[call](storage, tmp_path)
            wrong[name] = "nothing"
        except (StorageError, UsageError) as error:
            if outcome(error) != EXPECTED[name]:
                wrong[name] = outcome(error)
        except Exception as error:
            wrong[name] = repr(error)
        finally:
            events.unregister("before-send.s3", fail)
    assert wrong == {}
    assert not list(tmp_path.iterdir())


def test_any_error_in_a_body(storage: Storage, tmp_path: Path) -> None:
    """Raised where an answer is read, in the middle of a body."""

    class Broken:
        def __init__(self, kind: type[Exception]) -> None:
            self.kind = kind

        def read(self, *_: Any) -> bytes:
            raise instance(self.kind)

    events = s3_client().meta.events
    wrong: dict[str, str] = {}
    for name, kind in classes().items():

        def break_body(parsed: dict[str, Any], kind: type[Exception] = kind, **_: Any) -> None:
            parsed["Body"] = Broken(kind)

        events.register("after-call.s3.GetObject", break_body)
        try:
            for call in ("read", "download"):
                with pytest.raises((StorageError, UsageError)) as caught:
                    CALLS[call](storage, tmp_path)
                if outcome(caught.value) != EXPECTED[name]:
                    wrong[f"{call} {name}"] = outcome(caught.value)
        finally:
            events.unregister("after-call.s3.GetObject", break_body)
    assert wrong == {}


@pytest.mark.parametrize(
    ("code", "status", "transient"),
    [
        ("SlowDown", 503, True),
        ("XMinioServerNotInitialized", 503, True),
        ("TooManyRequestsException", 429, True),
        ("BadDigest", 400, True),
        ("IncompleteBody", 400, True),
        ("502", 502, True),
        ("ExpiredToken", 400, False),
        ("XMinioStorageFull", 507, False),
        ("NotImplemented", 501, False),
        ("KeyTooLongError", 400, False),
    ],
)
def test_answers(storage: Storage, code: str, status: int, transient: bool) -> None:
    def fail(**_: Any) -> None:
        answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise botocore.exceptions.ClientError(answer, "GetObject")

    s3_client().meta.events.register("before-send.s3", fail)
    try:
        with pytest.raises(StorageError) as caught:
            storage.read_bytes("x")
    finally:
        s3_client().meta.events.unregister("before-send.s3", fail)
    assert caught.value.transient is transient


def test_a_full_disk_under_a_download_is_the_disk_s(storage: Storage, tmp_path: Path) -> None:
    """/dev/full stands for the file that is written into."""
    from pirl.storage import local

    with open("/dev/full", "wb", buffering=0) as full:
        target = local.LocalFile(full, tmp_path / "x", "write")
        with pytest.raises(StorageError, match="the disk is full") as caught, storage._errors("read", "x") as client:  # type: ignore[attr-defined]
            client.download_fileobj(storage.bucket, "x", target)  # type: ignore[attr-defined]
    assert not caught.value.transient


@pytest.mark.parametrize(
    ("number", "transient"),
    [(errno.ESTALE, True), (errno.EIO, True), (errno.ETIMEDOUT, True), (errno.ENOSPC, False), (errno.EACCES, False)],
)
def test_file_systems_on_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, transient: bool
) -> None:
    monkeypatch.setenv("PIRL_STORAGE_PATIENCE_S", "0")

    def fail(self: Path, *_: Any, **__: Any) -> Any:
        raise OSError(number, "x")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(StorageError) as caught:
        open_storage(tmp_path).read_bytes("x")
    assert caught.value.transient is transient


@pytest.mark.parametrize("after", [0, 1], ids=["its index in the cache", "the shard"])
def test_a_shard_that_a_network_s_server_has_forgotten_is_opened_again(
    shards: str, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    reader, pread, calls = ShardReader(shards), os.pread, list(range(1 + after))
    right = reader.read(3)

    def forgotten(*arguments: Any) -> bytes:
        if calls and calls.pop() == 0:
            raise OSError(errno.ESTALE, "stale file handle")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", forgotten)
    assert reader.read(3) == right
    assert not calls


# ---- between processes


def error_classes() -> Iterator[type[PirlError]]:
    for module in pkgutil.walk_packages(pirl.__path__, "pirl."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    pending: list[type[PirlError]] = [PirlError]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        yield kind


def test_every_error_survives_pickling() -> None:
    kinds = list(error_classes())
    assert len(kinds) > 12
    for kind in kinds:
        try:
            error = kind("what", "hint", transient=True)
        except TypeError:  # it has one argument of its own
            error = kind("what")  # type: ignore[call-arg]
            error.transient = True
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert (copy.what, copy.hint, copy.transient, str(copy)) == (error.what, error.hint, True, str(error))
        assert copy.args == error.args


def fail_in_a_worker(_: int) -> None:
    raise StorageError("what", "hint", transient=True)


def test_an_error_of_a_worker_process_stays_transient() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(StorageError) as caught:
        pool.map(fail_in_a_worker, [0])
    assert caught.value.transient
    assert caught.value.hint == "hint"


def test_absent_is_no_outage(storage: Storage) -> None:
    with pytest.raises(StorageNotFoundError) as caught:
        storage.read_bytes("absent")
    assert not caught.value.transient
