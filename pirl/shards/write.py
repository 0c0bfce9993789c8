"""Images -> WebDataset shards with dense ids, in two passes that can be interrupted anywhere.

An id depends on how many images before it were unreadable, so all images are decoded first (pass 1), then every shard
is written knowing its first id (pass 2). Both passes run in worker processes and leave a record of each finished part
under `_work/` in the output; the next run of the same command takes these up. `manifest.json` comes last.

Two runs on the same input and output do no harm: each writes the same bytes, and every object is replaced atomically.
A run on another input is kept out by a claim (`_work/claim.json`, created atomically) before the first shard.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np

from pirl.errors import DataError, StorageError, StorageNotFoundError, UsageError
from pirl.shards.decoding import DEFAULT, LEGACY, Decoding, Pictures
from pirl.shards.manifest import FORMAT, MANIFEST, QUARANTINE, Manifest, Shard
from pirl.shards.parallel import Workers
from pirl.shards.place import require_outside
from pirl.shards.sources import Source
from pirl.shards.tar import END, padded
from pirl.shards.work import WORK, PartWorker, Plan, ascii_json, record_name
from pirl.storage import Storage, encode_json, local_path

SHARD_BYTES = 256 * 2**20
CHUNK_IMAGES = 1024  # checked between two records
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
    decoding: Decoding = DEFAULT,
    progress: Progress | None = None,
) -> Manifest:
    """Write `source` as shards of at most `shard_bytes` to `out` and return the manifest.

    The same input gives the same bytes for any number of processes; if `out` already holds it, nothing is done.
    Unreadable images get no id and are named in quarantine.json; a share of them above `max_bad_share` stops the run
    before anything is published (DataError). `limit` > 0 takes that many images, evenly spread over the source (so
    that all classes of a sorted folder are in). `decoding` defines what a pixel is, for this process and for all that
    read the shards; shards of version 0.1 are kept as they are. `progress(done, total)` counts image visits over both
    passes.
    """
    if not 0 <= max_bad_share <= 1 or shard_bytes < 1 or processes < 1 or limit < 0:
        raise UsageError(
            f"{max_bad_share=}, {shard_bytes=}, {processes=}, {limit=}: not all of these make sense",
            "0 <= max_bad_share <= 1, shard_bytes >= 1, processes >= 1, limit >= 0 (0: all images)",
        )
    require_outside(out, source)
    if len(source) == 0:
        raise DataError(f"{source.description} has no images", "give one with images")
    selected = np.arange(len(source))
    if 0 < limit < len(source):
        selected = np.arange(limit) * len(source) // limit
    run = _Run(source, out, selected, shard_bytes, decoding, progress or (lambda done, total: None))
    if done := run.finished():
        run.clear()  # what a run that was killed right after publishing has left
        return done
    try:
        return run.all(processes, max_bad_share)
    except (StorageError, OSError):
        if done := run.finished():  # another run of the same input finished meanwhile and cleared the records
            return done
        raise


class _Run:
    def __init__(
        self,
        source: Source,
        out: Storage,
        selected: np.ndarray,
        shard_bytes: int,
        decoding: Decoding,
        progress: Progress,
    ) -> None:
        self.source, self.out, self.selected = source, out, selected
        self.shard_bytes, self.decoding = shard_bytes, decoding
        self.progress, self.visited = progress, 0
        settings = [FORMAT, source.fingerprint(), selected.size, shard_bytes]
        part = "" if selected.size == len(source) else f", {selected.size} of {len(source)} images"
        origin = f"{source.description}{part}, shards of {shard_bytes} bytes"
        self.legacy_key = _key(settings)
        if source.in_memory or decoding == LEGACY:  # grey arrays have the same pixels with any settings
            self.key, self.origin = self.legacy_key, f"{origin}, sha256:{self.legacy_key}"
        else:
            self.key = _key([*settings, decoding.model_dump()])
            self.origin = f"{origin}, {decoding}, sha256:{self.key}"
        self.records = out / WORK / self.key[:16]

    def finished(self) -> Manifest | None:
        """Return the manifest if this very input is already there; UsageError if another one is."""
        if not self.out.exists(MANIFEST):
            return None
        manifest = Manifest.load(self.out)
        is_legacy = manifest.pictures is None and manifest.source.endswith(self.legacy_key)
        if not manifest.source.endswith(self.key) and not (is_legacy and self.decoding == DEFAULT):
            raise self._occupied(manifest.source, "choose another output, or remove this one first")
        existing = set(self.out.list("shard-"))
        for name in (name for shard in manifest.shards for name in (shard.name, shard.index_name)):
            if name not in existing:
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
        with Workers(PartWorker(self.source, self.out.uri, self.key, self.decoding), processes) as workers:
            extensions, sizes, bad, pictures = self._check(workers, max_bad_share)
            plans = self._plans(extensions, sizes)
            self._claim()
            shards = self._write(workers, plans)
        self.out.write_bytes(QUARANTINE, ascii_json(self._quarantine(bad), indent=2))
        manifest = Manifest.of(shards, self.source.classes, self.origin, len(bad), self.decoding, pictures)
        self.out.write_bytes(MANIFEST, encode_json(manifest.model_dump()))
        self.clear()
        return manifest

    def _quarantine(self, bad: dict[int, str]) -> dict[str, Any]:
        """Return the content of quarantine.json, see `Quarantine`."""
        source = self.source
        report = [{"name": source.names[i], "reason": reason} for i, reason in sorted(bad.items())]
        quarantine: dict[str, Any] = {"quarantined": len(report), "of": len(self.selected), "images": report}
        if source.left_out:
            quarantine["left_out"] = source.left_out.as_json()
        if source.classes and source.labels is not None:
            kept = np.setdiff1d(self.selected, np.array(list(bad), np.int64))
            held = np.bincount(source.labels[kept], minlength=len(source.classes))
            if empty := [name for name, images in zip(source.classes, held) if not images]:
                quarantine["empty_classes"] = empty
        return quarantine

    def _check(self, workers: Workers, max_bad_share: float) -> tuple[list[str], np.ndarray, dict[int, str], Pictures]:
        """Check every selected image, pass 1.

        Return the extension ("" for an unreadable one) and size of each, and why some are unreadable.
        """
        chunks = [self.selected[start : start + CHUNK_IMAGES] for start in range(0, len(self.selected), CHUNK_IMAGES)]
        existing = set(self.records.list("checked-"))
        results: dict[int, dict[str, Any]] = {}
        for number in range(len(chunks)):
            if _checked_name(number) in existing and (result := self._record(_checked_name(number))):
                if "pictures" not in result:  # of version 0.1
                    continue
                results[number] = result
        self._advance(sum(len(chunks[number]) for number in results))
        bad: dict[int, str] = {int(i): reason for result in results.values() for i, reason in result["bad"].items()}
        missing = [number for number in range(len(chunks)) if number not in results]
        parts = [chunks[number] for number in missing]
        for k, result in workers.run("check", parts, alone=self.source.in_memory):
            number = missing[k]
            results[number] = result
            self.records.write_bytes(_checked_name(number), ascii_json(result))
            bad |= {int(i): reason for i, reason in result["bad"].items()}
            if len(bad) > max_bad_share * len(self.selected):
                break
            self._advance(len(chunks[number]))
        self._refuse_too_bad(bad, max_bad_share)
        extensions = [extension for number in range(len(chunks)) for extension in results[number]["ext"]]
        sizes = np.concatenate([np.array(results[number]["size"], np.int64) for number in range(len(chunks))])
        pictures = Pictures()
        for result in results.values():
            pictures.add(Pictures.model_validate(result["pictures"]))
        return extensions, sizes, bad, pictures

    def _refuse_too_bad(self, bad: dict[int, str], max_bad_share: float) -> None:
        if len(bad) <= max_bad_share * len(self.selected) and len(bad) < len(self.selected):
            return
        examples = "\n    ".join(f"{self.source.names[i]}: {bad[i]}" for i in sorted(bad)[:5])
        first = examples.encode("utf-8", "backslashreplace").decode()
        if len(bad) == len(self.selected):
            raise DataError(f"{self.source.description} has no readable image, for example:\n    {first}", "check them")
        raise DataError(
            f"at least {len(bad)} of {len(self.selected)} images of {self.source.description} are unreadable, "
            f"more than the allowed share of {max_bad_share:g}; nothing was published. For example:\n    {first}",
            "repair or remove them, or allow a larger share (`max_bad_share`)",
        )

    def _plans(self, extensions: list[str], sizes: np.ndarray) -> list[Plan]:
        """Cut the readable images into shards: each as long as fits into shard_bytes, at least one image."""
        good = np.flatnonzero(sizes >= 0)
        label_bytes = 0 if self.source.labels is None else padded(1)
        ends = np.cumsum([padded(size) + label_bytes for size in sizes[good].tolist()])
        plans: list[Plan] = []
        start = 0
        while start < len(good):
            used = ends[start - 1] if start else 0
            stop = max(int(np.searchsorted(ends, used + self.shard_bytes - len(END), "right")), start + 1)
            part = good[start:stop]
            plans.append(Plan(len(plans), start, self.selected[part], [extensions[i] for i in part]))
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

    def _write(self, workers: Workers, plans: list[Plan]) -> list[Shard]:
        """Write every shard that has no record yet, pass 2."""
        existing = set(self.records.list("shard-"))
        shards: dict[int, Shard] = {}
        for plan in plans:
            if record_name(plan.number) in existing and (shard := self._written(plan)):
                shards[plan.number] = shard
                self._advance(shard.images)
        missing = [plan for plan in plans if plan.number not in shards]
        for k, shard in workers.run("write", missing):
            shards[missing[k].number] = shard
            self._advance(shard.images)
        return [shards[number] for number in range(len(plans))]

    def _written(self, plan: Plan) -> Shard | None:
        record = self._record(record_name(plan.number))
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
        self.progress(min(self.visited, 2 * len(self.selected)), 2 * len(self.selected))

    def clear(self) -> None:
        """Remove all records, the claim last: until then no other input may be sharded here."""
        self.progress(2 * len(self.selected), 2 * len(self.selected))
        folder = local_path(self.out)
        for name in self.out.list(f"{WORK}/"):
            if name != CLAIM:
                self.out.delete(name)
        self.out.delete(CLAIM)
        if folder:
            shutil.rmtree(folder / WORK, ignore_errors=True)


def _key(settings: list[Any]) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _checked_name(number: int) -> str:
    return f"checked-{number:06d}.json"
