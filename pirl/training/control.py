"""Agreement of the ranks at each step: continue, save or stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from enum import Enum, auto
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..launch import STOP_SIGNALS
from ..world import World


class Decision(Enum):
    """A step's outcome, the same on all ranks."""

    CONTINUE = auto()
    SAVE = auto()
    STOP = auto()


class Control:
    """Stop signals and the clock of the checkpoints, agreed on by all ranks without making a step wait for it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stopping = False
        self._due_from = monotonic()
        self._pending: tuple[Tensor, Any] | None = None
        self._obsolete = False
        self._handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, handler in self._handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._stop)

    def close(self) -> None:
        """Restore the signal handlers from before."""
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def agree(self, every_s: float, busy: Callable[[float], bool] = lambda every_s: False) -> Decision:
        """Return the decision of all ranks: stop if any rank has a stop signal, save if rank 0's clock is due.

        With several ranks the answer is that of the step before, so that no step waits for a message. The clock starts
        again with the request: each due time makes one checkpoint. While rank 0 is `busy` with the one before, a due
        one is put off; with 0 s between them it is not, because every step is to be saved.
        """
        due = monotonic() - self._due_from > every_s and (every_s == 0 or not busy(every_s))
        if due:
            self._due_from = monotonic()
        flags = torch.tensor([int(self.stopping), int(due and self.world.is_main)])
        if self.world.size > 1:
            work = dist.all_reduce(flags, group=self.world.control, async_op=True)
            previous, self._pending = self._pending, (flags, work)
            if previous is None:
                return Decision.CONTINUE
            flags, work = previous
            work.wait()  # at once after `settle`
        obsolete, self._obsolete = self._obsolete, False
        if flags[0]:
            return Decision.STOP
        return Decision.SAVE if flags[1] and not obsolete else Decision.CONTINUE

    def settle(self) -> None:
        """Wait until all ranks have queued their last step, before the next one is queued.

        Here a stalled rank is reported. Later this host could be blocked in the driver: the GPU waits for that rank's
        gradients, and its queue is finite.
        """
        if self._pending:
            self._pending[1].wait()

    def postpone(self, seconds: float) -> None:
        """Leave out `seconds` in which training has waited for storage."""
        self._due_from += seconds

    def restart(self) -> None:
        """Start the clock again after a checkpoint that was not requested, and drop a request under way."""
        self._due_from = monotonic()
        self._obsolete = self._pending is not None
