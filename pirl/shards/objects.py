"""Images on S3, each an object of its own or inside tar files, read ahead of the work with bounded memory."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from pirl.errors import DataError, StorageError, StorageNotFoundError, UsageError
from pirl.shards.decoding import Checked, Decoding
from pirl.shards.fashion import cache_root
from pirl.shards.images import EXTENSIONS, MAX_IMAGE_BYTES, check_image
from pirl.shards.sources import Source, check_class, numbered
from pirl.storage import Entry, S3Storage, open_storage

THREADS = 16  # requests at a time, of each process
AHEAD_BYTES = 64 * 2**20  # that a process has asked for and not used yet
REQUEST_BYTES = 8 * 2**20  # for neighbours in a tar file
GAP_BYTES = 64 * 2**10
SCAN_BYTES = 4 * 2**20
MAX_LABEL_BYTES = 1024


class ObjectSource(Source):
    """Images that are bytes starts[i] .. starts[i] + sizes[i] - 1 of the object `entries[objects[i]]`."""

    def __init__(
        self,
        storage: S3Storage,
        entries: Sequence[Entry],
        objects: Sequence[int],
        starts: Sequence[int],
        sizes: Sequence[int],
        names: list[str],
        labels: np.ndarray | None,
        classes: list[str] | None,
    ) -> None:
        self.storage, self.entries, self.uri = storage, list(entries), storage.uri
        self.description, self.names, self.labels, self.classes = storage.uri, names, labels, classes
        self.objects, self.starts, self.sizes = (np.array(column, np.int64) for column in (objects, starts, sizes))
        self._forget()

    def _forget(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._queue: deque[list[int]] = deque()
        self._asked: dict[int, Future[dict[int, bytes | None]]] = {}
        self._asked_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.classes, self.entries)).encode("utf-8", "backslashreplace"))
        for column in (self.objects, self.starts, self.sizes, self.labels):
            digest.update(b"" if column is None else column.tobytes())
        digest.update("\0".join(self.names).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def check(self, i: int, decoding: Decoding) -> tuple[Checked, int]:
        data = self.load(i)
        return check_image(data, self.names[i], decoding), len(data)

    def load(self, i: int) -> bytes:
        name = self.names[i]
        if self.sizes[i] > MAX_IMAGE_BYTES:
            raise DataError(f"{name}: {self.sizes[i]:,} bytes, more than the limit of {MAX_IMAGE_BYTES:,}")
        if future := self._asked.pop(i, None):
            data = future.result().pop(i)
            self._asked_bytes -= int(self.sizes[i])
            self._ask()
        else:
            data = self._fetch([i])[i]
        if data is None:
            raise DataError(f"{name}: changed since it was listed")
        return data

    def expect(self, indices: Sequence[int]) -> None:
        for future in self._asked.values():
            future.cancel()
        self._asked, self._asked_bytes = {}, 0
        self._queue = deque(self._requests([i for i in indices if self.sizes[i] <= MAX_IMAGE_BYTES]))
        self._ask()

    def _requests(self, indices: Sequence[int]) -> list[list[int]]:
        """Neighbours in one object go together."""
        requests: list[list[int]] = []
        for i in indices:
            if requests:
                first, last = requests[-1][0], requests[-1][-1]
                gap = self.starts[i] - self.starts[last] - self.sizes[last]
                together = self.starts[i] + self.sizes[i] - self.starts[first]
                if self.objects[i] == self.objects[last] and 0 <= gap <= GAP_BYTES and together <= REQUEST_BYTES:
                    requests[-1].append(i)
                    continue
            requests.append([i])
        return requests

    def _ask(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, "pirl-source")
        while self._queue and (not self._asked or self._asked_bytes < AHEAD_BYTES):
            request = self._queue.popleft()
            future = self._pool.submit(self._fetch, request)
            self._asked |= dict.fromkeys(request, future)
            self._asked_bytes += int(self.sizes[request].sum())

    def _fetch(self, request: list[int]) -> dict[int, bytes | None]:
        """The bytes of images that lie side by side in one object; None where it is not what was listed any more."""
        first, last = request[0], request[-1]
        entry, start = self.entries[self.objects[first]], int(self.starts[first])
        length = int(self.starts[last] + self.sizes[last]) - start
        try:
            data = self.storage.read_version(entry.name, entry.version, start, length)
        except StorageNotFoundError:
            data = None
        if data is None or len(data) != length:
            return dict.fromkeys(request)
        offsets = [(i, int(self.starts[i]) - start) for i in request]
        return {i: data[offset : offset + int(self.sizes[i])] for i, offset in offsets}


def object_source(uri: str) -> ObjectSource:
    """What lies under s3://bucket/prefix: images as in `folder_source`, or tar files (also one alone) with images.

    Images in tar files have the class that a WebDataset's `.cls` beside them says, or else the folder in which they
    lie, or else none.
    """
    storage = open_storage(uri)
    assert isinstance(storage, S3Storage)
    entries = storage.entries()
    if not entries and storage.prefix.endswith(".tar"):
        folder, _, name = storage.prefix.rpartition("/")
        storage = S3Storage(storage.bucket, folder)
        entries = [entry for entry in storage.entries(name) if entry.name == name]
    images = [entry for entry in entries if entry.name.lower().endswith(EXTENSIONS)]
    tars = [entry for entry in entries if entry.name.endswith(".tar")]
    if images and tars:
        raise UsageError(
            f"{uri} mixes images ({images[0].name!r}, ...) with tar files ({tars[0].name!r}, ...)",
            "give a prefix with one kind only",
        )
    if images:
        return _from_images(storage, images)
    if tars:
        return _from_tars(storage, tars)
    raise DataError(
        f"no image in {uri}", f"there should be objects ending in {' '.join(EXTENSIONS)}, below their classes, or .tar"
    )


def _from_images(storage: S3Storage, entries: list[Entry]) -> ObjectSource:
    # as a walk through a folder tree meets them: the classes, in each the folders, in each the files
    entries = sorted(entries, key=lambda entry: (_top(entry.name), entry.name.rpartition("/")[0], entry.name))
    entries = [entry for entry in entries if not _top(entry.name).startswith(".")]
    names = [entry.name for entry in entries]
    sizes = [entry.bytes for entry in entries]
    labels, classes = _by_folder(names, storage.uri)
    return ObjectSource(storage, entries, range(len(entries)), [0] * len(entries), sizes, names, labels, classes)


def _top(name: str) -> str:
    """The first folder of a name, empty when it lies in none."""
    return name.partition("/")[0] if "/" in name else ""


def _by_folder(names: list[str], where: str) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels and classes by the first folder of each name; none when all lie on top."""
    tops = [_top(name) for name in names]
    classes = sorted(set(tops) - {""})
    if not classes:
        return None, None
    if "" in tops:
        raise UsageError(
            f"{where} mixes images ({names[tops.index('')]!r}, ...) with classes ({classes[0]!r}, ...)",
            "give a prefix with one kind only: images, or images below one name per class",
        )
    for name in classes:
        check_class(name)
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[top] for top in tops], np.int64), classes


