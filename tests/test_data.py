"""The order of ids, how it is dealt to ranks, and the loader that follows it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from conftest import IMAGES, tiny_recipe

from pirl.config import Recipe
from pirl.data import Batch, CropDataset, Share, epoch_shares, negative_seeds
from pirl.errors import DataError
from pirl.loader import Loader
from pirl.order import epoch_order
from pirl.shards import Manifest, ShardReader, decode_image
from pirl.storage import encode_json, local_path, open_storage
from pirl.views import crop_batch
from pirl.world import World

GRID = [  # rows, batch, ranks
    (1, 1, 1),
    (1, 1, 3),
    (10, 3, 2),
    (10, 10, 4),
    (10, 9, 4),
    (33, 8, 3),
    (64, 8, 8),
    (65, 8, 8),
    (97, 16, 5),
    (1000, 128, 7),
    (1281, 32, 32),
]


def batched(batch: int, *overrides: str) -> Recipe:
    return tiny_recipe(f"train.batch_size={batch}", *overrides)


def dealt(recipe: Recipe, rows: int, epoch: int, size: int, start: int = 0) -> list[list[Share]]:
    """The shares of all ranks, by global batch."""
    by_rank = [list(epoch_shares(recipe, rows, epoch, World(rank, size), start)) for rank in range(size)]
    assert len({len(shares) for shares in by_rank}) == 1  # every rank makes every step
    return [list(shares) for shares in zip(*by_rank)]


def visited(batches: list[list[Share]]) -> list[int]:
    return [
        int(row) for shares in batches for rank, share in enumerate(shares) for row in share.rows[: share.counts[rank]]
    ]


@pytest.mark.parametrize(("rows", "batch", "size"), GRID)
def test_every_row_comes_exactly_once(rows: int, batch: int, size: int) -> None:
    batches = dealt(batched(batch), rows, 0, size)
    assert sorted(visited(batches)) == list(range(rows))
    for shares in batches:
        counts = shares[0].counts
        assert max(counts) - min(counts) <= 1  # dealt evenly
        assert all(share.counts == counts and share.size == sum(counts) for share in shares)
        assert all(len(share.rows) >= 1 for share in shares)  # a rank without samples still takes part


@pytest.mark.parametrize(("rows", "batch", "size"), GRID)
def test_dropping_the_last_batch_drops_nothing_else(rows: int, batch: int, size: int) -> None:
    recipe = batched(batch, "train.last_batch=drop")
    found = visited(dealt(recipe, rows, 0, size))
    assert len(found) == len(set(found)) == rows - rows % batch
    assert found == visited(dealt(batched(batch), rows, 0, size))[: len(found)]
    missing = set().union(*(set(range(rows)) - set(visited(dealt(recipe, rows, epoch, size))) for epoch in range(20)))
    assert rows % batch == 0 or len(missing) > rows % batch or rows == 1  # not the same ones in every epoch


@pytest.mark.parametrize(("rows", "batch", "size"), GRID)
def test_mean_over_ranks_of_weighted_sums_is_the_mean_over_the_global_batch(rows: int, batch: int, size: int) -> None:
    values = np.random.default_rng(0).normal(size=rows)
    for shares in dealt(batched(batch), rows, 1, size):
        sums = [share.weight * values[share.rows].sum() for share in shares]
        everyone = np.concatenate([share.rows[: share.counts[rank]] for rank, share in enumerate(shares)])
        assert np.mean(sums) == pytest.approx(values[everyone].mean(), rel=1e-12, abs=1e-12)


def test_the_global_batches_do_not_depend_on_ranks() -> None:
    def batches(size: int) -> list[set[int]]:
        return [set(visited([shares])) for shares in dealt(batched(9), IMAGES, 2, size)]

    assert batches(1) == batches(2) == batches(5)
    assert [len(batch) for batch in batches(1)] == [9, 9, 9, 9, 6]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 7), (4, 4)])
@pytest.mark.parametrize("keep", ["keep", "drop"])
def test_resuming_anywhere_on_other_ranks_continues_with_the_rest(before: int, after: int, keep: str) -> None:
    rows = 100
    recipe = batched(9, f"train.last_batch={keep}")
    whole = visited(dealt(recipe, rows, 3, before))
    seen = 0
    for done, shares in enumerate(dealt(recipe, rows, 3, before), start=1):
        seen += shares[0].size
        rest = visited(dealt(recipe, rows, 3, after, start=seen))
        first = visited(dealt(recipe, rows, 3, before)[:done])
        assert len(first) == seen
        assert sorted(first + rest) == sorted(whole)
    assert dealt(recipe, rows, 3, after, start=seen) == []


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as Salmon et al. (2011) write it, in plain Python."""
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & 0xFFFFFFFF,
            (left >> 32) ^ counter[3] ^ key[1],
            left & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_plain_philox_gives_the_published_vectors() -> None:
    """The known answers of the Random123 distribution (kat_vectors)."""
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def plain_uniform(seed: int, epoch: int, id: int, stream: int) -> float:
    words = philox(
        [id & 0xFFFFFFFF, id >> 32, epoch & 0xFFFFFFFF, epoch >> 32 << 16 | stream << 8],
        [seed & 0xFFFFFFFF, seed >> 32],
    )
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53


