"""Collectives between real ranks, and how a launch ends: one message, the right exit code, nobody left behind."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from pirl.errors import UsageError
from pirl.launch import STOP_SIGNALS, check_environment, run_ranks
from pirl.world import World, start_world


def collectives(world: World) -> dict[str, Any]:
    rank = world.rank
    counts = [[3, 1, 0], [2, 2, 2], [0, 0, 4]]
    return {
        "uneven": [
            world.all_gather(torch.arange(each[rank] * 2).view(-1, 2) + 100 * rank, each).tolist() for each in counts
        ],
        "ids": world.all_gather(torch.arange(rank + 1) + 10 * rank, [1, 2, 3]).tolist(),
        "scattered": world.sum_scatter(torch.arange(6.0) + 10 * rank, [1, 3, 2]).tolist(),
        "sum": world.sum(torch.tensor([1.0, rank])).tolist(),
        "broadcast": world.broadcast(torch.tensor([rank + 7])).item(),
        "object": world.broadcast_object({"rank": rank}),
        "objects": world.gather_objects(str(rank)),
    }


def test_collectives(tmp_path: Path) -> None:
    results = ranks.run(collectives, 3, tmp_path)
    assert [result.pop("scattered") for result in results] == [[30], [33, 36, 39], [42, 45]]
    assert results[0] == results[1] == results[2]
    expected = results[0]
    assert expected["uneven"] == [
        [[0, 1], [2, 3], [4, 5], [100, 101]],
        [[0, 1], [2, 3], [100, 101], [102, 103], [200, 201], [202, 203]],
        [[200, 201], [202, 203], [204, 205], [206, 207]],
    ]
    assert expected["ids"] == [0, 10, 11, 20, 21, 22]
    assert expected["sum"] == [3, 3]
    assert expected["broadcast"] == 7
    assert expected["object"] == {"rank": 0}
    assert expected["objects"] == ["0", "1", "2"]


def test_a_world_of_one_needs_no_process_group() -> None:
    world = World()
    x = torch.arange(3)
    assert world.all_gather(x, [3]).tolist() == [0, 1, 2]
    assert world.sum(x).tolist() == [0, 1, 2]
    assert world.broadcast_object("x") == "x"
    assert world.gather_objects("x") == ["x"]
    world.barrier()
    assert not torch.distributed.is_initialized()


PLACES = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": "²"}, "RANK is '²'"),
        ({"RANK": "2"}, "RANK is 2, expected less than WORLD_SIZE=2"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1, expected at most RANK=0"),
        ({"WORLD_SIZE": "0"}, "RANK is 0, expected less than WORLD_SIZE=0"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_the_environment_of_a_rank_is_checked(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in (PLACES | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=rf"{re.escape(message)}.*\n.*pirl train"):
        start_world()


@pytest.mark.parametrize(
    ("environment", "messages"),
    [
        ({"PET_NNODES": "2"}, ["PET_NNODES is 2 without an address"]),
        ({"PET_NNODES": "1:2", "PET_RDZV_BACKEND": "c10d"}, ["PET_NNODES is 2 without an address"]),
        ({"PET_NNODES": "two"}, ["PET_NNODES is 'two'"]),
        ({"PET_NNODES": "3:2"}, ["PET_NNODES is '3:2'"]),
        ({"PET_NNODES": "0"}, ["PET_NNODES is '0'"]),
        (
            {"PET_MASTER_PORT": "123456", "PET_NPROC_PER_NODE": "-1"},
            ["PET_MASTER_PORT is '123456', expected a number from 1 to 65535", "PET_NPROC_PER_NODE is '-1'"],
        ),
        ({"PET_NNODES": "2", "PET_MASTER_ADDR": "a", "PET_NODE_RANK": "2"}, ["PET_NODE_RANK is 2"]),
        ({"PET_RDZV_ENDPOINT": "a:http"}, ["PET_RDZV_ENDPOINT has the port 'http'"]),
        ({"PET_RDZV_ENDPOINT": "a:99999"}, ["PET_RDZV_ENDPOINT has the port '99999'"]),
        ({"PET_MAX_RESTARTS": "1.5"}, ["PET_MAX_RESTARTS is '1.5'"]),
    ],
)
def test_the_environment_of_a_launcher_is_checked(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], messages: list[str]
) -> None:
    """Before a process starts: torchrun would wait in silence for ten minutes, or end in a traceback."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as refused:
        run_ranks("rank_program", ["none"], 1)
    assert all(message in str(refused.value) for message in messages)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "host:29400"},
        {"PET_NNODES": "1:4", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "host"},
        {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "[::1]:0"},
        {"PET_NNODES": "2", "PET_MASTER_ADDR": "host", "PET_MASTER_PORT": "23456", "PET_NODE_RANK": "1"},
        {"PET_NPROC_PER_NODE": "auto"},
    ],
)
def test_the_environment_of_operators_is_taken(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_environment()


def launched(world: World, case: str) -> int:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    before = dict(os.environ), [signal.getsignal(number) for number in STOP_SIGNALS]
    try:
        return run_ranks("rank_program", [case], 2)
    finally:
        assert (dict(os.environ), [signal.getsignal(number) for number in STOP_SIGNALS]) == before


def outcome(case: str, folder: Path) -> tuple[int, str]:
    """Exit code that `run_ranks` returns, and all that was printed by launcher and ranks."""
    (code,) = ranks.run(launched, 1, folder, case)
    text = ranks.output(folder)
    return code, "\n".join(line for line in text.splitlines() if not re.match(r"rank \d pid", line))


def test_what_every_rank_tells_is_shown_once(tmp_path: Path) -> None:
    code, text = outcome("everyone is told", tmp_path)
    assert code == 2
    assert text == "error: nothing can be done\n  -> do something else"


def test_what_one_rank_tells_is_all_that_is_shown(tmp_path: Path) -> None:
    """The other rank, whose collective breaks, is a consequence and no second error."""
    code, text = outcome("one is told", tmp_path)
    assert code == 1
    assert "error: this rank cannot go on\n  -> look at its data" in text
    assert "Traceback" not in text


def test_a_bug_shows_its_traceback(tmp_path: Path) -> None:
    code, text = outcome("crash", tmp_path)
    assert code == 1
    assert text.count("ZeroDivisionError: a bug") == 1
    assert "error: rank 1 ended with exit code 1" in text


def test_ranks_end_well_while_a_collective_is_being_released(tmp_path: Path) -> None:
    """A thread that waits for the GIL of an interpreter under finalization would abort the rank."""
    assert outcome("exit", tmp_path)[0] == 0


def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path) -> None:
    code, text = outcome("kill", tmp_path)
    assert code == 1
    assert "error: rank 1 ended with signal 9" in text
    assert "Traceback" not in text


