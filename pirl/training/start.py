"""Start of a training: its check, and its ranks on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..extras import require
from ..launch import default_processes, only_argument, run_ranks
from ..logs import info
from ..metrics import check_port
from ..outputs import check_run_output
from ..run import Run
from ..shards import Manifest
from ..storage import open_storage
from ..storage.patience import longest_wait_s
from ..text import count
from ..world import joined_world
from .loop import train
from .spec import TrainingSpec
from .state import check_same_run
from .workers import with_workers

STORAGE_MARGIN_S = 30.0  # between an error of storage and the report of a rank that does not answer


def plan(spec: TrainingSpec) -> list[str]:
    """Check environment, recipe, data and run, and return in a few lines what a training would do."""
    check_port()
    for name in spec.sink_names:
        require(name, f"--sinks {name}")
    recipe = spec.recipe
    manifest = Manifest.load(open_storage(spec.data))
    recipe.check_data(manifest.images)
    check_run_output(spec.out, data=spec.data)
    run = Run.at(open_storage(spec.out))
    check_same_run(run, recipe, manifest.digest)
    newest = run.checkpoints().newest()
    rows = recipe.rows(manifest.images)
    return [
        f"{recipe.name}: {count(recipe.train.epochs, 'epoch')} of {count(rows, 'image')}, "
        f"{count(recipe.steps_per_epoch(rows), 'step')} each, in batches of {recipe.train.batch_size}",
        f"learning rate {recipe.learning_rate:g}, {recipe.loss.describe()}, "
        f"memory bank of {rows * recipe.model.embedding_dim * 4 / 2**20:.1f} MiB",
        f"in {count(spec.processes or default_processes(), 'process', 'processes')}, to {spec.out}, "
        f"from {newest or 'the start'}",
    ]


def rank_timeout_s(spec: TrainingSpec) -> float:
    """Return how long a rank waits for another one: longer than that one may wait for an unavailable storage."""
    wait_s = max(longest_wait_s(uri) for uri in (spec.data, spec.out))
    least_s = wait_s + STORAGE_MARGIN_S if wait_s else 0.0
    if least_s > spec.timeout_s and os.environ.get("RANK") == "0":
        info(
            f"ranks wait {least_s:g} s for each other, longer than --timeout-s {spec.timeout_s:g}: a request to "
            f"storage may take {wait_s:g} s (PIRL_STORAGE_PATIENCE_S, PIRL_S3_READ_TIMEOUT_S)"
        )
    return max(spec.timeout_s, least_s)


def start(arguments: Sequence[str]) -> int:
    """Train by the JSON file that is the only argument: as one rank under `torchrun`, else as all of this machine.

    Returns the exit code.
    """
    spec = TrainingSpec.read(only_argument("pirl.train", "pirl train", arguments))
    if "RANK" not in os.environ:
        plan(spec)  # a mistake costs nothing as long as no process is started
        return run_ranks("pirl.train", arguments, spec.processes)
    with joined_world(rank_timeout_s(spec)) as world:
        train(spec.recipe, with_workers(spec, world), world)
    return 0
