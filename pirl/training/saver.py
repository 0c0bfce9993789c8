"""Checkpoints of a training: saved by all ranks together, the last one retried."""

from __future__ import annotations

import time

from torch import Tensor

from .. import logs
from ..checkpoint import Checkpoints, Cursor
from ..config import Recipe
from ..errors import PirlError, StorageError
from ..metrics import Log
from ..world import World
from .meter import Meter
from .state import TrainState, check_state

FINAL_SAVE_RETRY_S = 150.0  # retry the final save this long while storage is unavailable
FINAL_SAVE_PAUSE_S = 5.0
AFTER_FAILURE_S = 30.0  # until the next save, after one that failed


class Saver:
    """Saves the state of a training in the background. All ranks call it, and each writes its share."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        state: TrainState,
        recipe: Recipe,
        data_digest: str,
        world: World,
        log: Log,
        meter: Meter,
    ) -> None:
        self.checkpoints, self.state, self.recipe, self.data_digest = checkpoints, state, recipe, data_digest
        self.world, self.log, self.meter = world, log, meter
        self.cursor: Cursor | None = None
        """Of the state that was saved last, or is being saved."""
        self.milestone = False
        """True if that checkpoint is kept for good."""
        self._started = 0.0
        self._overdue = False
        # batch statistics differ from rank to rank: rank 0's are saved
        self._of_main = {f"model/{name}" for name, _ in state.model.named_buffers()}

    def interval_s(self, every_s: float) -> float:
        """Return the seconds between two checkpoints: fewer after a save that has failed."""
        return min(every_s, AFTER_FAILURE_S) if self.checkpoints.failed else every_s

    def is_busy(self, due_s: float) -> bool:
        """Return whether this rank still writes a checkpoint; warn once if it does when the next has been due."""
        if not self.checkpoints.saving:
            return False
        took_s = time.monotonic() - self._started
        if self.cursor and took_s > due_s and not self._overdue and self.world.is_main:
            self._overdue = True
            logs.warn(
                f"the checkpoint of step {self.cursor.step} is still being written after {took_s:.0f} s, training "
                "continues without another one until then"
            )
        return True

    def save(self, cursor: Cursor, loss: Tensor | None = None, milestone: bool = False) -> None:
        """Start to save the state at `cursor`; `loss` is this rank's of the last step. A milestone is kept for good.

        Waits for a save under way, and warns if that has failed. Raises `TrainingError` if state or loss are not
        finite.
        """
        self.world.barrier()  # a stalled rank is reported here; waiting for its share of the last save would not
        self.world.wait_for_device()
        if error := self._finish():
            self._warn(error)
        mean = check_state(self.state, loss, self.world, self.meter)
        self.meter.saving()
        self.checkpoints.save(
            self.state.to_dict(self.recipe, self.data_digest),
            cursor,
            self.recipe.digest(),
            self.data_digest,
            self.meter.saved,
            loss=mean,
            milestone=milestone,
            of_main=self._of_main,
        )
        self.cursor, self.milestone = cursor, milestone
        self._started, self._overdue = time.monotonic(), False

    def save_final(self, cursor: Cursor, loss: Tensor | None) -> None:
        """Save, unless the state at `cursor` is saved already, and wait.

        Any error is retried once, as space may have been freed; a transient one for `FINAL_SAVE_RETRY_S`.
        """
        if self.cursor != cursor:
            self.save(cursor, loss)
        deadline = time.monotonic() + FINAL_SAVE_RETRY_S
        error = self._finish()
        again = error is not None
        while self.world.broadcast_object(again):
            if error:
                self._warn(error)
            time.sleep(FINAL_SAVE_PAUSE_S)
            self.save(cursor, loss, self.milestone)
            error = self._finish()
            again = isinstance(error, StorageError) and error.transient and time.monotonic() < deadline
        if error:
            raise error

    def _finish(self) -> PirlError | None:
        """Wait for a save under way and return the error that ended it, on rank 0. All ranks end on a broken state."""
        error = self.checkpoints.wait()
        if broken := self.world.broadcast_object(self.checkpoints.broken):
            raise self.meter.not_finite(where=broken)
        return error

    def _warn(self, error: PirlError) -> None:
        if self.world.is_main:
            logs.warn(f"the last checkpoint was not saved, training continues: {error}")
        self.log.event("checkpoint_failed", error=error.what)
