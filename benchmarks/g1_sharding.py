"""G1: shards of checked photographs, compared with `tar cf` of the same files and webdataset's writer.

All files are in memory (tmpfs). `tar` and `webdataset.ShardWriter` are one process. This library has `PROCESSES`,
which the check of all images has started before. `pirl shard` hashes; the side without hashes shows their cost. The
time of a single process is printed too, without a goal.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from zlib_ng import zlib_ng

from benchmarks.harness import Result, compare, finish
from benchmarks.photographs import write_photographs
from pirl.shards import FileSource, open_source
from pirl.shards.parallel import Workers
from pirl.shards.work import PartWorker, Plan

PROCESSES = min(2, os.cpu_count() or 1)
DIFFERENT, PHOTOGRAPHS, SHARDS = 150, 4000, 8
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None


class NoDigest:
    """Stand-in for SHA-256, to measure the writing alone."""

    def update(self, data: memoryview, /) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 64


class Unhashed(PartWorker):
    digest = NoDigest
    checksum = staticmethod(lambda data: 0)


class Ours:
    """Second pass of `write_shards`, in processes that run already."""

    def __init__(self, worker: PartWorker, processes: int) -> None:
        self.folder = Path(worker.uri)
        self.workers = Workers(worker, processes)
        parts = np.array_split(np.arange(PHOTOGRAPHS), SHARDS)
        self.plans = [Plan(k, int(part[0]), part, ["jpg"] * len(part)) for k, part in enumerate(parts)]
        list(self.workers.run("check", [part[:1] for part in parts]))
        started = time.perf_counter()
        list(self.workers.run("check", parts))
        self.check_s = round(time.perf_counter() - started, 2)

    def __call__(self) -> None:
        shards = [shard for _, shard in self.workers.run("write", self.plans)]
        assert sum(shard.images for shard in shards) == PHOTOGRAPHS


def tar(files: Path, out: Path) -> None:
    subprocess.run(["tar", "cf", out, "-C", files, "."], check=True)


def shard_writer(source: FileSource, out: Path) -> None:
    out.mkdir()
    with webdataset.ShardWriter(f"{out}/shard-%06d.tar", maxcount=PHOTOGRAPHS // SHARDS, verbose=0) as writer:
        for id, name in enumerate(source.names):
            data = (source.root / name).read_bytes()
            writer.write({"__key__": f"{id:09d}", "jpg": data, "cls": source.labels[id]})  # type: ignore[index]


def samples(folder: Path) -> list[tuple[str, bytes, bytes]]:
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    return [(s["__key__"], s["jpg"], s["cls"]) for s in webdataset.WebDataset(shards, shardshuffle=False)]


def check(source: FileSource, ours: list[Ours], theirs: Path, archive: Path) -> None:
    """Raise unless webdataset reads the same samples from all shards, and tar's archive holds the same files."""
    tar(source.root, archive)
    shard_writer(source, theirs)
    expected = [(source.root / name).read_bytes() for name in source.names]
    with tarfile.open(archive) as opened:
        for id in range(0, PHOTOGRAPHS, 97):
            member = opened.extractfile(f"./{source.names[id]}")
            assert member
            assert member.read() == expected[id]
    written = samples(theirs)
    assert [data for _, data, _ in written] == expected
    for side in ours:
        side()
        assert samples(side.folder) == written


def parts(source: FileSource, out: Path) -> dict[str, Any]:
    """Return the time of one process, in ms for 1,000 images, of each part of the work alone."""
    buffer = memoryview(bytearray(2**20))
    loaded = [bytes(source.load_into(i, buffer)) for i in range(1000)]

    def timed(work: Any) -> float:
        started = time.perf_counter()
        work()
        return round(1e3 * (time.perf_counter() - started), 1)

    with open(out, "wb", buffering=0) as file:
        return {
            "part_open_read_ms": timed(lambda: [source.load_into(i, buffer) for i in range(1000)]),
            "part_sha256_ms": timed(lambda: [hashlib.sha256(data) for data in loaded]),
            "part_crc32_ms": timed(lambda: [zlib_ng.crc32(data) for data in loaded]),
            "part_write_ms": timed(lambda: [file.write(data) for data in loaded]),
        }


def main() -> list[Result]:
    results = []
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch, ExitStack() as stack:
        root = Path(scratch)
        once, files = root / "once", root / "files"
        once.mkdir()
        pieces = [(once / f"{k:04}.jpg").read_bytes() for k in range(write_photographs(once, DIFFERENT))]
        for i in range(PHOTOGRAPHS):
            path = files / f"class{10 * i // PHOTOGRAPHS}" / f"{i:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pieces[i % len(pieces)])
        source = open_source(str(files))
        assert isinstance(source, FileSource)
        hashed = Ours(PartWorker(source, str(root / "hashed"), "0" * 64), PROCESSES)
        unhashed = Ours(Unhashed(source, str(root / "unhashed"), "0" * 64), PROCESSES)
        alone = Ours(PartWorker(source, str(root / "alone"), "0" * 64), 1)
        for side in (hashed, unhashed, alone):
            stack.enter_context(side.workers)
        check(source, [hashed, unhashed, alone], root / "theirs", root / "archive.tar")
        megabytes = round(int(source.sizes.sum()) / 1e6)
        facts = {
            "processes": PROCESSES,
            "images": PHOTOGRAPHS,
            "MB": megabytes,
            "disk": SCRATCH,
            "check_of_all_images_s": hashed.check_s,
            **parts(source, root / "part"),
        }
        outputs = ("hashed", "unhashed", "alone", "theirs")

        def clear() -> None:
            for output in outputs:
                shutil.rmtree(root / output, ignore_errors=True)
            (root / "archive.tar").unlink(missing_ok=True)

        for name, title, required, reference in (
            ("tar", "tar cf", 0.8, partial(tar, files, root / "archive.tar")),
            ("writer", "webdataset.ShardWriter", 3.0, partial(shard_writer, source, root / "theirs")),
        ):
            for suffix, how, least, side in (
                ("", "hashed", required, hashed),
                ("-unhashed", "not hashed", required, unhashed),
                ("-alone", "hashed, by one process", 0.0, alone),
            ):
                results.append(
                    compare(
                        goal=f"G1-{name}{suffix}",
                        title=f"{PHOTOGRAPHS} photographs, {megabytes} MB, into {SHARDS} shards, {how}, and {title}",
                        sides={"reference": reference, "ours": side},
                        required=least,
                        repeats=5,
                        unit="s",
                        parity=lambda: None,  # checked above, once for all sides
                        facts=facts,
                        between=clear,
                    )
                )
    return results


if __name__ == "__main__":
    finish(main())
