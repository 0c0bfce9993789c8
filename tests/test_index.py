"""The index of a shard: fixed-width records in a file that a machine's processes share, made when first needed."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import pytest
from images import flat_folder

from benchmarks.scale import SHARD_IMAGES, line, measure, write_data
from pirl.errors import DataError
from pirl.shards import ShardReader, open_source, write_shards
from pirl.shards.index import UNKNOWN, ShardIndex, convert
from pirl.storage import LocalStorage, open_storage


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIRL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three shards of 60 images."""
    source = open_source(str(flat_folder(tmp_path / "images", images=60)))
    write_shards(source, open_storage(tmp_path / "data"), shard_bytes=60_000)
    return tmp_path / "data"


class Counted(LocalStorage):
    """Notes every object that is read, and every look at a size."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked: list[str] = []

    def read_bytes(self, name: str) -> bytes:
        self.asked.append(name)
        return super().read_bytes(name)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        self.asked.append(name)
        return super().read_range(name, offset, length)

    def size(self, name: str) -> int:
        self.asked.append(f"size of {name}")
        return super().size(name)


def test_opening_costs_nothing_per_shard(data: Path) -> None:
    storage = Counted(data)
    reader = ShardReader(storage)
    assert len(reader.manifest.shards) > 2
    assert storage.asked == ["manifest.json"]
    reader.read_many([0, 1])
    assert storage.asked == ["manifest.json", "shard-000000.json"]  # the shard of these images, once


def test_an_index_is_converted_once_for_all_processes(data: Path) -> None:
    expected = ShardReader(data).read_many(range(60))
    storage = Counted(data)
    reader = ShardReader(storage)
    assert reader.read_many(range(60)) == expected
    assert [pickle.loads(pickle.dumps(reader)).read(id) for id in range(60)] == expected
    assert storage.asked == ["manifest.json"]
    assert not list(data.glob("*.index"))  # the data set stays as it was written


def test_records_are_those_of_the_json_index(data: Path) -> None:
    reader = ShardReader(data)
    for shard in reader.manifest.shards:
        text = (data / shard.index_name).read_bytes()
        index = json.loads(text)
        index["name"][1] = "caf\udce9 é.jpg"  # no UTF-8 on the disk that it came from
        content = convert(shard, json.dumps(index).encode(), 1)
        assert content
        file = ShardIndex(content)
        assert [file.name(place) for place in range(shard.images)] == index["name"]
        records = [file.record(place) for place in range(shard.images)]
        columns = list(zip(index["offset"], index["size"], index["label"] or [-1] * shard.images, index["crc32"]))
        assert [tuple(record) for record in records] == columns
        del index["crc32"]  # as in the first shards of version 0.1
        old = convert(shard, json.dumps(index).encode(), 1)
        assert old
        assert ShardIndex(old).record(0) == records[0]._replace(checksum=UNKNOWN)


def test_without_a_cache_indexes_are_held(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ShardReader(data).read_many(range(60))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIRL_CACHE", str(tmp_path / "file/below"))
    storage = Counted(data)
    reader = ShardReader(storage)
    assert [reader.read_many(range(60)) for _ in range(2)] == [expected, expected]
    assert len(storage.asked) == 1 + len(reader.manifest.shards)


def test_an_index_of_another_content_is_not_taken_from_the_cache(data: Path, tmp_path: Path) -> None:
    ShardReader(data).labels()
    first, second, *_ = sorted(tmp_path.glob("cache/shards/*/*.index"))
    second.write_bytes(first.read_bytes())
    reader = ShardReader(data)
    id = reader.manifest.shards[1].first_id
    assert reader.name(id) == ShardReader(data).name(id) == sorted(p.name for p in (tmp_path / "images").iterdir())[id]
    reader = ShardReader(data)
    reader.read(0)
    first.write_bytes(first.read_bytes()[:100])  # cut in place while it is in use
    with pytest.raises(DataError, match="cut"):
        reader.read(5)


def test_a_reader_holds_nothing_that_grows_with_its_images(tmp_path: Path) -> None:
    write_data(tmp_path / "data", 60_000)
    reader = ShardReader(tmp_path / "data")
    for shard in reader.manifest.shards:
        reader.label(shard.first_id)  # converted
    tracemalloc.start()
    for id in range(0, 60_000, 7):
        reader.read_many([id])
        assert reader.name(id).endswith(f"_{id % SHARD_IMAGES}.JPEG")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000  # four columns would be 1.9 MB


def test_the_benchmark_of_scale_runs(tmp_path: Path) -> None:
    (row,) = measure([5000], [5000], tmp_path)
    assert (tmp_path / "scale.json").exists()
    assert line(row).count("|") == 9
