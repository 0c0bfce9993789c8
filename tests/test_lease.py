"""One training at a time writes to a run: whoever lives keeps it, whoever is dead or cut off loses it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import ranks
from conftest import TRAIN, tiny_recipe
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401

from pirl.checkpoint import Lease, lease
from pirl.errors import PirlError, TrainingError, UsageError
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World

BEAT_S = 0.2


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else str(request.getfixturevalue("bucket")) + "/run"


@pytest.fixture
def holders() -> Iterator[list[BaseProcess]]:
    started: list[BaseProcess] = []
    yield started
    for process in started:
        process.kill()
        process.join()


def elsewhere(uri: str) -> None:
    """Have the holder look like a process of another machine."""
    folder = open_storage(uri) / "lease"
    name = folder.list()[-1]
    folder.write_json(name, folder.read_json(name) | {"machine": "another"})


def hold(
    uri: str,
    told: Any,
    environment: dict[str, str],
    machine: str = "",
    job: str = "",
    clock: bool = False,
    beat_s: float = BEAT_S,
) -> None:
    """A process that claims the lease, and tells what happens."""
    os.environ |= environment
    if machine:
        lease._machine = lambda: machine
    if job:
        os.environ["TORCHELASTIC_RUN_ID"] = job
    if clock:  # every look at the wall clock finds another day
        time.time = lambda: random.uniform(0, 4e9)
    try:
        held = Lease.claim(open_storage(uri), beat_s)
        told.send("held")
        while True:
            time.sleep(0.02)
            held.check()
    except PirlError as error:
        told.send(error)


def holder(holders: list[BaseProcess], uri: str, **how: Any) -> tuple[BaseProcess, Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pirl.train", "pirl.evaluate"])
    mine, theirs = context.Pipe()
    process = context.Process(target=hold, args=(uri, theirs, dict(os.environ)), kwargs=how, daemon=True)
    process.start()
    holders.append(process)
    return process, mine


def told(pipe: Any) -> Any:
    assert pipe.poll(60), "nothing was told"
    return pipe.recv()


def claim_seconds(uri: str) -> float:
    started = time.monotonic()
    Lease.claim(open_storage(uri), BEAT_S).release()
    return time.monotonic() - started


def test_taken_given_back_and_taken_again(uri: str) -> None:
    with Lease.claim(open_storage(uri), BEAT_S) as first:
        first.confirm()
    with Lease.claim(open_storage(uri), BEAT_S) as second:
        second.confirm()
        with pytest.raises(TrainingError, match="taken over"):
            first.confirm()
    assert len((open_storage(uri) / "lease").list()) == 1


@pytest.mark.parametrize("machine", ["", "another"])
def test_a_living_holder_keeps_it(uri: str, holders: list[BaseProcess], machine: str) -> None:
    """Of this machine, where its process can be seen, and of another, where only its heart can."""
    process, pipe = holder(holders, uri, machine=machine)
    assert told(pipe) == "held"
    with pytest.raises(UsageError, match=rf"another training writes to .*run: process {process.pid} on ") as refused:
        Lease.claim(open_storage(uri), BEAT_S)
    assert "another --out" in refused.value.hint
    time.sleep(3 * BEAT_S)
    assert not pipe.poll()


def test_a_killed_holder_of_this_machine_is_followed_at_once(uri: str, holders: list[BaseProcess]) -> None:
    process, pipe = holder(holders, uri)
    assert told(pipe) == "held"
    process.kill()  # and not waited for: a zombie still has its number
    time.sleep(0.1)
    patient = Lease.claim(open_storage(uri), beat_s=1000)  # does not wait for a beat
    patient.release()


def test_a_killed_holder_of_another_machine_is_followed_after_a_while(uri: str, holders: list[BaseProcess]) -> None:
    process, pipe = holder(holders, uri, machine="another")
    assert told(pipe) == "held"
    process.kill()
    process.join()
    assert claim_seconds(uri) >= lease.STALE_BEATS * BEAT_S


def test_the_same_job_waits_less(uri: str, holders: list[BaseProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    process, pipe = holder(holders, uri, machine="another", job="job-1")
    assert told(pipe) == "held"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    with pytest.raises(UsageError, match="another training writes"):  # started twice is still found out
        Lease.claim(open_storage(uri), BEAT_S)
    process.kill()
    process.join()
    monkeypatch.setattr(lease, "STALE_BEATS", 1000)
    claim_seconds(uri)


def test_a_holder_that_was_cut_off_stops_when_it_comes_back(uri: str, holders: list[BaseProcess]) -> None:
    frozen, pipe = holder(holders, uri, machine="another")
    assert told(pipe) == "held"
    assert frozen.pid is not None
    os.kill(frozen.pid, signal.SIGSTOP)
    with Lease.claim(open_storage(uri), BEAT_S) as mine:
        os.kill(frozen.pid, signal.SIGCONT)
        error = told(pipe)
        assert isinstance(error, TrainingError)
        assert "another training has taken over" in str(error)
        mine.confirm()


def test_of_many_one_gets_it(uri: str, holders: list[BaseProcess]) -> None:
    """At once, on a run whose last holder died."""
    dead, pipe = holder(holders, uri, machine="dead")
    assert told(pipe) == "held"
    dead.kill()
    dead.join()
    pipes = [holder(holders, uri, machine=f"machine {index}")[1] for index in range(5)]
    outcomes = [told(pipe) for pipe in pipes]
    assert sum(outcome == "held" for outcome in outcomes) == 1
    assert all(outcome == "held" or isinstance(outcome, UsageError) for outcome in outcomes)


def test_a_clock_that_jumps(uri: str, holders: list[BaseProcess]) -> None:
    _, pipe = holder(holders, uri, machine="another", clock=True)
    assert told(pipe) == "held"
    other, refused = holder(holders, uri, clock=True)
    assert isinstance(told(refused), UsageError)
    assert not pipe.poll(5 * BEAT_S)
    other.join(10)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"pid": "x", "machine": 3}'])
def test_a_damaged_lease_does_not_lock_a_run_for_ever(tmp_path: Path, content: bytes) -> None:
    folder = open_storage(tmp_path / "run" / "lease")
    folder.write_bytes("00000007.json", content)
    folder.write_bytes("notes.txt", b"")
    with Lease.claim(open_storage(tmp_path / "run"), 0.05) as mine:
        assert mine.number == 8


# ---- trainings


def test_two_trainings_into_one_folder(shards: str, tiny_toml: Path, tmp_path: Path) -> None:
    """The second says who is there and changes nothing; killed, the first is followed at once."""
    out = tmp_path / "run"
    command = [*TRAIN, str(tiny_toml), "--data", shards, "--out", str(out), "--processes=2"]
    env = {name: value for name, value in os.environ.items() if name != "RANK"} | {"OMP_NUM_THREADS": "1"}
    long = [*command, "train.epochs=3000", "--checkpoint-every-s=0.5"]
    first = subprocess.Popen(long, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoints/*/COMMIT.json")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second = subprocess.run(long, env=env, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2, second.stderr
        assert second.stderr.count("error: another training writes to") == 1
        assert "Traceback" not in second.stderr
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    events = [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert events.count("start") == 1
    assert "resume" not in events
    resumed = subprocess.Popen(long, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "resume" not in (out / "events.jsonl").read_text():
            assert time.monotonic() < deadline
            assert resumed.poll() is None
            time.sleep(0.1)
    finally:
        os.killpg(resumed.pid, signal.SIGKILL)
        resumed.communicate()


def train_rank(world: World, shards: str, out: str) -> Any:
    lease.BEAT_S = BEAT_S
    Lease.claim.__func__.__defaults__ = (BEAT_S,)  # type: ignore[attr-defined]
    return train(
        tiny_recipe("train.epochs=100000"), Options(data=shards, out=out, log_every=1, checkpoint_every_s=0.2), world
    )


def test_a_training_that_was_cut_off_ends_and_spares_its_successor(shards: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = ranks.start(train_rank, 2, tmp_path / "ranks", shards, str(out))
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/*/COMMIT.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
    elsewhere(str(out))
    with Lease.claim(open_storage(out), BEAT_S) as mine:
        before = sorted(path.name for path in (out / "checkpoints").iterdir())
        for process in processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGCONT)
        codes = ranks.finish(processes)
        assert codes[0] == 1, ranks.output(tmp_path / "ranks")
        assert "another training has taken over" in ranks.output(tmp_path / "ranks")
        complete = {path.parent.name for path in out.glob("checkpoints/*/COMMIT.json")}
        assert complete <= set(before)
        mine.confirm()
