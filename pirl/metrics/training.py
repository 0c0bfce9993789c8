"""What a rank of a training exposes. Nothing here makes the host wait for the device but `interval`, at log lines."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import storage
from ..memory import MemoryBank
from ..world import World
from .clock import StepClock
from .record import peak_memory_bytes
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


class TrainingMetrics(Telemetry):
    """Of the run `uri` on one rank; the first rank of a machine serves them."""

    def __init__(self, uri: str, world: World, total_steps: int, epochs: int) -> None:
        super().__init__(uri, world.rank)
        self.world = world
        self.steps_per_epoch = total_steps / epochs
        self.clock = StepClock(world.device)
        self._watched: tuple[nn.Module, MemoryBank] | None = None
        self._retries = storage.retries()
        if world.is_main:
            self.set("pirl_training_target_steps", total_steps)
            for name in ("training_steps", "training_images", "checkpoints", "checkpoint_failures"):
                self.add(f"pirl_{name}_total", 0)  # a rate needs the zero that comes before the first one
        self.add("pirl_storage_retries_total", 0)
        if world.local_rank == 0:
            self.serve()

    def watch(self, network: nn.Module, bank: MemoryBank) -> None:
        """Whose norms to tell, and the pass whose end parts a step in two."""
        self._watched = network, bank
        network.register_forward_hook(lambda *_: self.clock.forward_done())

    def replay(self, events: Sequence[Mapping[str, Any]]) -> None:
        """What the run's earlier processes have left in `events.jsonl`."""
        # in one go: a count seen on its way up would look to Prometheus as if it had begun anew
        self.add("pirl_training_restarts_total", sum(event["event"] == "resume" for event in events))
        for event in events:
            self._note_times(event["event"], event["time"])

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """An event of this process. Called from the checkpoint's thread too."""
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
        self._note_times(kind, time.time())

    def _note_times(self, kind: str, when: float) -> None:
        if kind == "checkpoint":
            self.set("pirl_checkpoint_last_success_timestamp_seconds", when)
        elif kind == "not_finite":
            self.set("pirl_training_nonfinite_timestamp_seconds", when)

    def stepped(self, images: int) -> None:
        """The end of a step of the whole training on `images`."""
        seconds = self.clock.end()
        if self.world.is_main:
            self.add("pirl_training_steps_total")
            self.add("pirl_training_images_total", images)
            self.observe("pirl_training_step_duration_seconds", seconds)

    def interval(self) -> None:
        """Each rank's own numbers, when all ranks log."""
        for part, seconds in self.clock.read().items():
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

    def line(self, values: Mapping[str, float]) -> None:
        """What rank 0 logs, by the names of `metrics.jsonl`."""
        for key, name in GAUGES.items():
            self.set(name, values[key])
        for key, part in LOSSES.items():
            self.set("pirl_training_loss", values[key], part=part)
        age = mean_row_age(values["epoch"]) * self.steps_per_epoch * values["step_s"]
        self.set("pirl_bank_age_seconds", age)
        if self._watched:
            network, bank = self._watched
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            self.set("pirl_training_gradient_norm", float(nn.utils.get_total_norm(gradients)))
            rows = bank.memory[:: max(1, len(bank.memory) // BANK_SAMPLE)]
            self.set("pirl_bank_norm", float(rows.norm(dim=1).mean()))


def mean_row_age(epoch: float) -> float:
    """Expected age of a row of the bank in epochs, at the position `epoch`: each epoch renews each row once, in an
    order of its own. A row not seen yet in the first epoch is as old as the run."""
    part = epoch % 1
    if epoch < 1:
        return part * (1 - part / 2)
    return (1 + part - part * part) / 2
