"""Images out of shards on S3 by ranged requests: near ones in one, several at a time, through the cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from pirl.errors import DataError, StorageNotFoundError
from pirl.shards.cache import BLOCK_BYTES, BlockCache
from pirl.shards.index import HINT
from pirl.shards.manifest import Manifest
from pirl.storage import Storage

REQUEST_BYTES = 16 * 2**20  # that one request asks for, unless one image is larger
GAP_BYTES = 128 * 2**10  # between two images: to read so much too much takes no longer than another request
THREADS = 8
IN_ORDER = 3  # images one after the other, and the next ones are read in advance
AHEAD_BYTES = 16 * 2**20


class Span(NamedTuple):
    """Bytes start..stop-1 of a shard."""

    shard: int
    start: int
    stop: int


@dataclass
class _Request:
    span: Span
    parts: list[int]
    """Numbers of the spans that lie inside."""
    keep: bool
    """It consists of whole blocks, for the cache."""


class RemoteShards:
    """Reads spans. Safe in threads; a forked or unpickled copy makes its own threads."""

    def __init__(self, storage: Storage, manifest: Manifest, cache: BlockCache) -> None:
        self.storage, self.shards, self.cache = storage, manifest.shards, cache
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def read(self, spans: Sequence[Span], fresh: bool = False) -> list[bytes]:
        """Return the bytes of each span; `fresh`: from S3, and what the cache has of them is dropped."""
        if fresh:
            for span in spans:
                self.cache.drop(*span)
        results: list[bytes | None] = [None if fresh else self.cache.get(*span) for span in spans]
        missing = [number for number, data in enumerate(results) if data is None]
        requests = self._requests(spans, missing, self.cache.room()) if missing else []

        def answer(request: _Request) -> list[bytes]:
            return self._answer(request, [spans[number] for number in request.parts], fresh)

        answers = map(answer, requests) if len(requests) < 2 else self.threads().map(answer, requests)
        for request, parts in zip(requests, answers):
            for number, data in zip(request.parts, parts):
                results[number] = data
        return [data for data in results if data is not None]

    def _requests(self, spans: Sequence[Span], missing: list[int], room: int) -> list[_Request]:
        """Return requests that hold the missing spans: of whole blocks as long as there is `room` for these."""
        requests: list[_Request] = []
        for number in sorted(missing, key=lambda number: spans[number]):
            shard, start, stop = spans[number]
            keep = room > 0
            if keep:
                start -= start % BLOCK_BYTES
                stop = min(stop + -stop % BLOCK_BYTES, self.shards[shard].bytes)
            last = requests[-1] if requests else None
            near = last and keep == last.keep and shard == last.span.shard and start <= last.span.stop + GAP_BYTES
            if last and near and max(stop, last.span.stop) - last.span.start <= REQUEST_BYTES:
                room -= max(stop - last.span.stop, 0)
                last.span = Span(shard, last.span.start, max(stop, last.span.stop))
                last.parts.append(number)
            else:
                room -= stop - start
                requests.append(_Request(Span(shard, start, stop), [number], keep))
        return requests

    def _answer(self, request: _Request, parts: list[Span], fresh: bool) -> list[bytes]:
        if not request.keep:
            return self._cut(self._get(request.span), request.span, parts)
        with self.cache.fetching(*request.span):
            if not fresh:  # another process may have been faster
                results = [data for part in parts if (data := self.cache.get(*part)) is not None]
                if len(results) == len(parts):
                    return results
            data = self._get(request.span)
            self.cache.put(request.span.shard, request.span.start, memoryview(data))
        return self._cut(data, request.span, parts)

    @staticmethod
    def _cut(data: bytes, span: Span, parts: list[Span]) -> list[bytes]:
        return [data[part.start - span.start : part.stop - span.start] for part in parts]

    def _get(self, span: Span) -> bytes:
        name = self.shards[span.shard].name
        try:
            data = self.storage.read_range(name, span.start, span.stop - span.start)
        except StorageNotFoundError:
            raise DataError(f"{self.storage.uri}/{name} is missing", HINT) from None
        if len(data) != span.stop - span.start:
            raise DataError(f"{self.storage.uri}/{name} was cut while it was in use", HINT)
        return data

    def threads(self) -> ThreadPoolExecutor:
        """Return the threads of this process for requests."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(THREADS, "pirl-s3")
        return self._pool[1]


class Ahead:
    """Single images; where their ids are asked for in order, the next ones are read meanwhile, some MB of them."""

    def __init__(self, read_many: Callable[[Sequence[int]], list[bytes]], images: int, mean_bytes: float) -> None:
        self._read_many, self._images = read_many, images
        self._count = max(1, int(AHEAD_BYTES / max(mean_bytes, 1)))  # in a part, of which up to two are held
        self._last, self._in_order = -1, 0
        self._parts: dict[int, Future[list[bytes]]] = {}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def read(self, id: int) -> bytes:
        self._in_order = self._in_order + 1 if id == self._last + 1 else 0
        self._last = id
        if self._in_order < IN_ORDER:
            return self._read_many([id])[0]
        if self._pool is None or self._pool[0] != os.getpid():  # what a parent has begun never ends here
            self._pool, self._parts = (os.getpid(), ThreadPoolExecutor(1, "pirl-ahead")), {}
        part = id // self._count
        sound = {k: each for k, each in self._parts.items() if not (each.done() and each.exception())}
        parts = {number: sound.get(number) or self._begin(number) for number in (part, part + 1)}
        self._parts = parts
        return parts[part].result()[id % self._count]

    def _begin(self, number: int) -> Future[list[bytes]]:
        assert self._pool
        first = number * self._count
        return self._pool[1].submit(self._read_many, range(first, min(first + self._count, self._images)))
