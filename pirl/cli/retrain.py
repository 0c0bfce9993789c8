"""`pirl retrain` and `promote`: what a schedule runs, and what undoes it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from .app import DEFAULT_ROOT, DRY_RUN_HELP, Overrides, Processes, app, console


@app.command()
def retrain(
    train_source: Annotated[str, typer.Option(envvar="PIRL_TRAIN_SOURCE", help="Images, as for `pirl shard`.")],
    test_source: Annotated[str, typer.Option(envvar="PIRL_TEST_SOURCE", help="The same for the test images.")],
    recipe: Annotated[str, typer.Option(envvar="PIRL_RECIPE", help="Recipe.")] = "demo",
    root: Annotated[str, typer.Option(envvar="PIRL_ROOT", help="Where everything goes.")] = DEFAULT_ROOT,
    registry: Annotated[str, typer.Option(envvar="PIRL_REGISTRY", help="Registry; else ROOT/registry.")] = "",
    model: Annotated[str, typer.Option(envvar="PIRL_MODEL", help="Name in the registry.")] = "pirl",
    metric: Annotated[str, typer.Option(envvar="PIRL_METRIC", help="What the gate looks at.")] = "linear_1pct",
    min_gain: Annotated[float, typer.Option(envvar="PIRL_MIN_GAIN", help="Least gain over random weights.")] = 0.01,
    warm_epochs: Annotated[
        int,
        typer.Option(
            envvar="PIRL_WARM_EPOCHS",
            help="Where images were only added, go on from the champion for so many epochs (0: the recipe's); "
            "-1: always start anew.",
            min=-1,
        ),
    ] = -1,
    processes: Processes = 0,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Train, evaluate and register, if data, recipe or code have changed since the champion; else do nothing.

    Made for a schedule: unchanged it ends within seconds, repeated it goes on with the same run. A new network that
    does not pass the gate is no failure of the command.

    Example: pirl retrain --train-source photos/train --test-source photos/test --root runs
    """
    from ..config import load_recipe
    from ..errors import UsageError
    from ..evaluate import evaluate_run
    from ..registry import data_uri, decide, decide_retrain, register_run
    from ..shards import open_source, write_shards
    from ..storage import open_storage
    from ..train import Options, launch
    from ..warm import warm_start

    overrides = overrides or []
    registry = registry or f"{root}/registry"
    sources = {"train": open_source(train_source), "test": open_source(test_source)}
    for split, source in sources.items():
        if source.classes is None:
            raise UsageError(f"the {split} images have no classes", "the gate asks for an evaluation, which needs them")
    data = {split: data_uri(root, split, source) for split, source in sources.items()}
    if dry_run and not open_storage(data["train"]).exists("manifest.json"):
        console.print(f"new images: {len(sources['train']):,} would be sharded to {data['train']}, then compared")
        return
    if not dry_run:
        write_shards(sources["train"], open_storage(data["train"]))
    warm = warm_epochs if warm_epochs >= 0 else None
    decision = decide_retrain(root, registry, model, load_recipe(recipe, overrides), data["train"], warm)
    for reason in decision.reasons:
        console.print(escape(reason), soft_wrap=True, highlight=False)
    if not decision.retrain:
        console.print("nothing to do")
        return
    console.print(f"{'would train' if dry_run else 'training'} {decision.run}", soft_wrap=True)
    if dry_run:
        return
    run = open_storage(decision.run)
    if decision.warm:
        if warm:
            overrides = [*overrides, f"train.epochs={warm}"]
        if not run.list("checkpoints/"):
            kept, fresh = warm_start(decision.warm, data["train"], decision.run, decision.recipe)
            console.print(f"from {decision.warm.run}: {kept:,} rows of the bank kept, {fresh:,} new")
    if code := launch(recipe, Options(data["train"], decision.run, processes or None), overrides):
        raise typer.Exit(code)
    write_shards(sources["test"], open_storage(data["test"]))
    evaluate_run(decision.run, data["train"], data["test"])
    if decide(decision.run, registry, model, metric, min_gain):
        version = register_run(decision.run, registry, model)
        console.print(f"{version.model} {version.version}: {version.uri}", soft_wrap=True)
    else:
        reasons = "; ".join(run.read_json("gate.json")["reasons"])
        console.print(f"not registered: {escape(reasons)}", soft_wrap=True)


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

    known = open_registry(registry)
    found = known.get(model, version, verify=True)
    before = known.pointer(model, CHAMPION)
    if not dry_run:
        known.promote(model, found.version)
    console.print(f"{model}: champion {before or 'none'} -> {found.version}{' (not done)' if dry_run else ''}")
