"""Checkpoints: what was saved is there, what was half saved is not, and nothing foreign is executed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401

from pirl.checkpoint import Checkpoints, Commit, Cursor
from pirl.errors import CheckpointError, StorageError
from pirl.storage import LocalStorage, Storage, open_storage


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


def test_saving_does_not_see_what_training_changes_meanwhile(folder: Path) -> None:
    """The copy is taken before `save` returns; the rest is held up until the tensors have changed."""
    gate = threading.Event()

    class Slow(LocalStorage):
        def write_bytes(self, name: str, data: bytes) -> None:
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
    assert {path.parent.name for path in folder.rglob("state.pt")} == set(checkpoints.names())
    assert value_of(checkpoints.load("step-00000100")) == 100


def test_what_was_half_written_is_ignored_and_cleared_away(folder: Path) -> None:
    checkpoints = Checkpoints(open_storage(folder), keep=2)
    save(checkpoints, 1)
    for step in (2, 9):
        half = folder / f"step-{step:08d}"
        half.mkdir()
        (half / "state.pt").write_bytes(b"half")
    assert checkpoints.newest() == "step-00000001"
    assert value_of(checkpoints.load()) == 1
    for step in (3, 4, 5):
        save(checkpoints, step)
    # a killed save leaves as much as a whole checkpoint holds: it must not pile up
    assert {path.parent.name for path in folder.rglob("state.pt")} - {"step-00000009"} == set(checkpoints.names())


def test_only_a_half_written_one_is_a_fresh_start(folder: Path) -> None:
    (folder / "step-00000000").mkdir(parents=True)
    (folder / "step-00000000" / "state.pt").write_bytes(b"half")
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


DAMAGES = {
    "cut": lambda path: (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:-100]),
    "bit": lambda path: (path / "state.pt").write_bytes(flipped((path / "state.pt").read_bytes())),
    "gone": lambda path: (path / "state.pt").unlink(),
    "commit": lambda path: (path / "COMMIT.json").write_text("{}"),
    "not json": lambda path: (path / "COMMIT.json").write_text("{"),
    "list": lambda path: (path / "COMMIT.json").write_text("[]"),
    "format": lambda path: (path / "COMMIT.json").write_text(
        (path / "COMMIT.json").read_text().replace('"format": 1', '"format": 7')
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
    with pytest.warns(UserWarning, match=r"step-00000002.* going on from the older step-00000001"):
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


def test_a_hostile_pickle_is_refused_and_not_executed(folder: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    save(checkpoints, 1)
    path = folder / "step-00000001"
    torch.save({"format": 1, "model": Marker(tmp_path / "executed")}, path / "state.pt")
    data = (path / "state.pt").read_bytes()
    commit = open_storage(path).read_json("COMMIT.json")
    commit |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    open_storage(path).write_json("COMMIT.json", commit)
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        checkpoints.load()
    assert not (tmp_path / "executed").exists()
    torch.load(path / "state.pt", weights_only=False)  # the trap works
    assert (tmp_path / "executed").exists()


class Failing(LocalStorage):
    """Refuses as many writes of a state as `failures` has entries, or writes half and reports a full disk."""

    failures: list[str]

    def write_bytes(self, name: str, data: bytes) -> None:
        if name == "state.pt" and self.failures:
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


def test_a_bug_while_saving_is_raised(folder: Path) -> None:
    checkpoints = Checkpoints(open_storage(folder))
    checkpoints.save({"model": lambda: None}, Cursor(), "r", "d")
    with pytest.raises(Exception, match="pickle"):
        checkpoints.wait()


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
    states = list(folder.rglob("state.pt"))
    assert len(states) <= 2 + 2  # two kept, one being written, one being retired: no heap of leftovers
