"""`pirl train`: one training, here or on a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import logs
from ..errors import UsageError
from .app import DRY_RUN_HELP, BackendName, JobItems, Overrides, Processes, RecipeName, app, console


@app.command()
def train(
    recipe: RecipeName,
    data: Annotated[str, typer.Option(help="URI of the shards.")],
    out: Annotated[str, typer.Option(help="URI of the run; a run that is there is resumed.")],
    backend: BackendName = "local",
    processes: Processes = 0,
    workers: Annotated[int, typer.Option(help="Data loading processes of each rank.")] = 0,
    log_every: Annotated[int, typer.Option(help="Steps between two log lines.")] = 50,
    checkpoint_every_s: Annotated[float, typer.Option(help="Seconds between two checkpoints.")] = 300.0,
    keep: Annotated[int, typer.Option(help="Complete checkpoints to keep.", min=1)] = 2,
    keep_every_epochs: Annotated[
        int, typer.Option(help="Also save and keep for good one checkpoint every so many epochs; 0: none.", min=0)
    ] = 0,
    keep_best: Annotated[
        bool, typer.Option("--keep-best", help="Also keep the checkpoint of the lowest loss.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option(help="Seconds after which a rank that does not answer ends the training.", min=1)
    ] = 600.0,
    job: JobItems = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP + " With pytorchjob: print its manifest.")] = False,
) -> None:
    """Pretrain, or go on with a run that was interrupted.

    Example: pirl train demo --data shards/train --out runs/mine train.epochs=3

    Example: pirl train r50-200ep-mlp --backend pytorchjob --job nodes=4 --job gpus=8 --data s3://b/data --out s3://b/r
    """
    from ..train import launch, plan
    from ..training.spec import Options

    options = Options(
        data,
        out,
        processes or None,
        workers,
        log_every,
        checkpoint_every_s,
        keep,
        keep_every_epochs,
        keep_best,
        timeout_s,
    )
    if backend == "pytorchjob":
        from ..jobs import job_settings, launch_job, prepare, to_yaml

        settings = job_settings(job or (), {"processes": processes})
        if not dry_run:
            launch_job(recipe, options, settings, overrides or [])
            return
        _, manifest = prepare(recipe, options, settings, overrides or [])
        logs.output(to_yaml(manifest))
        return
    if job:
        raise UsageError("--job is for a PyTorchJob", "add --backend pytorchjob, or leave it away")
    if dry_run:
        for line in plan(recipe, options, overrides or []):
            console.print(line)
        return
    raise typer.Exit(launch(recipe, options, overrides or []))
