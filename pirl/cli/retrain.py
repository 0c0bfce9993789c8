"""`pirl retrain` and `promote`: what a schedule runs, and what undoes it."""

from __future__ import annotations

from typing import Annotated

import typer

from ..backends import BACKENDS, open_backend
from ..errors import RegistryError
from ..shards.spec import ShardingOptions
from ..training.spec import TrainingOptions
from .app import DEFAULT_ROOT, DRY_RUN_HELP, Overrides, app, console
from .options import items_from, options_of

Job = Annotated[
    list[str],
    typer.Option(
        default_factory=items_from("PIRL_JOB"),
        show_default=False,
        metavar="NAME=VALUE",
        help="Other setting of the job (once for each; in the variable PIRL_JOB separated by blanks).",
    ),
]
WarmEpochs = Annotated[
    int,
    typer.Option(
        envvar="PIRL_WARM_EPOCHS",
        help="Epochs from the champion, if images were only added (0: the recipe's); -1: always a cold start.",
        min=-1,
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        envvar="PIRL_BACKEND",
        metavar="NAME",
        help=f"Train on this machine, or by a job on the cluster: {', '.join(BACKENDS)}.",
    ),
]


@app.command()
@options_of(TrainingOptions, env="PIRL_", source_options=ShardingOptions)
def retrain(
    train_source: Annotated[str, typer.Option(envvar="PIRL_TRAIN_SOURCE", help="Images, as for `pirl shard`.")],
    test_source: Annotated[str, typer.Option(envvar="PIRL_TEST_SOURCE", help="The same for the test images.")],
    options: TrainingOptions,
    source_options: ShardingOptions,
    job: Job,
    recipe: Annotated[str, typer.Option(envvar="PIRL_RECIPE", help="Recipe.")] = "demo",
    root: Annotated[
        str, typer.Option(envvar="PIRL_ROOT", help="Folder or s3:// prefix of data, runs and registry.")
    ] = DEFAULT_ROOT,
    registry: Annotated[str, typer.Option(envvar="PIRL_REGISTRY", help="Registry; else ROOT/registry.")] = "",
    model: Annotated[str, typer.Option(envvar="PIRL_MODEL", help="Name in the registry.")] = "pirl",
    metric: Annotated[str, typer.Option(envvar="PIRL_METRIC", help="Probe that the gate compares.")] = "linear_1pct",
    min_gain: Annotated[float, typer.Option(envvar="PIRL_MIN_GAIN", help="Least gain over random weights.")] = 0.01,
    warm_epochs: WarmEpochs = -1,
    backend: Backend = "local",
    nodes: Annotated[int, typer.Option(envvar="PIRL_NODES", help="Pods of the job.", min=0)] = 0,
    gpus: Annotated[int, typer.Option(envvar="PIRL_GPUS", help="GPUs of each pod.", min=0)] = 0,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Train, evaluate and register, if data, recipe or code have changed since the champion; else do nothing.

    Made for a schedule: unchanged it ends within seconds, repeated it continues the same run. The command succeeds
    too where a new network does not pass the gate.

    Example: pirl retrain --train-source photos/train --test-source photos/test --root runs
    """
    from ..retraining.retrain import Retraining, keep_up_to_date

    given = {"nodes": nodes or "", "gpus": gpus, "processes": options.processes}
    retraining = Retraining(
        train_source=train_source,
        test_source=test_source,
        root=root,
        registry=registry or f"{root}/registry",
        model=model,
        recipe=recipe,
        overrides=tuple(overrides or ()),
        metric=metric,
        min_gain=min_gain,
        warm_epochs=warm_epochs if warm_epochs >= 0 else None,
        options=options,
        source_options=source_options,
        backend=open_backend(backend, job, given),
    )
    if code := keep_up_to_date(retraining, dry_run):
        raise typer.Exit(code)


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="Name in the registry.")],
    version: Annotated[str, typer.Argument(help="Version, for instance v0003.")],
    registry: Annotated[str, typer.Option(help="URI of the registry.")] = f"{DEFAULT_ROOT}/registry",
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Make a version the champion, also to go back to an older one. Its files are checked first.

    Example: pirl promote pirl v0003 --registry runs/registry
    """
    from ..registry import CHAMPION, open_registry

    catalogue = open_registry(registry)
    chosen = catalogue.get(model, version, verify=True)
    try:
        before = catalogue.pointer(model, CHAMPION) or "none"
    except RegistryError as error:  # promoting repairs it
        console.print(error.what)
        before = "unknown"
    if not dry_run:
        catalogue.promote(model, chosen.version)
    console.print(f"{model}: champion {before} -> {chosen.version}{' (not done)' if dry_run else ''}")
