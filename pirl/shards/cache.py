"""Parts of remote shards on the local disk: kept over restarts, shared by processes, never more than allowed.

    ROOT/DIGEST/000003-000017.block   block 17 of shard 3 of the data set with this digest
    ROOT/DIGEST/shard-000003.index    where the images of shard 3 lie, see `index`
    ROOT/DIGEST/in-use                locked (flock) by every process that reads this data set
    ROOT/DIGEST/fetching              its byte n is locked by who fetches block n

An epoch visits every image once, in random order, so exchanging one block for another gains nothing: once the cache is
full, what it holds stays and the rest is read past it. Room is made from data sets that nobody reads any more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pirl import logs
from pirl.errors import UsageError

BLOCK_BYTES = 4 * 2**20
LIMIT = "PIRL_CACHE_GB"
LEFT_BEHIND_S = 3600.0  # an unfinished file of this age has lost its writer
COUNT_SHARE = 256  # the folder is measured again when a process has added this part of the limit


class BlockCache:
    """The blocks of one data set. What cannot be read or written is as if it were not there; contents are not checked.

    All data sets of `root` together take `PIRL_CACHE_GB` (default: half of what the disk has free without them), and up
    to 1/256 of that more for every process.
    """

    def __init__(self, root: Path | None, digest: str, blocks: bool = True) -> None:
        """Without a root nothing is kept. Without `blocks` only indexes are, and nothing is locked or measured."""
        self.root = root or Path(os.devnull)  # below a file there is nothing
        self.folder = self.root / digest
        self._in_use: BinaryIO | None = None
        self._limit = self._room = self._uncounted = 0
        self._off = root is None
        self._quiet = not blocks  # what is not kept is held in memory
        if not blocks:
            return
        if root is None:
            _warn_once(
                "no cache, as no home folder exists: images are read from S3 every time. PIRL_CACHE names a folder"
            )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)
            self._in_use = open(self.folder / "in-use", "ab")  # noqa: SIM115 (held as long as this object)
            with suppress(OSError):
                fcntl.flock(self._in_use, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self._count()
        except OSError as error:
            self._give_up(error)

    def get(self, shard: int, start: int, stop: int) -> bytes | None:
        """Return the bytes start..stop-1 of a shard if the cache has all of them."""
        pieces = []
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            first = block * BLOCK_BYTES
            offset, end = max(start - first, 0), min(stop - first, BLOCK_BYTES)
            try:
                descriptor = os.open(self.folder / _block_name(shard, block), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    piece = os.pread(descriptor, end - offset, offset)
                finally:
                    os.close(descriptor)
            except OSError:
                return None
            if len(piece) != end - offset:
                return None
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def drop(self, shard: int, start: int, stop: int) -> None:
        """Remove the blocks that hold any of these bytes."""
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            with suppress(OSError):
                (self.folder / _block_name(shard, block)).unlink()

    def put(self, shard: int, start: int, data: memoryview) -> None:
        """Keep the blocks in `data`, which begins with the block at byte `start`."""
        for begin in range(0, len(data), BLOCK_BYTES):
            name = _block_name(shard, (start + begin) // BLOCK_BYTES)
            self.save(name, data[begin : begin + BLOCK_BYTES])

    def path(self, name: str) -> Path:
        """Return where a file is kept, if it is."""
        return self.folder / name

    def save(self, name: str, data: memoryview) -> None:
        """Keep a file; readers see all of it or nothing."""
        if self._off:
            return
        unfinished = self.folder / f"{uuid.uuid4().hex}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have emptied the cache
            try:
                with open(unfinished, "wb", buffering=0) as file:
                    self._room -= len(data)
                    self._uncounted += len(data)
                    while data:
                        data = data[file.write(data) :]
                os.replace(unfinished, self.folder / name)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error)

    def room(self) -> int:
        """Return the bytes that may still be kept. Measure the folder now and then, and remove unused data sets."""
        if not self._off and self._uncounted > self._limit // COUNT_SHARE:
            try:
                self._count()
            except OSError as error:
                self._give_up(error)
        return 0 if self._off else max(self._room, 0)

    @contextmanager
    def fetching(self, shard: int, start: int, stop: int) -> Iterator[None]:
        """Hold a lock, so that one process or thread at a time works on the same blocks."""
        # a lock of the open file (OFD), not of the process: it works between threads and ends with its holder
        first = (shard << 32) + start // BLOCK_BYTES
        count = -(-stop // BLOCK_BYTES) - start // BLOCK_BYTES
        with ExitStack() as stack:
            with suppress(OSError):  # no file or no locks here: then some blocks are fetched twice
                file = stack.enter_context(open(self.folder / "fetching", "ab"))
                _lock_range(file, first, count)
            yield

    def _count(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        used = {folder: _used(folder) for folder in self.root.iterdir() if folder.is_dir()}
        disk = os.statvfs(self.root)
        given = os.environ.get(LIMIT)
        self._limit = _bytes(given) if given else (disk.f_bavail * disk.f_frsize + sum(used.values())) // 2
        self._room = self._limit - sum(used.values())
        self._uncounted = 0
        for folder in sorted(used, key=_last_use):
            if self._room > self._limit // COUNT_SHARE:
                return
            if folder != self.folder and _remove_unused(folder):
                self._room += used[folder]
        for path in self.folder.glob(
            "*.block"
        ):  # others have added more than there was room for, or less is allowed now
            if self._room >= 0:
                return
            with suppress(FileNotFoundError):
                self._room += path.stat().st_size
                path.unlink()

    def _give_up(self, error: OSError) -> None:
        if not self._off:
            self._off = True
            if self._quiet:
                return
            _warn_once(
                f"the cache {self.root} takes nothing more ({error.strerror or error}); what it lacks is read from S3 "
                f"every time. Free some space, or name another folder by PIRL_CACHE or a smaller size by {LIMIT}"
            )


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    """Warn once in this process: it may open many caches."""
    if text not in _warned:
        _warned.add(text)
        logs.warn(text)


def _bytes(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{LIMIT}={text!r} is not a size in GB.", "Give a number such as 200, or 0 for no cache.")
    return int(value * 1e9)


def _block_name(shard: int, block: int) -> str:
    return f"{shard:06d}-{block:06d}.block"


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return 0.0


def _lock_range(file: BinaryIO, first: int, count: int) -> None:
    """Wait for the bytes of an open file; for all of it where only Linux's lock of a range is missing."""
    if hasattr(fcntl, "F_OFD_SETLKW"):
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, first, count, 0))
    else:
        fcntl.flock(file, fcntl.LOCK_EX)


def _used(folder: Path) -> int:
    """Return the bytes in a folder; remove unfinished files of lost writers."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(".part") and time.time() - status.st_mtime > LEFT_BEHIND_S:
                    os.unlink(entry.path)
                else:
                    total += status.st_size
    return total


def _remove_unused(folder: Path) -> bool:
    """Remove another data set's blocks unless a process reads them."""
    try:
        with open(folder / "in-use", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return False
    return True
