"""`pirl_*` metrics of one rank of a training, served to Prometheus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import storage
from ..run import Record
from .process import peak_memory_bytes
from .sink import Context, Sink
from .telemetry import Telemetry

GAUGES = {  # of rank 0, by the names of `metrics.jsonl`
    "step": "pirl_training_step",
    "epoch": "pirl_training_epoch",
    "images_per_s": "pirl_training_images_per_second",
    "lr": "pirl_training_learning_rate",
    "embedding_std": "pirl_training_embedding_std",
}
LOSSES = {"loss": "total", "loss_patches": "patches", "loss_images": "images"}
BANK_SAMPLE = 65536  # rows that are enough for the mean of their norms


class Prometheus(Telemetry, Sink):
    """Metrics of one rank; the first rank of a machine serves those of all ranks there.

    No method waits for the device but `step` and `interval`, where the log line waits for it anyway.
    """

    every_rank = True

    def __init__(self, context: Context) -> None:
        super().__init__(context.run.uri, context.world.rank)
        self.world = world = context.world
        self.context = context
        self._retries = storage.retries()
        if world.is_main:
            self.set("pirl_training_target_steps", context.steps)
            for name in ("training_steps", "training_images", "checkpoints", "checkpoint_failures"):
                self.add(f"pirl_{name}_total", 0)  # a rate needs the zero that comes before the first one
        self.add("pirl_storage_retries_total", 0)
        if world.local_rank == 0:
            self.serve()

    def resume(self, record: Record) -> None:
        """Count the restarts and set the times of the run's earlier processes."""
        if not self.world.is_main:
            return
        # in one go: a count seen on its way up would look to Prometheus like a restart of the counter
        self.add("pirl_training_restarts_total", sum(event["event"] == "resume" for event in record.events))
        for event in record.events:
            self._note_time(event["event"], event["time"])

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Count an event of rank 0."""
        if not self.world.is_main:
            return
        if kind == "resume":
            self.add("pirl_training_restarts_total")
        elif kind == "checkpoint":
            self.add("pirl_checkpoints_total")
            self.set("pirl_checkpoint_duration_seconds", values["seconds"])
            self.set("pirl_checkpoint_size_bytes", values["bytes"])
        elif kind == "checkpoint_failed":
            self.add("pirl_checkpoint_failures_total")
        elif kind == "not_finite":
            self.set("pirl_training_loss", math.nan, part="total")
        self._note_time(kind, values["time"])

    def _note_time(self, kind: str, when: float) -> None:
        if kind == "checkpoint":
            self.set("pirl_checkpoint_last_success_timestamp_seconds", when)
        elif kind == "not_finite":
            self.set("pirl_training_nonfinite_timestamp_seconds", when)

    def tick(self, images: int, seconds: float) -> None:
        """Count a step, on rank 0."""
        if self.world.is_main:
            self.add("pirl_training_steps_total")
            self.add("pirl_training_images_total", images)
            self.observe("pirl_training_step_duration_seconds", seconds)

    def interval(self, parts: Mapping[str, float]) -> None:
        """Set this rank's own times, retries and memory."""
        for part, seconds in parts.items():
            self.add("pirl_training_step_seconds_total", seconds, part=part)
        retries = storage.retries()
        self.add("pirl_storage_retries_total", retries - self._retries)
        self._retries = retries
        self.set("pirl_memory_resident_bytes", peak_memory_bytes())
        if self.world.device.type == "cuda":
            memory = {
                "allocated": torch.cuda.memory_allocated(),
                "reserved": torch.cuda.memory_reserved(),
                "peak": torch.cuda.max_memory_allocated(),
            }
            for state, size in memory.items():
                self.set("pirl_gpu_memory_bytes", size, state=state)

    def step(self, values: Mapping[str, float]) -> None:
        """Set the gauges of one log line, and the norms of gradients and bank."""
        for key, name in GAUGES.items():
            self.set(name, values[key])
        for key, part in LOSSES.items():
            self.set("pirl_training_loss", values[key], part=part)
        steps_per_epoch = self.context.steps / self.context.epochs
        age = mean_row_age(values["epoch"]) * steps_per_epoch * values["step_s"]
        self.set("pirl_bank_age_seconds", age)
        if self.context.model:
            gradients = [p.grad for p in self.context.model.parameters() if p.grad is not None]
            self.set("pirl_training_gradient_norm", float(nn.utils.get_total_norm(gradients)))
        if self.context.bank:
            memory = self.context.bank.memory
            rows = memory[:: max(1, len(memory) // BANK_SAMPLE)]
            self.set("pirl_bank_norm", float(rows.norm(dim=1).mean()))


def mean_row_age(epoch: float) -> float:
    """Return the expected age of a row of the bank in epochs, at the position `epoch`.

    Each epoch renews each row once, in an order of its own. A row that the first epoch has not reached is as old as the
    run.
    """
    part = epoch % 1
    if epoch < 1:
        return part * (1 - part / 2)
    return (1 + part - part * part) / 2
