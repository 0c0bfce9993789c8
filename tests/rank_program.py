"""What the tests of `run_ranks` start on each rank: `python -m rank_program CASE`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from pirl.errors import PreemptedError, TrainingError, UsageError
from pirl.launch import exit_process
from pirl.world import start_world


def main(case: str) -> int:
    rank = int(os.environ["RANK"])
    print(f"rank {rank} pid {os.getpid()}", flush=True)
    if case == "everyone is told":
        raise UsageError("nothing can be done", "do something else")
    if case == "crash" and rank == 1:
        raise ZeroDivisionError("a bug")
    if case == "kill":
        world = start_world(timeout_s=60)
        signal.signal(signal.SIGTERM, lambda *_: None)  # as a training, which stops when all ranks agree
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.sum(torch.ones(3))
    if case == "start":
        print(f"rank {rank} ready", flush=True)
        time.sleep(300)
    if case == "wait":
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        print(f"rank {rank} ready", flush=True)
        while not stopped:
            time.sleep(0.05)
        time.sleep(1)
        print(f"rank {rank} saved", flush=True)
        raise PreemptedError("stopped by a signal", "run it again")
    if case == "one is told":
        world = start_world(timeout_s=60)
        signal.signal(signal.SIGTERM, lambda *_: None)
        if rank == 1:
            raise TrainingError("this rank cannot go on", "look at its data")
        world.sum(torch.ones(3))
    if case == "exit":
        global world_at_exit, late
        world_at_exit, late = start_world(timeout_s=60), Late()
        world_at_exit.sum(torch.ones(3))
    return 0


class Late:
    """An object whose release takes a while, so that the interpreter's finalization does."""

    def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(2)


if __name__ == "__main__":
    exit_process(lambda: main(sys.argv[1]))
