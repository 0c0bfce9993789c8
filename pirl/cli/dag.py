"""`pirl demo` and `pirl run`: the whole DAG from this machine."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import typer

from ..backends import open_backend
from ..collapse import collapse
from ..config import Recipe, load_recipe
from ..errors import PirlError, UsageError
from ..evaluate.spec import options_like
from ..run import REPORT, Run, Workspace
from ..settings import join_items
from ..shards.spec import ShardingOptions
from ..storage import local_path, open_storage
from ..text import count
from ..training.spec import TrainingOptions
from .app import DEFAULT_ROOT, DRY_RUN_HELP, BackendName, JobItems, Overrides, app, console
from .evaluate import show_gains
from .options import options_of
from .steps import Quiet, Verbose, log_path, step_console


@app.command()
def demo(
    root: Annotated[
        str, typer.Option(help="Folder or s3:// prefix of data, runs and registry.")
    ] = f"{DEFAULT_ROOT}/demo",
    recipe: Annotated[str, typer.Option(help="Recipe; `demo-long` takes about 40 minutes.")] = "demo",
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole DAG on this machine, on 70,000 real images.

    Example: pirl demo --root runs/demo
    """
    run_dag(
        train_source="fashion-mnist:train",
        test_source="fashion-mnist:test",
        root=root,
        recipe=recipe,
        overrides=overrides,
        options=TrainingOptions(),
        source_options=ShardingOptions(),
        dry_run=dry_run,
        quiet=quiet,
        verbose=verbose,
    )


@app.command()
@options_of(TrainingOptions, source_options=ShardingOptions)
def run(
    train_source: Annotated[str, typer.Argument(help="Folder with one subfolder a class, or a list of files.")],
    test_source: Annotated[str, typer.Argument(help="The same for the test images.")],
    options: TrainingOptions,
    source_options: ShardingOptions,
    recipe: Annotated[str, typer.Option(help="Recipe.")] = "demo",
    root: Annotated[str, typer.Option(help="Folder or s3:// prefix of data, runs and registry.")] = DEFAULT_ROOT,
    registry: Annotated[str, typer.Option(help="Registry; else ROOT/registry.")] = "",
    model: Annotated[str, typer.Option(help="Name in the registry.")] = "pirl",
    backend: BackendName = "local",
    job: JobItems = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole DAG on your own labelled images, all of it here or its training on a cluster.

    Example: pirl run photos/train photos/test --recipe demo train.epochs=20

    Example: pirl run photos/train photos/test --root s3://bucket/pirl --backend pytorchjob --job nodes=4 --job gpus=8
    """
    from ..registry import check_name, open_registry

    open_backend(backend, job or (), {"processes": options.processes}).check_location("root", root)
    check_name(model, "model")
    if registry:
        open_registry(registry)
    run_dag(
        train_source=train_source,
        test_source=test_source,
        root=root,
        recipe=recipe,
        overrides=overrides,
        registry=registry,
        model=model,
        options=options,
        source_options=source_options,
        backend=backend,
        job=join_items(job or ()),
        dry_run=dry_run,
        quiet=quiet,
        verbose=verbose,
    )


def run_dag(
    recipe: str,
    root: str,
    overrides: list[str] | None,
    options: TrainingOptions,
    source_options: ShardingOptions,
    dry_run: bool,
    quiet: bool,
    verbose: bool,
    **arguments: Any,
) -> None:
    """Run the pipeline's steps here, one after the other, and show its result."""
    from ..outputs import check_registry, check_run_output
    from ..shards import compare_classes, open_source, summary

    root = str(local_path(open_storage(root)) or root)
    resolved = load_recipe(recipe, overrides or [])
    train, test = (open_source(arguments[name], source_options) for name in ("train_source", "test_source"))
    notes = compare_classes(train, test)
    resolved.check_data(len(train))
    console.print(f"{count(len(train), 'training image')} and {count(len(test), 'test image')}")
    for split, source in (("training", train), ("test", test)):
        for line in summary(source):
            console.print(f"{split}: {line}")
    for note in notes:
        console.print(note)
    name = run_name(root, resolved, options)
    schedule = f"{count(resolved.train.epochs, 'epoch')} of {count(resolved.rows(len(train)), 'image')}"
    workspace = Workspace(root)
    console.print(f"run: {workspace.run_uri(name)} ({schedule})")
    check_run_output(workspace.run_uri(name), [train, test])
    check_registry(arguments.get("registry") or workspace.registry, [train, test])
    if dry_run:
        return
    from pipelines.local import run_local

    items = {"overrides": overrides or [], "options": options.items(), "source_options": source_options.items()}
    items["evaluation"] = options_like(options).items()
    texts = {name: join_items(each) for name, each in items.items()}
    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other", "give one of them")
    log = log_path(root, name)
    if not quiet:
        console.print(f"log: {log}")
    with step_console(log, verbose, quiet):
        done = run_local(root=root, run=name, recipe=recipe, **texts, **arguments)
    show_result(Run(done))


def run_name(root: str, recipe: Recipe, options: TrainingOptions | None = None) -> str:
    """Return the name of the run of a recipe: that of an existing run of version 0.1, or by the recipe's digest.

    Another start, as by --init, makes another run.
    """
    if options and (options.init or options.extend):
        key = hashlib.sha256(f"{recipe.digest()} {options.init} {options.extend}".encode()).hexdigest()
        return f"{recipe.name}-{key[:8]}"
    names = [f"{recipe.name}-{digest[:8]}" for digest in sorted(recipe.digests(), key=recipe.digest().__ne__)]
    return next((name for name in names if Workspace(root).run(name).exists()), names[0])


def show_result(run: Run) -> None:
    """Print the table of a finished run, the gate's decision, and the location of the report."""
    from ..storage import local_path

    result, gate, registered = run.evaluation(), run.gate(), run.registered()
    if result is None or gate is None:
        raise PirlError(f"{run.uri} has no evaluation or no decision of the gate", "run the same command again")
    show_gains(result)
    if reason := collapse(run.record().last):
        console.print(reason)
    console.print("seconds: " + ", ".join(f"{step.step} {step.seconds:.0f}" for step in run.steps()))
    if gate.promote and registered:
        console.print(f"registered as {registered.model} {registered.version}: {registered.uri}")
    else:
        console.print("not registered")
    for reason in gate.reasons:
        console.print(f"  {reason}")
    console.print(f"report: {local_path(run.storage) or run.uri}/{REPORT}")
