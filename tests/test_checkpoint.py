"""Checkpoints: what was saved is there, what was half saved is not, and nothing foreign is executed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import safetensors.torch
import torch
from conftest import warned
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401

from pirl.checkpoint import Checkpoints, Commit, Cursor
from pirl.checkpoint.state import DTYPES
from pirl.errors import CheckpointError, StorageError
from pirl.storage import LocalStorage, Storage, client, open_storage
from pirl.world import World


def state(value: float, size: int = 10) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((size,), value), "count": torch.tensor(3)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.full((size,), -value)}}, "groups": [{"lr": 0.1}]},
        "recipe": "name = 'x'",
    }


def save(checkpoints: Checkpoints, step: int, value: float | None = None) -> None:
    checkpoints.save(state(step if value is None else value), Cursor(1, 20, step, 3.5), "recipe", "data")
    assert checkpoints.wait() is None


def value_of(found: tuple[Commit, dict[str, Any]] | None) -> float:
    assert found is not None
    return found[1]["model"]["weight"][0].item()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(open_storage(folder), keep=3)


def test_round_trip(checkpoints: Checkpoints) -> None:
    assert checkpoints.load() is None
    assert checkpoints.newest() is None
    told = []
    saved = state(1.25)
    checkpoints.save(saved, Cursor(2, 30, 40, 5.5), "r" * 64, "d" * 64, lambda *values: told.append(values))
    assert checkpoints.wait() is None
    found = checkpoints.load()
    assert found is not None
    commit, loaded = found
    assert commit.name == "step-00000040"
    assert commit.cursor == Cursor(2, 30, 40, 5.5)
    assert (commit.recipe_digest, commit.data_digest) == ("r" * 64, "d" * 64)
    assert torch.equal(loaded["model"]["weight"], saved["model"]["weight"])
    assert loaded["optimizer"]["groups"] == [{"lr": 0.1}]
    assert loaded["recipe"] == saved["recipe"]
    assert told[0][0] == commit
    assert checkpoints.commit("step-00000040") == commit


def test_on_s3(bucket: str) -> None:  # noqa: F811
    checkpoints = Checkpoints(open_storage(f"{bucket}/run/checkpoints"), keep=2)
    assert checkpoints.load() is None
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert checkpoints.names() == ["step-00000002", "step-00000003"]
    assert value_of(checkpoints.load()) == 3


def test_the_newest_is_found_without_listing(bucket: str) -> None:  # noqa: F811
    """By two requests, and read by two for each part and one for its commit object, however many there are."""
    storage = open_storage(f"{bucket}/run/checkpoints")
    writer = Checkpoints(storage, keep=100)
    for step in range(12):
        save(writer, step)
    asked: list[str] = []
    events = client.s3_client().meta.events
    events.register("before-call.s3", lambda model, **_: asked.append(model.name), unique_id="asked")
    try:
        assert Checkpoints(storage).newest() == "step-00000011"
        assert asked == ["GetObject", "HeadObject"]
        assert value_of(Checkpoints(storage).load()) == 11
    finally:
        events.unregister("before-call.s3", unique_id="asked")
    assert asked[2:] == ["GetObject", "HeadObject", "GetObject", "HeadObject", "GetObject"]


def test_saving_does_not_see_what_training_changes_meanwhile(folder: Path) -> None:
    """The copy is taken before `save` returns; the rest is held up until the tensors have changed."""
    gate = threading.Event()

    class Slow(LocalStorage):
        def write_bytes(self, name: str, data: bytes | memoryview) -> None:
            assert gate.wait(20)
            super().write_bytes(name, data)

        def __truediv__(self, part: str) -> Slow:
            return Slow(self.path / part)

    checkpoints = Checkpoints(Slow(folder))
    live = state(1.0)
    before = time.monotonic()
    checkpoints.save(live, Cursor(step=1), "r", "d")
    assert time.monotonic() - before < 10  # did not wait for the storage
    live["model"]["weight"].fill_(99)
    live["optimizer"]["state"][0]["momentum_buffer"].fill_(99)
    live["optimizer"]["groups"][0]["lr"] = 99
    gate.set()
    assert checkpoints.wait() is None
    found = checkpoints.load()
    assert value_of(found) == 1.0
    assert found is not None
    assert found[1]["optimizer"]["state"][0]["momentum_buffer"][0] == -1
    assert found[1]["optimizer"]["groups"] == [{"lr": 0.1}]


def test_retention(folder: Path) -> None:
    checkpoints = Checkpoints(open_storage(folder), keep=2)
    for step in (5, 10, 100, 10_000_000):
        save(checkpoints, step)
    assert checkpoints.names() == ["step-00000100", "step-10000000"]
    assert checkpoints.newest() == "step-10000000"
    assert {path.name for path in folder.iterdir()} == {*checkpoints.names(), "LATEST.json"}
    assert value_of(checkpoints.load("step-00000100")) == 100


def test_what_was_half_written_is_ignored_and_cleared_away(folder: Path) -> None:
    checkpoints = Checkpoints(open_storage(folder), keep=2)
    save(checkpoints, 1)
    for step in (2, 9):
        half = folder / f"step-{step:08d}"
        half.mkdir()
        (half / "part-00000-of-00001-0badf00d.safetensors").write_bytes(b"half")
    checkpoints = Checkpoints(open_storage(folder), keep=2)  # the next process
    assert checkpoints.newest() == "step-00000001"
    assert value_of(checkpoints.load()) == 1
    for step in (3, 4, 5):
        save(checkpoints, step)
    # a killed save leaves as much as a whole checkpoint holds: it must not pile up
    assert {path.parent.name for path in folder.rglob("*.safetensors")} == set(checkpoints.names())


def test_only_a_half_written_one_is_a_fresh_start(folder: Path) -> None:
    (folder / "step-00000000").mkdir(parents=True)
    (folder / "step-00000000" / "part-00000-of-00001-0badf00d.safetensors").write_bytes(b"half")
    assert Checkpoints(open_storage(folder)).load() is None


@pytest.mark.parametrize(
    "latest", [None, b"", b"{", b"[]", b'{"name": 3}', b'{"name": "step-00000099"}', b'{"other": 1}']
)
def test_the_newest_is_found_without_its_pointer(folder: Path, checkpoints: Checkpoints, latest: bytes | None) -> None:
    save(checkpoints, 1)
    save(checkpoints, 2)
    (folder / "LATEST.json").unlink()
    if latest is not None:
        (folder / "LATEST.json").write_bytes(latest)
    assert checkpoints.newest() == "step-00000002"
    assert value_of(checkpoints.load()) == 2


def part_of(path: Path) -> Path:
    (part,) = path.glob("*.safetensors")
    return part


DAMAGES = {
    "cut": lambda path: part_of(path).write_bytes(part_of(path).read_bytes()[:-100]),
    "longer": lambda path: part_of(path).write_bytes(part_of(path).read_bytes() + b"more"),
    "bit": lambda path: part_of(path).write_bytes(flipped(part_of(path).read_bytes())),
    "gone": lambda path: part_of(path).unlink(),
    "commit": lambda path: (path / "COMMIT.json").write_text("{}"),
    "not json": lambda path: (path / "COMMIT.json").write_text("{"),
    "list": lambda path: (path / "COMMIT.json").write_text("[]"),
    "elsewhere": lambda path: (path / "COMMIT.json").write_text(
        (path / "COMMIT.json").read_text().replace("part-", "../part-")
    ),
    "format": lambda path: (path / "COMMIT.json").write_text(
        (path / "COMMIT.json").read_text().replace('"format": 2', '"format": 7')
    ),
}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_newest_gives_way_to_an_older_one_and_says_so(
    folder: Path, checkpoints: Checkpoints, damage: str
) -> None:
    save(checkpoints, 1)
    save(checkpoints, 2)
    DAMAGES[damage](folder / "step-00000002")
    with warned(r"step-00000002.* resuming from the older step-00000001"):
        found = checkpoints.load()
    assert value_of(found) == 1
    with pytest.raises(CheckpointError, match="step-00000002"):
        checkpoints.load("step-00000002")  # asked for by name: never another one
    DAMAGES[damage](folder / "step-00000001")
    with pytest.raises(CheckpointError, match="step-00000002") as caught:
        checkpoints.load()  # never a fresh start
    assert caught.value.hint


def test_a_missing_one_that_was_asked_for_lists_the_complete_ones(checkpoints: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="none"):
        checkpoints.load("step-00000007")
    save(checkpoints, 1)
    save(checkpoints, 2)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load("step-00000007")
    assert "step-00000001, step-00000002" in caught.value.hint


class Marker:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def replaced(folder: Path, data: bytes) -> None:
    """Put other data into a checkpoint of one part, and commit to it."""
    part_of(folder).write_bytes(data)
    storage = open_storage(folder)
    commit = storage.read_json("COMMIT.json")
    commit["parts"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    storage.write_json("COMMIT.json", commit)


def test_a_hostile_pickle_is_refused_and_not_executed(folder: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    save(checkpoints, 1)
    torch.save({"format": 2, "model": Marker(tmp_path / "executed")}, tmp_path / "trap")
    replaced(folder / "step-00000001", (tmp_path / "trap").read_bytes())
    with pytest.raises(CheckpointError, match="step-00000001 is as it was committed"):
        checkpoints.load()
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "trap", weights_only=False)  # the trap works
    assert (tmp_path / "executed").exists()


def test_foreign_files_are_refused(folder: Path, checkpoints: Checkpoints) -> None:
    """Whatever a header says, with the right hash: no crash, no memory beyond the file, one clear error."""
    save(checkpoints, 1)
    path = folder / "step-00000001"
    good = part_of(path).read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    tensor = {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}
    state_without = {**header, "__metadata__": {"state": '{"$tensor": "absent", "dtype": "F32", "shape": [1]}'}}
    heads: list[Any] = [
        *([], "text", {}, {"a": 1}, {"a": {}}, {"__metadata__": {}}, state_without),
        {**header, "__metadata__": {"state": "not json"}},
        {**header, "model/weight": {**tensor, "data_offsets": [0, 10**12]}},
        {**header, "model/weight": {**tensor, "data_offsets": [-8, 32]}},
        {**header, "model/weight": {**tensor, "data_offsets": [40, 0]}},
        {**header, "model/weight": {**tensor, "shape": [10**15]}},
        {**header, "model/weight": {**tensor, "shape": [5]}},
        {**header, "model/weight": {**tensor, "dtype": "I32"}},
        {**header, "model/weight": {**tensor, "dtype": "NEW"}},
    ]
    files = [json.dumps(head).encode() for head in heads]
    files = [len(text).to_bytes(8, "little") + text + good[8 + length :] for text in files]
    for data in [*files, b"", b"abc", (10**18).to_bytes(8, "little"), good[:8] + b"\xff" * length]:
        replaced(path, data)
        with pytest.raises(CheckpointError, match="no state"):
            checkpoints.load()
    replaced(path, good)
    assert value_of(checkpoints.load()) == 1


def test_a_part_is_a_usual_safetensors_file(folder: Path, checkpoints: Checkpoints) -> None:
    save(checkpoints, 7)
    tensors = safetensors.torch.load_file(part_of(folder / "step-00000007"))
    assert tensors["model/weight"].tolist() == [7.0] * 10
    assert tensors["optimizer/state/0/momentum_buffer"].tolist() == [-7.0] * 10


def test_an_older_format_is_told(folder: Path, checkpoints: Checkpoints) -> None:
    (folder / "step-00000001").mkdir(parents=True)
    (folder / "step-00000001" / "COMMIT.json").write_text('{"format": 1, "name": "step-00000001", "bytes": 3}')
    with pytest.raises(CheckpointError, match="has format 1, this version reads 2"):
        checkpoints.load()


@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
def test_a_state_with_a_number_that_is_none_is_not_published(checkpoints: Checkpoints, broken: float) -> None:
    save(checkpoints, 1)
    spoilt = state(2.0)
    spoilt["model"]["weight"][3] = broken
    checkpoints.save(spoilt, Cursor(step=2), "r", "d")
    assert "model/weight is not finite" in str(checkpoints.wait())
    assert checkpoints.broken == "model/weight"
    assert checkpoints.names() == ["step-00000001"]
    assert not list(checkpoints.storage.list("step-00000002"))


def test_every_kind_of_value_comes_back(checkpoints: Checkpoints) -> None:
    numbers = {name: torch.arange(-3, 4).to(dtype) for name, dtype in DTYPES.items()}
    more = {
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "large": torch.full((100,), 60000.0, dtype=torch.float16),
        "by number": {3: torch.ones(1), 1: "one"},
        "plain": [None, True, 1, 0.1, 1e-300, float("inf"), "text", (1, [2.5, ("a",)]), {"$odd": 1}, {}, []],
    }
    checkpoints.save({"numbers": numbers, "more": more}, Cursor(), "r", "d")
    assert checkpoints.wait() is None
    found = checkpoints.load()
    assert found is not None
    for name, tensor in numbers.items():
        loaded = found[1]["numbers"][name]
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)
    for name in ("channels last", "transposed", "scalar", "empty", "large"):
        assert torch.equal(found[1]["more"][name], more[name])
    assert found[1]["more"]["by number"] == more["by number"]
    assert found[1]["more"]["plain"] == more["plain"]
    assert list(found[1]["more"]) == list(more)


class Failing(LocalStorage):
    """Refuses as many writes of a state as `failures` has entries, or writes half and reports a full disk."""

    failures: list[str]

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        if name.startswith("part-") and self.failures:
            raise StorageError(self.failures.pop(), "free some space")
        super().write_bytes(name, data)

    def __truediv__(self, part: str) -> Storage:
        child = Failing(self.path / part)
        child.failures = self.failures
        return child


def test_a_failing_storage_is_told_and_the_next_save_works(folder: Path) -> None:
    storage = Failing(folder)
    storage.failures = ["no space left"]
    checkpoints = Checkpoints(storage)
    checkpoints.save(state(1), Cursor(step=1), "r", "d")
    error = checkpoints.wait()
    assert error is not None
    assert "no space left" in str(error)
    assert checkpoints.failures == 1
    assert checkpoints.wait() is None  # told once
    assert checkpoints.load() is None
    save(checkpoints, 2)
    assert value_of(checkpoints.load()) == 2
    assert checkpoints.failures == 1


def test_a_failed_save_takes_nothing_away(folder: Path) -> None:
    storage = Failing(folder)
    storage.failures = []
    checkpoints = Checkpoints(storage, keep=1)
    save(checkpoints, 1)
    for step in (2, 3):
        storage.failures.append("no space left")
        checkpoints.save(state(step), Cursor(step=step), "r", "d")
        assert checkpoints.wait() is not None
        assert value_of(checkpoints.load()) == 1


def test_a_bug_while_saving_is_raised(checkpoints: Checkpoints) -> None:
    with pytest.raises(TypeError, match="model: a function cannot be saved"):
        checkpoints.save({"model": lambda: None}, Cursor(), "r", "d")


def test_an_unfinished_publication_is_found_out(folder: Path, checkpoints: Checkpoints) -> None:
    """The pointer goes ahead of the commit object: until that is there, the one before is the newest."""
    save(checkpoints, 1)
    save(checkpoints, 2)
    (folder / "step-00000002" / "COMMIT.json").rename(folder / "aside")
    assert checkpoints.newest() == "step-00000001"
    (folder / "aside").rename(folder / "step-00000002" / "COMMIT.json")
    assert checkpoints.newest() == "step-00000002"


def test_a_lost_answer_to_the_commit_leaves_it_whole(folder: Path) -> None:
    """The storage says that the commit object was not written, and it is there all the same."""

    class Lying(LocalStorage):
        lies = 1

        def write_bytes(self, name: str, data: bytes | memoryview) -> None:
            super().write_bytes(name, data)
            if name == "COMMIT.json" and Lying.lies:
                Lying.lies -= 1
                raise StorageError("connection lost", "")

        def __truediv__(self, part: str) -> Lying:
            return Lying(self.path / part)

    checkpoints = Checkpoints(Lying(folder), keep=2)
    checkpoints.save(state(1), Cursor(step=1), "r", "d")
    assert checkpoints.wait() is not None
    assert value_of(checkpoints.load()) == 1
    save(checkpoints, 2)
    assert value_of(checkpoints.load("step-00000001")) == 1
    save(checkpoints, 3)
    assert checkpoints.names() == ["step-00000002", "step-00000003"]


def test_the_best_and_the_milestones_stay(folder: Path) -> None:
    checkpoints = Checkpoints(open_storage(folder), keep=1, keep_best=True)
    for step, loss in enumerate((None, 3.0, 1.0, 2.0, 4.0, 3.0)):
        checkpoints.save(state(step), Cursor(step=step), "r", "d", loss=loss, milestone=step == 3)
        assert checkpoints.wait() is None
        if step == 3:
            checkpoints = Checkpoints(open_storage(folder), keep=1, keep_best=True)  # a restart knows them too
    assert checkpoints.names() == [f"step-0000000{step}" for step in (2, 3, 5)]
    assert value_of(checkpoints.load("step-00000002")) == 2


def test_going_on_from_an_older_one(folder: Path) -> None:
    """What is newer, and was given up, is neither taken for the newest nor does it push others out."""
    save(Checkpoints(open_storage(folder), keep=2), 3)
    save(Checkpoints(open_storage(folder), keep=2), 9)
    DAMAGES["bit"](folder / "step-00000009")
    checkpoints = Checkpoints(open_storage(folder), keep=2)
    with warned("resuming from the older step-00000003"):
        assert value_of(checkpoints.load()) == 3
    assert checkpoints.skipped == ["step-00000009"]
    for step in (4, 5, 6):
        save(checkpoints, step)
        assert value_of(Checkpoints(open_storage(folder)).load()) == step
    assert checkpoints.names() == ["step-00000005", "step-00000006", "step-00000009"]
    save(checkpoints, 9)
    assert value_of(Checkpoints(open_storage(folder)).load()) == 9
    assert len(list((folder / "step-00000009").iterdir())) == 2


# ---- several ranks


def large(value: float) -> dict[str, Any]:
    """1.2 MiB in a tensor that is cut, others that are not, and statistics that only rank 0's count of."""
    return {
        "model": {"weight": torch.full((1000,), value), "bank": torch.arange(301_001.0).view(-1, 1) + value},
        "own": {"mean": torch.full((5,), value)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.full((70, 70), -value)}}, "lr": value},
    }


