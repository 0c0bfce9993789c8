"""The program `pirl`: each verb parses its arguments and calls one function of the library."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__
from .errors import EXIT_FAILURE, PirlError, UsageError, did_you_mean

app = typer.Typer(
    name="pirl",
    help="Self-supervised pretraining with PIRL: images in, an evaluated and registered trunk out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(width=None if sys.stdout.isatty() else 120)

RecipeName = Annotated[str, typer.Argument(help="Name of a recipe (`pirl recipes`) or path of a TOML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings to change.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Processes = Annotated[int, typer.Option(help="Processes on this machine; 0: as many as GPUs, else two.")]
DRY_RUN_HELP = "Check everything, say what would be done, and stop."
DEFAULT_ROOT = "runs"
IMAGENET = 1_281_167  # training images of ImageNet-1k
IMAGES_PER_RANK = 32  # in all of the reference's settings: its batch grows with the GPUs, and the rate with the batch


def main() -> None:
    """Run the program: a `PirlError` is a message and an exit code, a bug is a traceback."""
    try:
        app()
    except PirlError as error:
        _tell(error.what, error.hint)
        sys.exit(error.exit_code)


def _tell(what: str, hint: str) -> None:
    text = Console(stderr=True, soft_wrap=True)
    text.print(f"[bold red]error:[/] {escape(what)}", highlight=False)
    if hint:
        text.print(f"  -> {escape(hint)}", highlight=False)


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
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Run the whole DAG on this machine on your own labelled images.

    Example: pirl run photos/train photos/test --recipe demo train.epochs=20
    """
    run_dag(
        train_source=train_source,
        test_source=test_source,
        root=root,
        recipe=recipe,
        overrides=overrides,
        model=model,
        processes=processes,
        dry_run=dry_run,
    )


def run_dag(recipe: str, root: str, overrides: list[str] | None, dry_run: bool, **arguments: Any) -> None:
    """Run the pipeline locally and show its result."""
    from .config import load_recipe
    from .shards import open_source

    resolved = load_recipe(recipe, overrides or [])
    sizes = [len(open_source(arguments[name])) for name in ("train_source", "test_source")]
    resolved.check_data(sizes[0])
    console.print(f"{sizes[0]:,} training and {sizes[1]:,} test images")
    name = f"{resolved.name}-{resolved.digest()[:8]}"
    console.print(f"run: {root}/runs/{name} ({resolved.train.epochs} epochs of {resolved.rows(sizes[0]):,} images)")
    if dry_run:
        return
    from pipelines.local import run_local

    if "://" not in root:
        root = str(Path(root).absolute())
    done = run_local(root=root, run=name, recipe=recipe, overrides=" ".join(overrides or []), **arguments)
    show_result(done)


def show_result(run: Any) -> None:
    """The table of a finished run, the gate's verdict, and where the report is."""
    from .storage import local_path

    result, gate = run.read_json("eval.json"), run.read_json("gate.json")
    table = Table(title="top-1 of the frozen trunk, in %")
    for column in ("", "pretrained", "random weights", "gain"):
        table.add_column(column, justify="left" if not column else "right")
    names = {"linear": "linear, all labels", "linear_1pct": "linear, 1 % of the labels", "knn": "nearest neighbours"}
    for key, label in names.items():
        ours, random = (result[trunk][key]["top1"] for trunk in ("pretrained", "random"))
        table.add_row(
            label,
            *(f"{100 * value['mean']:.2f} ± {100 * value['std']:.2f}" for value in (ours, random)),
            f"{100 * (ours['mean'] - random['mean']):+.2f}",
        )
    console.print(table)
    steps = [run.read_json(name) for name in run.list("steps/")]
    steps.sort(key=lambda step: step["started"])
    console.print("seconds: " + ", ".join(f"{step['step']} {step['seconds']:.0f}" for step in steps))
    if gate["promote"]:
        version = run.read_json("registered.json")
        console.print(f"registered as {version['model']} {version['version']}: {version['uri']}")
    else:
        console.print(f"not registered: {'; '.join(gate['reasons'])}")
    console.print(f"report: {local_path(run) or run.uri}/report.html", soft_wrap=True)


