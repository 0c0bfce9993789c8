"""A prefix of an S3 bucket as a storage. boto3 is imported at the first use, since that takes a while."""

from __future__ import annotations

import io
import itertools
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from pirl.errors import PirlError, StorageError, UsageError
from pirl.storage.base import MAX_CHILDREN, Names, Storage, checked, checked_prefix, is_name, too_short, without_login
from pirl.storage.client import attempts, count_retry, s3_client
from pirl.storage.local import LocalFile, local_errors, reading_local, replacing
from pirl.storage.patience import retried, retry
from pirl.storage.s3_errors import error_code, explain, is_transient, missing_bucket

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

    shared = True

    def __init__(self, bucket: str, prefix: str = "") -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
            raise UsageError(f"{without_login(bucket)!r} is not a bucket name.", "Write s3://bucket/prefix.")
        self.bucket = bucket
        self.prefix = "/".join(part for part in prefix.split("/") if part)  # "a//b/" is a slip, not another place
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self.root = f"s3://{bucket}"
        self._timeout_s: float | None = None
        if self.prefix:
            checked(self.prefix, self.uri)

    def _key(self, name: str) -> str:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise StorageError(f"{name!r} is not a name for an object in {self.uri}.", "S3 takes UTF-8.") from error
        return f"{self.prefix}/{checked(name, self.uri)}".lstrip("/")

    def __truediv__(self, part: str) -> S3Storage:
        below = S3Storage(self.bucket, self._key(part.strip("/")))
        below.patience_s, below._timeout_s = self.patience_s, self._timeout_s
        return below

    def hurried(self, timeout_s: float) -> Self:
        other = self.patient(0)
        other._timeout_s = timeout_s
        return other

    def _attempts(self) -> int:
        return attempts() if self._timeout_s is None else 1

    @retried
    def read_bytes(self, name: str) -> bytes:
        return self._get(name)

    @retried
    def read_range(self, name: str, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        return self._get(name, Range=f"bytes={offset}-{offset + length - 1}")

    @retried
    def read_into(self, name: str, buffer: memoryview) -> None:
        def read(start: int) -> None:
            piece = buffer[start : start + _PART_BYTES]
            data = self.read_range(name, start, len(piece))
            if len(data) != len(piece):
                raise too_short(name, self.uri)
            piece[:] = data

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
                    if error_code(error) == "InvalidRange":  # the object ends before the offset
                        return b""
                    raise
                # botocore repeats requests, but not a body that breaks off half-way.
                try:
                    return bytes(body.read())
                except Exception as error:
                    if attempt >= self._attempts() or not is_transient(error):
                        raise
                    count_retry()
                    time.sleep(random.uniform(0.5, 1) * min(0.1 * 2**attempt, 10))
        raise AssertionError  # the loop has no end

    @retried
    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        key = self._key(name)
        with self._errors("write", name) as client:
            client.upload_fileobj(_View(data), self.bucket, key, Config=_transfer(self._attempts()))

    def create(self, name: str, data: bytes) -> bool:
        tries = itertools.count(1)
        return retry(self, lambda: self._create(name, data, tries))

    def _create(self, name: str, data: bytes, tries: Iterator[int]) -> bool:
        key = self._key(name)
        with self._errors("create", name) as client:
            from botocore.exceptions import ClientError

            for attempt in tries:
                try:
                    client.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    if error_code(error) == "PreconditionFailed":
                        # A repeated request may have lost against itself, when only the first answer was lost.
                        repeated = attempt > 1 or error.response.get("ResponseMetadata", {}).get("RetryAttempts")
                        return bool(repeated) and self.read_bytes(name) == data
                    if error_code(error) != "ConditionalRequestConflict" or attempt >= self._attempts():
                        raise
                    time.sleep(random.uniform(0.05, 0.2) * attempt)
        raise AssertionError  # the loop has no end

    @retried
    def upload(self, path: Path, name: str) -> None:
        key = self._key(name)
        with reading_local(path) as source, self._errors("write", name) as client:
            client.upload_fileobj(source, self.bucket, key, Config=_transfer(self._attempts()))

    @retried
    def download(self, name: str, path: Path) -> None:
        key = self._key(name)
        with local_errors("write", path), replacing(path) as file, self._errors("read", name) as client:
            client.download_fileobj(
                self.bucket, key, LocalFile(file, path, "write"), Config=_transfer(self._attempts())
            )

    @retried
    def read_version(self, name: str, version: str, offset: int, length: int) -> bytes | None:
        """Read as `read_range` does; return None where the object has changed since `entries` listed it."""
        if length <= 0:
            return b""
        try:
            return self._get(name, IfMatch=version, Range=f"bytes={offset}-{offset + length - 1}")
        except StorageError as error:
            if isinstance(error.__cause__, Exception) and error_code(error.__cause__) == "PreconditionFailed":
                return None
            raise

    def list(self, prefix: str = "") -> Names:
        return [entry.name for entry in self.entries(prefix)]

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {entry.name: entry.bytes for entry in self.entries(prefix)}

    @retried
    def entries(self, prefix: str = "", unusable: Names | None = None) -> Entries:
        """Return the objects of `list` with sizes and versions. Keys that are not names are put into `unusable`."""
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

    @retried
    def children(self) -> Names:
        start = f"{self.prefix}/" if self.prefix else ""
        with self._errors("list", "") as client:
            page = client.list_objects_v2(Bucket=self.bucket, Prefix=start, Delimiter="/", MaxKeys=MAX_CHILDREN)
        keys = [entry["Key"] for entry in page.get("Contents", ())]
        keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
        return sorted(key[len(start) :] for key in keys if is_name(key[len(start) :].removesuffix("/")))

    @retried
    def require_writable(self, name: str = "probe") -> None:
        key = self._key(name)
        with self._errors("write", name) as client:  # an upload in parts makes no object before it is completed
            upload = client.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]
        with suppress(StorageError), self._errors("write", name) as client:
            client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)

    @retried
    def size(self, name: str) -> int:
        key = self._key(name)
        with self._errors("read", name) as client:
            return int(client.head_object(Bucket=self.bucket, Key=key)["ContentLength"])

    @retried
    def delete(self, name: str) -> None:
        key = self._key(name)
        with self._errors("delete", name) as client:
            client.delete_object(Bucket=self.bucket, Key=key)

    @contextmanager
    def _errors(self, action: str, name: str) -> Iterator[Any]:
        """Yield the client of this process; raise its errors as `StorageError` with the cause and the next step."""
        endpoint, client = "", None
        try:
            client = s3_client(self._timeout_s)
            endpoint = without_login(client.meta.endpoint_url)
            yield client
        except PirlError:
            raise
        except Exception as error:
            explained = explain(
                error, f"{action} {self.uri}/{name}".rstrip("/"), self.bucket, endpoint, self._attempts()
            )
            if explained is None:
                raise
            if error_code(error) == "404" and not _has_bucket(client, self.bucket):
                explained = missing_bucket(self.bucket)
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
    """Return whether the bucket exists, where the answer to a HEAD of an object (it has no body) leaves that open."""
    try:
        client.head_bucket(Bucket=bucket)
    except Exception as error:  # any other error does not show that the bucket is absent
        return error_code(error) != "404"
    return True


def _transfer(tries: int) -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=2 * _PART_BYTES,
        multipart_chunksize=_PART_BYTES,
        max_concurrency=_PARALLEL,
        num_download_attempts=tries,
        preferred_transfer_client="classic",  # the other one would not follow the retries and timeouts set above
    )