def save_on_rank(world: World, folder: Path, steps: range, keep: int = 2) -> list[str]:
    checkpoints = Checkpoints(open_storage(folder), keep, world)
    for step in steps:
        content = large(step)
        content["own"]["mean"] += world.rank
        checkpoints.save(content, Cursor(step=step), "r", "d", of_main={"own/mean"})
    error = checkpoints.wait()
    assert error is None, error
    world.barrier()
    return checkpoints.names()


def assert_whole(found: tuple[Commit, dict[str, Any]] | None) -> int:
    """All of a `large` state is there, and of one step. Returns the step."""
    assert found is not None
    commit, content = found
    step = commit.cursor.step
    wanted = large(step)
    assert torch.equal(content["model"]["bank"], wanted["model"]["bank"])
    assert torch.equal(content["model"]["weight"], wanted["model"]["weight"])
    assert torch.equal(content["own"]["mean"], wanted["own"]["mean"])
    assert torch.equal(
        content["optimizer"]["state"][0]["momentum_buffer"], wanted["optimizer"]["state"][0]["momentum_buffer"]
    )
    assert content["optimizer"]["lr"] == step
    return step


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_writing_and_any_number_may_read(folder: Path, tmp_path: Path, size: int) -> None:
    (names, *_) = ranks.run(save_on_rank, size, tmp_path / "ranks", folder, range(1, 4))
    assert names == ["step-00000002", "step-00000003"]
    checkpoints = Checkpoints(open_storage(folder))
    assert assert_whole(checkpoints.load()) == 3
    assert assert_whole(checkpoints.load("step-00000002")) == 2
    sizes = [part.bytes for part in checkpoints.commit("step-00000003").parts]
    assert len(sizes) == size
    assert max(sizes) < 1.2 * min(sizes)