@app.command()
def shard(
    source: Annotated[str, typer.Argument(help="Folder, list of files (.txt), or fashion-mnist:train|test.")],
    out: Annotated[str, typer.Argument(help="Folder or s3:// prefix.")],
    processes: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    max_bad_share: Annotated[float, typer.Option(help="Stop if a larger share of images is unreadable.")] = 0.01,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Pack images into WebDataset shards with a manifest.

    Example: pirl shard photos/train shards/train
    """
    from .shards import open_source, write_shards
    from .storage import open_storage

    images = open_source(source)
    if dry_run:
        console.print(f"{len(images):,} images would go to {out}")
        return
    with progress("sharding") as advance:
        manifest = write_shards(
            images, open_storage(out), processes=processes, max_bad_share=max_bad_share, progress=advance
        )
    console.print(
        f"{manifest.images:,} images in {len(manifest.shards)} shards, {manifest.quarantined} quarantined, "
        f"digest {manifest.digest[:12]}: {out}"
    )


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
    from .train import Options, launch, plan

    options = Options(data, out, processes or None, workers, log_every, checkpoint_every_s, keep)
    if dry_run:
        for line in plan(recipe, options, overrides or []):
            console.print(line)
        return
    raise typer.Exit(launch(recipe, options, overrides or []))


@app.command("eval")
def evaluate(
    run: Annotated[str, typer.Argument(help="URI of a run.")],
    data: Annotated[str, typer.Option(help="URI of labelled shards to train the probe on.")],
    test: Annotated[str, typer.Option(help="URI of labelled shards to test it on.")],
    protocol: Annotated[str, typer.Option(help="fast: features once; zoo: as the zoo's numbers were made.")] = "fast",
    epochs: Annotated[int | None, typer.Option(help="Epochs of the protocol zoo, 28 if not given.", min=1)] = None,
    workers: Annotated[int, typer.Option(help="Data loading processes of the protocol zoo.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Probe a run's frozen trunk: beside the same trunk with random weights (fast), or layer by layer (zoo).

    Example: pirl eval runs/mine --data shards/train --test shards/test
    """
    if protocol not in ("fast", "zoo"):
        guess = did_you_mean(protocol, ("fast", "zoo"))
        raise UsageError(f"there is no protocol {protocol!r}.{guess}", "give --protocol fast or --protocol zoo")

    def tell(text: str) -> None:
        if not as_json:
            console.print(text, soft_wrap=True, markup=False, highlight=False)

    if protocol == "zoo":
        from .evaluate import ZooProtocol, evaluate_layers

        settings = ZooProtocol() if epochs is None else ZooProtocol(epochs=epochs)
        result = evaluate_layers(run, data, test, settings, workers, tell)
    else:
        if epochs is not None or workers:
            raise UsageError("--epochs and --workers are for --protocol zoo", "leave them out, or choose that protocol")
        from .evaluate import evaluate_run

        result = evaluate_run(run, data, test, progress=tell)
    if as_json:
        print(json.dumps(result))
    elif protocol == "zoo":
        show_layers(result)
    else:
        for trunk in ("pretrained", "random"):
            scores = ", ".join(f"{name} {100 * value['top1']['mean']:.2f} %" for name, value in result[trunk].items())
            console.print(f"{trunk}: {scores}")


def show_layers(result: dict[str, Any]) -> None:
    """The table of `pirl eval --protocol zoo`."""
    epochs = result["epochs"]
    table = Table(title=f"the frozen trunk, layer by layer, after {len(epochs)} epochs of the zoo's linear protocol")
    for column in ("head", "pooling", "features", "top-1, %", "top-5, %", "best top-1, %"):
        table.add_column(column, justify="left" if column in ("head", "pooling") else "right")
    for name, head in result["protocol"]["heads"].items():
        best = max(epochs, key=lambda epoch: epoch["top1"][name])
        table.add_row(
            name,
            head["pooling"],
            str(head["features"]),
            f"{100 * result['top1'][name]:.2f}",
            f"{100 * result['top5'][name]:.2f}",
            f"{100 * best['top1'][name]:.2f} (epoch {best['epoch']})",
        )
    console.print(table)
    for difference in result["differences"]:
        console.print(f"not as in the zoo: {difference}", markup=False, highlight=False)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="URI of a run.")],
    data: Annotated[str, typer.Option(help="URI of its shards.")],
    test: Annotated[str | None, typer.Option(help="URI of labelled test shards, for the nearest neighbours.")] = None,
) -> None:
    """Write the run's report.html.

    Example: pirl report runs/mine --data shards/train --test shards/test
    """
    from .report import write_report

    console.print(write_report(run, data, test), soft_wrap=True)


