"""A prefix of an S3 bucket as a storage. boto3 is imported at the first use, since that takes a while."""

from __future__ import annotations

import io
import itertools
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pirl.errors import PirlError, StorageError, StorageNotFoundError, UsageError
from pirl.storage.base import FULL_HINT, MAX_CHILDREN, Names, Storage, checked, checked_prefix, is_name, without_login
from pirl.storage.local import local_errors, reading_local, replacing

_PARALLEL = 8  # requests of one transfer
_PART_BYTES = 16 << 20  # S3 allows 10,000 parts; s3transfer enlarges them by itself above 160 GB


class Entry(NamedTuple):
    """An object as it was when it was listed."""

    name: str
    bytes: int
    version: str


Entries = list[Entry]  # inside the class `list` is the method


class S3Storage(Storage):
    """A prefix in a bucket of S3 or of a server that speaks its protocol.

    Uploads that a crash interrupts stay invisible; a lifecycle rule (AbortIncompleteMultipartUpload) frees their space.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
            raise UsageError(f"{without_login(bucket)!r} is not a bucket name.", "Write s3://bucket/prefix.")
        self.bucket = bucket
        self.prefix = "/".join(part for part in prefix.split("/") if part)  # "a//b/" is a slip, not another place
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        if self.prefix:
            checked(self.prefix, self.uri)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{checked(name, self.uri)}".lstrip("/")

    def __truediv__(self, part: str) -> S3Storage:
        return S3Storage(self.bucket, self._key(part.strip("/")))

    def read_bytes(self, name: str) -> bytes:
        return self._get(name)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        return self._get(name, Range=f"bytes={offset}-{offset + length - 1}")

    def read_into(self, name: str, buffer: memoryview) -> None:
        def read(start: int) -> None:
            piece = buffer[start : start + _PART_BYTES]
            found = self.read_range(name, start, len(piece))
            if len(found) != len(piece):
                raise StorageError(
                    f"{self.uri}/{name} is shorter than expected.", "It was changed while it was read: try again."
                )
            piece[:] = found

        with ThreadPoolExecutor(_PARALLEL) as pool:
            for _ in pool.map(read, range(0, len(buffer), _PART_BYTES)):
                pass

    def _get(self, name: str, **arguments: str) -> bytes:
        key = self._key(name)
        with self._errors("read", name) as client:
            from botocore import exceptions as boto

            for attempt in itertools.count(1):
                try:
                    body = client.get_object(Bucket=self.bucket, Key=key, **arguments)["Body"]
                except boto.ClientError as error:
                    if _code(error) == "InvalidRange":  # the object ends before the offset
                        return b""
                    raise
                # botocore repeats requests, but not a body that breaks off half-way.
                try:
                    return bytes(body.read())
                except (boto.HTTPClientError, boto.IncompleteReadError, boto.FlexibleChecksumError):
                    if attempt >= _attempts():
                        raise
                    _count_retries(1)
                    time.sleep(random.uniform(0.5, 1) * min(0.1 * 2**attempt, 10))
        raise AssertionError  # the loop has no end

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        key = self._key(name)
        with self._errors("write", name) as client:
            client.upload_fileobj(_View(data), self.bucket, key, Config=_transfer())

    def create(self, name: str, data: bytes) -> bool:
        key = self._key(name)
        with self._errors("create", name) as client:
            from botocore.exceptions import ClientError

            for attempt in itertools.count(1):
                try:
                    client.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    if _code(error) == "PreconditionFailed":
                        # A repeated request may have lost against itself, when only the first answer was lost.
                        repeated = attempt > 1 or error.response.get("ResponseMetadata", {}).get("RetryAttempts")
                        return bool(repeated) and self.read_bytes(name) == data
                    if _code(error) != "ConditionalRequestConflict" or attempt >= _attempts():
                        raise
                    time.sleep(random.uniform(0.05, 0.2) * attempt)
        raise AssertionError  # the loop has no end

    def upload(self, path: Path, name: str) -> None:
        key = self._key(name)
        with reading_local(path) as source, self._errors("write", name) as client:
            client.upload_fileobj(source, self.bucket, key, Config=_transfer())

    def download(self, name: str, path: Path) -> None:
        key = self._key(name)
        with local_errors("write", path), self._errors("read", name) as client, replacing(path) as file:
            client.download_fileobj(self.bucket, key, file, Config=_transfer())

    def read_version(self, name: str, version: str, offset: int, length: int) -> bytes | None:
        """As `read_range`; None when the object is not the one that `entries` has listed any more."""
        if length <= 0:
            return b""
        try:
            return self._get(name, IfMatch=version, Range=f"bytes={offset}-{offset + length - 1}")
        except StorageError as error:
            if isinstance(error.__cause__, Exception) and _code(error.__cause__) == "PreconditionFailed":
                return None
            raise

    def list(self, prefix: str = "") -> Names:
        return [entry.name for entry in self.entries(prefix)]

    def entries(self, prefix: str = "", unusable: Names | None = None) -> Entries:
        """What `list` names, with sizes and versions. Keys that are no names are put into `unusable`."""
        start = f"{self.prefix}/" if self.prefix else ""
        with self._errors("list", prefix) as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=start + checked_prefix(prefix, self.uri)
            )
            entries = [
                Entry(entry["Key"][len(start) :], int(entry["Size"]), entry["ETag"])
                for page in pages
                for entry in page.get("Contents", ())
            ]
        if unusable is not None:
            unusable += [e.name for e in entries if not is_name(e.name) and (e.bytes or not e.name.endswith("/"))]
        return sorted(entry for entry in entries if is_name(entry.name))  # others' markers ("folder/") are no objects

    def children(self) -> Names:
        start = f"{self.prefix}/" if self.prefix else ""
        with self._errors("list", "") as client:
            page = client.list_objects_v2(Bucket=self.bucket, Prefix=start, Delimiter="/", MaxKeys=MAX_CHILDREN)
        keys = [entry["Key"] for entry in page.get("Contents", ())]
        keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
        return sorted(key[len(start) :] for key in keys if is_name(key[len(start) :].removesuffix("/")))

    def require_writable(self, name: str = "probe") -> None:
        key = self._key(name)
        with self._errors("write", name) as client:  # an upload in parts is no object before it is completed
            upload = client.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]
        with suppress(StorageError), self._errors("write", name) as client:
            client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)

    def size(self, name: str) -> int:
        key = self._key(name)
        with self._errors("read", name) as client:
            return int(client.head_object(Bucket=self.bucket, Key=key)["ContentLength"])

    def delete(self, name: str) -> None:
        key = self._key(name)
        with self._errors("delete", name) as client:
            client.delete_object(Bucket=self.bucket, Key=key)

    @contextmanager
    def _errors(self, action: str, name: str) -> Iterator[Any]:
        """The client of this process; what it raises comes out explained."""
        endpoint = ""
        try:
            client = _s3_client()
            endpoint = without_login(client.meta.endpoint_url)
            yield client
        except (PirlError, OSError):
            raise
        except Exception as error:
            explained = _explain_s3(error, f"{action} {self.uri}/{name}".rstrip("/"), self.bucket, endpoint)
            if explained is None:
                raise
            if _code(error) == "404" and not _has_bucket(client, self.bucket):
                explained = StorageError(*_no_bucket(self.bucket))
            raise explained from error


class _View(io.RawIOBase):
    """A file over bytes in memory; unlike `BytesIO` it copies only what is read."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, len(self._data))[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        piece = self._data[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