def unpublished(world: World, folder: Path, step: int) -> None:
    """All parts are written, and rank 0 dies before the commit object is."""
    checkpoints = Checkpoints(open_storage(folder), 2, world, guard=lambda: os.kill(os.getpid(), signal.SIGKILL))
    checkpoints.save(large(-1), Cursor(step=step), "r", "d")
    checkpoints.wait()


def test_parts_of_two_attempts_at_one_step_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    """Three ranks are killed before they publish; two ranks, then three, make the same step anew."""
    processes = ranks.start(unpublished, 3, tmp_path / "ranks", folder, 5)
    assert ranks.finish(processes)[0] == -signal.SIGKILL
    assert len(list((folder / "step-00000005").iterdir())) == 3
    assert Checkpoints(open_storage(folder)).load() is None
    for size in (2, 3):
        ranks.run(save_on_rank, size, tmp_path / "ranks", folder, range(5, 6))
        assert assert_whole(Checkpoints(open_storage(folder)).load()) == 5
        assert len(list((folder / "step-00000005").iterdir())) == size + 1


def save_forever_on_rank(world: World, folder: Path) -> None:
    checkpoints = Checkpoints(open_storage(folder), 2, world)
    newest = world.broadcast_object(checkpoints.newest())
    for step in range(int(newest.removeprefix("step-")) + 1 if newest else 0, 10**8):
        content = large(step)
        content["own"]["mean"] += world.rank
        checkpoints.save(content, Cursor(step=step), "r", "d", of_main={"own/mean"})


