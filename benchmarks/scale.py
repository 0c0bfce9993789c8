"""Nothing per process grows with the images: order, index and loading processes at 10,000 to 100 million ids.

The data sets are made here: a manifest, the index of each shard in its JSON form, and shards of holes (sparse files),
whose images are zeros. Each line is measured in a process of its own, the way of version 0.1 (sort N keys, hold the
index of all shards) beside today's. `python -m benchmarks.scale [ids ...]` prints the table as Markdown.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng import zlib_ng

from benchmarks.harness import RESULTS, machine
from pirl.config import load_recipe
from pirl.data import CropDataset, epoch_shares
from pirl.shards import Manifest, Shard, ShardReader
from pirl.shards.work import ascii_json
from pirl.storage import encode_json, open_storage
from pirl.world import World

SIZES = [10_000, 1_000_000, 10_000_000, 100_000_000]
OLD_SIZES = SIZES[:3]  # at which the way of 0.1 is measured and all shards are touched: above, it takes GB and minutes
IMAGE_BYTES = 110_000  # ImageNet's mean
SHARD_IMAGES = 2300  # of 256 MB
BATCHES, BATCH = 12, 256  # that are read
RECIPE = ("r50-200ep-linear", ["train.batch_size=1024"])


def write_data(folder: Path, images: int) -> None:
    """Write the manifest of `images` images with the same content, and the shards: links to one index and one tar."""
    folder.mkdir(parents=True)
    step = -(-IMAGE_BYTES // 512) * 512 + 512
    checksum = zlib_ng.crc32(bytes(IMAGE_BYTES))
    first: dict[int, Shard] = {}  # by the number of images
    shards = []
    for number, first_id in enumerate(range(0, images, SHARD_IMAGES)):
        count = min(SHARD_IMAGES, images - first_id)
        name = f"shard-{number:06d}.tar"
        if count not in first:
            index = {
                "offset": list(range(512, count * step, step)),
                "size": [IMAGE_BYTES] * count,
                "crc32": [checksum] * count,
                "label": [place % 1000 for place in range(count)],
                "name": [f"n{place % 1000:08d}/n{place % 1000:08d}_{place}.JPEG" for place in range(count)],
            }
            data = ascii_json(index)
            digest = hashlib.sha256(data).hexdigest()
            size = count * step + 1024
            first[count] = Shard(
                name=name, first_id=first_id, images=count, bytes=size, sha256="0" * 64, index_sha256=digest
            )
            (folder / first[count].index_name).write_bytes(data)
            (folder / name).touch()
            os.truncate(folder / name, size)
        shard = first[count].model_copy(update={"name": name, "first_id": first_id})
        if shard != first[count]:
            os.link(folder / first[count].name, folder / shard.name)
            os.link(folder / first[count].index_name, folder / shard.index_name)
        shards.append(shard)
    manifest = Manifest.of(shards, [f"n{label:08d}" for label in range(1000)], "holes", 0)
    open_storage(folder).write_bytes("manifest.json", encode_json(manifest.model_dump()))


def memory(kind: str) -> float:
    """Return the resident memory of this process in MB: VmRSS now, VmHWM at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def clocked(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def measure_order(images: int, kind: str) -> dict[str, float]:
    """Return the time from an epoch's start to a rank's first share, of another share, and the memory for it."""
    recipe = load_recipe(RECIPE[0], [*RECIPE[1], f"train.order={kind}"])
    world = World(3, 32)
    next(epoch_shares(recipe, BATCH * 4, 0, world))  # what is imported or compiled once
    before = memory("VmRSS")
    shares = epoch_shares(recipe, images, 1, world)
    first, _ = clocked(lambda: next(shares))
    another, _ = clocked(lambda: next(shares))
    return {"epoch_start_s": first, "batch_s": another, "order_mb": memory("VmHWM") - before}


def measure_old_index(images: int, folder: str) -> dict[str, float]:
    """Return what version 0.1 did on opening: the size and the JSON index of each shard, four columns held."""
    before = memory("VmRSS")

    def opened() -> tuple[np.ndarray, ...]:
        storage = open_storage(folder)
        columns = []
        for shard in Manifest.load(storage).shards:
            storage.size(shard.name)
            data = storage.read_bytes(shard.index_name)
            index = json.loads(data)
            columns.append([np.array(index[name], np.int64) for name in ("offset", "size", "label", "crc32")])
        return tuple(np.concatenate(column) for column in zip(*columns))

    seconds, held = clocked(opened)
    assert len(held[0]) == images
    return {"open_s": seconds, "loading_mb": memory("VmRSS") - before}


def measure_index(images: int, folder: str) -> dict[str, float]:
    """Return time and memory to open a data set as a loading process does, and to read batches in random order."""
    recipe = load_recipe(*RECIPE)
    before = memory("VmRSS")
    opening, dataset = clocked(lambda: CropDataset(folder, recipe))
    rng = np.random.default_rng(0)

    def read() -> None:
        dataset.reader.read_many(rng.integers(0, images, BATCH).tolist())

    first, _ = clocked(read)
    rest, _ = clocked(lambda: [read() for _ in range(BATCHES - 1)])
    name, _ = clocked(lambda: dataset.reader.name(images - 1))
    return {
        "open_s": opening,
        "first_batch_s": first,
        "batch_s": rest / (BATCHES - 1),
        "name_s": name,
        "loading_mb": memory("VmRSS") - before,
    }


def measure_shards(images: int, folder: str) -> dict[str, float]:
    """Touch every shard once, as the processes of a node do in the course of an epoch."""
    reader = ShardReader(folder)
    before = memory("VmRSS")
    seconds, _ = clocked(lambda: [reader.label(shard.first_id) for shard in reader.manifest.shards])
    return {"all_shards_s": seconds, "all_shards_mb": memory("VmRSS") - before}


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "order": measure_order,
    "old_index": measure_old_index,
    "index": measure_index,
    "shards": measure_shards,
}