def _has_bucket(client: Any, bucket: str) -> bool:
    """Tells an absent object from an absent bucket where the answer to a HEAD (it has no body) could mean both."""
    try:
        client.head_bucket(Bucket=bucket)
    except Exception as error:  # whatever else it is, it is no news about the bucket
        return _code(error) != "404"
    return True


_ABSENT = ("404", "NoSuchKey", "NotFound")
_client_lock = threading.Lock()
_client: tuple[int, Any] | None = None
_retries = 0


def _s3_client() -> Any:
    """One client per process and per AWS environment, made at the first use (importing boto3 takes a while)."""
    global _client
    environment = hash(frozenset(item for item in os.environ.items() if item[0].startswith(("AWS_", "PIRL_S3_"))))
    with _client_lock:
        if _client is None or _client[0] != environment:
            import boto3
            from botocore.config import Config

            config = Config(
                retries={"mode": "standard", "total_max_attempts": _attempts()},
                connect_timeout=_setting("PIRL_S3_CONNECT_TIMEOUT_S", 5.0),
                read_timeout=_setting("PIRL_S3_READ_TIMEOUT_S", 60.0),
                max_pool_connections=32,
                tcp_keepalive=True,
            )
            try:
                _client = environment, boto3.session.Session().client("s3", config=config)
                _client[1].meta.events.register("needs-retry.s3", _count_attempt, unique_id="pirl")
            except ValueError as error:
                raise UsageError(
                    "The S3 endpoint is not a valid URL.",
                    "Set AWS_ENDPOINT_URL to something like https://s3.example.org.",
                ) from error
        return _client[1]


def retries() -> int:
    """Requests that this process has repeated, or given up, because the server or the network failed them."""
    return _retries


def _count_attempt(attempts: int, response: Any, caught_exception: Any, **_: Any) -> None:
    """botocore asks after every attempt; told of a failure that it repeats, and answers nothing itself."""
    status = response[0].status_code if response else 0
    if caught_exception is not None or status in (429, 500, 502, 503, 504):
        _count_retries(1)


