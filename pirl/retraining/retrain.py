"""From "something has changed" to a registered model, as a schedule runs it.

    decide --> shard --> train --> evaluate --> gate --> register
      `-> up to date                              `-> not registered, and not trained again until something changes

Every step is done once for the same images, recipe and code, under names made of these. So this is repeated after it
broke off, or started twice at once: with a job on a cluster the second finds the job of the first and follows it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pirl.backends import Backend, LocalBackend
from pirl.config import load_recipe
from pirl.errors import EXIT_DONE, PreemptedError
from pirl.evaluate.images import check_images
from pirl.evaluate.spec import EvaluationSpec, options_like
from pirl.gate import METRIC, MIN_GAIN, RejectedError, check_question, decide, register_run
from pirl.initial.warm import warm_start
from pirl.logs import info, progress
from pirl.outputs import check_outside, check_registry
from pirl.programs import EvaluationProgram, Training
from pirl.retraining.changes import Decision, Gating, data_uri, decide_retrain
from pirl.run import Run
from pirl.shards import MANIFEST, ShardingOptions, Source, compare_classes, open_source, summary, write_shards
from pirl.storage import open_storage
from pirl.text import count
from pirl.training.spec import TrainingOptions, TrainingSpec


@dataclass(frozen=True)
class Retraining:
    """A model to keep up to date with its images, recipe and code."""

    train_source: str
    """Images as `pirl.shards.open_source` names them, with classes: the gate asks for an evaluation."""
    test_source: str
    root: str
    """URI below which shards and runs go."""
    registry: str
    model: str
    recipe: str
    overrides: tuple[str, ...] = ()
    metric: str = METRIC
    min_gain: float = MIN_GAIN
    warm_epochs: int | None = None
    """Epochs of a warm start where images were only added; 0: the recipe's, None: never one."""
    options: TrainingOptions = field(default_factory=TrainingOptions)
    """How the ranks run."""
    source_options: ShardingOptions = field(default_factory=ShardingOptions)
    """How the images are read, of both sources."""
    backend: Backend = field(default_factory=LocalBackend)
    """Backend of the training."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that name the origin of the training, on a backend that keeps labels."""


def keep_up_to_date(retraining: Retraining, dry_run: bool = False) -> int:
    """Train, evaluate, register if there is anything new, else print why not. Return the exit code of the training.

    `dry_run` prints what would be done, as far as possible without making shards.
    """
    check_question(retraining.metric, retraining.min_gain)
    if not dry_run:
        retraining.backend.check_location("root", retraining.root)
        retraining.backend.require_access()
    own = retraining.source_options
    named = {"train": retraining.train_source, "test": retraining.test_source}
    sources = {split: open_source(name, own) for split, name in named.items()}
    for split, source in sources.items():
        for line in summary(source):
            info(f"{split}: {line}")
    for note in compare_classes(sources["train"], sources["test"]):
        info(note)
    check_outside(retraining.root, list(sources.values()))
    check_registry(retraining.registry, list(sources.values()))
    open_storage(retraining.root).require_writable()
    data = {split: data_uri(retraining.root, split, source, own.decoding) for split, source in sources.items()}
    if not dry_run:
        _shard(sources["train"], data["train"], own)
    elif not open_storage(data["train"]).exists(MANIFEST):
        info(f"new: {count(len(sources['train']), 'image')} would be sharded to {data['train']} and compared")
        info(f"what is new would be trained {retraining.backend.where}")
        return EXIT_DONE
    recipe = load_recipe(retraining.recipe, retraining.overrides)
    gating = Gating(retraining.registry, retraining.model, retraining.metric, retraining.min_gain, data["test"])
    decision = decide_retrain(
        retraining.root, gating, recipe, data["train"], retraining.warm_epochs, retraining.options.init
    )
    for reason in decision.reasons:
        info(reason)
    if not decision.retrain:
        info("up to date")
        return EXIT_DONE
    info(f"{'would train' if dry_run else 'training'} {decision.run} {retraining.backend.where}")
    if dry_run:
        return EXIT_DONE
    _shard(sources["test"], data["test"], own)
    check_images(data["train"], data["test"])  # what an evaluation would refuse after the training
    if code := _train(retraining, decision, data["train"]):
        return code
    with ending_on_sigterm(f"the training is saved in {decision.run}"):
        if code := _evaluate(retraining, decision.run, data):
            return code
        _register(retraining, decision.run)
    return EXIT_DONE


@contextmanager
def ending_on_sigterm(saved: str) -> Iterator[None]:
    """Turn a SIGTERM into a `PreemptedError` that names what is `saved`. Outside of the main thread a no-op."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise PreemptedError(f"stopped by SIGTERM; {saved}", "run the same command again to continue")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _shard(source: Source, data: str, options: ShardingOptions) -> None:
    write_shards(
        source,
        open_storage(data),
        max_bad_share=options.max_bad_share,
        decoding=options.decoding,
        progress=progress("sharding"),
    )


def _train(retraining: Retraining, decision: Decision, data: str) -> int:
    """Train to the end of the recipe, from the champion where the decision has a warm start. Return the exit code."""
    if decision.warm and not Run.at(decision.run).checkpoints().names():
        kept, fresh = warm_start(decision.warm, data, decision.run, decision.recipe)
        info(f"from {decision.warm.run}: {count(kept, 'row')} of the bank kept, {fresh:,} new")
    options = dict(retraining.options) | ({"init": ""} if decision.warm else {})
    spec = TrainingSpec(recipe=decision.recipe, data=data, out=decision.run, **options)
    return retraining.backend.run(Training(spec), retraining.labels)


def _evaluate(retraining: Retraining, run: str, data: dict[str, str]) -> int:
    """Evaluate on the backend of the training, unless the run has the result. Return the exit code."""
    options = options_like(retraining.options)
    program = EvaluationProgram(EvaluationSpec.parse(run, data=data["train"], test=data["test"], options=options))
    return EXIT_DONE if program.is_complete() else retraining.backend.run(program, retraining.labels)


def _register(retraining: Retraining, run: str) -> None:
    """Register what passes the gate. A rejection is not a failure."""
    decision = decide(run, retraining.registry, retraining.model, retraining.metric, retraining.min_gain)
    for reason in decision.reasons:
        info(reason)
    if not decision.promote:
        info("not registered")
        return
    try:
        version = register_run(run, retraining.registry, retraining.model)
    except RejectedError as error:  # another version has become the champion meanwhile
        info(f"not registered: {error.what}")
        return
    info(f"{version.model} {version.version}: {version.uri}")