@pytest.mark.parametrize(("seed", "epoch", "rows"), [(0, 0, 50), (7, 3, 50), (2**40 + 5, 799, 31)])
def test_order_by_an_independent_generator(seed: int, epoch: int, rows: int) -> None:
    """A run's order must never change between versions: a resumed run would repeat and skip images."""
    expected = sorted(range(rows), key=lambda id: plain_uniform(seed, epoch, id, stream=250))
    assert epoch_order(seed, epoch, rows).tolist() == expected


def test_seeds_of_negatives_by_an_independent_generator() -> None:
    ids = np.array([0, 5, 2**33 + 1])
    for view in (0, 1):
        expected = [int(plain_uniform(3, 2, int(id), stream=251 + view) * 2**53) for id in ids]
        assert negative_seeds(3, 2, ids, view).tolist() == expected


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(epoch_order(seed, epoch, 100)) for seed in range(3) for epoch in range(20)}
    assert len(orders) == 60
    places = np.array([np.argsort(epoch_order(0, epoch, 100)) for epoch in range(200)])
    assert abs(places.mean(0) - 49.5).max() < 5 * 28.9 / 200**0.5  # no image has a usual place
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 100)[0] = 3


# ---- crops


def test_a_batch_is_the_images_own_crops(shards: str, tiny: Recipe) -> None:
    dataset = CropDataset(shards, tiny)
    rows = np.array([7, 0, 41])
    batch = dataset[2, rows]
    reader = ShardReader(shards)
    images = [np.asarray(decode_image(reader.read(int(id)), "x")) for id in rows]
    expected, patches = crop_batch(images, rows, tiny.train.seed, 2, tiny.views)
    assert np.array_equal(batch.images.numpy(), expected)
    assert np.array_equal(batch.elements.numpy(), patches)
    assert batch.rows.tolist() == batch.ids.tolist() == [7, 0, 41]
    assert batch.images.dtype == torch.uint8
    assert batch.elements.shape == (12, 5, 5, 3)
    assert torch.equal(dataset[2, rows].images, batch.images)  # also from kept images
    assert not torch.equal(dataset[3, rows].images, batch.images)


def test_fewer_images_are_spread_over_the_ids(shards: str) -> None:
    dataset = CropDataset(shards, tiny_recipe("data.images=16"))
    ids = dataset.image_ids(np.arange(16))
    assert len(set(ids.tolist())) == 16
    assert set(np.diff(ids)) == {2, 3}
    batch = dataset[0, np.array([3])]
    assert (batch.rows.item(), batch.ids.item()) == (3, ids[3])
    assert len(CropDataset(shards, tiny_recipe("data.images=1000")).image_ids(np.arange(IMAGES))) == IMAGES


# ---- loader


def everything(loader: Loader, epoch: int = 0, samples: int = 0) -> list[tuple[int, int, Share, Batch]]:
    return list(loader.batches(epoch, samples))


def loaded(world: World, shards: str, recipe: Recipe, workers: int, samples: int = 0) -> list[Any]:
    return [
        (epoch, seen, share.rows.tolist(), *(tensor.numpy().tobytes() for tensor in batch[:4]))
        for epoch, seen, share, batch in Loader(shards, recipe, world, workers).batches(1, samples)
    ]


def test_loader_follows_the_plan_across_epochs(shards: str, tiny: Recipe) -> None:
    found = everything(Loader(shards, tiny, World(), 0))
    assert [(epoch, seen) for epoch, seen, _, _ in found] == [
        (epoch, seen) for epoch in range(3) for seen in (0, 9, 18, 27, 36)
    ]
    for _, _, share, batch in found:
        assert batch.rows.tolist() == share.rows.tolist()
        assert len(batch.images) == len(share.rows)


