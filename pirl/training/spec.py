"""Specification of a training: what to train, on which data, into which run, and how its ranks run.

One model, made from the options of a command, the texts of a pipeline, the environment or JSON. Ranks and pods get it
as one JSON file. A new option of training is one more field of `TrainingOptions`: commands, pipelines, components and
pods have it by that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator

from ..config import Recipe, load_recipe
from ..errors import UsageError, did_you_mean
from ..extras import SINKS
from ..settings import Collector, Settings, Specification, items_of, options_from, validated
from ..storage import open_storage
from .placement import BankPlacement


class TrainingOptions(Settings):
    """How the ranks run, and what a new run starts from."""

    processes: int = Field(0, ge=0, le=1024)
    """Processes (ranks) on this machine, or in each pod; 0: one for each GPU, else two, in a pod one."""
    workers: int = Field(-1, ge=-1, le=256)
    """Data loading processes of each rank; -1: as many as cores and shared memory allow, at most 8."""
    log_every: int = Field(50, ge=1, le=10**9)
    """Steps between two log lines."""
    checkpoint_every_s: float = Field(300.0, ge=0, le=10**9)
    """Seconds between two checkpoints, put off while one is still being written; 0: one after every step."""
    keep: int = Field(2, ge=1, le=10**6)
    """Newest complete checkpoints to keep."""
    keep_every_epochs: int = Field(0, ge=0, le=10**6)
    """Also save and keep for good one checkpoint every so many epochs; 0: none."""
    keep_best: bool = False
    """Also keep the checkpoint of the lowest loss."""
    bank: BankPlacement = "auto"
    """Memory bank of each rank: whole, or its part of the rows; auto: rows where all would take much of its memory."""
    timeout_s: float = Field(600.0, ge=1, le=10**6)
    """Seconds after which a rank that does not answer ends the training; loading processes have half of that."""

    init: str = ""
    """Weights that a new run starts from: a run, a registered model, or a file (.pth, .pt, .torch, .safetensors)."""
    extend: str = ""
    """A finished run that a new run continues on the same shards, with its memory bank; the schedule restarts."""
    sinks: str = ""
    """Also send metrics to these, separated by commas: tensorboard, mlflow, wandb."""

    @field_validator("sinks")
    @classmethod
    def _are_sinks(cls, text: str) -> str:
        names = [name for part in text.split(",") if (name := part.strip())]
        for name in names:
            if name not in SINKS:
                raise ValueError(f"unknown sink {name!r}.{did_you_mean(name, SINKS)} Choose of {', '.join(SINKS)}")
        return ",".join(dict.fromkeys(names))

    @property
    def sink_names(self) -> list[str]:
        """Names of the sinks that were chosen."""
        return self.sinks.split(",") if self.sinks else []


def check_location(uri: str) -> str:
    """Return a URI that names a storage, or raise `ValueError`."""
    try:
        open_storage(uri)
    except UsageError as error:
        raise ValueError(f"{error.what} {error.hint}") from None
    return uri


Location = Annotated[str, AfterValidator(check_location)]
"""URI of a folder in a storage."""


class Options(TrainingOptions):
    """Locations that a training reads and writes, and how its ranks run."""

    data: Location
    """URI of the shards."""
    out: Location
    """URI of the run; an existing run is resumed."""


class TrainingSpec(Specification, Options):
    """Complete specification of a training, for its ranks."""

    recipe: Recipe

    @classmethod
    def parse(
        cls,
        recipe: str,
        *,
        data: str,
        out: str,
        overrides: str | Iterable[str] = (),
        options: str | Iterable[str] | TrainingOptions = (),
    ) -> TrainingSpec:
        """Return the specification of a recipe's name or path, or raise all problems at once.

        `overrides` and `options` are KEY=VALUE items, as a list or as one text with blanks between them.
        """
        problems = Collector("the training")
        resolved = problems.run(lambda: load_recipe(recipe, items_of(overrides)))
        made = problems.run(lambda: _options(data, out, options))
        problems.finish()
        assert resolved is not None
        assert made is not None
        return cls(recipe=resolved, **dict(made))


def training_options(items: str | Iterable[str]) -> TrainingOptions:
    """Return the options of NAME=VALUE items."""
    return options_from(TrainingOptions, items)


def _options(data: str, out: str, options: str | Iterable[str] | TrainingOptions) -> Options:
    problems = Collector("the training")
    given = problems.run(lambda: options if isinstance(options, TrainingOptions) else training_options(options))
    values: dict[str, Any] = {**(dict(given) if given else {}), "data": data, "out": out}
    made = problems.run(lambda: validated(Options, values, "locations", option=True))
    problems.finish()
    assert made is not None
    return made
