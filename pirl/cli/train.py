"""`pirl train`: one training."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import DRY_RUN_HELP, Overrides, Processes, RecipeName, app, console


@app.command()
def train(
    recipe: RecipeName,
    data: Annotated[str, typer.Option(help="URI of the shards.")],
    out: Annotated[str, typer.Option(help="URI of the run; a run that is there is resumed.")],
    processes: Processes = 0,
    workers: Annotated[int, typer.Option(help="Data loading processes of each rank.")] = 0,
    log_every: Annotated[int, typer.Option(help="Steps between two log lines.")] = 50,
    checkpoint_every_s: Annotated[float, typer.Option(help="Seconds between two checkpoints.")] = 300.0,
    keep: Annotated[int, typer.Option(help="Complete checkpoints to keep.", min=1)] = 2,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Pretrain on this machine, or go on with a run that was interrupted.

    Example: pirl train demo --data shards/train --out runs/mine train.epochs=3
    """
    from ..train import Options, launch, plan

    options = Options(data, out, processes or None, workers, log_every, checkpoint_every_s, keep)
    if dry_run:
        for line in plan(recipe, options, overrides or []):
            console.print(line)
        return
    raise typer.Exit(launch(recipe, options, overrides or []))
