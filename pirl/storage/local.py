"""A folder as a storage: write aside, sync, rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import itertools
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pirl.errors import StorageError, StorageNotFoundError, UsageError
from pirl.storage.base import (
    FULL_HINT,
    MAX_CHILDREN,
    TEMPORARY,
    Names,
    Storage,
    checked,
    checked_prefix,
    too_short,
)
from pirl.storage.patience import retried

_COPY_BYTES = 4 << 20
_STALE_S = 60.0
MAX_ATTEMPTS = 1000  # to create a file in a folder that other processes remove


class LocalStorage(Storage):
    """A folder. Made when the first object is written."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.uri = self.path.as_uri()

    def _file(self, name: str) -> Path:
        return self.path / checked(name, self.uri)

    def __truediv__(self, part: str) -> LocalStorage:
        below = LocalStorage(self._file(part.strip("/")))
        below.patience_s = self.patience_s
        return below

    @retried
    def read_bytes(self, name: str) -> bytes:
        path = self._file(name)
        with local_errors("read", path, reading=True):
            return path.read_bytes()

    @retried
    def read_range(self, name: str, offset: int, length: int) -> bytes:
        path = self._file(name)
        with local_errors("read", path, reading=True), path.open("rb", buffering=0) as file:
            file.seek(offset)
            return io.BufferedReader(file).read(length)

    @retried
    def read_into(self, name: str, buffer: memoryview) -> None:
        path = self._file(name)
        with local_errors("read", path, reading=True), path.open("rb") as file:
            if file.readinto(buffer) != len(buffer):
                raise too_short(name, self.uri)

    @retried
    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        path = self._file(name)
        with local_errors("write", path), replacing(path) as file:
            file.write(data)

    @retried
    def create(self, name: str, data: bytes) -> bool:
        path = self._file(name)
        with local_errors("create", path):
            try:
                with replacing(path, publish=os.link) as file:
                    file.write(data)
            except FileExistsError:
                if path.is_file():
                    return False
                raise
        return True

    @retried
    def upload(self, path: Path, name: str) -> None:
        target = self._file(name)
        with reading_local(path) as source, local_errors("write", target), replacing(target) as file:
            shutil.copyfileobj(source, file, _COPY_BYTES)

    @retried
    def download(self, name: str, path: Path) -> None:
        source_path = self._file(name)
        with local_errors("read", source_path, reading=True):
            source = source_path.open("rb")
        with source, local_errors("write", path), replacing(path) as file:
            shutil.copyfileobj(LocalFile(source, source_path, "read"), file, _COPY_BYTES)

    @retried
    def list(self, prefix: str = "") -> Names:
        start = self.path / checked_prefix(prefix, self.uri).rpartition("/")[0]
        names: Names = []
        with local_errors("list", start):
            for folder, _, files in os.walk(start, onerror=_raise_unless_absent):
                below = os.path.relpath(folder, self.path)
                objects = (file for file in files if not file.startswith(TEMPORARY))
                names.extend(file if below == "." else f"{below}/{file}" for file in objects)
        return sorted(name for name in names if name.startswith(prefix))

    @retried
    def children(self) -> Names:
        names: Names = []
        with local_errors("list", self.path), suppress(FileNotFoundError), os.scandir(self.path) as entries:
            for entry in itertools.islice(entries, MAX_CHILDREN):
                names += [] if entry.name.startswith(TEMPORARY) else [entry.name + "/" * entry.is_dir()]
        return sorted(names)

    @retried
    def require_writable(self, name: str = "probe") -> None:
        path = self._file(name)
        with local_errors("write", path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "not a file", str(path))
            folder = path.parent
            while not os.path.lexists(folder):
                folder = folder.parent
            tempfile.TemporaryFile(prefix=TEMPORARY, dir=folder).close()

    @retried
    def size(self, name: str) -> int:
        path = self._file(name)
        with local_errors("read", path, reading=True):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, "not a file", str(path))
            return status.st_size

    @retried
    def delete(self, name: str) -> None:
        path = self._file(name)
        with suppress(StorageNotFoundError), local_errors("delete", path, reading=True):
            path.unlink()
            _sync_folder(path.parent)
            self._remove_empty(path.parent)

    def _remove_empty(self, folder: Path) -> None:
        """Remove a folder, and those above it up to the storage's own, as far as they are empty."""
        with suppress(OSError):  # not empty, in use, or removed by another process
            folder.rmdir()
            if folder != self.path:
                self._remove_empty(folder.parent)


