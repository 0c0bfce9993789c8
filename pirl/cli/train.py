"""`pirl train`: one training, on this machine or on a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import logs
from ..backends import prepare_training
from ..text import with_paths
from ..training.spec import TrainingOptions
from .app import DRY_RUN_HELP, BackendName, JobItems, Json, Overrides, RecipeName, app
from .options import options_of


@app.command()
@options_of(TrainingOptions)
def train(
    recipe: RecipeName,
    data: Annotated[str, typer.Option(help="URI of the shards.")],
    out: Annotated[str, typer.Option(help="URI of the run; an existing run is resumed.")],
    options: TrainingOptions,
    backend: BackendName = "local",
    job: JobItems = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP + " With a cluster: print the job.")] = False,
    as_json: Json = False,
) -> None:
    """Pretrain, or resume a run that was interrupted.

    With --dry-run --json it prints the specification that `python -m pirl.train SPEC.json` takes.

    Example: pirl train demo --data shards/train --out runs/mine train.epochs=3

    Example: pirl train r50-200ep-mlp --backend pytorchjob --job nodes=4 --job gpus=8 --data s3://bucket/data \
--out s3://bucket/run
    """
    chosen, program = prepare_training(
        recipe, data=data, out=out, overrides=overrides or (), options=options, backend=backend, job=job or ()
    )
    if not dry_run:
        raise typer.Exit(chosen.run(program))
    plan = chosen.plan(program)
    logs.output(program.spec.to_json() if as_json else with_paths(plan))
