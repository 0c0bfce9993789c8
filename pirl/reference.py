"""Reference of every setting, generated from the models: `python -m pirl.reference > docs/configuration.md`."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .config import Recipe
from .jobs import JobSettings
from .jobs.steps import StepSettings
from .shards.spec import ShardingOptions
from .training.spec import Options

ENVIRONMENT = {
    "PIRL_BACKEND": "`pirl retrain`: where the training runs",
    "PIRL_BUCKET": "overlays: the bucket of the installation",
    "PIRL_CACHE": "folder of the cache on disk; else `~/.cache/pirl`",
    "PIRL_CACHE_GB": "most that the cache takes, in 10^9 bytes",
    "PIRL_DATA": "folder with Fashion-MNIST, for the demo",
    "PIRL_GPUS": "`pirl retrain`: GPUs of each pod",
    "PIRL_JOB": "`pirl retrain`: other settings of the job, separated by blanks",
    "PIRL_LOG": "`human` or `json`: the form of log lines",
    "PIRL_METRIC": "`pirl retrain`: what the gate looks at",
    "PIRL_METRICS_FILE": "file that Prometheus' node exporter reads",
    "PIRL_METRICS_PORT": "port of rank 0 for Prometheus; other ranks take the next ones",
    "PIRL_MIN_GAIN": "`pirl retrain`: least gain over random weights",
    "PIRL_MODEL": "`pirl retrain`: name in the registry",
    "PIRL_NODES": "`pirl retrain`: pods of the job",
    "PIRL_OUTCOME": "set by the launch: folder in which each rank leaves its outcome",
    "PIRL_RECIPE": "`pirl retrain`: recipe",
    "PIRL_REGISTRY": "`pirl retrain`: registry; else ROOT/registry",
    "PIRL_ROOT": "`pirl retrain`: where everything goes",
    "PIRL_RUNNER": "set by the local runner: its process",
    "PIRL_S3_ATTEMPTS": "tries of one request to S3, the first one included",
    "PIRL_S3_CONNECT_TIMEOUT_S": "seconds until a connection to S3 is given up",
    "PIRL_S3_READ_TIMEOUT_S": "seconds without a byte from S3",
    "PIRL_STEP": "settings of a pipeline's steps, separated by blanks",
    "PIRL_STEPS_IMAGE": "image of a pipeline's steps, read when compiling",
    "PIRL_STORAGE_PATIENCE_S": "seconds for which transient failures of storage are retried",
    "PIRL_TEST_SOURCE": "`pirl retrain`: test images",
    "PIRL_TRAINER_IMAGE": "image of a job's pods",
    "PIRL_TRAIN_SOURCE": "`pirl retrain`: training images",
    "PIRL_WARM_EPOCHS": "`pirl retrain`: epochs of a warm start",
}
"""Variables and their meaning. `pirl retrain` also reads each option of a training as PIRL_NAME."""


def markdown() -> str:
    """Return the page docs/configuration.md."""
    options = {name: field for name, field in Options.model_fields.items() if name not in ("data", "out")}
    sections = [
        "# Configuration",
        "Every setting with its type, default and bounds. This page is generated: "
        "`python -m pirl.reference > docs/configuration.md`.",
        "## Recipe",
        "The training itself. `pirl show RECIPE` prints the values of a recipe; `section.key=value` overrides one.",
        table(fields(Recipe)),
        "## Options of a training",
        "How the ranks run. Only `init` and `extend` change what is learned. On a command `--name`, in a pipeline's "
        "`options` `name=value`, for `pirl retrain` also `PIRL_NAME`.",
        table((name, field) for name, field in options.items()),
        "## Options of a source",
        "How images are read and sharded. On `pirl shard`, `run` and `retrain` `--name`, in a pipeline's "
        "`source_options` `name=value`, for `pirl retrain` also `PIRL_NAME`. `pirl preview` has those of reading.",
        table(ShardingOptions.model_fields.items()),
        "## Settings of a job",
        "For a backend on a cluster: `--job name=value`, in a pipeline's `job` `name=value`.",
        table(fields(JobSettings)),
        "## Settings of a pipeline's steps",
        "Pods of the steps on KFP, fixed when the pipeline is compiled: `--step name=value` of `pirl compile`, "
        "`submit` and `schedule`, or all of them in `PIRL_STEP`.",
        table(fields(StepSettings)),
        "## Environment variables",
        "The usual variables of AWS tools hold for S3.",
        "| variable | meaning |\n|---|---|\n"
        + "\n".join(f"| `{name}` | {text} |" for name, text in ENVIRONMENT.items()),
    ]
    return "\n\n".join(sections) + "\n"


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name and the field of every setting of a model and its sections."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def table(rows: typing.Iterable[tuple[str, FieldInfo]]) -> str:
    """Return a Markdown table of settings."""
    lines = ["| name | type | default | bounds | meaning |", "|---|---|---|---|---|"]
    for name, field in rows:
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(
            f"| `{name}` | {kind_of(field.annotation)} | {default_of(field)} | {bounds_of(field)} | {meaning} |"
        )
    return "\n".join(lines)


def kind_of(annotation: Any) -> str:
    """Return a type in words; the choices of a literal."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(parts[0])
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is dict:
        return "table"
    if origin in (tuple, list):
        kinds = list(dict.fromkeys(kind_of(part) for part in parts if part is not Ellipsis))
        size = f"{len(parts)} of " if origin is tuple and Ellipsis not in parts else "list of "
        return size + ", ".join(kinds)
    if parts:
        return " or ".join(kind_of(part) for part in parts if part is not type(None))
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def default_of(field: FieldInfo) -> str:
    """Return the default; "required" without one, "computed" if it depends on the machine."""
    if field.default_factory in (dict, list, tuple):
        return f"`{json.dumps(field.default_factory())}`"
    if field.default_factory is not None:
        return "computed"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel) or field.default is None:
        return ""
    return f"`{json.dumps(field.default, default=str)}`"


def bounds_of(field: FieldInfo) -> str:
    """Return the bounds of a number, also of the items of a list."""
    metadata = list(field.metadata)
    for part in typing.get_args(field.annotation)[:1]:
        metadata += getattr(part, "__metadata__", ())
    signs = {Ge: ">= ", Gt: "> ", Le: "<= ", Lt: "< "}
    items = [bound for item in metadata for bound in getattr(item, "metadata", None) or [item]]
    bounds = [bound for bound in items if type(bound) in signs]
    return ", ".join(f"{signs[type(bound)]}{getattr(bound, type(bound).__name__.lower()):g}" for bound in bounds)


if __name__ == "__main__":
    print(markdown(), end="")
