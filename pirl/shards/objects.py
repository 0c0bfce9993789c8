"""Images that are ranges of objects on S3 or of local tar files, read ahead of the work with bounded memory."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from pirl.errors import DataError, StorageNotFoundError
from pirl.shards.decoding import Checked, Decoding
from pirl.shards.filter import LeftOut
from pirl.shards.images import MAX_IMAGE_BYTES, check_image
from pirl.shards.sources import Source
from pirl.storage import Entry

THREADS = 16  # requests at a time, of each process
AHEAD_BYTES = 64 * 2**20  # that a process has asked for and not used yet
REQUEST_BYTES = 8 * 2**20  # for neighbours in a tar file
GAP_BYTES = 64 * 2**10


class Objects(Protocol):
    """A place whose files are read by ranges, as long as they are the version that was listed."""

    uri: str

    def read_version(self, name: str, version: str, offset: int, length: int) -> bytes | None:
        """Return the bytes; None where the file is another version."""


class ObjectSource(Source):
    """Images that are bytes starts[i] .. starts[i] + sizes[i] - 1 of the object `entries[objects[i]]`."""

    def __init__(
        self,
        storage: Objects,
        entries: Sequence[Entry],
        objects: Sequence[int],
        starts: Sequence[int],
        sizes: Sequence[int],
        names: list[str],
        labels: np.ndarray | None,
        classes: list[str] | None,
        left_out: LeftOut | None = None,
        description: str = "",
    ) -> None:
        self.storage, self.entries, self.uri = storage, list(entries), storage.uri
        self.names, self.labels, self.classes = names, labels, classes
        self.description, self.left_out = description or storage.uri, left_out or LeftOut()
        self.objects, self.starts, self.sizes = (np.array(column, np.int64) for column in (objects, starts, sizes))
        self._forget()

    def _forget(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._queue: deque[list[int]] = deque()
        self._pending: dict[int, Future[dict[int, bytes | None]]] = {}
        self._pending_bytes = 0

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
        if future := self._pending.pop(i, None):
            data = future.result().pop(i)
            self._pending_bytes -= int(self.sizes[i])
            self._submit()
        else:
            data = self._fetch([i])[i]
        if data is None:
            raise DataError(f"{name}: changed since it was listed")
        return data

    def expect(self, indices: Sequence[int]) -> None:
        for future in self._pending.values():
            future.cancel()
        self._pending, self._pending_bytes = {}, 0
        self._queue = deque(self._requests([i for i in indices if self.sizes[i] <= MAX_IMAGE_BYTES]))
        self._submit()

    def _requests(self, indices: Sequence[int]) -> list[list[int]]:
        """Group neighbours in one object into one request."""
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

    def _submit(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, "pirl-source")
        while self._queue and (not self._pending or self._pending_bytes < AHEAD_BYTES):
            request = self._queue.popleft()
            future = self._pool.submit(self._fetch, request)
            self._pending |= dict.fromkeys(request, future)
            self._pending_bytes += int(self.sizes[request].sum())

    def _fetch(self, request: list[int]) -> dict[int, bytes | None]:
        """Return the bytes of images that are adjacent in one object; None where it has changed since it was listed."""
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
