"""The content of a run's folder, read once, and what follows from it: verdict, table of results, curves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar, cast

from pirl.checkpoint import Checkpoints, Commit
from pirl.collapse import collapse
from pirl.config import Recipe
from pirl.errors import CheckpointError, StorageError
from pirl.gains import Gain, gains, labels_text, number_text, row_title
from pirl.lines import Event, MetricsLine
from pirl.report.charts import Chart, Line, line_chart, number, ticks
from pirl.results import Completion, Evaluation, GateDecision, Registered, StepRecord
from pirl.run import Run
from pirl.text import count, duration

T = TypeVar("T")
TITLES = {"linear": "Linear classifier", "linear_1pct": "Linear, few labels", "knn": "Nearest neighbours"}


def row_detail(probe: str, evaluation: Evaluation) -> str:
    """Return how a probe was trained, for the second line of its title."""
    return {
        "linear": f"all {evaluation.train_images:,} labels",
        "linear_1pct": labels_text(evaluation),
        "knn": f"{evaluation.protocol.neighbours} neighbours vote",
        **{name: number_text(tuned.labels, evaluation.train_images) for name, tuned in evaluation.fine_tuned().items()},
    }.get(probe, "")


def row_titles(evaluation: Evaluation | None) -> dict[str, str]:
    """Return the titles of the table's lines by probe."""
    return TITLES | dict.fromkeys(evaluation.fine_tuned() if evaluation else (), "Fine-tuned network")


@dataclass(frozen=True)
class RunFacts:
    """The content of a run directory. What is not there (yet) is None or empty."""

    uri: str
    recipe: Recipe
    config: str
    """The text of config.toml, short arrays on one line."""
    metrics: list[MetricsLine]
    events: list[Event]
    done: Completion | None
    evaluation: Evaluation | None
    gate: GateDecision | None
    registered: Registered | None
    steps: list[StepRecord]
    checkpoints: list[Commit | str]
    """The complete ones, oldest first; for a damaged one, what is wrong with it."""
    mismatch: str = ""
    """Why the evaluation is not of the newest checkpoint; empty where it is."""
    problems: tuple[str, ...] = ()
    """Of the files that could not be read and are left out."""

    @property
    def collapsed(self) -> str:
        """Why the last logged interval shows a collapse; empty where it does not."""
        return collapse(self.metrics[-1] if self.metrics else None)

    @property
    def data_digest(self) -> str | None:
        """Of the images that it was trained on."""
        if self.done:
            return self.done.data_digest
        return next((entry.data_digest for entry in self.checkpoints if isinstance(entry, Commit)), None)


