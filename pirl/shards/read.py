"""Reading sharded images by id, in any order, at the price of one positioned read each; on S3 through a cache."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import resource
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
from pirl.shards.labels import match_classes
from pirl.shards.manifest import Manifest, Shard
from pirl.shards.remote import HINT, Ahead, RemoteShards, Span
from pirl.storage import Storage, local_path, open_storage
from pirl.storage.local import local_errors
from pirl.storage.patience import retry

OPEN_THREADS = 16
HASH_BYTES = 8 * 2**20
UNKNOWN = -1  # checksum of an image in shards that were made before there were checksums


class ShardReader:
    """The images of a sharded data set by id, 0 <= id < len(reader).

    Opening it checks the manifest, the size of every shard and the hash of every index, so that damage shows at once
    and not in mid-epoch; `read_many` finds out what has changed since. From S3 come only the parts that are asked for,
    kept in a cache (`PIRL_CACHE`, default ~/.cache/pirl) and checked, wherever they come from, by each image's
    checksum; who reads one image after the other gets the next ones in advance. A reader may be shared by threads,
    inherited by fork, and pickled.
    """

    manifest: Manifest

    def __init__(self, storage: Storage | str | Path) -> None:
        self.storage = storage if isinstance(storage, Storage) else open_storage(storage)
        self.manifest = Manifest.load(self.storage)
        self._local = local_path(self.storage)
        self._remote = self._open_remote()
        self._first_ids = [shard.first_id for shard in self.manifest.shards]
        with ThreadPoolExecutor(OPEN_THREADS) as pool:  # on S3 each costs a round trip
            columns = list(pool.map(self._open_shard, self.manifest.shards))
        self._offsets, self._sizes, self._labels, self._checksums = (np.concatenate(c) for c in zip(*columns))
        self._classes = self.manifest.classes  # by which the labels are numbered
        self._files: dict[int, _File] = {}
        self._names: dict[int, list[str]] = {}
        self._ahead = self._open_ahead()

    def _open_remote(self) -> RemoteShards | None:
        if self._local:
            return None
        root = cache_root()
        cache = BlockCache(root / "shards" if root else None, self.manifest.digest)
        return RemoteShards(self.storage, self.manifest, cache)

    def _open_ahead(self) -> Ahead | None:
        return Ahead(self.read_many, len(self), float(self._sizes.mean())) if self._remote else None

    def __len__(self) -> int:
        return self.manifest.images

    def read(self, id: int) -> bytes:
        """The encoded image, as it was given (a lossless PNG for array data sets)."""
        number = self._shard_of(id)
        if self._ahead:
            return self._ahead.read(id)
        size = int(self._sizes[id])
        data = retry(self.storage, lambda: self._pread(number, size, int(self._offsets[id])))
        if len(data) != size:
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
                self._files = {}  # one that a network's server has forgotten (ESTALE) has to be opened anew
                raise

    def image(self, id: int) -> Image.Image:
        """Return the RGB image, decoded with the settings of the manifest."""
        return decode_image(self.read(id), f"image {id} ({self.name(id)})", self.manifest.decoding)

    def read_many(self, ids: Sequence[int]) -> list[bytes]:
        """Several images, checked against their checksums.

        From S3, those that lie near each other come in one request, others at the same time.
        """
        if self._remote is None:
            images = [self.read(id) for id in ids]
            for id, data in zip(ids, images):
                if not self._sound(id, data):
                    raise self._changed(id)
            return images
        spans = [self._span(id) for id in ids]
        images = self._remote.read(spans)
        changed = [k for k, id in enumerate(ids) if not self._sound(id, images[k])]
        if changed:  # in the cache, it is to be hoped
            again = self._remote.read([spans[k] for k in changed], fresh=True)
            for k, data in zip(changed, again):
                if not self._sound(ids[k], data):
                    raise self._changed(ids[k])
                images[k] = data
        return images

    def _span(self, id: int) -> Span:
        start = int(self._offsets[id])
        return Span(self._shard_of(id), start, start + int(self._sizes[id]))

    def _sound(self, id: int, data: bytes) -> bool:
        return int(self._checksums[id]) in (zlib_ng.crc32(data), UNKNOWN)

    def _changed(self, id: int) -> DataError:
        name = self.manifest.shards[self._shard_of(id)].name
        return DataError(f"{self.storage.uri}/{name} has other content than its manifest says (image {id})", HINT)

    def label(self, id: int) -> int:
        """Class index, -1 when unlabelled."""
        self._shard_of(id)
        return int(self._labels[id])

    def labels(self) -> np.ndarray:
        """All class indices, int64 (N,), -1 when unlabelled."""
        return self._labels.copy()

    def match_classes(self, classes: Sequence[str]) -> list[str]:
        """Number the labels from now on by `classes`, those of the training images, matched by name.

        Returns the classes without an image in this data set. DataError naming what training does not have.
        """
        held = np.unique(self._labels).tolist()
        numbers, absent = match_classes(classes, self._classes or [], held, self.storage.uri)
        if numbers:
            self._labels = np.array(numbers, np.int64)[self._labels]
        self._classes = list(classes)
        return absent

    def sizes(self) -> np.ndarray:
        """Bytes of all encoded images, int64 (N,), from the indexes."""
        return self._sizes.copy()

    def name(self, id: int) -> str:
        """The file name that the image had, relative to its folder. Never to be used as a path to write to."""
        number = self._shard_of(id)
        if number not in self._names:
            self._names[number] = self._index(self.manifest.shards[number])["name"]
        return self._names[number][id - self._first_ids[number]]

    def verify(self) -> None:
        """Hash every shard; DataError naming the first that is not what the manifest says."""
        for shard in self.manifest.shards:
            digest = hashlib.sha256()
            for offset in range(0, shard.bytes, HASH_BYTES):
                digest.update(self.storage.read_range(shard.name, offset, HASH_BYTES))
            if digest.hexdigest() != shard.sha256:
                raise DataError(f"{self.storage.uri}/{shard.name} has other content than its manifest says", HINT)
            self._index(shard)

    def _shard_of(self, id: int) -> int:
        if not 0 <= id < self.manifest.images:
            raise IndexError(f"id {id} is not in 0..{self.manifest.images - 1}")
        return bisect.bisect_right(self._first_ids, id) - 1

    def _open_shard(self, shard: Shard) -> tuple[np.ndarray, ...]:
        """Check one shard's size and its index -> offsets, sizes, labels, checksums, each int64 (images,)."""
        where = f"{self.storage.uri}/{shard.name}"
        try:
            size = self.storage.size(shard.name)
        except StorageNotFoundError:
            raise DataError(f"{where} is missing", HINT) from None
        if size != shard.bytes:
            raise DataError(f"{where} has {size:,} bytes, its manifest says {shard.bytes:,}", HINT)
        index = self._index(shard)
        try:
            offsets, sizes = np.array(index["offset"], np.int64), np.array(index["size"], np.int64)
            labels = np.full(shard.images, -1) if index["label"] is None else np.array(index["label"], np.int64)
            checksums = np.array(index.get("crc32", [UNKNOWN] * shard.images), np.int64)
            known = len(self.manifest.classes or ())
            sound = {len(offsets), len(sizes), len(labels), len(checksums), len(index["name"])} == {shard.images}
            sound &= offsets.min() >= 0 and sizes.min() >= 0 and (offsets + sizes).max() <= shard.bytes
            sound &= index["label"] is None or (labels.min() >= 0 and labels.max() < known)
        except (KeyError, TypeError, ValueError, OverflowError):
            sound = False
        if not sound:
            raise DataError(f"{self.storage.uri}/{shard.index_name} does not describe {shard.name}", HINT)
        return offsets, sizes, labels, checksums

    def _index(self, shard: Shard) -> dict[str, Any]:
        """The columns of a shard's index, from the cache where there is one; its hash is in the manifest."""
        where = f"{self.storage.uri}/{shard.index_name}"
        data = self._remote.cache.load(shard.index_name) if self._remote else None
        if data is None or hashlib.sha256(data).hexdigest() != shard.index_sha256:
            try:
                data = self.storage.read_bytes(shard.index_name)
            except StorageNotFoundError:
                raise DataError(f"{where} is missing", HINT) from None
            if hashlib.sha256(data).hexdigest() != shard.index_sha256:
                raise DataError(f"{where} has other content than its manifest says", HINT)
            if self._remote:
                self._remote.cache.save(shard.index_name, memoryview(data))
        index = json.loads(data)
        return index if isinstance(index, dict) else {}

    def _file(self, number: int) -> _File:
        file = self._files.get(number)
        if file is None:
            if len(self._files) >= _max_open():
                self._files = {}  # a new dict: threads that are reading keep their file until they are done
            shard = self.manifest.shards[number]
            assert self._local
            path = self._local / shard.name
            try:
                with local_errors("open", path, reading=True):
                    file = self._files[number] = _File(path)
            except StorageNotFoundError:
                raise DataError(f"{self.storage.uri}/{shard.name} is missing", HINT) from None
        return file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}, "_names": {}, "_remote": None, "_ahead": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remote = self._open_remote()
        self._ahead = self._open_ahead()


class _File:
    """A file descriptor that closes with the last one who uses it."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _max_open() -> int:
    """Shards kept open at a time: half of what this process may open, the rest is for others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(soft // 2, 4096) if soft > 0 else 4096
