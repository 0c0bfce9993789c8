"""The errors of a user, each with the next step. Only a bug, which is not one of these, shows a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the work is saved; run the same command again to resume


class PirlError(Exception):
    """A failure that the user can act on: `what` happened and where, `hint` is the next step."""

    exit_code = EXIT_FAILURE
    transient = False
    """True where a retry may help, as with an overloaded or unavailable server. Otherwise somebody has to act."""

    def __init__(self, what: str, hint: str = "", *, transient: bool | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        if transient is not None:
            self.transient = transient

    def __str__(self) -> str:
        return f"{self.what}\n  -> {self.hint}" if self.hint else self.what

    def __reduce__(self) -> tuple[Any, ...]:
        # Between processes an error keeps its class and all its fields, whatever arguments its constructor takes.
        return _restore, (type(self), self.what), dict(vars(self))


class UsageError(PirlError):
    """The command or its arguments cannot work as written."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """A recipe or an override is wrong."""


class DataError(PirlError):
    """Images, shards or a manifest are not what they should be."""


class StorageError(PirlError):
    """A file system or object store refused, failed or is unavailable."""


class StorageNotFoundError(StorageError):
    """The named object does not exist."""


class CheckpointError(PirlError):
    """A checkpoint is missing, broken, or belongs to something else."""


class RegistryError(PirlError):
    """The model registry holds something that contradicts the request."""


class TrainingError(PirlError):
    """Training cannot continue."""


class PreemptedError(PirlError):
    """Training was stopped from outside and has saved its state."""

    exit_code = EXIT_PREEMPTED


def _restore(kind: type[PirlError], what: str) -> PirlError:
    """Return an unpickled error; pickle then sets its fields."""
    return kind.__new__(kind, what)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest choice, or an empty string."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