def read_run(run: Run) -> RunFacts:
    """Return everything but the checkpoints' states; raise `StorageNotFoundError` where the run does not exist.

    A file that is damaged is left out and named in `problems`: it does not hide the rest.
    """
    recipe, text, record = run.recipe(), run.recipe_text(), run.record()
    problems: list[str] = []

    def readable(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except StorageError as error:
            problems.append(error.what)
            return None

    checkpoints = run.checkpoints()
    evaluation = readable(run.evaluation)
    return RunFacts(
        uri=run.uri,
        recipe=recipe,
        config=re.sub(r"\[\n([^\[\]\"]*)\n\]", _one_line, text),
        metrics=record.metrics,
        events=record.events,
        done=readable(run.completion),
        evaluation=evaluation,
        gate=readable(run.gate),
        registered=readable(run.registered),
        steps=readable(run.steps) or [],
        checkpoints=[_commit(checkpoints, name) for name in checkpoints.names()],
        mismatch=_mismatch(run, evaluation) if evaluation else "",
        problems=tuple(problems),
    )


def _mismatch(run: Run, evaluation: Evaluation) -> str:
    try:
        return run.mismatch(evaluation)
    except CheckpointError as error:
        return error.what


def _one_line(array: re.Match[str]) -> str:
    return f"[{' '.join(array[1].split()).rstrip(',')}]"


def _commit(checkpoints: Checkpoints, name: str) -> Commit | str:
    try:
        return checkpoints.commit(name)
    except CheckpointError as error:
        return error.what


@dataclass(frozen=True)
class Verdict:
    """`tone` is good, bad or open; `helped` is a sentence about the gain of pretraining."""

    tone: str
    title: str
    reasons: list[str]
    helped_tone: str
    helped: str


def verdict(run: RunFacts) -> Verdict:
    """Return the state of the registration with its reasons, and the gain of pretraining."""
    reasons = list(run.gate.reasons) if run.gate else []
    if run.registered:
        tone, title = "good", f"Registered as {run.registered.model} {run.registered.version}"
    elif run.gate and run.gate.promote:
        tone, title = "open", "Passed the gate, not registered yet"
    elif run.gate:
        tone, title = "bad", "Not registered: it did not pass the gate"
    else:
        tone, title = "open", "Not registered: the gate has not decided yet"
    return Verdict(tone, title, reasons, *_helped(run))


def _helped(run: RunFacts) -> tuple[str, str]:
    if not run.evaluation:
        started = "is finished" if run.done else "is not finished"
        return "open", f"Not evaluated yet, so nothing is known about its use. Training {started}."
    rows = [row for row in gains(run.evaluation) if row.rate == "top1"]
    texts = [f"{row_title(row.probe, run.evaluation)} {points(row.gain)} ({row.decision})" for row in rows]
    rates = f"in points over random weights: {'; '.join(texts)}."
    if "pretrained" in run.evaluation.collapsed:
        return "bad", f"The features have collapsed: they are the same for all training images, {rates}"
    if reason := run.collapsed:
        return "bad", f"{reason[0].upper()}{reason[1:]}; {rates}"
    better, worse = ([row for row in rows if row.tone == tone] for tone in ("good", "bad"))
    if not better and not worse:
        return "open", f"No difference is shown by {count(run.evaluation.test_images, 'test image')}, {rates}"
    if worse:
        return "bad", f"Pretraining {'helped in part and hurt in part' if better else 'hurt'}, {rates}"
    return (
        ("good", f"Pretraining helped, {rates}")
        if len(better) == len(rows)
        else ("open", f"Pretraining helped in part, {rates}")
    )


@dataclass(frozen=True)
class Scale:
    """The axis next to the table: percentages low..high as places 0..100 of its width."""

    low: float
    high: float
    labels: list[tuple[float, str]]

    def at(self, share: float) -> float:
        return round(100 * (100 * share - self.low) / (self.high - self.low), 3)

    def width(self, share: float) -> float:
        return round(100 * 100 * abs(share) / (self.high - self.low), 3)


def scale(rows: list[Gain]) -> Scale:
    """Return an axis that holds all rates with their spreads. It need not start at 0: it carries dots, not bars."""
    ends = [
        100 * (side.mean + sign * side.error(row.images))
        for row in rows
        for side in (row.pretrained, row.random)
        for sign in (-1, 1)
    ]
    marks = ticks(min(ends), max(ends), 4)
    low, high = marks[0], marks[-1]
    return Scale(low, high, [(100 * (mark - low) / (high - low), number(mark, marks)) for mark in marks])


def points(gain: float) -> str:
    """Return a difference of shares as signed percentage points."""
    return f"{100 * gain:+.2f}".replace("-", "\N{MINUS SIGN}")


def when(seconds: float) -> str:
    """Return seconds since 1970 as a UTC time."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def header(run: RunFacts) -> list[tuple[str, str]]:
    """Return the facts under the title: (name, value)."""
    recipe, model = run.recipe, run.recipe.model
    starts = [event for event in run.events if event["event"] in ("start", "resume")]
    last = run.metrics[-1] if run.metrics else None
    facts = []
    if starts:
        facts.append(("Started", when(starts[0]["time"])))
    if run.done:
        facts.append(
            (
                "Training",
                f"{count(run.done.epochs, 'epoch')}, {count(run.done.steps, 'step')}, "
                f"{count(run.done.images_seen, 'image')} seen in {duration(run.done.seconds)}",
            )
        )
    elif last:
        facts.append(("Training", f"not finished: epoch {last['epoch']:.2f} of {recipe.train.epochs}"))
    else:
        facts.append(("Training", "no step was logged yet"))
    if starts:
        resumes = len(starts) - 1
        again = f", resumed {'once' if resumes == 1 else f'{resumes} times'}" if resumes else ""
        facts.append(("Ranks", f"{starts[-1]['ranks']}{again}"))
        facts.append(("Version", f"pirl-pipeline {starts[-1]['version']}"))
    layers = "-".join(str(count) for count in model.layers)
    facts.append(("Trunk", f"ResNet of {model.block} blocks {layers}, width {model.width:g}"))
    facts.append(("Recipe digest", recipe.digest()[:12]))
    return facts


def curves(run: RunFacts) -> list[Chart]:
    """Return the charts of a training. Empty where no step was logged."""
    lines = run.metrics
    if not lines:
        return []
    marks = [
        (event["step"] * lines[-1]["epoch"] / lines[-1]["step"], "resumed")
        for event in run.events
        if event["event"] == "resume"
    ]

    def line(name: str, key: str, style: int = 0, scale: float = 1.0) -> Line:
        rows = [cast(Mapping[str, float], row) for row in lines]
        return Line(name, [(row["epoch"], row[key] * scale) for row in rows if key in row], style)

    loss = run.recipe.loss
    levels = []
    if loss.kind == "cross_entropy" and isinstance(loss.negatives, int):
        chance = math.log(loss.negatives + 1)
        levels = [(chance, f"chance: ln(K+1) = {chance:.2f}")]
    return [
        line_chart(
            "Loss",
            "nats",
            [line("total", "loss"), line("patches", "loss_patches", 1), line("images", "loss_images", 2)],
            marks=marks,
            levels=levels,
            note=f"{loss.kind} with {loss.describe()}; the total weighs patches {loss.patch_weight:g}.",
        ),
        line_chart("Learning rate", "rate", [line("learning rate", "lr")], marks=marks, zero=True),
        line_chart(
            "Similarity to the memory bank",
            "cosine",
            [line("own row", "pos_similarity"), line("negatives", "neg_similarity", 1)],
            marks=marks,
            note="Learning pulls the two apart: an image resembles its own row, and no other.",
        ),
        line_chart(
            "Spread of the embeddings",
            "standard deviation",
            [line("spread", "embedding_std")],
            marks=marks,
            zero=True,
            levels=[(1.0, "even over the sphere")],
            note="Near 0 the embeddings have collapsed into one point.",
        ),
        line_chart("Throughput", "images per second", [line("all ranks", "images_per_s")], marks=marks, zero=True),
        line_chart(
            "Time of a step",
            "milliseconds",
            [line("step", "step_s", 0, 1000), line("of it waiting for data", "data_wait_s", 1, 1000)],
            marks=marks,
            zero=True,
        ),
    ]