def test_any_rank_killed_while_saving_in_a_loop(folder: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    reader = Checkpoints(open_storage(folder))
    before = -1
    for attempt in range(6):
        size = rng.choice((2, 3))
        processes = ranks.start(save_forever_on_rank, size, tmp_path / "ranks", folder)
        known, deadline = reader.newest(), time.monotonic() + 60
        while reader.newest() == known and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        first = processes[attempt % size]
        first.kill()
        time.sleep(rng.random() * 0.1)  # the others go on for a moment
        for process in processes:
            process.kill()
            process.join()
        step = assert_whole(reader.load())
        assert step > before
        before = step
    ranks.run(save_on_rank, 2, tmp_path / "ranks", folder, range(before + 1, before + 3))
    assert {path.parent.name for path in folder.rglob("*.safetensors")} == set(reader.names())  # nothing is left over


class FullForRank(LocalStorage):
    """Reports a full disk to one rank's part."""

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        if name.startswith("part-00001") and "step-00000002" in str(self.path):
            raise StorageError("the disk is full", "free some space")
        super().write_bytes(name, data)

    def __truediv__(self, part: str) -> FullForRank:
        return FullForRank(self.path / part)


def save_on_a_full_disk(world: World, folder: Path) -> list[str]:
    checkpoints = Checkpoints(FullForRank(folder), 2, world)
    told = []
    for step in (1, 2, 3):
        checkpoints.save(large(step), Cursor(step=step), "r", "d")
        told.append(str(checkpoints.wait()))
        world.barrier()
        if step == 2 and world.is_main:
            told.append(str(sorted(path.name for path in folder.iterdir() if any(path.glob("*")) or path.is_file())))
    return told


def test_one_rank_that_cannot_write_fails_the_save_of_all_at_once(folder: Path, tmp_path: Path) -> None:
    told, others = ranks.run(save_on_a_full_disk, 2, tmp_path / "ranks", folder)
    assert "the disk is full" in told[1]
    assert told[2] == "['LATEST.json', 'step-00000001']"  # rank 0's part has gone again
    assert (told[0], told[3]) == ("None", "None")
    assert others == ["None"] * 3
    checkpoints = Checkpoints(open_storage(folder))
    assert checkpoints.names() == ["step-00000001", "step-00000003"]
    assert assert_whole(checkpoints.load()) == 3


# ---- one process, killed


def save_forever(folder: Path) -> None:
    torch.set_num_threads(1)
    checkpoints = Checkpoints(open_storage(folder), keep=2)
    newest = checkpoints.newest()
    step = int(newest.removeprefix("step-")) if newest else 0
    while True:
        step += 1
        checkpoints.save(state(step, 30_000), Cursor(step=step), "r", "d")


def test_killed_while_saving_in_a_loop(folder: Path) -> None:
    """Wherever a kill -9 lands, the newest is whole, loads without a warning, and never goes back."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pirl.train", "pirl.evaluate"])
    rng = random.Random(0)
    reader = Checkpoints(open_storage(folder))
    before = -1.0
    for _ in range(8):
        process = context.Process(target=save_forever, args=(folder,))
        process.start()
        known = reader.newest()
        deadline = time.monotonic() + 60
        while reader.newest() == known and time.monotonic() < deadline:  # it is saving
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = reader.load()
        value = value_of(found)
        assert found is not None
        assert found[0].cursor.step == value > before
        before = value
    states = list(folder.rglob("*.safetensors"))
    assert len(states) <= 2 + 2  # two kept, one being written, one being retired: no heap of leftovers