def test_workers_change_nothing(shards: str, tmp_path: Path) -> None:
    """No worker, and two worker processes, from the start and from the middle of an epoch: the same bytes."""
    recipe = tiny_recipe("train.epochs=2")
    assert ranks.run(loaded, 1, tmp_path, shards, recipe, 2)[0] == loaded(World(), shards, recipe, 0)
    assert loaded(World(), shards, recipe, 0, 18) == loaded(World(), shards, recipe, 0)[2:]


def killed_while_loading(world: World, shards: str) -> str:
    loader = Loader(shards, tiny_recipe("train.epochs=1000"), world, 1).batches(0, 0)
    next(loader)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
    started = time.monotonic()
    try:
        for _ in loader:
            pass
    except DataError as error:
        return f"{time.monotonic() - started:.1f}s {error}"
    return "went on"


def test_a_killed_worker_is_a_data_error_at_once(shards: str, tmp_path: Path) -> None:
    (told,) = ranks.run(killed_while_loading, 1, tmp_path, shards)
    assert "a data loading process of rank 0 died" in told
    assert "fewer workers" in told
    assert float(told.split("s")[0]) < 20


PROGRAM = """
import os, signal, sys, time
import torch
from pirl.config import load_recipe
from pirl.loader import Loader
from pirl.world import World

if __name__ == "__main__":
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    batches = Loader(sys.argv[2], load_recipe(sys.argv[1]), World(), 2).batches(0, 0)
    next(batches)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.5)
    print(len(told), 1 + sum(1 for _ in batches))
"""


def run_program(case: str, shards: str, recipe: Path, folder: Path) -> tuple[str, set[int]]:
    """What a rank with two workers, alone in a session, prints; and who of its session lives a minute later."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(recipe), shards, case]
    with open(folder / "output.txt", "w+") as output:
        process = subprocess.Popen(command, start_new_session=True, stdout=output, stderr=subprocess.STDOUT)
        process.wait(120)
    deadline = time.monotonic() + 60
    while (left := in_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return (folder / "output.txt").read_text(), left


def in_session(session: int) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, its_session, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_session) == session and state != "Z":
                found.add(int(path.parent.name))
    return found


def test_workers_survive_the_signal_that_tells_their_rank_to_stop(shards: str, tiny_toml: Path, tmp_path: Path) -> None:
    """A launcher signals the whole process group; the rank decides when it has seen enough."""
    text, left = run_program("told to stop", shards, tiny_toml, tmp_path)
    assert text.split() == ["1", "15"]  # all batches of three epochs
    assert not left


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's list of processes")
def test_workers_end_with_a_killed_rank(shards: str, tiny_toml: Path, tmp_path: Path) -> None:
    _, left = run_program("killed", shards, tiny_toml, tmp_path)
    assert not left


def broken_image(world: World, shards: str, workers: int) -> str:
    try:
        for _ in Loader(shards, tiny_recipe(), world, workers).batches(0, 0):
            pass
    except DataError as error:
        return str(error)
    return "went on"


def with_broken_image(shards: str, folder: Path, id: int) -> str:
    """Return a copy of shards in which the index says a wrong place for an image, without a checksum to show it."""
    source = local_path(open_storage(shards))
    assert source
    shutil.copytree(source, folder)
    manifest = Manifest.load(open_storage(folder))
    number = [shard.first_id <= id for shard in manifest.shards].count(True) - 1
    shard = manifest.shards[number]
    index = json.loads((folder / shard.index_name).read_text())
    index["offset"][id - shard.first_id] += 7
    del index["crc32"]  # as in shards that were made before there were checksums
    data = json.dumps(index).encode()
    (folder / shard.index_name).write_bytes(data)
    manifest.shards[number] = shard.model_copy(update={"index_sha256": hashlib.sha256(data).hexdigest()})
    settings = (manifest.source, manifest.quarantined, manifest.decoding, manifest.pictures)
    changed = Manifest.of(manifest.shards, manifest.classes, *settings)
    (folder / "manifest.json").write_bytes(encode_json(changed.model_dump()))
    return str(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_without_a_traceback(shards: str, tmp_path: Path, workers: int) -> None:
    broken = with_broken_image(shards, tmp_path / "broken", 30)
    (told,) = ranks.run(broken_image, 1, tmp_path, broken, workers)
    assert "image 30 (" in told
    assert "Traceback" not in told
