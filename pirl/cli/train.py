"""`pirl train`: one training, here or on a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import logs
from .app import DRY_RUN_HELP, BackendName, JobItems, Overrides, Processes, RecipeName, app


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
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP + " On a cluster: print the manifest.")] = False,
) -> None:
    """Pretrain, or go on with a run that was interrupted.

    Example: pirl train demo --data shards/train --out runs/mine train.epochs=3

    Example: pirl train r50-200ep-mlp --backend pytorchjob --job nodes=4 --job gpus=8 --data s3://b/data --out s3://b/r
    """
    from ..backends import open_backend
    from ..programs import Training
    from ..training.spec import Options

    chosen = open_backend(backend, job or (), {"processes": processes})
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
    program = Training(recipe, options, overrides or ())
    if dry_run:
        logs.output(chosen.plan(program))
        return
    if code := chosen.run(program):
        raise typer.Exit(code)
