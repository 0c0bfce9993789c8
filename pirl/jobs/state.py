"""States of a job, and the clocks that its launcher keeps of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from .diagnose import is_well
from .kind import Object, Phase, Verdict

LONGEST_TURN_S = 60.0  # that one turn of the launcher may add to a clock: it may have slept, or waited for an answer


class State(Enum):
    """State of a job in the launcher; see the picture in `launcher`."""

    ABSENT = "absent"
    SUSPENDED = "suspended"
    PENDING = "pending"
    RUNNING = "running"
    RESTARTING = "restarting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


FINAL = {Phase.SUCCEEDED: State.SUCCEEDED, Phase.FAILED: State.FAILED, Phase.SUSPENDED: State.SUSPENDED}


def observe(verdict: Verdict | None, pods: Sequence[Object], nodes: int, ran: bool) -> State:
    """Return the state that the cluster's objects show; `ran`: all pods have been running before."""
    if verdict is None:
        return State.ABSENT
    if verdict.phase in FINAL:
        return FINAL[verdict.phase]
    if sum(map(is_well, pods)) >= nodes:
        return State.RUNNING
    return State.RESTARTING if ran else State.PENDING


@dataclass
class Clocks:
    """Seconds, counted only while the cluster answers."""

    state: State | None = None
    ran: bool = False
    """All pods have been running."""
    in_state: float = 0.0
    permanent: float = 0.0
    """With a trouble that waiting does not fix."""
    without_step: float = 0.0
    """Running without a new step."""
    total: float = 0.0
    """Not suspended."""
    turn: float = 0.0
    """Of the last turn."""
    read_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.resume()

    def resume(self) -> None:
        """Leave out the time since the last turn, in which the cluster did not answer."""
        self.read_at = time.monotonic()

    def enter(self, state: State, stepped: bool, progress_available: bool) -> bool:
        """Count one turn in `state`, and return whether the state is a new one."""
        now = time.monotonic()
        self.turn, self.read_at = min(now - self.read_at, LONGEST_TURN_S), now
        self.ran = self.ran or state is State.RUNNING
        changed = state is not self.state
        if changed:
            self.state, self.in_state = state, 0.0
        self.in_state += self.turn
        self.total += self.turn if state is not State.SUSPENDED else 0.0
        if stepped:
            self.without_step = 0.0
        elif state is State.RUNNING and progress_available:
            self.without_step += self.turn
        return changed
