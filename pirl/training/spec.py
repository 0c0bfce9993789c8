"""Options of a training: where it reads and writes, and how this machine runs it."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from ..world import World


@dataclass(frozen=True)
class Options:
    """Where a training reads and writes, and how this machine runs it: nothing here changes what is learned."""

    data: str
    """URI of the shards."""
    out: str
    """URI of the run."""
    processes: int | None = None
    """Processes on this machine; None: one for each GPU, else two where there are two cores."""
    workers: int = 0
    """Data loading processes of each rank."""
    log_every: int = 50
    """Steps."""
    checkpoint_every_s: float = 300.0
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every_epochs: int = 0
    """Also save and keep for good one checkpoint every so many epochs; 0: none."""
    keep_best: bool = False
    """Also keep the one of the lowest loss."""
    timeout_s: float = World.timeout_s
    """Longest that a rank waits for another one, and twice the longest that it waits for its loading processes."""

    def arguments(self) -> list[str]:
        """As `python -m pirl.train` takes them."""
        given = {f"--{name.replace('_', '-')}": value for name, value in vars(self).items() if value is not None}
        flags = [flag for flag, value in given.items() if value is True]
        return flags + [
            text for flag, value in given.items() if not isinstance(value, bool) for text in (flag, str(value))
        ]

    def check(self) -> None:
        """Refuse numbers that cannot work, all at once."""
        least = {
            "processes": 1,
            "workers": 0,
            "log_every": 1,
            "checkpoint_every_s": 0,
            "keep": 1,
            "keep_every_epochs": 0,
            "timeout_s": 1,
        }
        values = {name: getattr(self, name) for name in least}
        wrong = [f"--{name.replace('_', '-')} {value}" for name, value in values.items() if (value or 0) < least[name]]
        if self.processes is None:
            wrong = [text for text in wrong if not text.startswith("--processes")]
        if wrong:
            raise UsageError(f"these are too small: {', '.join(wrong)}", "`--help` tells what they count")
