"""Shards on S3: how they are asked for, and a cache that is shared, bounded, damaged, full, or gone."""

from __future__ import annotations

import fcntl
import os
import pwd
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import warned
from images import flat_folder, folder_of_classes
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 (fixtures)

from pirl.errors import DataError, UsageError
from pirl.shards import Manifest, ShardReader, cache, cache_root, open_source, write_shards
from pirl.shards.cache import BlockCache, _lock_range
from pirl.shards.fashion import present_fashion_mnist
from pirl.storage import S3Storage, open_storage

BLOCK = 4096


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks of 4 kB, requests of up to 16 kB, for shards of 40 kB with images of about 2 kB."""
    monkeypatch.setenv("PIRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pirl.shards.cache.BLOCK_BYTES", BLOCK)
    monkeypatch.setattr("pirl.shards.remote.BLOCK_BYTES", BLOCK)
    monkeypatch.setattr("pirl.shards.remote.REQUEST_BYTES", 4 * BLOCK)
    monkeypatch.setattr("pirl.shards.remote.GAP_BYTES", 2048)  # a label lies between two images
    monkeypatch.setattr("pirl.shards.remote.AHEAD_BYTES", 4 * BLOCK)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A folder with 60 images in shards of 40 kB, and what is in them."""
    return make(tmp_path_factory.mktemp("local"), images=20)


def make(folder: Path, images: int) -> tuple[Path, list[bytes]]:
    source = open_source(str(folder_of_classes(folder / "images", classes=3, images=images)))
    write_shards(source, open_storage(folder / "shards"), shard_bytes=40_000)
    return folder / "shards", [(folder / "images" / name).read_bytes() for name in source.names]


@pytest.fixture
def data(local: tuple[Path, list[bytes]], bucket: str) -> tuple[str, list[bytes]]:  # noqa: F811
    """The same on S3."""
    return uploaded(local[0], f"{bucket}/set"), local[1]


def uploaded(folder: Path, uri: str) -> str:
    for path in folder.iterdir():
        open_storage(uri).upload(path, path.name)
    return uri


class Counted(S3Storage):
    """Notes every range of a shard that is asked for."""

    def __init__(self, name: str, prefix: str = "") -> None:
        super().__init__(name, prefix)
        self.ranges: list[tuple[str, int, int]] = []

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        if name.endswith(".tar"):
            self.ranges.append((name, offset, length))
        return super().read_range(name, offset, length)


def counted(uri: str) -> tuple[ShardReader, list[tuple[str, int, int]]]:
    name, _, prefix = uri.removeprefix("s3://").partition("/")
    storage = Counted(name, prefix)
    return ShardReader(storage), storage.ranges


