"""`pirl demo` and `pirl run`: the whole DAG from this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..text import count, score
from .app import DEFAULT_ROOT, DRY_RUN_HELP, BackendName, JobItems, Overrides, Processes, app, console, show_table


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
        dry_run=dry_run,
    )


@app.command()
def run(
    train_source: Annotated[str, typer.Argument(help="Folder with one subfolder a class, or a list of files.")],
    test_source: Annotated[str, typer.Argument(help="The same for the test images.")],
    recipe: Annotated[str, typer.Option(help="Recipe.")] = "demo",
    root: Annotated[str, typer.Option(help="Where everything goes.")] = DEFAULT_ROOT,
    model: Annotated[str, typer.Option(help="Name in the registry.")] = "pirl",
    processes: Processes = 0,
    backend: BackendName = "local",
    job: JobItems = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Run the whole DAG on your own labelled images, all of it here or its training on a cluster.

    Example: pirl run photos/train photos/test --recipe demo train.epochs=20

    Example: pirl run photos/train photos/test --root s3://bucket/pirl --backend pytorchjob --job nodes=4 --job gpus=8
    """
    from ..backends import open_backend

    open_backend(backend, job or (), {"processes": processes}).check_location("root", root)
    run_dag(
        train_source=train_source,
        test_source=test_source,
        root=root,
        recipe=recipe,
        overrides=overrides,
        model=model,
        processes=processes,
        backend=backend,
        job=shlex.join(job or ()),
        dry_run=dry_run,
    )


def run_dag(recipe: str, root: str, overrides: list[str] | None, dry_run: bool, **arguments: Any) -> None:
    """Run the pipeline's steps here, one after the other, and show its result."""
    from ..config import load_recipe
    from ..outputs import check_registry, check_run_output
    from ..shards import compare_sources, open_source, summary

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
    name = f"{resolved.name}-{resolved.digest()[:8]}"
    schedule = f"{count(resolved.train.epochs, 'epoch')} of {count(resolved.rows(len(train)), 'image')}"
    console.print(f"run: {root}/runs/{name} ({schedule})")
    check_run_output(f"{root}/runs/{name}", [train, test])
    check_registry(f"{root}/registry", [train, test])
    if dry_run:
        return
    from pipelines.local import run_local

    if "://" not in root:
        root = str(Path(root).absolute())
    done = run_local(root=root, run=name, recipe=recipe, overrides=" ".join(overrides or []), **arguments)
    show_result(done)


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
