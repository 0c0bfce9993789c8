"""The frame of every component around its one call: messages, timing, and the end of the runner."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pirl import logs
from pirl.errors import PirlError, StorageError
from pirl.jobs.steps import STEPS_IMAGE
from pirl.launch import die_with_parent
from pirl.metrics import peak_memory_bytes, task
from pirl.results import StepRecord
from pirl.run import Run

IMAGE = STEPS_IMAGE
SECRET_DIR = "/etc/pirl/storage"
"""Folder of the Secret with the storage's credentials in a step's pod; each key is a file."""
SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION")
"""Each may be absent there."""
RUNNER = "PIRL_RUNNER"
"""Environment variable with the process that runs the pipeline on this machine."""


def end_with_runner() -> None:
    """Stop this process when the runner ends, or the shell between the two."""
    die_with_parent()
    runner = os.environ.get(RUNNER)
    if not runner or not hasattr(os, "pidfd_open"):
        return

    def watch(pid: int) -> None:
        with suppress(ProcessLookupError):
            gone = select.poll()
            gone.register(os.pidfd_open(pid), select.POLLIN)
            gone.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, args=(int(runner),), name="runner", daemon=True).start()


def load_credentials(folder: str = SECRET_DIR) -> None:
    """Set the variables that the Secret has and this process does not."""
    for key in SECRET_KEYS:
        with suppress(FileNotFoundError, NotADirectoryError):
            if text := (Path(folder) / key).read_text().strip():
                os.environ.setdefault(key, text)


def labels_of(kfp_run: str) -> dict[str, str]:
    """Return the label of a job that a KFP run started; none where the backend left the placeholder as it is."""
    return {"pirl.dev/kfp-run": kfp_run} if kfp_run and "{" not in kfp_run else {}


@contextmanager
def reporting_errors(name: str) -> Iterator[None]:
    """End the step `name` with its runner, and report a `PirlError` without a traceback."""
    end_with_runner()
    load_credentials()
    try:
        logs.configure()
        yield
    except PirlError as error:
        logs.error(f"step {name}: {error}")
        raise SystemExit(error.exit_code) from None


@contextmanager
def step(run: str, name: str) -> Iterator[None]:
    """Report errors as `reporting_errors`, and record the time of the step `name` of a run in its `steps/NAME.json`.

    A repeated step that is a no-op keeps the time of the work, and records when it last ran.
    """
    started, clock = time.time(), time.perf_counter()
    with reporting_errors(name), task(name, run):
        yield
    seconds = round(time.perf_counter() - clock, 2)
    folder = Run.at(run)
    record = StepRecord(step=name, started=started, seconds=seconds, peak_rss_bytes=peak_memory_bytes())
    try:
        before = folder.step(name)
    except StorageError:  # damaged: written again
        before = None
    longest = before if before and before.seconds > seconds else record
    folder.save_step(longest.model_copy(update={"last_started": started}))
