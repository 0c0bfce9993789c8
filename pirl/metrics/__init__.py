"""Run metrics: JSON-lines record, Prometheus export, console events.

`sink`: the `Sink` that a kind implements, and the `Log` that passes metrics and events to all sinks of a training.
`jsonlines`: `metrics.jsonl` and `events.jsonl` in the run's own storage. `prometheus`: the `pirl_*` metrics of a rank.
`trainer_status`: progress in the status of a TrainJob. `table`: every `pirl_*` metric. `telemetry`: their values in
this process, served or written to a file.

`background`: a sink with a library of its own and a thread: `tensorboard`, `mlflow`, `wandb`, chosen by `--sinks`.

A new kind is one file with a `Sink`, and one line of `SINKS`.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import PirlError
from ..run import read_lines
from .jsonlines import JsonLines
from .mlflow import MLflow
from .process import peak_memory_bytes
from .prometheus import Prometheus
from .sink import Console, Context, Log, Sink, report_failure
from .telemetry import Telemetry, check_port, task
from .tensorboard import TensorBoard
from .trainer_status import TrainerStatus
from .wandb import WandB

SINKS: dict[str, type[Sink]] = {
    "jsonl": JsonLines,
    "console": Console,
    "prometheus": Prometheus,
    "trainer": TrainerStatus,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}
ALWAYS = ("jsonl", "console", "prometheus", "trainer")


def open_log(context: Context, names: Iterable[str] = ALWAYS) -> Log:
    """Return the log of a training on this rank; a sink that cannot be opened is reported and left out."""
    sinks = []
    for name in names:
        kind = SINKS[name]
        if context.world.is_main or kind.every_rank:
            try:
                sinks.append(kind(context))
            except PirlError:
                raise
            except Exception as error:
                report_failure(kind.__name__, error)
    return Log(context.run, sinks)


__all__ = [
    "ALWAYS",
    "SINKS",
    "Context",
    "JsonLines",
    "Log",
    "Sink",
    "Telemetry",
    "check_port",
    "open_log",
    "peak_memory_bytes",
    "read_lines",
    "task",
]
