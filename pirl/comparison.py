"""Runs next to each other: recipe, data, cost and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UsageError
from .results import Evaluation
from .run import Run
from .text import duration, percent

HIGHER = "top-1, %"


@dataclass(frozen=True)
class Comparison:
    """A table of runs, and what forbids comparing their scores."""

    rows: list[dict[str, Any]]
    """Each with `what` and one value for each run by its name."""
    notes: list[str]


def compare_runs(uris: Sequence[str]) -> Comparison:
    """Return recipe keys that differ, data, cost and scores of runs; checkpoints are not read."""
    if len(uris) < 2:
        raise UsageError(f"{len(uris)} run is given, expected two or more", "name another run")
    runs = [Run.at(uri) for uri in uris]
    names = _names(runs)
    columns = [_facts(run) for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = []
    for key in keys:
        values = [column.get(key) for column in columns]
        if "." in key and all(value == values[0] for value in values):
            continue  # a recipe's key that is the same everywhere
        rows.append({"what": key, **dict(zip(names, values))})
        if key.endswith(HIGHER) and len(runs) == 2 and None not in values:
            first, second = map(float, values)  # type: ignore[arg-type]
            rows[-1]["difference"] = f"{second - first:+.2f}"
    if any("difference" in row for row in rows):
        rows = [{**row, "difference": row.get("difference")} for row in rows]
    return Comparison(rows, _notes(names, [run.evaluation() for run in runs]))


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the names of the runs' folders, or their locations where names are the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [f"{i}: {run.place}" for i, run in enumerate(runs, 1)]


def _facts(run: Run) -> dict[str, Any]:
    recipe, completion, evaluation = run.recipe(), run.completion(), run.evaluation()
    last = run.record().last
    facts: dict[str, Any] = {
        "recipe": recipe.name,
        "state": "done" if completion else "unfinished",
        "data": completion.data_digest[:12] if completion else None,
        "ranks": completion.ranks if completion else None,
        "steps": completion.steps if completion else last and last["step"],
        "time": duration(completion.seconds) if completion else None,
        "throughput, images/s": _rounded(last.get("images_per_s") if last else None, 1),
        "last loss": _rounded(last.get("loss") if last else None, 4),
    }
    for weights, scores in (
        (("pretrained", evaluation.scores("pretrained")), ("random", evaluation.scores("random"))) if evaluation else ()
    ):
        for probe, score in scores.items():
            facts[f"{probe}, {weights}, {HIGHER}"] = percent(score.top1.mean)
    registered = run.registered()
    facts["registered"] = f"{registered.model} {registered.version}" if registered else None
    return {**facts, **recipe.keys()}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _notes(names: Sequence[str], evaluations: Sequence[Evaluation | None]) -> list[str]:
    """Return why scores cannot be compared."""
    notes = [f"{name} has no evaluation" for name, each in zip(names, evaluations) if each is None]
    present = [each for each in evaluations if each]
    for what, values in (
        ("test images", {each.test_data for each in present}),
        ("labelled training images", {each.train_data for each in present}),
        ("protocols", {str(each.protocol) for each in present}),
    ):
        if len(values) > 1:
            notes.append(f"the evaluations have different {what}: their scores cannot be compared")
    return notes
