"""Specification of an evaluation: the run, the labelled data, and the protocol with its options.

One model, made from the options of a command, the texts of a step or JSON. A new option of evaluation is one more field
of `EvaluationOptions`: the command and the step have it by that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from pydantic import Field, field_validator, model_validator

from ..errors import did_you_mean
from ..settings import Collector, Settings, Specification, options_from, validated
from ..training.spec import Location

PROTOCOLS = ("fast", "zoo", "bank")


class EvaluationOptions(Settings):
    """The protocol, and how it is applied."""

    protocol: str = "fast"
    """fast: features once; zoo: as the zoo's numbers were made; bank: the rows of the memory bank."""
    epochs: int | None = Field(None, ge=1, le=10**6)
    """Epochs of the protocol zoo, 28 if not given."""
    workers: int = Field(0, ge=0, le=256)
    """Data loading processes of the protocol zoo; 0: none."""

    @field_validator("protocol")
    @classmethod
    def _is_protocol(cls, name: str) -> str:
        if name not in PROTOCOLS:
            raise ValueError(f"unknown protocol.{did_you_mean(name, PROTOCOLS)} Choose one of {', '.join(PROTOCOLS)}")
        return name

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.protocol != "zoo" and (self.epochs is not None or self.workers):
            raise ValueError("epochs and workers are options of the protocol zoo: omit them, or choose that protocol")
        return self


class EvaluationSpec(Specification, EvaluationOptions):
    """One evaluation: all that its process has to know."""

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
        own = problems.run(lambda: _options(options))
        values = {**(dict(own) if own else {}), "run": run, "data": data, "test": test}
        spec = problems.run(lambda: validated(cls, values, "locations", option=True))
        problems.finish()
        assert spec is not None
        return spec


def _options(options: str | Iterable[str] | EvaluationOptions) -> EvaluationOptions:
    return options if isinstance(options, EvaluationOptions) else options_from(EvaluationOptions, options)
