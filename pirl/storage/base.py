"""The contract of a storage, and the names of objects."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from pirl.errors import StorageError, StorageNotFoundError
from pirl.storage.patience import has_answered, patience_s, remember

Names = list[str]  # inside the classes `list` is the method
TEMPORARY = ".pirl-tmp-"  # files of this prefix are unfinished, not objects
MAX_SMALL_BYTES = 256 * 2**20  # of a record; the manifest of a billion images in shards of 1 GB has about 25 MB
MAX_CHILDREN = 1000
FULL_HINT = "Free some space or choose another place, then run the same command again; what was there is untouched."


class Storage(ABC):
    """A prefix under which objects are kept. Cheap to make, safe after fork, in threads, and in a pickle."""

    uri: str
    shared = False
    """Other machines see the same objects under this URI."""
    root = ""
    patience_s: float | None = None

    def patient(self, seconds: float | None = None) -> Self:
        """Return the same storage, which repeats for so long what fails for a transient reason; 0: not at all.

        By default it does so for `PIRL_STORAGE_PATIENCE_S`; without this, only once it has answered for the first time.
        """
        other = copy.copy(self)
        other.patience_s = patience_s() if seconds is None else seconds
        return other

    def hurried(self, timeout_s: float) -> Self:
        """Return the same storage, for one try of a request with so many seconds without a byte."""
        return self.patient(0)

    @abstractmethod
    def __truediv__(self, part: str) -> Storage:
        """Return the storage one or more levels below."""

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """Return the whole object; `StorageNotFoundError` when absent."""

    @abstractmethod
    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`; fewer where the object ends."""

    @abstractmethod
    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fill `buffer`, as large as the whole object, with it; a `StorageError` where the object is smaller."""

    @abstractmethod
    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        """Write or replace the object as one atomic step."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write the object unless it exists: True for exactly one of all contenders, False changes nothing.

        Contenders should write something of their own: after a lost answer S3's winner knows itself by its data.
        """

    @abstractmethod
    def upload(self, path: Path, name: str) -> None:
        """Copy a local file to the object, streaming, atomic."""

    @abstractmethod
    def download(self, name: str, path: Path) -> None:
        """Copy the object to a local file, streaming, atomic."""

    @abstractmethod
    def list(self, prefix: str = "") -> Names:
        """Return all names that start with `prefix`, from all levels, sorted."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the bytes of each object that `list` names."""
        return {name: self.size(name) for name in self.list(prefix)}

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of the object; `StorageNotFoundError` when absent."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the object; absent is fine."""

    @abstractmethod
    def children(self) -> Names:
        """Return the names directly below, those of folders with a slash: the first thousand, sorted."""

    @abstractmethod
    def require_writable(self, name: str = "probe") -> None:
        """Raise `StorageError` where the object cannot be written. Nothing is left behind."""

    def exists(self, name: str) -> bool:
        """Return whether the object exists."""
        try:
            self.size(name)
        except StorageNotFoundError:
            return False
        return True

    def read_small(self, name: str) -> bytes:
        """Return the whole object, which describes something and so is small; `StorageError` if it is not.

        The read is bounded, so that a process that can write a record cannot fill the memory of its readers.
        """
        data = self.read_range(name, 0, MAX_SMALL_BYTES + 1)
        if len(data) > MAX_SMALL_BYTES:
            raise StorageError(
                f"{self.uri}/{name} has more than {MAX_SMALL_BYTES:,} bytes; what it describes takes far less.",
                "It was changed or damaged by something else; restore it, or delete it if it can be made again.",
            )
        return data

    def read_json(self, name: str) -> Any:
        data = self.read_small(name)
        try:
            return json.loads(data)
        except ValueError as error:
            raise StorageError(
                f"{self.uri}/{name} is not valid JSON: {error}.",
                "It was changed or damaged by something else; restore it, or delete it if it can be made again.",
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, encode_json(value))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"answered": has_answered(self.root)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.pop("answered"):
            remember(state.get("root", ""))
        vars(self).update(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)


def encode_json(value: Any) -> bytes:
    """Return JSON as this project stores it: UTF-8, indent 2, the caller's order of keys, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def is_name(name: str) -> bool:
    parts = name.split("/")
    return "\0" not in name and not any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in parts)


def checked(name: str, uri: str) -> str:
    if not is_name(name):
        raise StorageError(
            f"{name!r} is not a name for an object in {uri}.",
            "Names are relative, separated by single slashes, and stay below their prefix ('..' is refused).",
        )
    return name


def checked_prefix(prefix: str, uri: str) -> str:
    """Return a list prefix, which may end in a slash or in the middle of a name, but may not leave the storage."""
    if prefix:
        checked(prefix.removesuffix("/"), uri)
    return prefix


def too_short(name: str, uri: str) -> StorageError:
    """Return the error for an object that ends before the buffer is full."""
    return StorageError(f"{uri}/{name} is shorter than expected.", "It was changed while it was read: try again.")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a local file in hex, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_login(url: str) -> str:
    """Return the URL without a user and password that it may carry."""
    return re.sub(r"(^|//)[^/@]*@", r"\1", url)
