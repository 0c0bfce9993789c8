"""The list of runs below a folder, read without checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pirl import logs
from pirl.errors import PirlError
from pirl.results import Content
from pirl.run import DONE, RECIPE, Record, Run
from pirl.storage import open_storage

C = TypeVar("C")


class RunSummary(Content):
    """One line of the list of runs."""

    run: str
    recipe: str | None = None
    state: str
    """done, preempted, imported or unfinished."""
    epoch: float | None = None
    epochs: int | None = None
    step: int | None = None
    loss: float | None = None
    images_per_s: float | None = None
    linear_top1: float | None = None
    knn_top1: float | None = None
    registered: str | None = None
    updated: float | None = None
    """Unix time of the last event."""
    uri: str


def list_runs(root: str) -> list[RunSummary]:
    """Return a summary of each run below `root`, the latest first, without reading checkpoints.

    A content that cannot be read is left out with a warning: it hides neither the rest of its run nor other runs.
    """
    storage = open_storage(root)
    folders = [name.rpartition("/")[0] for name in storage.list() if name.rpartition("/")[2] == RECIPE]
    summaries = [_summary(Run(storage / folder if folder else storage), folder or ".") for folder in folders]
    return sorted(summaries, key=lambda summary: -(summary.updated or 0))


def _summary(run: Run, name: str) -> RunSummary:
    record = _readable(run.record) or Record([], [])
    recipe, result, registered = _readable(run.recipe), _readable(run.evaluation), _readable(run.registered)
    last, event = record.last, record.events[-1] if record.events else None
    scores = result.pretrained if result else {}
    state = {"preempted": "preempted", "import": "imported"}.get(event["event"] if event else "", "unfinished")
    return RunSummary(
        run=name,
        recipe=recipe.name if recipe else None,
        state="done" if run.storage.exists(DONE) else state,
        epoch=round(last["epoch"], 2) if last and "epoch" in last else None,
        epochs=recipe.train.epochs if recipe else None,
        step=last["step"] if last else None,
        loss=last.get("loss") if last else None,
        images_per_s=last.get("images_per_s") if last else None,
        linear_top1=scores["linear"].top1.mean if "linear" in scores else None,
        knn_top1=scores["knn"].top1.mean if "knn" in scores else None,
        registered=f"{registered.model} {registered.version}" if registered else None,
        updated=event["time"] if event else None,
        uri=run.uri,
    )


def _readable(read: Callable[[], C]) -> C | None:
    """Return a content of a run; leave out one that cannot be read, with a warning."""
    try:
        return read()
    except PirlError as error:
        logs.warn(f"left out: {error}")
        return None
