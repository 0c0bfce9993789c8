"""States of an evaluation that trains by epochs, kept in the run's storage until its result is there."""

from __future__ import annotations

import time
from typing import Any

from pirl import logs
from pirl.checkpoint import Checkpoints, Cursor
from pirl.evaluate.execution import ALONE
from pirl.evaluate.parts import SAVE_EVERY_S
from pirl.storage import Storage
from pirl.world import World


class EpochStates:
    """The newest state of one training, saved after an epoch where the last one is old. All ranks call it together."""

    def __init__(
        self, folder: Storage | None, digest: str, world: World = ALONE, every_s: float = SAVE_EVERY_S
    ) -> None:
        """`digest` identifies the training; without a folder nothing is kept."""
        self.digest, self.world, self.every_s = digest, world, every_s
        self.checkpoints = Checkpoints(folder, keep=1, world=world) if folder else None
        self._saved_at = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the state of an interrupted training, if there is one."""
        loaded = self.checkpoints.load() if self.checkpoints else None
        return loaded[1] if loaded else None

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        """Save the state after `epoch` epochs, unless the last one is new. A failure is reported, no more."""
        if not self.checkpoints:
            return
        if not self.world.broadcast_object(time.monotonic() - self._saved_at >= self.every_s):
            return
        self._saved_at = time.monotonic()
        self.checkpoints.save(state, Cursor(step=epoch, epoch=epoch), self.digest, self.digest)
        if error := self.checkpoints.wait():
            logs.warn(f"the state after epoch {epoch} was not saved: {error.what}")

    def close(self) -> None:
        """End a save that is under way."""
        if self.checkpoints:
            self.checkpoints.close()
