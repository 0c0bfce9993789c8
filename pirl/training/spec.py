"""Specification of a training: what to train, on which data, into which run, and how its ranks run.

One model, made from the options of a command, the texts of a pipeline, the environment or JSON. Ranks and pods get it
as one JSON file. A new option of training is one more field of `TrainingOptions`: commands, pipelines, components and
pods have it by that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ..config import Recipe, load_recipe
from ..errors import UsageError
from ..settings import Collector, Settings, json_value, read_items, read_json, split_items, validated
from ..storage import open_storage


class TrainingOptions(Settings):
    """How the ranks run: nothing here changes what is learned."""

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
    timeout_s: float = Field(600.0, ge=1, le=10**6)
    """Seconds after which a rank that does not answer ends the training; loading processes have half of that."""

    def items(self) -> list[str]:
        """Return NAME=VALUE items of what is not at its default, which `training_options` takes."""
        return [f"{name}={json.dumps(value)}" for name, value in self.model_dump(exclude_defaults=True).items()]


class Options(TrainingOptions):
    """Locations that a training reads and writes, and how its ranks run."""

    data: str
    """URI of the shards."""
    out: str
    """URI of the run; an existing run is resumed."""

    @field_validator("data", "out")
    @classmethod
    def _is_location(cls, uri: str) -> str:
        try:
            open_storage(uri)
        except UsageError as error:
            raise ValueError(f"{error.what} {error.hint}") from None
        return uri


class TrainingSpec(Options):
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

    @classmethod
    def read(cls, path: str) -> TrainingSpec:
        """Return the specification in a JSON file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"specification {path} cannot be read: {error}", "name a file of `to_json`") from None
        return validated(cls, read_json(text, path), path)

    def to_json(self) -> str:
        """Return the text that `read` takes."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"


def items_of(text: str | Iterable[str]) -> list[str]:
    """Return the items of a text, or those of a list."""
    return split_items(text) if isinstance(text, str) else list(text)


def training_options(items: str | Iterable[str]) -> TrainingOptions:
    """Return the options of NAME=VALUE items."""
    values, problems = read_items(items_of(items), json_value, "name=value")
    return validated(TrainingOptions, values, "options", problems, entry="option")


def _options(data: str, out: str, options: str | Iterable[str] | TrainingOptions) -> Options:
    problems = Collector("the training")
    given = problems.run(lambda: options if isinstance(options, TrainingOptions) else training_options(options))
    values: dict[str, Any] = {**(dict(given) if given else {}), "data": data, "out": out}
    made = problems.run(lambda: validated(Options, values, "locations", option=True))
    problems.finish()
    assert made is not None
    return made
