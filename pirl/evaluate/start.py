"""Start of an evaluation: its check, and its ranks on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import logs
from ..errors import PirlError, PreemptedError, UsageError
from ..launch import default_processes, handled_signals, only_argument, run_ranks
from ..lines import ProgressLine
from ..metrics import Telemetry, check_port
from ..run import Run
from ..shards import Manifest
from ..storage import open_storage
from ..text import count
from ..training.workers import cores_for_loading
from ..world import World, joined_world, report_stragglers
from .apply import apply_protocol
from .execution import Execution
from .progress import Progress
from .spec import EvaluationSpec


def plan(spec: EvaluationSpec) -> list[str]:
    """Check environment, run and data, and return in a few lines what an evaluation would do."""
    check_port()
    commit = Run.at(spec.run).commit()
    manifests = [Manifest.load(open_storage(uri)) for uri in (spec.data, spec.test)]
    for uri, manifest in zip((spec.data, spec.test), manifests):
        if manifest.classes is None:
            raise UsageError(
                f"{uri} has no labels: an evaluation needs them", "shard a folder with one subfolder for each class"
            )
    train, test = manifests
    return [
        f"protocol {spec.protocol}: {commit.name} of {spec.run}",
        f"on {count(train.images, 'training image')} of {count(len(train.classes or ()), 'class', 'classes')} and "
        f"{count(test.images, 'test image')}",
        f"in {count(spec.processes or default_processes(), 'process', 'processes')}",
    ]


def start(arguments: Sequence[str]) -> int:
    """Evaluate by the JSON file that is the only argument: as one rank under `torchrun`, else as all of this machine.

    Return the exit code.
    """
    spec = EvaluationSpec.read(only_argument("pirl.evaluate", "pirl eval", arguments))
    if "RANK" not in os.environ:
        plan(spec)
        return run_ranks("pirl.evaluate", arguments, spec.processes)
    with joined_world(spec.timeout_s) as world, stopping(), report_stragglers(world):
        apply_protocol(spec, Execution(world, workers(spec.workers), progress_of(spec, world)))
    return 0


def workers(given: int) -> int:
    """Return the loading processes of a rank: as given, or the cores that the ranks of this machine leave, dealt."""
    if given >= 0:
        return given
    return cores_for_loading(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def progress_of(spec: EvaluationSpec, world: World) -> Progress:
    """Return the progress of this rank: rank 0 prints it and leaves it in the run.

    The first rank of each machine answers Prometheus, so that a pod that does not is a pod in trouble.
    """
    run, telemetry = Run.at(spec.run), Telemetry(Run.at(spec.run).uri, world.rank)
    if world.local_rank == 0:
        telemetry.serve()
    if not world.is_main:
        return Progress()

    def record(line: ProgressLine) -> None:
        telemetry.set("pirl_evaluation_progress_ratio", line["done"] / max(1, line["total"]), phase=line["phase"])
        telemetry.set("pirl_evaluation_throughput", line["rate"], phase=line["phase"])
        try:
            run.save_evaluation_progress(line)
        except PirlError as error:  # the next line may be written again
            logs.warn(f"the progress was not saved: {error.what}")

    return Progress(logs.info, record)


@contextmanager
def stopping() -> Iterator[None]:
    """Turn a stop signal into a `PreemptedError`: what is saved is used by the next start."""

    def stop(number: int, _: Any) -> None:
        raise PreemptedError(
            f"the evaluation was stopped by {signal.Signals(number).name}",
            "run the same command again: it continues from what was saved",
        )

    before = {number: signal.signal(number, stop) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
