"""Specification of an evaluation: the run, the labelled data, and the protocol with its options.

One model, made from the options of a command, the texts of a step or JSON. Ranks and pods get it as one JSON file. A
new option of evaluation is one more field of `EvaluationOptions`: the command and the step have it by that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Self

from pydantic import Field, field_validator, model_validator

from ..errors import did_you_mean
from ..settings import Collector, Settings, Specification, options_from, validated
from ..training.spec import Location, TrainingOptions
from .schedules import FinetuneProtocol, Schedule

PROTOCOLS = ("fast", "zoo", "finetune", "bank")
PROTOCOLS_OF = {
    "epochs": ("zoo", "finetune"),
    "base_lr": ("zoo", "finetune"),
    "schedule": ("zoo",),
    "label_shares": ("finetune",),
}
"""Option -> the protocols that have it."""


class EvaluationOptions(Settings):
    """The protocol, and how it is applied."""

    protocol: str = "fast"
    """fast: features once; zoo: as the zoo's numbers were made; finetune: fast, then the whole network trained with
    1 % and 10 % of the labels; bank: the rows of the memory bank."""
    epochs: int | None = Field(None, ge=1, le=10**6)
    """Epochs of the protocols zoo (those of its schedule if not given) and finetune (70)."""
    schedule: Schedule = "imagenet"
    """Epochs and drops of the protocol zoo, as the paper has them for a data set: imagenet 28, places205 14, inat18 84
    epochs."""
    base_lr: float | None = Field(None, gt=0, le=1000)
    """Learning rate of the protocols zoo and finetune for a batch of 256; 0.01 if not given."""
    label_shares: str = ""
    """Shares of the labels for the protocol finetune, separated by commas; 0.01,0.1 if not given."""
    processes: int = Field(0, ge=0, le=1024)
    """Processes (ranks) on this machine, or in each pod; 0: one for each GPU, else two, in a pod one."""
    workers: int = Field(-1, ge=-1, le=256)
    """Data loading processes of each rank; -1: as many as there are cores, at most 8."""
    timeout_s: float = Field(600.0, ge=1, le=10**6)
    """Seconds after which a rank that does not answer ends the evaluation."""

    def items(self) -> list[str]:
        """Return NAME=VALUE items of what is not at its default, which `evaluation_options` takes."""
        return [f"{name}={json.dumps(value)}" for name, value in self.model_dump(exclude_defaults=True).items()]

    @field_validator("protocol")
    @classmethod
    def _is_protocol(cls, name: str) -> str:
        if name not in PROTOCOLS:
            raise ValueError(f"unknown protocol.{did_you_mean(name, PROTOCOLS)} Choose one of {', '.join(PROTOCOLS)}")
        return name

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        for name, protocols in PROTOCOLS_OF.items():
            if self.protocol not in protocols and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is an option of the protocol {' and '.join(protocols)}: omit it, or choose that protocol"
                )
        return self

    @field_validator("label_shares", mode="before")
    @classmethod
    def _are_shares(cls, value: object) -> str:
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        parts = [part.strip() for part in text.split(",") if part.strip()]
        FinetuneProtocol(**{"shares": tuple(map(float, parts))} if parts else {})
        return ",".join(parts)

    def finetune_protocol(self) -> FinetuneProtocol:
        """Return the settings of the protocol finetune."""
        shares = {"shares": tuple(map(float, self.label_shares.split(",")))} if self.label_shares else {}
        values = {"epochs": self.epochs, "base_lr": self.base_lr, **shares}
        return FinetuneProtocol(**{name: value for name, value in values.items() if value is not None})


def options_like(training: TrainingOptions) -> EvaluationOptions:
    """Return the options of the evaluation that follows a training: as many processes, and as patient."""
    return EvaluationOptions(processes=training.processes, workers=training.workers, timeout_s=training.timeout_s)


class EvaluationSpec(Specification, EvaluationOptions):
    """One evaluation: all that its ranks have to know."""

    run: Location
    """URI of a run, or of one of its checkpoints."""
    data: Location
    """URI of labelled shards to train the probe on."""
    test: Location
    """URI of labelled shards to test it on."""

    @classmethod
    def parse(
        cls, run: str, *, data: str, test: str, options: str | Iterable[str] | EvaluationOptions = ()
    ) -> EvaluationSpec:
        """Return the specification, or raise all problems at once.

        `options` are NAME=VALUE items, as a list or as one text with blanks between them.
        """
        problems = Collector("the evaluation")
        own = problems.run(lambda: evaluation_options(options))
        values = {**(dict(own) if own else {}), "run": run, "data": data, "test": test}
        spec = problems.run(lambda: validated(cls, values, "locations", option=True))
        problems.finish()
        assert spec is not None
        return spec


def evaluation_options(options: str | Iterable[str] | EvaluationOptions) -> EvaluationOptions:
    """Return the options of NAME=VALUE items."""
    return options if isinstance(options, EvaluationOptions) else options_from(EvaluationOptions, options)
