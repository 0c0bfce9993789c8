"""The runner of the DAG on this machine: each step a process, no cluster and no container."""

from __future__ import annotations

import contextlib
import locale
import logging
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kfp import local

from components.step import RUNNER
from pipelines.pretrain import pirl_pretrain
from pirl.errors import PirlError, PreemptedError, UsageError
from pirl.jobs.steps import require_image
from pirl.run import Run, Workspace
from pirl.storage import Storage


def run_local(**arguments: Any) -> Storage:
    """Run `pirl-pretrain`, check that its steps ran, and return the run's storage.

    A failed step prints the reason on its own output; the `PirlError` raised here names the step.
    """
    require_image()
    for name, value in arguments.items():
        if "python3" in str(value):  # the local runner would replace the word by the path of the interpreter
            raise UsageError(f"{name} {value!r} holds the word 'python3'", "use a path without it")
    run = Workspace(arguments["root"]).run(arguments["run"]).storage
    started = time.time()
    logging.getLogger().setLevel(logging.WARNING)
    with (
        tempfile.TemporaryDirectory(prefix="pirl-kfp-") as scratch,
        warnings.catch_warnings(),
        passing_on_stop() as interrupted,
    ):
        warnings.simplefilter("ignore")
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=scratch)
        try:
            pirl_pretrain(**arguments)
        except RuntimeError as error:
            if interrupted:
                raise PreemptedError(f"interrupted: {saved_state(Run(run))}", "run the same command again") from None
            raise PirlError(
                f"the pipeline stopped: {_last_step(error)}", "see the step's own message above; run it again to resume"
            ) from None
    require_steps(run, started)
    return run


@contextlib.contextmanager
def passing_on_stop() -> Iterator[list[int]]:
    """Pass SIGTERM, and a lost terminal, on to the step that runs: it saves, and the pipeline has failed when it ends.

    So does an interrupt (SIGINT), which is noted in the list; a terminal has sent it to the step itself.

    SIGHUP stays ignored under `nohup`. The output of a step reaches the runner in the encoding that the runner reads.
    A step also ends by itself after its runner, which may have had no time to pass a signal on.
    """
    os.environ[RUNNER] = str(os.getpid())
    os.environ["PYTHONIOENCODING"] = f"{locale.getpreferredencoding(False)}:backslashreplace"
    interrupted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def pass_on(number: int, *_: Any) -> None:
        if number == signal.SIGINT:
            interrupted.append(number)
            if _in_foreground():
                return
        for children in Path("/proc/self/task").glob("*/children"):
            for child in children.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGTERM)  # the shell around the step, which ends with it

    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        if signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    """Return whether a terminal sends its interrupts to this process and its children."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def saved_state(run: Run) -> str:
    """Return what an interrupted run has kept, in words."""
    name = run.checkpoints().newest()
    if name is None:
        return f"{run.uri} has no checkpoint yet; finished steps are kept"
    return f"{run.uri} has {name} and all finished steps"


def require_steps(run: Storage, since: float) -> None:
    """Fail unless every step of the branch that the gate chose ran after `since`: a skipped step must not look done."""
    expected = ["shard-train", "shard-test", "pretrain", "linear_eval", "gate", "report"]
    folder = Run(run)
    if (gate := folder.gate()) and gate.promote:
        expected.insert(5, "register")
    records = {name: folder.step(name) for name in expected}
    missing = [name for name, record in records.items() if record is None or record.last_started < since]
    if missing:
        raise PirlError(
            f"the pipeline ended without having run {', '.join(missing)}", "this is a bug: please report it"
        )


def _last_step(error: RuntimeError) -> str:
    text = str(error)
    with contextlib.suppress(ValueError):
        text = text[text.index("Inner task failed") :]
    return "".join(part.partition("m")[2] if index else part for index, part in enumerate(text.split("\x1b[")))
