"""Reading sharded images by id, in any order, at the price of one positioned read each; on S3 through a cache."""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from zlib_ng import zlib_ng

from pirl.errors import DataError, StorageNotFoundError
from pirl.shards.cache import BlockCache
from pirl.shards.fashion import cache_root
from pirl.shards.images import decode_image
from pirl.shards.index import HAS_CHECKSUMS, HINT, UNKNOWN, Record, ShardIndexes, max_open
from pirl.shards.labels import match_classes
from pirl.shards.manifest import Manifest, Shard
from pirl.shards.remote import Ahead, RemoteShards, Span
from pirl.storage import Storage, local_path, open_storage
from pirl.storage.local import local_errors
from pirl.storage.patience import retry

OPEN_THREADS = 16
HASH_BYTES = 8 * 2**20


class ShardReader:
    """The images of a sharded data set by id, 0 <= id < len(reader).

    Opening it reads the manifest and nothing of a shard, and what it holds does not grow with the images. The size and
    the index of a shard are checked when an image of it is first asked for, each image of `read_many` by its checksum,
    and all shards by `check`. From S3 come only the parts that are asked for, kept in a cache (`PIRL_CACHE`, default
    ~/.cache/pirl); sequential reads get the next images in advance. A reader may be shared by threads, inherited by
    fork, and pickled.
    """

    manifest: Manifest

    def __init__(self, storage: Storage | str | Path) -> None:
        self.storage = storage if isinstance(storage, Storage) else open_storage(storage)
        self.manifest = Manifest.load(self.storage)
        self._local = local_path(self.storage)
        self._first_ids = [shard.first_id for shard in self.manifest.shards]
        self._classes = self.manifest.classes  # by which the labels are numbered
        self._numbers: np.ndarray | None = None  # of the classes; None: as the shards number them
        self._open()

    def _open(self) -> None:
        root = cache_root()
        cache = BlockCache(root / "shards" if root else None, self.manifest.digest, blocks=self._local is None)
        self._indexes = ShardIndexes(self.storage, self.manifest, cache)
        self._files: dict[int, _File] = {}
        self._remote: RemoteShards | None = None
        self._ahead: Ahead | None = None
        if self._local is None:
            mean_bytes = sum(shard.bytes for shard in self.manifest.shards) / len(self)
            self._remote = RemoteShards(self.storage, self.manifest, cache)
            self._ahead = Ahead(self.read_many, len(self), mean_bytes)

    def __len__(self) -> int:
        return self.manifest.images

    def read(self, id: int) -> bytes:
        """Return the encoded image, as it was given (a lossless PNG for array data sets)."""
        if self._ahead:
            self._shard_of(id)
            return self._ahead.read(id)
        return self._read(id, self._record(id))

    def _read(self, id: int, record: Record) -> bytes:
        number = self._shard_of(id)
        data = retry(self.storage, lambda: self._pread(number, record.size, record.offset))
        if len(data) != record.size:
            shard = self.manifest.shards[number]
            raise DataError(f"{self.storage.uri}/{shard.name} was cut while it was in use (image {id})", HINT)
        return data

    def _pread(self, number: int, size: int, offset: int) -> bytes:
        file = self._file(number)  # held until the read is done: another thread may drop it from the open ones
        assert self._local
        with local_errors("read", self._local / self.manifest.shards[number].name):
            try:
                return os.pread(file.fd, size, offset)
            except OSError:
                self._files = {}  # a file that a network's server has forgotten (ESTALE) has to be opened again
                raise

    def image(self, id: int) -> Image.Image:
        """Return the RGB image, decoded with the settings of the manifest."""
        return decode_image(self.read(id), f"image {id} ({self.name(id)})", self.manifest.decoding)

    def read_many(self, ids: Sequence[int]) -> list[bytes]:
        """Return several images, checked against their checksums.

        From S3, those that lie near each other come in one request, others at the same time.
        """
        if self._remote:
            numbers = {self._shard_of(id) for id in ids}
            list(self._remote.threads().map(self._indexes.open, numbers))  # each may cost a round trip
        records = [self._record(id) for id in ids]
        if self._remote is None:
            images = [self._read(id, record) for id, record in zip(ids, records)]
            for id, record, data in zip(ids, records, images):
                if not _is_sound(record, data):
                    raise self._changed(id)
            return images
        spans = [self._span(id, record) for id, record in zip(ids, records)]
        images = self._remote.read(spans)
        changed = [k for k, record in enumerate(records) if not _is_sound(record, images[k])]
        if changed:  # in the cache, it is to be hoped
            again = self._remote.read([spans[k] for k in changed], fresh=True)
            for k, data in zip(changed, again):
                if not _is_sound(records[k], data):
                    raise self._changed(ids[k])
                images[k] = data
        return images

    def _span(self, id: int, record: Record) -> Span:
        return Span(self._shard_of(id), record.offset, record.offset + record.size)

    def _changed(self, id: int) -> DataError:
        name = self.manifest.shards[self._shard_of(id)].name
        return DataError(f"{self.storage.uri}/{name} has other content than its manifest lists (image {id})", HINT)

    def label(self, id: int) -> int:
        """Return the class index, -1 when unlabelled."""
        label = self._record(id).label
        return label if self._numbers is None else int(self._numbers[label])

    def labels(self, ids: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Return the class indices of some or all images, int64, -1 when unlabelled."""
        if ids is not None:
            return np.array([self.label(int(id)) for id in ids], np.int64)
        labels = self._column("label")
        return labels if self._numbers is None else self._numbers[labels]

    def match_classes(self, classes: Sequence[str]) -> list[str]:
        """Use the numbers of `classes`, those of the training images, for the labels from now on, matched by name.

        Return the classes without an image in this data set. DataError naming what training does not have.
        """
        held = np.unique(self.labels()).tolist()
        numbers, absent = match_classes(classes, self._classes or [], held, self.storage.uri)
        if numbers:
            new = np.array(numbers, np.int64)
            self._numbers = new if self._numbers is None else new[self._numbers]
        self._classes = list(classes)
        return absent

    def sizes(self) -> np.ndarray:
        """Return the bytes of all encoded images, int64 (N,), from the indexes."""
        return self._column("size")

    def checksums(self) -> np.ndarray | None:
        """Return the CRC-32 of all encoded images, int64 (N,), from the indexes; None where shards have none (0.1)."""
        if not all(self._indexes.open(number).flags & HAS_CHECKSUMS for number in range(len(self.manifest.shards))):
            return None
        return self._column("crc32")

    def name(self, id: int) -> str:
        """Return the file name that the image had, relative to its folder. Never to be used as a path to write to."""
        number = self._shard_of(id)
        return self._indexes.open(number).name(id - self._first_ids[number])

    def check(self) -> None:
        """Raise DataError naming the first shard that is missing or has another size than in its manifest.

        One listing shows all of them.
        """
        sizes = self.storage.sizes("shard-")
        for shard in self.manifest.shards:
            for name in (shard.name, shard.index_name):
                if name not in sizes:
                    raise DataError(f"{self.storage.uri}/{name} is missing", HINT)
            self._check_size(shard, sizes[shard.name])

    def verify(self) -> None:
        """Hash every shard; DataError naming the first that differs from the manifest."""
        for shard in self.manifest.shards:
            digest = hashlib.sha256()
            for offset in range(0, shard.bytes, HASH_BYTES):
                digest.update(self.storage.read_range(shard.name, offset, HASH_BYTES))
            if digest.hexdigest() != shard.sha256:
                raise DataError(f"{self.storage.uri}/{shard.name} has other content than its manifest lists", HINT)
            self._indexes.fetch(shard)

    def _column(self, name: str) -> np.ndarray:
        out = np.empty(len(self), np.int64)

        def fill(number: int) -> None:
            shard = self.manifest.shards[number]
            out[shard.first_id : shard.first_id + shard.images] = self._indexes.open(number).columns()[name]

        with ThreadPoolExecutor(OPEN_THREADS) as pool:  # on S3 an index that is not in the cache costs a round trip
            list(pool.map(fill, range(len(self.manifest.shards))))
        return out

    def _record(self, id: int) -> Record:
        number = self._shard_of(id)
        return self._indexes.open(number).record(id - self._first_ids[number])

    def _check_size(self, shard: Shard, size: int) -> None:
        if size != shard.bytes:
            where = f"{self.storage.uri}/{shard.name}"
            raise DataError(f"{where} has {size:,} bytes, expected {shard.bytes:,}", HINT)

    def _shard_of(self, id: int) -> int:
        if not 0 <= id < self.manifest.images:
            raise IndexError(f"id {id} is not in 0..{self.manifest.images - 1}")
        return bisect.bisect_right(self._first_ids, id) - 1

    def _file(self, number: int) -> _File:
        file = self._files.get(number)
        if file is None:
            if len(self._files) >= max_open():
                self._files = {}  # a new dict: threads that are reading keep their file until they are done
            shard = self.manifest.shards[number]
            assert self._local
            path = self._local / shard.name
            try:
                with local_errors("open", path, reading=True):
                    file = _File(path)
                    size = os.fstat(file.fd).st_size
            except StorageNotFoundError:
                raise DataError(f"{self.storage.uri}/{shard.name} is missing", HINT) from None
            self._check_size(shard, size)
            self._files[number] = file
        return file

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_indexes", "_files", "_remote", "_ahead")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class _File:
    """A file descriptor that closes with the last one who uses it."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _is_sound(record: Record, data: bytes) -> bool:
    return record.checksum in (zlib_ng.crc32(data), UNKNOWN)