def shuffled(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def blocks(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("cache/shards/*/*.block"))


# --- requests ---------------------------------------------------------------------------------------------------------


def test_near_images_come_in_one_request_and_only_once(data: tuple[str, list[bytes]], tmp_path: Path) -> None:
    uri, expected = data
    reader, ranges = counted(uri)
    ids = shuffled(60)
    assert reader.read_many(ids) == [expected[id] for id in ids]
    total = sum(shard.bytes for shard in reader.manifest.shards)
    assert len(ranges) <= sum(-(-shard.bytes // (3 * BLOCK)) for shard in reader.manifest.shards)
    assert all(length <= 4 * BLOCK and offset % BLOCK == 0 for _, offset, length in ranges)
    assert total - 2 * BLOCK * len(reader.manifest.shards) <= sum(length for *_, length in ranges) <= 1.4 * total
    ranges.clear()
    assert [reader.read(id) for id in ids] == [expected[id] for id in ids]
    again, more = counted(uri)  # as after a restart
    assert again.read_many(ids) == [expected[id] for id in ids]
    assert not ranges
    assert not more


def test_without_a_cache_only_the_images_are_asked_for(
    data: tuple[str, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, expected = data
    monkeypatch.setenv("PIRL_CACHE_GB", "0")
    reader, ranges = counted(uri)
    for id in (50, 3, 20):
        assert reader.read(id) == expected[id]
    assert [length for *_, length in ranges] == [len(expected[id]) for id in (50, 3, 20)]
    ranges.clear()
    assert reader.read_many([7, 5, 6, 50]) == [expected[id] for id in (7, 5, 6, 50)]
    assert len(ranges) == 2  # 5 to 7 lie side by side
    assert not blocks(tmp_path)


def test_who_reads_in_order_is_read_ahead_for(data: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    uri, expected = data
    monkeypatch.setenv("PIRL_CACHE_GB", "0")
    reader, ranges = counted(uri)
    assert [reader.read(id) for id in range(60)] == expected
    assert len(ranges) < 30
    seen = len(ranges)
    assert [reader.read(id) for id in (40, 10, 30)] == [expected[id] for id in (40, 10, 30)]
    assert len(ranges) == seen + 3


# --- the cache is shared ----------------------------------------------------------------------------------------------

READER = """
import sys
import time
from test_cache import BLOCK, counted, shuffled
from pirl.errors import PirlError
from pirl.shards import cache, remote

cache.BLOCK_BYTES = remote.BLOCK_BYTES = BLOCK
remote.REQUEST_BYTES = 4 * BLOCK
uri, seed, wait_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
try:
    reader, ranges = counted(uri)
    fetch = reader.storage.read_range

    def slow(name, offset, length):
        if name.endswith(".tar"):
            print("fetching", name, offset // BLOCK, flush=True)
            time.sleep(wait_s)
        return fetch(name, offset, length)

    reader.storage.read_range = slow
    import zlib
    sums = {id: zlib.crc32(reader.read(id)) for id in shuffled(len(reader), seed)}
except PirlError as error:
    sys.exit(f"{type(error).__name__} {error}")
print("sums", [sums[id] for id in sorted(sums)])
"""


def start(uri: str, seed: int, wait_s: float = 0.0, **options: Any) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": f"{os.getcwd()}:{Path(__file__).parent}"}
    command = [sys.executable, "-c", READER, uri, str(seed), str(wait_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def finish(process: subprocess.Popen[str], expected: list[bytes]) -> tuple[list[str], str]:
    """(what it has fetched, its stderr) of a process that has read all images as they are."""
    import zlib

    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    *fetched, sums = out.splitlines()
    assert sums == f"sums {[zlib.crc32(image) for image in expected]}"
    return fetched, errors


def test_processes_share_what_they_fetch(data: tuple[str, list[bytes]], tmp_path: Path) -> None:
    uri, expected = data
    processes = [start(uri, seed, 0.02) for seed in range(3)]
    fetched = [finish(process, expected)[0] for process in processes]
    everything = [line for lines in fetched for line in lines]
    assert sum(map(bool, fetched)) > 1
    # who needs a block beside one that is there asks for both: a few come twice
    assert len(everything) < 1.2 * len(set(everything))
    assert finish(start(uri, 9), expected)[0] == []
    assert not list(tmp_path.glob("cache/shards/*/*.part"))


def test_a_killed_process_leaves_no_lock_and_no_half_block(data: tuple[str, list[bytes]], tmp_path: Path) -> None:
    uri, expected = data
    first = start(uri, 0, 60)
    assert first.stdout
    assert first.stdout.readline().startswith("fetching")  # and holds the lock for a minute
    second = start(uri, 0)
    time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert finish(second, expected)[0]


@pytest.mark.parametrize("ranges", [True, False])
def test_the_lock_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool) -> None:
    """Systems other than Linux have no lock of a range of an open file: there it is of the whole file."""
    if not ranges:
        monkeypatch.delattr(fcntl, "F_OFD_SETLKW")
    with open(tmp_path / "lock", "ab") as first, open(tmp_path / "lock", "ab") as second:
        _lock_range(first, 5, 2)
        waiting = threading.Thread(target=_lock_range, args=(second, 6, 1), daemon=True)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        first.close()
        waiting.join(30)
        assert not waiting.is_alive()


# --- the cache is bounded ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_read_past_the_cache(
    data: tuple[str, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, expected = data
    monkeypatch.setenv("PIRL_CACHE_GB", "0.00006")  # 60 kB for 140 kB
    processes = [start(uri, seed) for seed in range(2)]
    for process in processes:
        finish(process, expected)
    reader, ranges = counted(uri)
    assert reader.read_many(shuffled(60)) == [expected[id] for id in shuffled(60)]
    kept = sum(path.stat().st_size for path in blocks(tmp_path))
    assert 20_000 < kept <= 60_000 + 2 * BLOCK
    assert 0 < sum(length for *_, length in ranges) < sum(map(len, expected)) + 2048 * 60
    monkeypatch.setenv("PIRL_CACHE_GB", "0.00003")  # less from now on
    ShardReader(uri)
    assert sum(path.stat().st_size for path in blocks(tmp_path)) <= 30_000


@pytest.mark.slow
def test_room_is_made_from_data_sets_that_nobody_reads(
    bucket: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets = [make(tmp_path / str(images), images) for images in (8, 9, 10)]
    used, unused, new = (uploaded(folder, f"{bucket}/{len(images)}") for folder, images in sets)
    used_images, unused_images, new_images = (images for _, images in sets)
    open_one = ShardReader(used)
    open_one.read_many(range(24))
    finish(start(unused, 0), unused_images)
    assert len({path.parent for path in blocks(tmp_path)}) == 2
    full = sum(path.stat().st_size for path in tmp_path.glob("cache/shards/*/*"))
    monkeypatch.setenv("PIRL_CACHE_GB", str(full / 1e9))
    reader, _ = counted(new)
    assert reader.read_many(range(30)) == new_images
    kept = {path.parent.name for path in blocks(tmp_path)}
    assert kept == {open_one.manifest.digest, reader.manifest.digest}
    assert open_one.read_many(range(24)) == used_images


# --- the cache fails --------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    path.write_bytes(bytes(value ^ 1 for value in path.read_bytes()))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILERS: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "gone": Path.unlink,
    "a folder": replace_by_folder,
}


@pytest.mark.parametrize("how", SPOILERS)
def test_damaged_blocks_are_fetched_again(data: tuple[str, list[bytes]], tmp_path: Path, how: str) -> None:
    uri, expected = data
    ShardReader(uri).read_many(range(60))
    before = {path.name: path.read_bytes() for path in blocks(tmp_path)}
    for path in blocks(tmp_path)[::2]:
        SPOILERS[how](path)
    reader, ranges = counted(uri)
    assert reader.read_many(shuffled(60)) == [expected[id] for id in shuffled(60)]
    assert ranges
    if how != "a folder":
        assert [reader.read(id) for id in shuffled(60)] == [expected[id] for id in shuffled(60)]
        # what no image lies in (headers, the end) may stay damaged
        same = [path.name for path in blocks(tmp_path) if path.read_bytes() == before[path.name]]
        assert len(same) >= len(before) - len(reader.manifest.shards)


@pytest.mark.parametrize("how", SPOILERS)
def test_an_index_that_was_damaged_is_fetched_again(data: tuple[str, list[bytes]], tmp_path: Path, how: str) -> None:
    uri, expected = data
    assert ShardReader(uri).label(5) == 0
    (index,) = tmp_path.glob("cache/shards/*/shard-*.index")
    SPOILERS[how](index)
    reader = ShardReader(uri)
    assert reader.read(5) == expected[5]
    assert reader.name(5) == "class0/005.jpg"


@pytest.mark.slow
def test_a_full_disk_stops_the_caching_and_nothing_else(data: tuple[str, list[bytes]], tmp_path: Path) -> None:
    """A process that may write no file above 3 kB: as on a full disk, write() fails in the middle of a block."""

    def little_room() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    uri, expected = data
    _, errors = finish(start(uri, 0, preexec_fn=little_room), expected)
    assert errors.count("takes nothing more") == 1
    assert "PIRL_CACHE" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("cache/shards/*/*.part"))
    finish(start(uri, 0), expected)  # there is room again
    assert finish(start(uri, 1), expected)[0] == []


def test_a_cache_that_cannot_be_made(
    data: tuple[str, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, expected = data
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIRL_CACHE", str(tmp_path / "file/below"))
    with warned(re.escape(str(tmp_path / "file/below"))) as printed:
        assert ShardReader(uri).read_many(range(60)) == expected
    assert printed.getvalue().count("warning:") == 1


def test_a_cache_that_is_emptied_while_in_use(data: tuple[str, list[bytes]], tmp_path: Path) -> None:
    import shutil

    uri, expected = data
    reader = ShardReader(uri)
    assert reader.read_many(range(30)) == expected[:30]
    shutil.rmtree(tmp_path / "cache")
    assert reader.read_many(range(60)) == expected


def test_a_wrong_size_is_named(data: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("PIRL_CACHE_GB", text)
        with pytest.raises(UsageError, match=f"PIRL_CACHE_GB='{text}'"):
            ShardReader(data[0])


# --- the shards change ------------------------------------------------------------------------------------------------


def test_shards_that_change_while_they_are_read(data: tuple[str, list[bytes]], tmp_path: Path) -> None:
    uri, expected = data
    storage, reader = open_storage(uri), ShardReader(uri)
    manifest = Manifest.load(storage)
    assert reader.read(0) == expected[0]
    first, second, third = manifest.shards[:3]
    whole = storage.read_bytes(second.name)
    storage.write_bytes(second.name, bytes(reversed(whole)))  # of the same size
    with pytest.raises(DataError, match=rf"{second.name} has other content .* \(image {second.first_id}\)") as caught:
        reader.read(second.first_id)
    assert "pirl shard" in caught.value.hint
    storage.write_bytes(second.name, whole)  # restored, so the wrong blocks in the cache are replaced
    assert reader.read(second.first_id) == expected[second.first_id]
    storage.write_bytes(third.name, b"short")
    with pytest.raises(DataError, match=f"{third.name} was cut"):
        reader.read(third.first_id)
    storage.delete(third.name)
    with pytest.raises(DataError, match=f"{third.name} is missing"):
        reader.read(third.first_id)
    assert reader.read(0) == expected[0]
    assert first.images > 1


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of a user that has no entry in the list of users, with an empty environment (`env -i`)."""
    for name in ("HOME", "XDG_CACHE_HOME", "PIRL_CACHE", "PIRL_DATA"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


def test_without_a_home_nothing_is_kept(homeless: None) -> None:
    assert cache_root() is None
    with warned("no cache"):
        empty = BlockCache(None, "digest")
    empty.put(0, 0, memoryview(b"data"))
    empty.save("small", memoryview(b"data"))
    empty.drop(0, 0, 4)
    with empty.fetching(0, 0, 4):
        assert empty.get(0, 0, 4) is None
    assert not empty.path("small").exists()
    assert empty.room() == 0
    with pytest.raises(UsageError, match="no such home folder"):
        open_storage("~/runs")


def test_without_a_home_shards_on_s3_are_read(homeless: None, bucket: str, tmp_path: Path) -> None:  # noqa: F811
    write_shards(open_source(str(flat_folder(tmp_path / "images", images=3))), open_storage(f"{bucket}/shards"))
    with warned("no cache"):
        reader = ShardReader(f"{bucket}/shards")
    assert len([reader.read(id) for id in range(3)]) == 3
    present_fashion_mnist()