def waiting(folder: Path, case: str = "wait") -> tuple[Any, list[int]]:
    """A launcher, and the pids of its ranks, which wait for a signal."""
    (launcher,) = ranks.start(launched, 1, folder, case)
    deadline = time.monotonic() + 120
    while ranks.output(folder).count("ready") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(pid) for pid in re.findall(r"rank \d pid (\d+)", ranks.output(folder))]
    assert len(pids) == 2
    return launcher, pids


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_signal_is_passed_on_and_the_ranks_may_save(tmp_path: Path) -> None:
    launcher, pids = waiting(tmp_path)
    os.kill(launcher.pid, signal.SIGTERM)
    assert ranks.finish([launcher]) == [0]
    assert torch.load(tmp_path / "result-0.pt") == 75
    text = ranks.output(tmp_path)
    assert text.count("saved") == 2
    assert text.count("error: stopped by a signal") == 1
    assert "Traceback" not in text
    assert not any(alive(pid) for pid in pids)


def test_a_signal_before_the_ranks_can_save_is_a_preemption_too(tmp_path: Path) -> None:
    launcher, _ = waiting(tmp_path, "start")
    os.kill(launcher.pid, signal.SIGTERM)
    assert ranks.finish([launcher]) == [0]
    assert torch.load(tmp_path / "result-0.pt") == 75
    assert "error: stopped by SIGTERM before there was anything new to save\n  -> run" in ranks.output(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the kernel's help is Linux's")
def test_nobody_is_left_when_the_launcher_is_killed(tmp_path: Path) -> None:
    launcher, pids = waiting(tmp_path)
    os.kill(launcher.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
    assert ranks.output(tmp_path).count("saved") == 2  # they ended by themselves, after saving
    ranks.finish([launcher])
