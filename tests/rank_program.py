"""What the tests of `run_ranks` start on each rank: `python -m rank_program CASE`."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from pirl.distributed import report_outcome, start_world, stop_world
from pirl.errors import PreemptedError, TrainingError, UsageError


def main(case: str) -> int:
    rank = int(os.environ["RANK"])
    print(f"rank {rank} pid {os.getpid()}", flush=True)
    if case == "everyone is told":
        raise UsageError("nothing can be done", "do something else")
    if case == "crash" and rank == 1:
        raise ZeroDivisionError("a bug")
    if case == "kill" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
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
        if rank == 1:
            raise TrainingError("this rank cannot go on", "look at its data")
        world.sum(torch.ones(3))
    if case == "two at once":
        world = start_world(timeout_s=60)
        world.barrier()
        stop_world(world)
        raise TrainingError(f"the ranks differ, says rank {rank}")
    return 0


if __name__ == "__main__":
    sys.exit(report_outcome(lambda: main(sys.argv[1])))
