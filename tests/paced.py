"""Trainings in which something happens at a given step, so that no test depends on the speed of a machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pirl.config import Recipe
from pirl.results import Completion
from pirl.training.loop import Trainer, train
from pirl.training.spec import Options
from pirl.world import World

WAIT_S = 240.0


@dataclass(frozen=True)
class SignalAt:
    """A signal that `rank` sends to itself after `step`, before the ranks agree on what comes next."""

    step: int
    rank: int
    number: int

    def is_due(self, step: int) -> bool:
        return step == self.step

    def act(self, world: World) -> None:
        if world.rank == self.rank:
            os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class HoldAt:
    """A pause of every rank after `step`, until the file `until` exists; without one until the ranks are killed."""

    step: int
    until: Path | None = None

    def is_due(self, step: int) -> bool:
        return step == self.step

    def act(self, world: World) -> None:
        deadline = time.monotonic() + WAIT_S
        while not (self.until and self.until.exists()):
            assert time.monotonic() < deadline, f"a rank was held too long at step {self.step}"
            time.sleep(0.01)


@dataclass(frozen=True)
class SlowFrom:
    """A pause of `seconds` of every rank after `step` and each later one, until the file `until` exists."""

    step: int
    until: Path
    seconds: float = 0.1

    def is_due(self, step: int) -> bool:
        return step >= self.step and not self.until.exists()

    def act(self, world: World) -> None:
        time.sleep(self.seconds)


Act = SignalAt | HoldAt | SlowFrom


def train_paced(world: World, recipe: Recipe, options: Options, *acts: Act) -> Completion:
    """Train a rank, with `acts` after their steps, as counted over all restarts."""
    step = Trainer._step

    def paced(trainer: Trainer, *arguments: Any) -> None:
        step(trainer, *arguments)
        for act in acts:
            if act.is_due(trainer.cursor.step):
                act.act(world)

    Trainer._step = paced  # type: ignore[method-assign]
    return train(recipe, options, world)
