"""Lines of the record of a run: `metrics.jsonl`, `events.jsonl` and the progress of an evaluation.

A line of a newer version may have more values. They are kept, because a training that resumes writes its earlier lines
again.
"""

from __future__ import annotations

import json
from typing import Any, Required, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

Line = TypeVar("Line")


class MetricsLine(TypedDict, total=False):
    """Means of one interval of a training."""

    step: Required[int]
    epoch: float
    """Position, with the part of the epoch that is done."""
    loss: float
    loss_patches: float
    """Of the second views."""
    loss_images: float
    lr: float
    images_per_s: float
    step_s: float
    data_wait_s: float
    """Of a step."""
    time_s: float
    """Of the whole training so far."""
    pos_similarity: float
    """To the own row of the memory bank."""
    neg_similarity: float
    embedding_std: float


class Event(TypedDict, total=False):
    """Start, resume, checkpoint, end or fault of a training."""

    event: Required[str]
    time: Required[float]
    """Unix time."""
    step: int
    ranks: int
    version: str
    seconds: float
    bytes: int
    reason: str
    error: str
    init: str
    """Place of the initial weights."""
    init_digest: str


class ProgressLine(TypedDict):
    """The newest progress of an evaluation under way."""

    step: int
    """Units done over all phases."""
    phase: str
    done: int
    total: int
    """Units of the phase."""
    unit: str
    rate: float
    """Units per second."""


for _kind in (MetricsLine, Event):
    setattr(_kind, "__pydantic_config__", ConfigDict(extra="allow"))  # noqa: B010 (mypy has no such attribute)


def parse_lines(text: str, kind: type[Line]) -> tuple[list[Line], int]:
    """Return the lines of a kind, and the number of others, such as a last one that is cut off."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    lines: list[Line] = []
    damaged = 0
    for line in filter(str.strip, text.splitlines()):
        try:
            value = json.loads(line)
            adapter.validate_python(value)
        except (ValueError, ValidationError):
            damaged += 1
        else:
            lines.append(value)
    return lines, damaged
