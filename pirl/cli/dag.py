"""`pirl demo` and `pirl run`: the whole DAG from this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from ..backends import open_backend
from ..config import Recipe, load_recipe
from ..settings import join_items
from ..storage import local_path, open_storage
from ..text import count, score
from ..training.spec import TrainingOptions
from .app import DEFAULT_ROOT, DRY_RUN_HELP, BackendName, JobItems, Overrides, app, console, show_table
from .options import options_of


@app.command()
def demo(
    root: Annotated[str, typer.Option(help="Where everything goes.")] = f"{DEFAULT_ROOT}/demo",
    recipe: Annotated[str, typer.Option(help="Recipe; `demo-long` takes about 40 minutes.")] = "demo",
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
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
        dry_run=dry_run,
    )


@app.command()
@options_of(TrainingOptions)
def run(
    train_source: Annotated[str, typer.Argument(help="Folder with one subfolder a class, or a list of files.")],
    test_source: Annotated[str, typer.Argument(help="The same for the test images.")],
    options: TrainingOptions,
    recipe: Annotated[str, typer.Option(help="Recipe.")] = "demo",
    root: Annotated[str, typer.Option(help="Where everything goes.")] = DEFAULT_ROOT,
    registry: Annotated[str, typer.Option(help="Registry; else ROOT/registry.")] = "",
    model: Annotated[str, typer.Option(help="Name in the registry.")] = "pirl",
    backend: BackendName = "local",
    job: JobItems = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
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
        backend=backend,
        job=join_items(job or ()),
        dry_run=dry_run,
    )


def run_dag(
    recipe: str, root: str, overrides: list[str] | None, options: TrainingOptions, dry_run: bool, **arguments: Any
) -> None:
    """Run the pipeline's steps here, one after the other, and show its result."""
    from ..outputs import check_registry, check_run_output
    from ..shards import compare_sources, open_source, summary

    root = str(local_path(open_storage(root)) or root)
    resolved = load_recipe(recipe, overrides or [])
    train, test = (open_source(arguments[name]) for name in ("train_source", "test_source"))
    notes = compare_sources(train, test)
    resolved.check_data(len(train))
    console.print(f"{count(len(train), 'training image')} and {count(len(test), 'test image')}")
    for split, source in (("training", train), ("test", test)):
        for line in summary(source):
            console.print(f"{split}: {line}", soft_wrap=True, markup=False, highlight=False)
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    name = run_name(root, resolved)
    schedule = f"{count(resolved.train.epochs, 'epoch')} of {count(resolved.rows(len(train)), 'image')}"
    console.print(f"run: {root}/runs/{name} ({schedule})")
    check_run_output(f"{root}/runs/{name}", [train, test])
    check_registry(arguments.get("registry") or f"{root}/registry", [train, test])
    if dry_run:
        return
    from pipelines.local import run_local

    texts = {"overrides": join_items(overrides or []), "options": join_items(options.items())}
    done = run_local(root=root, run=name, recipe=recipe, **texts, **arguments)
    show_result(done)


def run_name(root: str, recipe: Recipe) -> str:
    """Return the name of the run of a recipe: that of an existing run of version 0.1, or by the recipe's digest."""
    names = [f"{recipe.name}-{digest[:8]}" for digest in sorted(recipe.digests(), key=recipe.digest().__ne__)]
    runs = open_storage(f"{root}/runs")
    return next((name for name in names if runs.exists(f"{name}/config.toml")), names[0])


def show_result(run: Any) -> None:
    """The table of a finished run, the gate's verdict, and where the report is."""
    from ..storage import local_path

    result, gate = run.read_json("eval.json"), run.read_json("gate.json")
    table = Table(title="top-1 of the frozen trunk, in %")
    for column in ("", "pretrained", "random weights", "gain"):
        table.add_column(column, justify="left" if not column else "right")
    names = {"linear": "linear, all labels", "linear_1pct": "linear, 1 % of the labels", "knn": "nearest neighbours"}
    for key, label in names.items():
        ours, random = (result[trunk][key]["top1"] for trunk in ("pretrained", "random"))
        table.add_row(
            label,
            *(score(value["mean"], value["std"]) for value in (ours, random)),
            f"{100 * (ours['mean'] - random['mean']):+.2f}",
        )
    show_table(table)
    steps = [run.read_json(name) for name in run.list("steps/")]
    steps.sort(key=lambda step: step["started"])
    console.print("seconds: " + ", ".join(f"{step['step']} {step['seconds']:.0f}" for step in steps))
    if gate["promote"]:
        version = run.read_json("registered.json")
        console.print(f"registered as {version['model']} {version['version']}: {version['uri']}")
    else:
        console.print(f"not registered: {'; '.join(gate['reasons'])}")
    console.print(f"report: {local_path(run) or run.uri}/report.html")
