"""State of a training: what a checkpoint holds, and what must agree before it is loaded or saved."""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from ..checkpoint import Checkpoints, Commit, Cursor, Rows, SavedBank, SavedTraining, saved_training
from ..config import Recipe
from ..errors import CheckpointError, PirlError, StorageNotFoundError, TrainingError, UsageError
from ..logs import info
from ..loss import Contrast
from ..memory import MemoryBank
from ..model import PIRL
from ..results import InitialRecord
from ..run import Run
from ..world import World
from .meter import Meter

INCOMPLETE = ("trunk only", "no bank", "no optimizer")  # in place of the data's digest in an import that lacks the rest


@dataclass
class TrainState:
    """Everything that a step changes. A checkpoint holds it, besides the cursor."""

    model: PIRL
    bank: MemoryBank
    criterion: Contrast
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def to_dict(self, recipe: Recipe, data_digest: str) -> SavedTraining:
        bank = self.bank.state_dict()
        if self.bank.cut:
            bank["memory"] = Rows(self.bank.memory, self.bank.first, self.bank.images)
        return {
            "model": self.model.state_dict(),
            "bank": cast(SavedBank, {**bank, **self.criterion.state_dict()}),  # one place on disk, as in version 0.1
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "recipe": recipe.to_toml(),
            "data_digest": data_digest,
        }

    def load_dict(self, saved: SavedTraining) -> None:
        self.model.load_state_dict(saved["model"])
        self.bank.load(saved["bank"]["memory"])
        self.criterion.load_state_dict({"z": saved["bank"]["z"]})
        self.optimizer.load_state_dict(saved["optimizer"])
        for parameter, values in self.optimizer.state.items():
            if (momentum := values.get("momentum_buffer")) is not None:
                # the fused step takes it to lie in memory as the parameter does (channels last), and would not notice
                values["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
        self.scaler.load_state_dict(saved["scaler"])


def resume(
    state: TrainState, checkpoints: Checkpoints, run: Run, data_digest: str, world: World, name: str | None
) -> Cursor | None:
    """Load the newest whole checkpoint into `state` and return its cursor; None where `name`, the newest, is None."""
    if name is None:
        return None
    newest = checkpoints.load(rows=own_rows(state))
    commits = world.gather_objects(newest[0].name if newest else None)
    if len(set(commits)) > 1:
        raise CheckpointError(f"ranks read different checkpoints: {commits}", "check the storage of every node")
    if not newest:
        raise CheckpointError(f"{run.uri} has lost its checkpoints", "run the same command again")
    commit, saved = newest
    check_same_data(run.uri, commit, data_digest)
    state.load_dict(saved_training(saved, f"checkpoint {commit.name} of {run.place}"))
    if world.is_main:
        info(f"resuming from {commit.name}: epoch {commit.cursor.epoch}, {commit.cursor.samples} samples into it")
    return commit.cursor


def load_initial(model: PIRL, run: Run, world: World) -> InitialRecord:
    """Load the initial weights of a run into the model of every rank; return their record."""
    given: tuple[InitialRecord, dict[str, Tensor]] | PirlError | None = None
    if world.is_main:
        try:
            given = _read_initial(run)
        except PirlError as error:
            given = error
    given = world.broadcast_object(given)
    if isinstance(given, PirlError):
        raise given
    assert given is not None
    record, tensors = given
    model.load_state_dict({**model.state_dict(), **tensors})
    return record


def _read_initial(run: Run) -> tuple[InitialRecord, dict[str, Tensor]]:
    record = run.initial()
    if record is None:
        raise UsageError(f"{run.uri} has no initial weights", "start it by `pirl train`, which copies them there")
    data = run.initial_weights()
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise CheckpointError(f"the initial weights in {run.uri} are damaged", "run the same command again")
    return record, load_tensors(data)


def own_rows(state: TrainState) -> dict[str, range]:
    """Return what a rank needs of the tensors that are cut, by their paths in a checkpoint."""
    if not state.bank.cut:
        return {}
    return {"bank/memory": range(state.bank.first, state.bank.first + len(state.bank.memory))}


def check_same_run(run: Run, recipe: Recipe, data_digest: str) -> None:
    """Raise `UsageError` if the run was started with another recipe or with other data."""
    try:
        before = run.recipe()
    except StorageNotFoundError:
        return
    if before.digest() != recipe.digest():
        raise UsageError(
            f"{run.uri} holds a run of another recipe:\n  " + "\n  ".join(before.differences(recipe)),
            "use the same settings to resume it, or another --out for a new run",
        )
    checkpoints = run.checkpoints()
    name = checkpoints.newest()
    with suppress(CheckpointError):  # `resume` reports a damaged one, or finds an older one
        if name:
            check_same_data(run.uri, checkpoints.commit(name), data_digest)


def check_same_data(out: str, commit: Commit, data_digest: str) -> None:
    """Raise `UsageError` if the checkpoint was trained on other data, or was imported without all of its state."""
    if commit.data_digest in INCOMPLETE:
        raise UsageError(
            f"{out} was imported with {commit.data_digest}: it cannot be trained further",
            "evaluate or export it; to train, start a new run",
        )
    if commit.data_digest != data_digest:
        raise UsageError(
            f"{out} was trained on other data (digest {commit.data_digest[:12]}, these shards have {data_digest[:12]})",
            "use the same data to resume it, or another --out for a new run",
        )


def check_state(state: TrainState, loss: Tensor | None, world: World, meter: Meter) -> float | None:
    """Raise if the loss is not finite or the ranks' whole banks differ; return the loss of the global batch.

    Every rank applies the same updates to a whole bank. Non-finite weights are detected later, in the staged copy.
    """
    replicas = world.size > 1 and not state.bank.cut
    own = 0.0 if loss is None else loss.item(), state.bank.checksum() if replicas else 0
    losses, sums = zip(*world.gather_objects(own))
    if not all(map(math.isfinite, losses)):
        raise meter.not_finite(*losses)
    if len(set(sums)) > 1:
        raise TrainingError(f"the ranks' memory banks differ (sums {sums})", "this is a bug: please report it")
    return None if loss is None else sum(losses) / len(losses)
