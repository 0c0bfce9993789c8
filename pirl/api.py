"""The Python interface: the steps of the command line as functions. `import pirl` offers them under its own name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .backends import prepare_training
from .embedding import Embeddings, Encoder, load
from .errors import EXIT_DONE, EXIT_PREEMPTED, PreemptedError, TrainingError, UsageError
from .run import Run
from .settings import validated
from .shards import DatasetSource, Manifest, ShardingOptions, Source, open_source, write_shards
from .storage import open_storage
from .training.spec import TrainingOptions

Overrides = Mapping[str, Any] | str | Iterable[str]

__all__ = ["Embeddings", "Encoder", "load", "pretrain", "shard"]


def shard(
    source: str | Path | Source | Any,
    out: str | Path,
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Manifest:
    """Pack images into shards at `out`, as `pirl shard` does; return their manifest.

    source: a place that `pirl shard` takes, or a torchvision data set of (PIL image, label). options: those of the
    command, with underscores: background, max_pixels. A broken image goes into quarantine.json; `max_bad_share` is the
    most of them.

        manifest = pirl.shard("photos/train", "shards/train")
    """
    own = validated(ShardingOptions, options, "options", entry="option")
    if isinstance(source, str | Path):
        opened: Source = open_source(str(source), own)
    else:
        opened = source if isinstance(source, Source) else DatasetSource(source)
    return write_shards(
        opened,
        open_storage(out),
        processes=processes or os.cpu_count() or 1,
        max_bad_share=own.max_bad_share,
        decoding=own.decoding,
        progress=progress,
    )


def pretrain(
    recipe: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    overrides: Overrides = (),
    backend: str = "local",
    job: Overrides = (),
    **options: Any,
) -> Run:
    """Pretrain by a recipe on the shards `data`, or resume the run at `out`; return the run.

    overrides: settings of the recipe by dotted name. backend and job: where to train, and settings of a cluster's job.
    options: those of `pirl train`, with underscores: workers, log_every, checkpoint_every_s. The ranks are processes of
    their own. `PreemptedError` after a stop signal: the same call resumes.

        run = pirl.pretrain("demo", "shards/train", "runs/mine", overrides={"train.epochs": 3})
    """
    chosen, program = prepare_training(
        str(recipe),
        data=str(data),
        out=str(out),
        overrides=items(overrides),
        options=validated(TrainingOptions, options, "options", entry="option"),
        backend=backend,
        job=items(job),
    )
    code = chosen.run(program)
    if code == EXIT_PREEMPTED:
        raise PreemptedError(f"the training in {out} was stopped; its state is saved", "call pretrain again to resume")
    if code != EXIT_DONE:
        raise TrainingError(f"the training in {out} ended with exit code {code}", "its own message stands above")
    return Run.at(str(out))


def items(values: Overrides) -> str | list[str]:
    """Return KEY=VALUE items of a mapping; a text or a list of items as it is."""
    if isinstance(values, str):
        return values
    if not isinstance(values, Mapping):
        return list(values)
    return [f"{key}={value if isinstance(value, str) else _text(key, value)}" for key, value in values.items()]


def _text(key: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        raise UsageError(
            f"{key} is a {type(value).__name__}, expected a number, a text, true or false, or a list of them",
            "give a plain value",
        ) from None
