"""Objects by name under a URI: a folder or an S3 prefix, with the same promises.

A name is relative ("checkpoints/LATEST.json"). What a reader sees is always one whole object, the old or the new one,
whatever dies in between. `create` makes exactly one of many contenders the winner. Every failure is a `StorageError`
that names the object and the next step.

S3 follows the usual AWS settings (credential chain, AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_S3, AWS_REGION...), and:
    PIRL_STORAGE_PATIENCE_S    seconds that a request is repeated while the storage is unavailable (default 180); until
                               it has answered for the first time, its address may be wrong, and nothing is waited for
    PIRL_S3_ATTEMPTS           tries of a request that count as one, the first one included (default 4)
    PIRL_S3_CONNECT_TIMEOUT_S  seconds (default 5)
    PIRL_S3_READ_TIMEOUT_S     seconds without a byte (default 60)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote_to_bytes

from pirl.errors import UsageError, did_you_mean
from pirl.storage.base import Storage, encode_json, sha256_file, without_login
from pirl.storage.client import retries
from pirl.storage.local import LocalStorage, expand_home
from pirl.storage.s3 import Entry, S3Storage

__all__ = [
    "SCHEMES",
    "Entry",
    "LocalStorage",
    "S3Storage",
    "Storage",
    "encode_json",
    "expand_home",
    "local_path",
    "open_storage",
    "retries",
    "sha256_file",
    "split_file_uri",
    "write_file",
]


def _open_folder(rest: str) -> LocalStorage:
    """Return the folder at `rest` of file://`rest`."""
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise UsageError(f"file://{rest} names another machine.", f"Write the path /{rest.strip('/')} if it is local.")
    return LocalStorage(Path(os.fsdecode(b"/" + unquote_to_bytes(path))))


def _open_bucket(rest: str) -> S3Storage:
    """Return the prefix at `rest` of s3://`rest`."""
    bucket, _, prefix = rest.partition("/")
    return S3Storage(bucket, prefix)


SCHEMES: dict[str, Callable[[str], Storage]] = {"file": _open_folder, "s3": _open_bucket}
"""From a URI's scheme to its storage, made from the text after `scheme://`."""


def open_storage(uri: str | Path) -> Storage:
    """Return the storage at a path or a URI, such as s3://bucket/prefix. Nothing is read or created yet."""
    text = str(uri)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", text)
    if not text.strip() or "\0" in text:
        raise UsageError("An empty string is not a storage location.", "Give a folder or s3://bucket/prefix.")
    if isinstance(uri, Path) or scheme is None:
        return LocalStorage(expand_home(text))
    rest = text[scheme.end() :]
    if scheme[1] in SCHEMES and rest.startswith("/"):
        return SCHEMES[scheme[1]](rest[1:])
    raise UsageError(
        f"{without_login(text)!r} is not a storage location."
        + ("" if scheme[1] in SCHEMES else did_you_mean(scheme[1], SCHEMES)),  # else its slashes are wrong
        "Use a path or s3://bucket/prefix.",
    )


def split_file_uri(uri: str | Path) -> tuple[Storage, str]:
    """Return the storage and the name of the file at a path or a URI, such as s3://bucket/folder/file.html."""
    text = str(uri)
    folder, _, name = text.rpartition("/")
    if isinstance(uri, Path) or not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):
        path = expand_home(text).absolute()
        return LocalStorage(path.parent), path.name
    if not name or not folder.strip("/").partition("://")[2]:
        raise UsageError(f"{without_login(text)!r} names no file.", "Write s3://bucket/folder/file, or a path.")
    return open_storage(folder), name


def write_file(uri: str | Path, data: bytes) -> str:
    """Write the file at a path or a URI; return where it is: a path, or the URI of another storage."""
    folder, name = split_file_uri(uri)
    folder.write_bytes(name, data)
    path = local_path(folder)
    return str(path / name) if path else f"{folder.uri}/{name}"


def local_path(storage: Storage) -> Path | None:
    """Return the folder of a local storage, `None` for any other."""
    return storage.path if isinstance(storage, LocalStorage) else None
