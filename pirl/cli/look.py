"""`pirl recipes`, `show`, `preview`, `runs`, `doctor`: look before you pay."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.text import Text

from .. import logs
from ..backends import DEFAULT_CLUSTER, open_cluster
from ..errors import EXIT_FAILURE, UsageError
from ..shards.spec import SourceOptions
from ..text import duration
from .app import DEFAULT_ROOT, BackendName, JobItems, Json, Overrides, RecipeName, app, console, show_rows
from .options import options_of

IMAGENET = 1_281_167  # training images of ImageNet-1k
IMAGES_PER_RANK = 32  # in all of the reference's settings: its batch grows with the GPUs, and the rate with the batch


@app.command()
def recipes(
    ranks: Annotated[int | None, typer.Option(help="Rescale to this many GPUs.", min=1, max=65536)] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, with steps and learning rates on ImageNet's 1,281,167 images.

    Example: pirl recipes --ranks 8
    """
    from ..config import load_recipe, recipe_names
    from ..optim import learning_rate

    scale = [] if ranks is None else [f"train.batch_size={IMAGES_PER_RANK * ranks}"]
    rows = [
        {
            "recipe": recipe.name,
            "ranks": recipe.train.batch_size // IMAGES_PER_RANK,
            "batch_size": recipe.train.batch_size,
            "epochs": recipe.train.epochs,
            "iterations": recipe.train.epochs * recipe.steps_per_epoch(recipe.rows(IMAGENET)),
            "learning_rate": learning_rate(recipe, recipe.optim.warmup_epochs),
            "last_learning_rate": learning_rate(recipe, recipe.train.epochs - 1),
            "head": recipe.model.head,
            "loss": recipe.loss.kind,
            "temperature": recipe.loss.temperature,
            "published_top1": recipe.published_top1,
            "description": recipe.description,
        }
        for recipe in (load_recipe(name, scale) for name in recipe_names())
    ]
    if as_json:
        show_rows(rows, as_json)
        return
    short = {"learning_rate": "lr", "last_learning_rate": "last lr", "temperature": "T", "published_top1": "top-1"}
    keys = [key for key in rows[0] if key not in ("batch_size", "description")]
    show_rows(
        [{short.get(key, key): f"{row[key]:,}" if key == "iterations" else row[key] for key in keys} for row in rows],
        False,
    )
    batch = "each recipe's own global batch" if ranks is None else f"train.batch_size={IMAGES_PER_RANK * ranks}"
    console.print(
        f"iterations on ImageNet's {IMAGENET:,} images, {IMAGES_PER_RANK} of them a step on each rank (GPU): {batch}.\n"
        "lr: of the first and the last epoch; proportional to the global batch, as in the reference: "
        "--ranks N shows it for N.",
    )


@app.command()
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe as it would run, every key.

    Example: pirl show demo train.epochs=3
    """
    from ..config import load_recipe

    logs.output(load_recipe(recipe, overrides or []).to_toml())


@app.command()
@options_of(SourceOptions)
def preview(
    recipe: RecipeName,
    images: Annotated[str, typer.Argument(help="Folder of images, or any source that `pirl shard` takes.")],
    options: SourceOptions,
    out: Annotated[str, typer.Option(help="File to write: a path or an s3:// URI.")] = "preview.html",
    count: Annotated[int, typer.Option(help="Images.", min=1)] = 8,
) -> None:
    """Write a sheet of the views that a recipe makes of images.

    Example: pirl preview demo photos/train --out preview.html
    """
    from ..report import write_preview

    console.print(write_preview(recipe, images, out, count=count, options=options))


@app.command()
def runs(
    root: Annotated[str, typer.Argument(help="Folder or s3:// prefix.")] = DEFAULT_ROOT, as_json: Json = False
) -> None:
    """List the runs below a folder, the latest first.

    Example: pirl runs runs
    """
    from ..runs import list_runs

    rows = [summary.model_dump() for summary in list_runs(root)]
    if not as_json:
        rows = [{**row, "updated": ago(row["updated"])} for row in rows]
    show_rows(
        rows, as_json, hide=("uri", *(key for key in rows[0] if not any(row[key] for row in rows))) if rows else ()
    )


def ago(moment: float | None) -> str | None:
    """Return a Unix time as the time since then."""
    return None if moment is None else f"{duration(max(0.0, time.time() - moment))} ago"


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="URIs of two or more runs.")],
    as_json: Json = False,
) -> None:
    """Print runs next to each other: recipe keys that differ, data, cost, scores.

    Example: pirl compare runs/mine runs/other
    """
    from ..comparison import compare_runs

    comparison = compare_runs(runs)
    if as_json:
        logs.output(f"{json.dumps(vars(comparison))}\n")
        return
    show_rows(comparison.rows, False)
    for note in comparison.notes:
        console.print(f"note: {note}")


@app.command()
def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="Look at the cluster, not at this machine.")] = False,
    root: Annotated[
        str, typer.Option(envvar="PIRL_ROOT", help="s3:// location of the runs; a pod tries to write to it.")
    ] = "",
    backend: BackendName = DEFAULT_CLUSTER,
    job: JobItems = None,
    as_json: Json = False,
) -> None:
    """Look at what this machine, or a cluster, can do for a training, and how to fix the rest.

    With --cluster: API, operator, rights of the launcher, GPUs, queue, and a job of one pod, deleted afterwards.

    Example: pirl doctor

    Example: pirl doctor --cluster --root s3://bucket/pirl --job nodes=4 --job gpus=8
    """
    from ..doctor import cluster_checks, machine_checks

    if job and not cluster:
        raise UsageError("--job is for a cluster", "add --cluster, or leave it away")
    rows = []
    chosen = open_cluster(backend, job or ()) if cluster else None
    for check in cluster_checks(chosen.kinds, chosen.settings, root) if chosen else machine_checks():
        rows.append(vars(check))
        if as_json:
            continue
        style = {"ok": "green", "note": "yellow", "bad": "red"}[check.state]
        console.print(Text.assemble((f"{check.state:4}", style), f" {check.name}: {check.finding}"))
        if check.fix:
            console.print(f"       -> {check.fix}")
    if as_json:
        logs.output(f"{json.dumps(rows)}\n")
    raise typer.Exit(EXIT_FAILURE if any(row["state"] == "bad" for row in rows) else 0)
