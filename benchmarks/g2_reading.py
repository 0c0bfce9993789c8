"""G2: encoded images with their labels from shards, by id in random order, compared with webdataset's stream.

Nothing is decoded. Each side is one process, with all files in memory (tmpfs). G2-order compares this library's
random order with its sequential one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import webdataset

from benchmarks.harness import Result, compare, finish
from benchmarks.photographs import write_photographs
from pirl.shards import ShardReader, open_source, write_shards
from pirl.storage import open_storage

DIFFERENT, COPIES = 150, 20
SHARD_BYTES = 32 * 2**20
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None


def write_files(folder: Path) -> None:
    """Write COPIES of each photograph, in ten classes."""
    once = folder / "class0"
    once.mkdir(parents=True)
    pieces = [(once / f"{k:04}.jpg").read_bytes() for k in range(write_photographs(once, DIFFERENT))]
    for copy in range(1, COPIES):
        (folder / f"class{copy}").mkdir()
        for k, data in enumerate(pieces):
            (folder / f"class{copy}" / f"{k:04}.jpg").write_bytes(data)


class Stream:
    """Stream of webdataset, in the order of the shards."""

    def __init__(self, shards: Path) -> None:
        self.urls = sorted(str(path) for path in shards.glob("*.tar"))

    def samples(self) -> list[tuple[int, bytes, int]]:
        stream = webdataset.WebDataset(self.urls, shardshuffle=False)
        return [(int(sample["__key__"]), sample["jpg"], int(sample["cls"])) for sample in stream]

    def __call__(self) -> int:
        return sum(len(sample["jpg"]) for sample in webdataset.WebDataset(self.urls, shardshuffle=False))


class ById:
    """Reader of this library, in a given order of ids."""

    def __init__(self, shards: Path, shuffled: bool) -> None:
        self.reader = ShardReader(shards)
        ids = np.arange(len(self.reader))
        self.ids = (np.random.default_rng(0).permutation(ids) if shuffled else ids).tolist()

    def samples(self) -> list[tuple[int, bytes, int]]:
        return [(id, self.reader.read(id), self.reader.label(id)) for id in self.ids]

    def __call__(self) -> int:
        read, label = self.reader.read, self.reader.label
        return sum(len(read(id)) + 0 * label(id) for id in self.ids)


def main() -> list[Result]:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        files, shards = Path(scratch, "files"), Path(scratch, "shards")
        write_files(files)
        source = open_source(str(files))
        manifest = write_shards(source, open_storage(shards), shard_bytes=SHARD_BYTES)
        stream, shuffled, in_order = Stream(shards), ById(shards, True), ById(shards, False)

        def check() -> None:
            theirs = stream.samples()
            assert theirs == in_order.samples() == sorted(shuffled.samples())
            assert [data for _, data, _ in theirs] == [(files / name).read_bytes() for name in source.names]

        facts = {
            "images": manifest.images,
            "MB": round(sum(shard.bytes for shard in manifest.shards) / 1e6),
            "shards": len(manifest.shards),
            "disk": SCRATCH,
        }
        return [
            compare(
                goal="G2",
                title=f"{manifest.images} images by id in random order, not decoded, and webdataset's stream",
                sides={"reference": stream, "ours": shuffled},
                required=5.0,
                parity=check,
                facts=facts,
            ),
            compare(
                goal="G2-order",
                title="random order and sequential order of this library",
                sides={"reference": in_order, "ours": shuffled},
                required=0.8,
                parity=check,
                facts=facts,
            ),
        ]


if __name__ == "__main__":
    finish(main())
