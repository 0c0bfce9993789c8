"""From "something has changed" to a registered model: what a schedule runs.

    decide --> shard --> train --> evaluate --> gate --> register
      `-> nothing to do                           `-> not registered, and not trained again until something changes

Every step is done once for the same images, recipe and code, under names made of these. So this is repeated after it
broke off, or started twice at once: with a job on a cluster the second finds the job of the first and follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .backends import Backend, LocalBackend
from .config import load_recipe
from .errors import EXIT_DONE
from .evaluate import evaluate_run
from .logs import say
from .outputs import check_outside, check_registry
from .programs import Training
from .registry import Decision, data_uri, decide, decide_retrain, register_run
from .shards import Source, compare_sources, open_source, summary, write_shards
from .storage import open_storage
from .text import count
from .training.spec import TrainingOptions, TrainingSpec
from .warm import warm_start


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
    metric: str = "linear_1pct"
    min_gain: float = 0.01
    warm_epochs: int | None = None
    """Epochs of a warm start where images were only added; 0: the recipe's, None: never one."""
    options: TrainingOptions = field(default_factory=TrainingOptions)
    """How the ranks run."""
    backend: Backend = field(default_factory=LocalBackend)
    """Where to train."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of the training that say who started it, on a backend that keeps labels."""


def keep_up_to_date(wanted: Retraining, dry_run: bool = False) -> int:
    """Train, evaluate, register if there is anything new, else say why not. Returns the exit code of the training.

    `dry_run` says what would be done, as far as that can be known without making shards.
    """
    sources = {"train": open_source(wanted.train_source), "test": open_source(wanted.test_source)}
    for split, source in sources.items():
        for line in summary(source):
            say(f"{split}: {line}")
    for note in compare_sources(sources["train"], sources["test"]):
        say(note)
    check_outside(wanted.root, list(sources.values()))
    check_registry(wanted.registry, list(sources.values()))
    open_storage(wanted.root).require_writable()
    data = {split: data_uri(wanted.root, split, source) for split, source in sources.items()}
    if not dry_run:
        write_shards(sources["train"], open_storage(data["train"]))
    elif not open_storage(data["train"]).exists("manifest.json"):
        say(f"new images: {len(sources['train']):,} would be sharded to {data['train']} and compared")
        say(f"what is new would be trained {wanted.backend.where}")
        return EXIT_DONE
    recipe = load_recipe(wanted.recipe, wanted.overrides)
    decision = decide_retrain(wanted.root, wanted.registry, wanted.model, recipe, data["train"], wanted.warm_epochs)
    for reason in decision.reasons:
        say(reason)
    if not decision.retrain:
        say("nothing to do")
        return EXIT_DONE
    say(f"{'would train' if dry_run else 'training'} {decision.run} {wanted.backend.where}")
    if dry_run:
        return EXIT_DONE
    return _train(wanted, decision, data["train"]) or _register(wanted, decision.run, data, sources["test"])


def _train(wanted: Retraining, decision: Decision, data: str) -> int:
    """To the end of the recipe, from the champion where the decision says so. Returns the exit code."""
    if decision.warm and not open_storage(decision.run).list("checkpoints/"):
        kept, fresh = warm_start(decision.warm, data, decision.run, decision.recipe)
        say(f"from {decision.warm.run}: {count(kept, 'row')} of the bank kept, {fresh:,} new")
    spec = TrainingSpec(recipe=decision.recipe, data=data, out=decision.run, **dict(wanted.options))
    return wanted.backend.run(Training(spec), wanted.labels)


def _register(wanted: Retraining, run: str, data: dict[str, str], test: Source) -> int:
    """Evaluate, and register what passes the gate. What does not is no failure."""
    write_shards(test, open_storage(data["test"]))
    evaluate_run(run, data["train"], data["test"])
    if decide(run, wanted.registry, wanted.model, wanted.metric, wanted.min_gain):
        version = register_run(run, wanted.registry, wanted.model)
        say(f"{version.model} {version.version}: {version.uri}")
    else:
        say(f"not registered: {'; '.join(open_storage(run).read_json('gate.json')['reasons'])}")
    return EXIT_DONE
