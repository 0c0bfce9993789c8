"""What every component does around its one call."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pirl import __version__
from pirl.distributed import die_with_parent
from pirl.errors import PirlError
from pirl.metrics import peak_memory_bytes
from pirl.storage import open_storage

IMAGE = os.environ.get("PIRL_STEPS_IMAGE", f"localhost/pirl-python-steps:{__version__.replace('+', '-')}")
"""Compiled into the pipeline; the name holds "python" because the local runner asks for it."""


@contextmanager
def step(run: str, name: str) -> Iterator[None]:
    """Time the step `name` of a run into its `steps/NAME.json`; end with the runner that started it.

    A repeated step that finds its work done keeps the time that the work took, and says when it last ran. What a user
    can act on is told in a line or two, without a traceback.
    """
    die_with_parent()
    started, clock = time.time(), time.perf_counter()
    try:
        yield
    except PirlError as error:
        print(f"error: step {name}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    seconds = round(time.perf_counter() - clock, 2)
    storage, entry = open_storage(run), f"steps/{name}.json"
    record: dict[str, Any] = {
        "step": name,
        "started": started,
        "seconds": seconds,
        "peak_rss_bytes": peak_memory_bytes(),
    }
    if storage.exists(entry):
        before = storage.read_json(entry)
        record = before if before["seconds"] > seconds else record
    storage.write_json(entry, {**record, "last_started": started})
