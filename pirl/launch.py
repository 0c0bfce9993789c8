"""Starting the ranks of one machine, and how they end."""

from __future__ import annotations

import atexit
import ctypes
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from . import logs
from .errors import EXIT_DONE, EXIT_FAILURE, EXIT_PREEMPTED, PirlError, UsageError
from .world import is_port, lost_peer, parse_number

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals on which a training saves and ends. One that is ignored, as SIGHUP is under `nohup`, stays ignored."""

OUTCOME = "PIRL_OUTCOME"  # folder where each rank of this machine leaves its message and exit code
CONSOLE_WAIT_S = 10.0  # that a rank waits for a reader of its output that has paused: the other ranks wait for it


def die_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends, also by SIGKILL. A no-op but on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def report_outcome(work: Callable[[], int]) -> int:
    """Run `work` and return its exit code; a `PirlError` becomes a message and its exit code.

    A rank leaves the message in the folder $PIRL_OUTCOME, so that the launcher prints it once. A collective that broke
    because another rank has ended is marked as a consequence.
    """
    folder = os.environ.get(OUTCOME)
    if folder:
        die_with_parent()

    def leave(message: str, exit_code: int, follows: bool = False) -> int:
        if folder:
            path = Path(folder) / f"{os.environ['RANK']}.json"
            path.write_text(json.dumps({"exit_code": exit_code, "message": message, "follows": follows}))
        else:
            logs.error(message)
        return exit_code

    try:
        logs.configure(wait_s=CONSOLE_WAIT_S if folder else None)
        return work()
    except PirlError as error:
        return leave(str(error), error.exit_code)
    except RuntimeError as error:
        if not folder or not lost_peer(error):
            raise
        return leave(f"rank {os.environ['RANK']} lost another rank: {error}", EXIT_FAILURE, follows=True)


def exit_process(work: Callable[[], int]) -> NoReturn:
    """Report the outcome of `work` and end this process; a rank ends without finalizing the interpreter.

    A thread of gloo releases the tensors of the last collective some time after it has completed, and needs the GIL for
    it. A thread that waits for the GIL of an interpreter under finalization aborts the process (signal 6).
    """
    if "RANK" not in os.environ:
        sys.exit(report_outcome(work))
    try:
        exit_code = report_outcome(work)
    except BaseException:
        traceback.print_exc()
        exit_code = EXIT_FAILURE
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(exit_code)


def only_argument(module: str, command: str, arguments: Sequence[str]) -> str:
    """Return the path of the specification, which is the only argument of `python -m MODULE`."""
    if len(arguments) == 1:
        return arguments[0]
    raise UsageError(
        f"python -m {module} takes one argument, the JSON file of a specification: {len(arguments)} given",
        f"use `{command}`; with --dry-run --json it prints such a file",
    )


def run_ranks(module: str, arguments: Sequence[str], processes: int | None) -> int:
    """Start the ranks of this machine as `torchrun` does, wait for them and return the exit code.

    Several machines: by the `PET_*` environment. A stop signal is passed on, and the ranks have half a minute to save.
    The message of a rank's `PirlError` is shown once, and its exit code returned. Anything else that ends a rank is 1,
    with the traceback that the rank has shown.
    """
    check_environment()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    flags = [] if "PET_NPROC_PER_NODE" in os.environ else [f"--nproc-per-node={processes or default_processes()}"]
    if "PET_RDZV_BACKEND" not in os.environ and "PET_MASTER_ADDR" not in os.environ:
        flags += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1"]
    flags.append(f"--signals-to-handle={','.join(number.name for number in handled_signals())}")
    settings = torchrun.parse_args([*flags, "-m", module, *arguments])
    per_node = torchrun.determine_local_world_size(settings.nproc_per_node)
    with tempfile.TemporaryDirectory(prefix="pirl-") as folder, _restored_process():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // per_node)))
        os.environ[OUTCOME] = folder
        try:
            torchrun.run(settings)
            return EXIT_DONE
        except (ChildFailedError, SignalException) as error:
            return _report_failure(error, Path(folder))


def _report_failure(error: ChildFailedError | SignalException, folder: Path) -> int:
    """Print why the ranks ended, once, and return the exit code."""
    outcomes = {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}
    if isinstance(error, SignalException) and not outcomes:
        logs.error(
            f"stopped by {error.sigval.name} before there was anything new to save\n"
            "  -> run the same command again to continue"
        )
        return EXIT_PREEMPTED
    failures = error.failures if isinstance(error, ChildFailedError) else {}
    silent = {rank: failure.exitcode for rank, failure in failures.items() if rank not in outcomes}
    # a rank that ended because another one did, or because of the stop signal, is not a cause
    causes = [outcome for outcome in outcomes.values() if not outcome["follows"]]
    if silent and all(outcome["exit_code"] == EXIT_PREEMPTED for outcome in causes):
        causes = []  # the agent has stopped the others because this one died
    if causes or not silent:
        causes = sorted(causes or outcomes.values(), key=lambda outcome: outcome["exit_code"] == EXIT_PREEMPTED)
        for message in dict.fromkeys(outcome["message"] for outcome in causes):
            logs.error(message)
        return causes[0]["exit_code"]
    rank, code = min(silent.items(), key=lambda item: (item[1] == -signal.SIGTERM, item[0]))
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    logs.error(f"rank {rank} ended with {how}")
    return EXIT_FAILURE


def handled_signals() -> list[signal.Signals]:
    """Return the stop signals that this process does not ignore."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def _restored_process() -> Iterator[None]:
    """Undo what `torchrun` changes in the calling process: signal handlers and environment variables."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    environment = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def check_environment() -> None:
    """Raise `UsageError` with every `PET_*` variable that `torchrun` could not use, before any process starts."""
    problems = [
        *_number_problems("PET_NODE_RANK", 0),
        *_number_problems("PET_MAX_RESTARTS", 0),
    ]
    if not is_port(port := os.environ.get("PET_MASTER_PORT", "29500")):
        problems.append(f"PET_MASTER_PORT is {port!r}, expected a number from 1 to 65535")
    if os.environ.get("PET_NPROC_PER_NODE", "") not in ("auto", "gpu", "cpu"):
        problems += _number_problems("PET_NPROC_PER_NODE", 1)
    nodes = os.environ.get("PET_NNODES", "1")
    counts = [parse_number(text) for text in nodes.split(":")]
    fewest, most = counts[0] or 0, counts[-1] or 0
    if None in counts or len(counts) > 2 or not 0 < fewest <= most:
        problems.append(f"PET_NNODES is {nodes!r}, expected a number of nodes from 1, or MIN:MAX")
    elif most > 1:
        problems += _rendezvous_problems(most)
    if (end := re.search(r":([^:\]]*)$", os.environ.get("PET_RDZV_ENDPOINT", ""))) and not is_port(end[1], 0):
        problems.append(f"PET_RDZV_ENDPOINT has the port {end[1]!r}, expected a number from 0 to 65535")
    if problems:
        raise UsageError(
            "environment variables are wrong:\n  " + "\n  ".join(problems), "fix them, or unset them for one machine"
        )


def _rendezvous_problems(nodes: int) -> list[str]:
    """Return the problem that keeps several nodes from finding each other, if any."""
    if os.environ.get("PET_RDZV_ENDPOINT"):
        return []
    if os.environ.get("PET_RDZV_BACKEND", "static") != "static" or not os.environ.get("PET_MASTER_ADDR"):
        return [
            f"PET_NNODES is {nodes} without an address where the nodes meet, expected PET_RDZV_BACKEND=c10d and "
            "PET_RDZV_ENDPOINT=HOST:PORT, or PET_MASTER_ADDR, PET_MASTER_PORT and PET_NODE_RANK"
        ]
    rank = parse_number(os.environ.get("PET_NODE_RANK", "0"))
    if rank is not None and rank >= nodes:
        return [f"PET_NODE_RANK is {rank}, expected less than PET_NNODES={nodes}"]
    return []


def _number_problems(name: str, least: int) -> list[str]:
    """Return the problem of the variable `name`, if it is set and not an integer of at least `least`."""
    text = os.environ.get(name, str(least))
    value = parse_number(text)
    return [] if value is not None and value >= least else [f"{name} is {text!r}, expected a number from {least}"]


def default_processes() -> int:
    """One for each GPU; without one, two where there are two cores."""
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)