def _count_retries(number: int) -> None:
    global _retries
    with _client_lock:
        _retries += number


def _forget_client() -> None:
    """A forked child must neither share its parent's connections nor wait for a lock that a lost thread holds."""
    global _client, _client_lock
    _client, _client_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_client)


def _setting(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{name}={text!r} is not a positive number.", f"Unset it for the default, {default:g}.")
    return value


def _attempts() -> int:
    return max(1, int(_setting("PIRL_S3_ATTEMPTS", 8)))


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=2 * _PART_BYTES,
        multipart_chunksize=_PART_BYTES,
        max_concurrency=_PARALLEL,
        num_download_attempts=_attempts(),
        preferred_transfer_client="classic",  # the other one would not follow the retries and timeouts set above
    )


def _code(error: Exception) -> str:
    """The code of an S3 answer, empty for any other error."""
    return str((getattr(error, "response", None) or {}).get("Error", {}).get("Code", ""))


def _no_bucket(bucket: str) -> tuple[str, str]:
    return (
        f"The bucket {bucket!r} does not exist.",
        "Check its name and AWS_ENDPOINT_URL, or create it (`aws s3 mb`).",
    )


_REFUSED = (
    "access denied",
    "The account in use needs s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket there "
    "(without ListBucket even an absent object is answered so).",
)
_BAD_CREDENTIALS = (
    "the S3 server does not accept the credentials",
    "Renew them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile, or the pod's service account; "
    "and check AWS_ENDPOINT_URL.",
)
_WRONG_REGION = ("the bucket is in another region", "Set AWS_REGION to the bucket's region.")
_BUSY = ("the S3 server is overloaded or failing", "Run the same command again later; PIRL_S3_ATTEMPTS sets the tries.")
_S3_FULL = ("the S3 server has no space or quota left", FULL_HINT)
_S3_REASONS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem"), _REFUSED),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "401"), _BAD_CREDENTIALS),
    **dict.fromkeys(("ExpiredToken", "TokenRefreshRequired", "ExpiredTokenException"), _BAD_CREDENTIALS),
    **dict.fromkeys(("PermanentRedirect", "301", "307", "AuthorizationHeaderMalformed"), _WRONG_REGION),
    **dict.fromkeys(("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout"), _BUSY),
    **dict.fromkeys(("500", "502", "503", "504"), _BUSY),
    **dict.fromkeys(("QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity", "507"), _S3_FULL),
    "RequestTimeTooSkewed": ("this machine's clock differs from the server's", "Set the clock (NTP)."),
    "NotImplemented": (
        "the S3 server lacks a feature that is needed",
        "Use a server with conditional writes (If-None-Match); for checksums try "
        "AWS_REQUEST_CHECKSUM_CALCULATION=when_required.",
    ),
}


def _explain_s3(error: BaseException, doing: str, bucket: str, endpoint: str) -> StorageError | None:
    """The error for the user, or None for one that S3 is not to blame for. Repeats no text of the server."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as boto
    from s3transfer.exceptions import RetriesExceededError

    if isinstance(error, RetriesExceededError):
        error = error.last_exception
    if isinstance(error, boto.ClientError):
        code = _code(error)
        if code in _ABSENT:
            return StorageNotFoundError(
                f"{doing.partition(' ')[2]} does not exist.", "Check the URI, or run the step that writes it."
            )
        if code == "NoSuchBucket":
            return StorageError(*_no_bucket(bucket))
        reason, hint = _S3_REASONS.get(
            code, (f"the S3 server answered {code}", "Look this code up in the server's documentation.")
        )
        explained = StorageError(f"Cannot {doing}: {reason}.", hint)
        explained.passing = (reason, hint) == _BUSY
        return explained
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return StorageError(
            f"Cannot {doing}: no usable S3 credentials found.",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the pod a service account.",
        )
    if isinstance(
        error, boto.HTTPClientError | boto.ConnectionError | boto.IncompleteReadError | boto.FlexibleChecksumError
    ):
        explained = StorageError(
            f"Cannot {doing}: the S3 endpoint {urlsplit(endpoint).netloc or 'chosen'} cannot be reached or breaks off "
            f"({type(error).__name__}, {_attempts()} tries).",
            "Check AWS_ENDPOINT_URL (AWS_ENDPOINT_URL_S3), the network and whether the server is up.",
        )
        explained.passing = True
        return explained
    if isinstance(error, boto.BotoCoreError | Boto3Error):
        return StorageError(f"Cannot {doing}: {error}.", "Check the AWS settings of this machine (AWS_*, ~/.aws).")
    return None
