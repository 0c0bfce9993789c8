"""Starting the ranks of one machine, and how they end."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from . import logs
from .errors import EXIT_DONE, EXIT_FAILURE, EXIT_PREEMPTED, PirlError
from .logs import complain
from .world import lost_peer

OUTCOME = "PIRL_OUTCOME"  # folder in which each rank of this machine leaves how it ended
CONSOLE_WAIT_S = 10.0  # that a rank waits for a reader of its output that has paused: the other ranks wait for it


def die_with_parent() -> None:
    """Have the kernel send this process a SIGTERM when its parent ends, however that ends. Linux only, else nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def report_outcome(work: Callable[[], int]) -> int:
    """Run `work`; a `PirlError` becomes a message and an exit code, on a rank left for the launcher to tell once.

    So does a collective that broke because another rank has ended: that is the other's story.
    """
    folder = os.environ.get(OUTCOME)
    if folder:
        die_with_parent()

    def tell(message: str, exit_code: int, follows: bool = False) -> int:
        if folder:
            path = Path(folder) / f"{os.environ['RANK']}.json"
            path.write_text(json.dumps({"exit_code": exit_code, "message": message, "follows": follows}))
        else:
            complain(message)
        return exit_code

    try:
        logs.start(wait_s=CONSOLE_WAIT_S if folder else None)
        return work()
    except PirlError as error:
        return tell(str(error), error.exit_code)
    except RuntimeError as error:
        if not folder or not lost_peer(error):
            raise
        return tell(f"rank {os.environ['RANK']} lost another rank: {error}", EXIT_FAILURE, follows=True)


def run_ranks(module: str, arguments: Sequence[str], processes: int | None) -> int:
    """Start the ranks of this machine as `torchrun` does, and wait. Several machines: by the `PET_*` environment.

    A SIGTERM is passed on, and the ranks have half a minute to save. What a rank tells by a `PirlError` is shown once,
    and its exit code returned; anything else that ends a rank is 1, with the traceback that the rank has shown.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    flags = [] if "PET_NPROC_PER_NODE" in os.environ else [f"--nproc-per-node={processes or default_processes()}"]
    if "PET_RDZV_BACKEND" not in os.environ and "PET_MASTER_ADDR" not in os.environ:
        flags += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1"]
    settings = torchrun.parse_args([*flags, "-m", module, *arguments])
    per_node = torchrun.determine_local_world_size(settings.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // per_node)))
    with tempfile.TemporaryDirectory(prefix="pirl-") as folder:
        os.environ[OUTCOME] = folder
        try:
            torchrun.run(settings)
            return EXIT_DONE
        except (ChildFailedError, SignalException) as error:
            told = {int(path.stem): json.loads(path.read_text()) for path in Path(folder).glob("*.json")}
            if isinstance(error, SignalException) and not told:
                complain(
                    f"stopped by {error.sigval.name} before there was anything new to save\n"
                    "  -> run the same command again to go on"
                )
                return EXIT_PREEMPTED
            failures = error.failures if isinstance(error, ChildFailedError) else {}
            silent = {rank: failure.exitcode for rank, failure in failures.items() if rank not in told}
            # what follows from another rank's end, or from the order to stop, has nothing to add to the cause
            causes = [outcome for outcome in told.values() if not outcome["follows"]]
            if causes or not silent:
                causes = sorted(causes or told.values(), key=lambda outcome: outcome["exit_code"] == EXIT_PREEMPTED)
                for message in dict.fromkeys(outcome["message"] for outcome in causes):
                    complain(message)
                return causes[0]["exit_code"]
            rank, code = min(silent.items(), key=lambda item: (item[1] == -signal.SIGTERM, item[0]))
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            complain(f"rank {rank} ended with {how}")
            return EXIT_FAILURE
        finally:
            del os.environ[OUTCOME]


def default_processes() -> int:
    """One for each GPU; without one, two where there are two cores."""
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)
