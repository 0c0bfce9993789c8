"""The index of a shard: a file of fixed-width records, read by position and shared through the page cache.

A data set has the index of a shard as JSON (`shard-000003.json`). When an image of that shard is first asked for, the
JSON is fetched, checked and converted once for all processes of a machine, into the cache:

    ROOT/DIGEST/shard-000003.index
        64 bytes   magic, images, flags, bytes of the names, CRC-32 of all that follows, SHA-256 of the JSON index
        32 bytes   for each image: offset, size, end of its name (int64), label (int32, -1: none), CRC-32 (uint32)
                   the names one after the other, UTF-8

A lookup is one positioned read of 32 bytes, so that a process holds nothing of an index. Mapped pages would count as
its memory, and it would have to unmap them. Without a cache a process holds the indexes of the shards that it has read.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from zlib_ng import zlib_ng

from pirl.errors import DataError, StorageError, StorageNotFoundError
from pirl.shards.cache import BlockCache
from pirl.shards.manifest import Manifest, Shard
from pirl.storage import Storage
from pirl.storage.local import local_errors

HINT = "restore the file, or remove the folder and run `pirl shard` again"
UNKNOWN = -1  # checksum of an image in shards that were made before there were checksums

MAGIC = b"PIRLIDX1"
HEADER = struct.Struct("<8sqIIq32s")  # magic, images, flags, CRC-32, bytes of the names, SHA-256
RECORD = struct.Struct("<qqqiI")  # offset, size, end of the name, label, CRC-32
COLUMNS = np.dtype([("offset", "<i8"), ("size", "<i8"), ("name_end", "<i8"), ("label", "<i4"), ("crc32", "<u4")])
HAS_CHECKSUMS = 1  # a flag


class Record(NamedTuple):
    """Place, name, label and checksum of an image in its shard."""

    offset: int
    size: int
    label: int
    """-1: unlabelled."""
    checksum: int
    """CRC-32, or UNKNOWN."""


class ShardIndex:
    """The index of one shard, in a file or in memory."""

    def __init__(self, content: bytes | Path) -> None:
        self.fd = -1
        self.path = content if isinstance(content, Path) else None
        self.content = b"" if isinstance(content, Path) else content
        if self.path:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        _, self.images, self.flags, _, self.names_bytes, _ = HEADER.unpack(self._read(0, HEADER.size))

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def record(self, place: int) -> Record:
        """Return the record of the image at `place` in the shard."""
        offset, size, _, label, checksum = RECORD.unpack(self._read(HEADER.size + place * RECORD.size, RECORD.size))
        return Record(offset, size, label, checksum if self.flags & HAS_CHECKSUMS else UNKNOWN)

    def name(self, place: int) -> str:
        """Return the name of the image at `place`."""
        first = max(place - 1, 0)
        records = self._read(HEADER.size + first * RECORD.size, (place + 1 - first) * RECORD.size)
        ends = [0] * (place == 0) + [end for _, _, end, _, _ in RECORD.iter_unpack(records)]
        names = HEADER.size + self.images * RECORD.size
        return self._read(names + ends[0], ends[1] - ends[0]).decode("utf-8", "surrogatepass")

    def columns(self) -> np.ndarray:
        """Return all records, (images,) of COLUMNS."""
        return np.frombuffer(self._read(HEADER.size, self.images * RECORD.size), COLUMNS)

    def is_sound(self, shard: Shard) -> bool:
        """Return whether this is the whole and undamaged index of a shard."""
        data = self.content or self._read(0, os.fstat(self.fd).st_size)
        magic, images, _, checksum, names_bytes, digest = HEADER.unpack_from(data)
        return (
            (magic, images, digest.hex()) == (MAGIC, shard.images, shard.index_sha256)
            and len(data) == HEADER.size + images * RECORD.size + names_bytes
            and checksum == zlib_ng.crc32(memoryview(data)[HEADER.size :])
        )

    def _read(self, start: int, length: int) -> bytes:
        data = self._pread(self.path, start, length) if self.path else self.content[start : start + length]
        if len(data) != length:
            raise DataError("the index of a shard in the cache was cut while it was in use", "run the command again")
        return data

    def _pread(self, path: Path, start: int, length: int) -> bytes:
        with local_errors("read", path):
            try:
                return os.pread(self.fd, length, start)
            except OSError:  # a file that a network's server has forgotten (ESTALE) has to be opened again
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                os.dup2(fd, self.fd, inheritable=False)  # other threads may be reading from it
                os.close(fd)
                return os.pread(self.fd, length, start)


class ShardIndexes:
    """The indexes of a data set, each opened when it is first asked for. Safe in threads and after fork."""

    def __init__(self, storage: Storage, manifest: Manifest, cache: BlockCache) -> None:
        self.storage, self.manifest, self.cache = storage, manifest, cache
        self._checked = bytearray(len(manifest.shards))
        self._files: dict[int, ShardIndex] = {}
        self._held: dict[int, ShardIndex] = {}

    def open(self, number: int) -> ShardIndex:
        """Return the index of a shard; DataError where it is missing or does not describe the shard."""
        index = self._files.get(number) or self._held.get(number)
        if index is None:
            index = self._cached(number) or self._converted(number)
            if index.fd < 0:
                self._held[number] = index
            else:
                if len(self._files) >= max_open():
                    self._files = {}  # a new dict: threads that are reading keep their file until they are done
                self._files[number] = index
        return index

    def fetch(self, shard: Shard) -> bytes:
        """Return the JSON index of a shard; DataError where it is missing or its hash is not in the manifest."""
        where = f"{self.storage.uri}/{shard.index_name}"
        try:
            data = self.storage.read_bytes(shard.index_name)
        except StorageNotFoundError:
            raise DataError(f"{where} is missing", HINT) from None
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            raise DataError(f"{where} has other content than its manifest lists", HINT)
        return data

    def _cached(self, number: int) -> ShardIndex | None:
        shard = self.manifest.shards[number]
        try:
            index = ShardIndex(self.cache.path(_file_name(shard)))
            if self._checked[number] or index.is_sound(shard):
                self._checked[number] = 1
                return index
        except (OSError, DataError, StorageError):
            pass
        return None

    def _converted(self, number: int) -> ShardIndex:
        shard = self.manifest.shards[number]
        data = convert(shard, self.fetch(shard), len(self.manifest.classes or ()))
        if data is None:
            raise DataError(f"{self.storage.uri}/{shard.index_name} does not describe {shard.name}", HINT)
        self.cache.save(_file_name(shard), memoryview(data))
        return self._cached(number) or ShardIndex(data)


def convert(shard: Shard, data: bytes, classes: int) -> bytes | None:
    """Return the index file of a shard from its JSON; None where that does not describe the shard."""
    try:
        index = json.loads(data)
        names = [name.encode("utf-8", "surrogatepass") for name in index["name"]]
        labels, checksums = index["label"], index.get("crc32")
        columns = {
            "offset": np.array(index["offset"], np.int64),
            "size": np.array(index["size"], np.int64),
            "name_end": np.cumsum([len(name) for name in names]),
            "label": np.full(shard.images, -1) if labels is None else np.array(labels, np.int64),
            "crc32": np.array(checksums or [0] * shard.images, np.int64),
        }
        offsets, sizes = columns["offset"], columns["size"]
        sound = {column.shape for column in columns.values()} == {(shard.images,)}
        sound &= bool(offsets.min() >= 0 and sizes.min() >= 0 and (offsets + sizes).max() <= shard.bytes)
        sound &= labels is None or bool(columns["label"].min() >= 0 and columns["label"].max() < classes)
        sound &= bool(columns["crc32"].min() >= 0 and columns["crc32"].max() < 2**32)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None
    if not sound:
        return None
    records = np.empty(shard.images, COLUMNS)
    for name, column in columns.items():
        records[name] = column
    body = records.tobytes() + b"".join(names)
    flags = HAS_CHECKSUMS if checksums else 0
    names_bytes = len(body) - records.nbytes
    digest = bytes.fromhex(shard.index_sha256)
    return HEADER.pack(MAGIC, shard.images, flags, zlib_ng.crc32(body), names_bytes, digest) + body


def max_open() -> int:
    """Return how many shards, and how many indexes, are kept open: each a quarter of what this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(soft // 4, 4096) if soft > 0 else 4096


def _file_name(shard: Shard) -> str:
    return f"{shard.name.removesuffix('.tar')}.index"
