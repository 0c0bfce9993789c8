"""Images -> WebDataset shards with dense ids, in two passes that can be interrupted anywhere.

An id depends on how many images before it were unreadable, so all images are decoded first (pass 1), then every shard
is written knowing its first id (pass 2). Both passes run in worker processes and leave a record of each finished part
under `_work/` in the output; the next run of the same command takes these up. `manifest.json` comes last.

Two runs on the same input and output do no harm: each writes the same bytes, and every object is replaced atomically.
A run on another input is kept out by a claim (`_work/claim.json`, created atomically) before the first shard.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pirl.errors import DataError, StorageError, StorageNotFoundError, UsageError
from pirl.shards.manifest import FORMAT, MANIFEST, QUARANTINE, Manifest, Shard
from pirl.shards.parallel import Workers
from pirl.shards.sources import Source
from pirl.shards.tar import END, padded, write_tar
from pirl.storage import Storage, encode_json, local_path, open_storage

SHARD_BYTES = 256 * 2**20
CHUNK_IMAGES = 1024  # checked between two records
WORK = "_work"
CLAIM = f"{WORK}/claim.json"

Progress = Callable[[int, int], None]


def write_shards(
    source: Source,
    out: Storage,
    *,
    max_bad_share: float = 0.01,
    shard_bytes: int = SHARD_BYTES,
    processes: int = 1,
    limit: int = 0,
    progress: Progress | None = None,
) -> Manifest:
    """Write `source` as shards of at most `shard_bytes` to `out` and return the manifest.

    The same input gives the same bytes for any number of processes; if `out` already holds it, nothing is done.
    Unreadable images get no id and are named in quarantine.json; a share of them above `max_bad_share` stops the run
    before anything is published (DataError). `limit` > 0 takes that many images, evenly spread over the source (so
    that all classes of a sorted folder are in). `progress(done, total)` counts image visits over both passes.
    """
    if not 0 <= max_bad_share <= 1 or shard_bytes < 1 or processes < 1 or limit < 0:
        raise UsageError(
            f"{max_bad_share=}, {shard_bytes=}, {processes=}, {limit=}: not all of these make sense",
            "0 <= max_bad_share <= 1, shard_bytes >= 1, processes >= 1, limit >= 0 (0: all images)",
        )
    folder = local_path(out)
    if folder and source.folder and folder.resolve().is_relative_to(source.folder.resolve()):
        raise UsageError(f"the output {folder} lies inside the images {source.folder}", "choose a folder outside")
    if len(source) == 0:
        raise DataError(f"{source.description} has no images", "give one with images")
    wanted = np.arange(len(source))
    if 0 < limit < len(source):
        wanted = np.arange(limit) * len(source) // limit
    run = _Run(source, out, wanted, shard_bytes, progress or (lambda done, total: None))
    if done := run.finished():
        run.clear()  # what a run that was killed right after publishing has left
        return done
    try:
        return run.all(processes, max_bad_share)
    except (StorageError, OSError):
        if done := run.finished():  # another run of the same input finished meanwhile and cleared the records
            return done
        raise


@dataclass
class _Plan:
    """One shard to be written: which images of the source, under which ids."""

    number: int
    first_id: int
    images: np.ndarray  # int64, indices into the source
    extensions: list[str]

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}.tar"


class _Run:
    def __init__(self, source: Source, out: Storage, wanted: np.ndarray, shard_bytes: int, progress: Progress) -> None:
        self.source, self.out, self.wanted, self.shard_bytes = source, out, wanted, shard_bytes
        self.progress, self.visited = progress, 0
        settings = [FORMAT, source.fingerprint(), wanted.size, shard_bytes]
        self.key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        part = "" if wanted.size == len(source) else f", {wanted.size} of {len(source)} images"
        self.origin = f"{source.description}{part}, shards of {shard_bytes} bytes, sha256:{self.key}"
        self.records = out / WORK / self.key[:16]

    def finished(self) -> Manifest | None:
        """The manifest if this very input is already there; UsageError if another one is."""
        if not self.out.exists(MANIFEST):
            return None
        manifest = Manifest.load(self.out)
        if not manifest.source.endswith(self.key):
            raise self._occupied(manifest.source, "choose another output, or remove this one first")
        there = set(self.out.list("shard-"))
        for name in (name for shard in manifest.shards for name in (shard.name, shard.index_name)):
            if name not in there:
                raise DataError(
                    f"{self.out.uri}/{name} is missing, though the manifest lists it",
                    f"restore it, or remove {self.out.uri} and run this command again",
                )
        return manifest

    def _occupied(self, other: str, hint: str) -> UsageError:
        changed = other.rpartition(", sha256:")[0] == self.origin.rpartition(", sha256:")[0]
        note = " (its files have changed since)" if changed else ""
        return UsageError(f"{self.out.uri} holds shards of another input{note}: {other}; this is {self.origin}", hint)

    def all(self, processes: int, max_bad_share: float) -> Manifest:
        with Workers(_Worker(self.source, self.out.uri, self.key), processes) as workers:
            extensions, sizes, bad = self._check(workers, max_bad_share)
            plans = self._plans(extensions, sizes)
            self._claim()
            shards = self._write(workers, plans)
        report = [{"name": self.source.names[i], "reason": reason} for i, reason in sorted(bad.items())]
        quarantine = {"quarantined": len(report), "of": len(self.wanted), "images": report}
        self.out.write_bytes(QUARANTINE, _json_bytes(quarantine, indent=2))
        manifest = Manifest.of(shards, self.source.classes, self.origin, len(report))
        self.out.write_bytes(MANIFEST, encode_json(manifest.model_dump()))
        self.clear()
        return manifest

    def _check(self, workers: Workers, max_bad_share: float) -> tuple[list[str], np.ndarray, dict[int, str]]:
        """Pass 1. Extension ("" for an unreadable one) and size of every wanted image, and why some are unreadable."""
        chunks = [self.wanted[start : start + CHUNK_IMAGES] for start in range(0, len(self.wanted), CHUNK_IMAGES)]
        there = set(self.records.list("checked-"))
        results: dict[int, dict[str, Any]] = {}
        for number in range(len(chunks)):
            if _checked_name(number) in there and (result := self._record(_checked_name(number))):
                results[number] = result
        self._advance(sum(len(chunks[number]) for number in results))
        bad: dict[int, str] = {int(i): reason for result in results.values() for i, reason in result["bad"].items()}
        missing = [number for number in range(len(chunks)) if number not in results]
        parts = [chunks[number] for number in missing]
        for k, result in workers.run("check", parts, alone=self.source.in_memory):
            number = missing[k]
            results[number] = result
            self.records.write_bytes(_checked_name(number), _json_bytes(result))
            bad |= {int(i): reason for i, reason in result["bad"].items()}
            if len(bad) > max_bad_share * len(self.wanted):
                break
            self._advance(len(chunks[number]))
        self._refuse_too_bad(bad, max_bad_share)
        extensions = [extension for number in range(len(chunks)) for extension in results[number]["ext"]]
        sizes = np.concatenate([np.array(results[number]["size"], np.int64) for number in range(len(chunks))])
        return extensions, sizes, bad

    def _refuse_too_bad(self, bad: dict[int, str], max_bad_share: float) -> None:
        if len(bad) <= max_bad_share * len(self.wanted) and len(bad) < len(self.wanted):
            return
        examples = "\n    ".join(f"{self.source.names[i]}: {bad[i]}" for i in sorted(bad)[:5])
        first = examples.encode("utf-8", "backslashreplace").decode()
        if len(bad) == len(self.wanted):
            raise DataError(f"{self.source.description} has no readable image, for example:\n    {first}", "check them")
        raise DataError(
            f"at least {len(bad)} of {len(self.wanted)} images of {self.source.description} are unreadable, "
            f"more than the allowed share of {max_bad_share:g}; nothing was published. For example:\n    {first}",
            "repair or remove them, or allow a larger share (max_bad_share)",
        )

    def _plans(self, extensions: list[str], sizes: np.ndarray) -> list[_Plan]:
        """Cut the readable images into shards: each as long as fits into shard_bytes, at least one image."""
        good = np.flatnonzero(sizes >= 0)
        label_bytes = 0 if self.source.labels is None else padded(1)
        ends = np.cumsum([padded(size) + label_bytes for size in sizes[good].tolist()])
        plans: list[_Plan] = []
        start = 0
        while start < len(good):
            used = ends[start - 1] if start else 0
            stop = max(int(np.searchsorted(ends, used + self.shard_bytes - len(END), "right")), start + 1)
            part = good[start:stop]
            plans.append(_Plan(len(plans), start, self.wanted[part], [extensions[i] for i in part]))
            start = stop
        return plans

    def _claim(self) -> None:
        claim = {"source": self.origin, "run": uuid.uuid4().hex}
        if not self.out.create(CLAIM, encode_json(claim)):
            try:
                holder = self.out.read_json(CLAIM)["source"]
            except StorageNotFoundError:
                holder = self.origin  # another run finished just now
            if not holder.endswith(self.key):
                hint = f"run that one again to finish it, or remove {self.out.uri} to start over"
                raise self._occupied(f"{holder} (unfinished)", hint)
            return
        strangers = [name for name in self.out.list("shard-") if re.fullmatch(r"shard-\d+\.(tar|json)", name)]
        if strangers and self.finished() is None:  # or else another run finished between our first look and the claim
            self.out.delete(CLAIM)
            raise UsageError(
                f"{self.out.uri} holds {strangers[0]} and others that no {MANIFEST} describes",
                "remove them, or choose another output",
            )

    def _write(self, workers: Workers, plans: list[_Plan]) -> list[Shard]:
        """Pass 2. Write every shard that has no record yet."""
        there = set(self.records.list("shard-"))
        shards: dict[int, Shard] = {}
        for plan in plans:
            if _written_name(plan.number) in there and (shard := self._written(plan)):
                shards[plan.number] = shard
                self._advance(shard.images)
        missing = [plan for plan in plans if plan.number not in shards]
        for k, shard in workers.run("write", missing):
            shards[missing[k].number] = shard
            self._advance(shard.images)
        return [shards[number] for number in range(len(plans))]

    def _written(self, plan: _Plan) -> Shard | None:
        record = self._record(_written_name(plan.number))
        if record is None:
            return None
        shard = Shard.model_validate(record)
        try:
            whole = self.out.size(shard.name) == shard.bytes and self.out.exists(shard.index_name)
        except StorageNotFoundError:
            return None
        return shard if whole else None

    def _record(self, name: str) -> Any:
        try:
            return self.records.read_json(name)
        except StorageNotFoundError:
            return None

    def _advance(self, images: int) -> None:
        self.visited += images
        self.progress(min(self.visited, 2 * len(self.wanted)), 2 * len(self.wanted))

    def clear(self) -> None:
        """Remove all records, the claim last: until then no other input may be sharded here."""
        self.progress(2 * len(self.wanted), 2 * len(self.wanted))
        folder = local_path(self.out)
        for name in self.out.list(f"{WORK}/"):
            if name != CLAIM:
                self.out.delete(name)
        self.out.delete(CLAIM)
        if folder:
            shutil.rmtree(folder / WORK, ignore_errors=True)


def _checked_name(number: int) -> str:
    return f"checked-{number:06d}.json"


def _written_name(number: int) -> str:
    return f"shard-{number:06d}.json"


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    """ASCII JSON, so that file names that are no UTF-8 (lone surrogates) survive the round trip."""
    separators = (",", ":") if indent is None else None
    return (json.dumps(value, indent=indent, separators=separators) + "\n").encode("ascii")


class _Worker:
    """The work on one part, in whichever process. Methods take one task and return something small."""

    def __init__(self, source: Source, uri: str, key: str) -> None:
        self.source, self.uri, self.key = source, uri, key

    def check(self, images: np.ndarray) -> dict[str, Any]:
        """Decode images (int64 indices) -> columns "ext" and "size" (-1: unreadable), and "bad" {index: reason}."""
        extensions: list[str] = []
        sizes: list[int] = []
        bad: dict[str, str] = {}
        for i in images.tolist():
            try:
                extension, size = self.source.check(i)
            except DataError as error:
                extension, size = "", -1
                bad[str(i)] = error.what.removeprefix(f"{self.source.names[i]}: ")
            extensions.append(extension)
            sizes.append(size)
        return {"ext": extensions, "size": sizes, "bad": bad}

    def write(self, plan: _Plan) -> Shard:
        """Write one shard, its index and its record, each published whole and in this order."""
        out = open_storage(self.uri)
        folder = local_path(out)
        try:
            with _temporary(folder / WORK if folder else None) as path:
                tar = write_tar(path, self._members(plan))
                if folder:
                    os.replace(path, folder / plan.name)
                else:
                    out.upload(path, plan.name)
        except OSError as error:
            raise StorageError(
                f"{out.uri}/{plan.name} cannot be written: {error.strerror or error}",
                "make room or choose another place, then run the same command again; it continues where it was",
            ) from error
        images = plan.images.tolist()
        step = 1 if self.source.labels is None else 2  # members per image
        index = {
            "offset": tar.offsets[::step],
            "size": tar.sizes[::step],
            "label": None if self.source.labels is None else self.source.labels[plan.images].tolist(),
            "name": [self.source.names[i] for i in images],
        }
        data = _json_bytes(index)
        shard = Shard(
            name=plan.name,
            first_id=plan.first_id,
            images=len(images),
            bytes=tar.bytes,
            sha256=tar.sha256,
            index_sha256=hashlib.sha256(data).hexdigest(),
        )
        out.write_bytes(shard.index_name, data)
        (out / WORK / self.key[:16]).write_bytes(_written_name(plan.number), encode_json(shard.model_dump()))
        return shard

    def _members(self, plan: _Plan) -> Iterator[tuple[str, bytes]]:
        for id, i, extension in zip(itertools.count(plan.first_id), plan.images.tolist(), plan.extensions):
            try:
                data = self.source.load(i)
            except DataError as error:
                raise DataError(
                    f"{error.what} (it was readable when it was checked)",
                    "leave the images alone while they are sharded, then run this again",
                ) from None
            yield f"{id:09d}.{extension}", data
            if self.source.labels is not None:
                yield f"{id:09d}.cls", str(self.source.labels[i]).encode()


class _temporary:
    """A path for an unfinished shard, beside the output so that it can be renamed, or in TMPDIR."""

    def __init__(self, folder: Path | None) -> None:
        self.own = None if folder else tempfile.mkdtemp(prefix="pirl-shard-")
        self.folder = folder or Path(self.own or "")

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"unfinished-{uuid.uuid4().hex}"
        return self.path

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        if self.own:
            shutil.rmtree(self.own, ignore_errors=True)