@contextmanager
def replacing(target: Path, publish: Callable[[Path, Path], None] = os.replace) -> Iterator[BinaryIO]:
    """Yield a file to write into; at the end sync it to disk and publish it as `target`, on failure remove it."""
    folder = target.parent
    # A hash, since the object's own name may already be as long as a file name can be.
    stem = f"{TEMPORARY}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"
    temporary = folder / f"{stem}{secrets.token_hex(8)}"
    _sweep(folder, stem)  # first: the new file is not locked yet
    descriptor = _create(temporary)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with suppress(OSError):  # no locks here: then nothing will ever be swept
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            publish(temporary, target)
        _sync_folder(folder)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _create(path: Path) -> int:
    """Create a file and its folder, which another process may remove as long as it is empty; return a descriptor."""
    for attempt in itertools.count(1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError):
            if attempt == MAX_ATTEMPTS or (os.path.lexists(path.parent) and not path.parent.is_dir()):
                raise
    raise AssertionError


def _sweep(folder: Path, stem: str) -> None:
    """Remove what killed writers of the same object left: old files whose lock nobody holds."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(stem) and time.time() - entry.stat().st_mtime > _STALE_S:
                with open(entry.path, "r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # removed by another process, which has deleted the object
        return
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def expand_home(path: str | Path) -> Path:
    """Return the path with ~ and ~user replaced; `UsageError` where the home folder does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path} has no place: no such home folder", "write the whole path") from None


@contextmanager
def reading_local(path: Path) -> Iterator[LocalFile]:
    """Open the local source of an upload. Its absence is not that of an object, so it is a plain `StorageError`."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror}.", "Check the path and its permissions.") from error
    with file:
        yield LocalFile(file, path, "read")


@contextmanager
def local_errors(action: str, path: Path, *, reading: bool = False) -> Iterator[None]:
    """Raise an `OSError` of the file system as a `StorageError`; `reading`: an absent file is an absent object."""
    try:
        yield
    except OSError as error:
        raise _explain_local(error, action, path, reading) from error


class LocalFile(io.RawIOBase):
    """A local file at one end of a transfer: what fails in it is a `StorageError`, unlike the other end's `OSError`."""

    def __init__(self, file: BinaryIO, path: Path, action: str) -> None:
        self._file, self._path, self._action = file, path, action

    def readable(self) -> bool:
        return self._file.readable()

    def writable(self) -> bool:
        return self._file.writable()

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        with local_errors(self._action, self._path):
            return self._file.read(size)

    def write(self, data: Any) -> int:
        with local_errors(self._action, self._path):
            return self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with local_errors(self._action, self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _explain_local(error: OSError, action: str, path: Path, reading: bool) -> StorageError:
    if reading and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return StorageNotFoundError(f"{path} does not exist.", "Check the path, or run the step that writes it.")
    reason = error.strerror or str(error)
    if error.errno in _UNAVAILABLE:
        hint = "Check the disk, and the mount and its server where it is one of a network."
        return StorageError(f"Cannot {action} {path}: {reason}.", hint, transient=True)
    reason, hint = _LOCAL_REASONS.get(
        error.errno or 0, (reason, "Check the disk and the path, then run the same command again.")
    )
    return StorageError(f"Cannot {action} {path}: {reason}.", hint)


# Of a file system on a network (NFS, FUSE) whose server or connection is unavailable.
_UNAVAILABLE = frozenset(
    (
        *(errno.EAGAIN, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN),
        *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH),
    )
)
_PERMISSION_HINT = "Give this user permission, or choose another place."
_IN_THE_WAY = "a file stands where a folder is needed, or the other way round"
_LOCAL_REASONS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", FULL_HINT),
    errno.EDQUOT: ("the disk quota is used up", FULL_HINT),
    errno.EFBIG: ("the file is larger than this file system or user may have", FULL_HINT),
    errno.EROFS: ("the file system is read-only", "Choose a place that can be written, or mount it read-write."),
    errno.EACCES: ("permission denied", _PERMISSION_HINT),
    errno.EPERM: ("the file system does not permit it", _PERMISSION_HINT),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter path."),
    errno.ENOTDIR: (_IN_THE_WAY, "Move it away, or choose another place."),
    errno.EEXIST: (_IN_THE_WAY, "Move it away, or choose another place."),
    errno.EISDIR: (_IN_THE_WAY, "Move it away, or choose another place."),
    errno.EOPNOTSUPP: ("the file system has no hard links", "Choose a place on a usual file system, or S3."),
}