@app.command()
def register(
    run: Annotated[str, typer.Argument(help="URI of an evaluated run.")],
    registry: Annotated[str, typer.Option(help="URI of the registry.")] = f"{DEFAULT_ROOT}/registry",
    model: Annotated[str, typer.Option(help="Name in the registry.")] = "pirl",
    metric: Annotated[str, typer.Option(help="What the gate looks at.")] = "linear_1pct",
    min_gain: Annotated[float, typer.Option(help="Least gain over random weights; 0.01 is a point.")] = 0.01,
    dry_run: Annotated[bool, typer.Option(help="Only ask the gate.")] = False,
) -> None:
    """Register a run's trunk, if it passes the gate.

    Example: pirl register runs/mine --registry runs/registry
    """
    from .registry import decide, register_run

    if dry_run or not decide(run, registry, model, metric, min_gain):
        from .storage import open_storage

        promote = decide(run, registry, model, metric, min_gain)
        reasons = "; ".join(open_storage(run).read_json("gate.json")["reasons"])
        console.print(f"{'would be registered' if promote else 'not registered'}: {reasons}")
        raise typer.Exit(0 if promote else EXIT_FAILURE)
    version = register_run(run, registry, model)
    console.print(f"{version.model} {version.version}: {version.uri}", soft_wrap=True)


@app.command("import")
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="Checkpoint of VISSL's, a converted trunk, or a ResNet's state dict.")],
    out: Annotated[str, typer.Option(help="URI of the run to make.")],
    data: Annotated[str | None, typer.Option(help="URI of the shards that it was trained on, to continue.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe that it is of, if the file does not tell.")] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Make a run of a checkpoint of VISSL's model zoo: to evaluate, to export, or to train on.

    Example: pirl import model_final_checkpoint_phase199.torch --out runs/zoo
    """
    from .export import examine, import_file

    if dry_run:
        found = examine(file, data, recipe, overrides or [])
    else:
        found = import_file(file, out, data, recipe, overrides or [])
    console.print(found.summary(), soft_wrap=True, highlight=False)
    for note in found.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True, highlight=False)
    if not dry_run:
        console.print(f"run: {out}", soft_wrap=True)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="URI of a run or of one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(help="File to write: .safetensors, or .torch for VISSL.")],
    layout: Annotated[
        Literal["torchvision", "vissl"], typer.Option(help="A trunk for torchvision, or all of a training for VISSL.")
    ] = "torchvision",
) -> None:
    """Write a trunk as safetensors in torchvision's key layout, or a checkpoint that VISSL reads.

    Example: pirl export runs/mine trunk.safetensors
    """
    from .export import export as write

    console.print(str(write(checkpoint, out, layout)), soft_wrap=True)


@app.command()
def recipes(
    ranks: Annotated[int | None, typer.Option(help="Rescale to this many GPUs.", min=1, max=65536)] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, with steps and learning rates on ImageNet's 1,281,167 images.

    Example: pirl recipes --ranks 8
    """
    from .config import load_recipe, recipe_names
    from .optim import learning_rate

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
        highlight=False,
    )


