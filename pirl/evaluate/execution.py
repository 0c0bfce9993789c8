"""How an evaluation is executed: nothing here changes its result."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pirl.evaluate.progress import Progress
from pirl.world import World

ALONE = World()
"""This process without others, on the CPU."""


def default_device() -> torch.device:
    """Return the device of an evaluation without ranks."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Execution:
    """Ranks, loading processes of each, and progress."""

    world: World = field(default_factory=lambda: World(device=default_device()))
    workers: int = 0
    progress: Progress = field(default_factory=Progress)