def apart(measure: str, images: int, *arguments: str) -> dict[str, float]:
    """Return a measurement made in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", f"--{measure}", str(images), *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def measure(sizes: list[int], old_sizes: list[int], results: Path = RESULTS) -> list[dict[str, Any]]:
    """Measure all sizes, write `results`/scale.json and print the table."""
    rows = []
    for images in sizes:
        with tempfile.TemporaryDirectory(prefix="pirl-scale-") as scratch:
            os.environ["PIRL_CACHE"] = f"{scratch}/cache"
            folder = f"{scratch}/data"
            write_data(Path(folder), images)
            row: dict[str, Any] = {"ids": images, "permutation": apart("order", images, "permutation")}
            row["index"] = apart("index", images, folder)
            row["index_again"] = apart("index", images, folder)
            if images in old_sizes:
                row["sorted"] = apart("order", images, "sorted")
                row["old_index"] = apart("old_index", images, folder)
                os.environ["PIRL_CACHE"] = f"{scratch}/other"
                row["shards"] = apart("shards", images, folder)
                row["shards_again"] = apart("shards", images, folder)
        rows.append(row)
        print(line(row), flush=True)
    results.mkdir(parents=True, exist_ok=True)
    (results / "scale.json").write_text(json.dumps({**machine(), "rows": rows}, indent=2) + "\n")
    return rows


HEAD = """| ids | epoch's start (0.1) | memory for it (0.1) | opening (0.1) | memory of a loading process (0.1) | first batch of 256 | a batch | all shards touched |
|---|---|---|---|---|---|---|---|"""  # noqa: E501


def line(row: dict[str, Any]) -> str:
    """Return a row of the table; in brackets what version 0.1 needs."""

    def old(measure: str, key: str, scale: float, unit: str) -> str:
        return f" ({row[measure][key] * scale:,.4g} {unit})" if measure in row else ""

    new, index = row["permutation"], row["index_again"]
    shards = "not measured"
    if "shards" in row:
        shards = f"{row['shards']['all_shards_s']:.3g} s, then {row['shards_again']['all_shards_s']:.2g}"
    cells = [
        f"{row['ids']:,}",
        f"{new['epoch_start_s'] * 1e3:.2g} ms{old('sorted', 'epoch_start_s', 1e3, 'ms')}",
        f"{new['order_mb']:.2g} MB{old('sorted', 'order_mb', 1, 'MB')}",
        f"{index['open_s']:.2g} s{old('old_index', 'open_s', 1, 's')}",
        f"{index['loading_mb']:.3g} MB{old('old_index', 'loading_mb', 1, 'MB')}",
        f"{row['index']['first_batch_s'] * 1e3:.3g} ms, then {index['first_batch_s'] * 1e3:.3g}",
        f"{index['batch_s'] * 1e3:.3g} ms",
        shards,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("--"):
        name, images, *arguments = sys.argv[1:]
        print(json.dumps(MEASURES[name.removeprefix("--")](int(images), *arguments)))
    else:
        print(HEAD)
        measure([int(images) for images in sys.argv[1:]] or SIZES, OLD_SIZES)