@app.command()
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe as it would run, every key.

    Example: pirl show demo train.epochs=3
    """
    from .config import load_recipe

    print(load_recipe(recipe, overrides or []).to_toml(), end="")


@app.command()
def preview(
    recipe: RecipeName,
    images: Annotated[str, typer.Argument(help="Folder of images, or any source that `pirl shard` takes.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("preview.html"),
    count: Annotated[int, typer.Option(help="Images.", min=1)] = 8,
) -> None:
    """Write a sheet of the views that a recipe makes of images.

    Example: pirl preview demo photos/train --out preview.html
    """
    from .report import write_preview

    write_preview(recipe, images, out, count=count)
    console.print(str(out), soft_wrap=True)


@app.command()
def runs(
    root: Annotated[str, typer.Argument(help="Folder or s3:// prefix.")] = DEFAULT_ROOT, as_json: Json = False
) -> None:
    """List the runs below a folder.

    Example: pirl runs runs
    """
    from .metrics import list_runs

    show_rows(list_runs(root), as_json)


@app.command()
def models(
    registry: Annotated[str, typer.Argument(help="URI of a registry.")] = f"{DEFAULT_ROOT}/registry",
    as_json: Json = False,
) -> None:
    """List the registered models.

    Example: pirl models runs/demo/registry
    """
    from .registry import Registry

    known = Registry(registry)
    rows = []
    for name in known.models():
        pointers = {pointer: known.pointer(name, pointer) for pointer in ("champion", "latest")}
        for version in known.versions(name):
            scores = version.record.get("metrics", {}).get("pretrained", {})
            rows.append(
                {
                    "model": name,
                    "version": version.version,
                    "is": " ".join(pointer for pointer, at in pointers.items() if at == version.version),
                    **{f"{key}_top1": round(value["top1"]["mean"], 4) for key, value in scores.items()},
                    "created": version.record["created"],
                    "uri": version.uri,
                }
            )
    show_rows(rows, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look at what this machine can do, and how to mend what it cannot.

    Example: pirl doctor
    """
    from .doctor import checks

    rows = [vars(check) for check in checks()]
    if as_json:
        print(json.dumps(rows))
    else:
        for row in rows:
            mark = {"ok": "[green]ok  [/]", "note": "[yellow]note[/]", "bad": "[red]bad [/]"}[row["state"]]
            console.print(f"{mark} {row['name']}: {escape(row['found'])}", highlight=False)
            if row["fix"]:
                console.print(f"       -> {escape(row['fix'])}", highlight=False)
    raise typer.Exit(EXIT_FAILURE if any(row["state"] == "bad" for row in rows) else 0)


@app.command("compile")
def compile_pipeline(out: Annotated[Path, typer.Argument(help="File to write.")] = Path("pirl-pretrain.yaml")) -> None:
    """Compile the pipeline to YAML for a KFP cluster.

    Example: pirl compile pirl-pretrain.yaml
    """
    from kfp import compiler

    from pipelines.pretrain import pirl_pretrain

    compiler.Compiler().compile(pirl_pretrain, str(out))
    console.print(str(out), soft_wrap=True)


def version_callback(wanted: bool) -> None:
    if wanted:
        console.print(f"pirl {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=version_callback, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass


def show_rows(rows: list[dict[str, Any]], as_json: bool, hide: tuple[str, ...] = ()) -> None:
    """A list of dictionaries with the same keys as JSON, or as a table without the keys to `hide`."""
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        console.print("none")
        return
    table = Table()
    keys = [key for key in rows[0] if key not in hide]
    for key in keys:
        table.add_column(key.replace("_", " "), overflow="fold")
    for row in rows:
        values = (row[key] for key in keys)
        table.add_row(*("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line for every tenth where it is none."""
    if console.is_terminal:
        with Progress(
            TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        ) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    told = -1

    def advance(done: int, total: int) -> None:
        nonlocal told
        if total and done * 10 // total > told:
            told = done * 10 // total
            print(f"{what}: {done}/{total}", flush=True)

    yield advance