# --- tar files --------------------------------------------------------------------------------------------------------

Member = tuple[str, int, int, str | None]
"""Name, offset, size, and what a `.cls` beside it says."""


def _from_tars(storage: S3Storage, tars: list[Entry]) -> ObjectSource:
    with ThreadPoolExecutor(THREADS) as pool:
        scanned = list(pool.map(lambda entry: _members(storage, entry), tars))
    objects = [number for number, members in enumerate(scanned) for _ in members]
    members = [member for found in scanned for member in found]
    if not members:
        raise DataError(f"no image in the tar files of {storage.uri}", f"they should hold {' '.join(EXTENSIONS)}")
    names = [member[0] for member in members]
    given = [member[3] for member in members]
    labels: np.ndarray | None
    classes: list[str] | None
    if any(text is not None for text in given):
        for number, text in enumerate(given):
            if text is None:
                raise UsageError(
                    f"{names[number]} in {tars[objects[number]].name} has no .cls beside it, others have",
                    "give every image a label, or none",
                )
        labels, classes = numbered([text for text in given if text is not None], storage.uri)
    else:
        labels, classes = _by_folder(names, storage.uri)
    return ObjectSource(
        storage,
        tars,
        objects,
        [member[1] for member in members],
        [member[2] for member in members],
        [f"{tars[number].name}/{name}" for number, name in zip(objects, names)],
        labels,
        classes,
    )


def _members(storage: S3Storage, entry: Entry) -> list[Member]:
    """The images of one tar file. To find them it is read once; what was found is remembered in the cache."""
    key = hashlib.sha256(repr((storage.uri, entry)).encode()).hexdigest()
    remembered = open_storage(cache_root() / "tars")
    with suppress(StorageError):
        return [tuple(member) for member in remembered.read_json(f"{key}.json")]
    members = _scan(storage, entry)
    with suppress(StorageError, UnicodeEncodeError):
        remembered.write_json(f"{key}.json", members)
    return members


def _scan(storage: S3Storage, entry: Entry) -> list[Member]:
    where = f"{storage.uri}/{entry.name}"
    found: list[tuple[str, int, int]] = []
    labels: dict[str, str] = {}

    def read(start: int, length: int) -> bytes:
        data = storage.read_version(entry.name, entry.version, start, length)
        if data is None:
            raise DataError(f"{where} changed while it was read", "leave it alone, then run this again")
        return data

    try:
        with tarfile.open(fileobj=io.BufferedReader(_Ranged(read, entry.bytes), SCAN_BYTES), mode="r:") as tar:
            for member in tar:
                if not member.isreg() or member.sparse is not None:
                    continue
                if member.offset_data + member.size > entry.bytes:
                    raise tarfile.ReadError(f"{member.name} goes beyond its end")
                name = member.name.removeprefix("./")
                if name.endswith(".cls") and member.size <= MAX_LABEL_BYTES:
                    content = tar.extractfile(member)
                    labels[_sample(name)] = content.read().decode("utf-8", "replace").strip() if content else ""
                elif name.lower().endswith(EXTENSIONS) and not _top(name).startswith("."):
                    found.append((name, member.offset_data, member.size))
            if entry.bytes - tar.offset < tarfile.BLOCKSIZE:  # of zeros, which tarfile does not miss
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise DataError(
            f"{where} is no tar file, or was cut: {error}", "compressed ones must be unpacked; upload it again"
        ) from None
    return [(*member, labels.get(_sample(member[0]))) for member in found]


def _sample(name: str) -> str:
    """The part of a name that the members of one WebDataset sample share."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


class _Ranged(io.RawIOBase):
    """An object as a file."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._read(self._position, min(len(buffer), max(self._size - self._position, 0)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
