"""Real ranks for tests, joined by gloo: processes forked from a clean server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from pirl.errors import PirlError
from pirl.world import World, start_world, stop_world

CRASHED = 99


def start(target: Callable[..., Any], size: int, folder: Path, *arguments: Any, **env: str) -> list[BaseProcess]:
    """Start `target(world, *arguments)` on `size` ranks. Rank r leaves what it returns in `folder`/result-r.pt, and
    what it prints in `folder`/output-r.txt; its exit code is a `PirlError`'s own, or 99 for any other exception.

    `TIMEOUT_S` is the longest that a rank waits for another one."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(size):
        (folder / f"result-{rank}.pt").unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pirl.train", "pirl.evaluate"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(target, rank, size, port, folder, arguments, env), daemon=False)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], timeout_s: float = 120) -> list[int | None]:
    """Exit codes of the ranks, negative for signals; a rank that hangs is killed and has None."""
    codes: list[int | None] = []
    for process in processes:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
            codes.append(None)
        else:
            codes.append(process.exitcode)
    return codes


def run(target: Callable[..., Any], size: int, folder: Path, *arguments: Any, **env: str) -> list[Any]:
    """What `target(world, *arguments)` returned on each of `size` ranks; all of them must have ended well."""
    codes = finish(start(target, size, folder, *arguments, **env))
    assert codes == [0] * size, (codes, [output(folder, rank) for rank in range(size)])
    return [result(folder, rank) for rank in range(size)]


def result(folder: Path, rank: int = 0) -> Any:
    """What a rank has returned."""
    return torch.load(folder / f"result-{rank}.pt", weights_only=False)


def output(folder: Path, rank: int = 0) -> str:
    """What a rank has printed so far."""
    path = folder / f"output-{rank}.txt"
    return path.read_text() if path.exists() else ""


def _rank(
    target: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    folder: Path,
    arguments: tuple[Any, ...],
    env: dict[str, str],
) -> None:
    descriptor = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **env,
    }
    torch.set_num_threads(1)
    for number in (signal.SIGHUP, signal.SIGQUIT):  # ignored where the tests run in the background of a shell
        signal.signal(number, signal.SIG_DFL)
    code = 0
    try:
        world: World = start_world(timeout_s=float(env.get("TIMEOUT_S", 60)))
        result = target(world, *arguments)
        torch.save(result, folder / f"result-{rank}.pt")
        stop_world(world)
    except PirlError as error:
        print(f"error: {error}", flush=True)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = CRASHED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
