"""`pirl register`, `models`, `import`, `export`: what becomes of a run, and what can become one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import logs
from ..errors import EXIT_FAILURE, RegistryError
from ..registry import Registry
from .app import DEFAULT_ROOT, DRY_RUN_HELP, Json, Overrides, app, console, show_rows


@app.command()
def register(
    run: Annotated[str, typer.Argument(help="URI of an evaluated run.")],
    registry: Annotated[str, typer.Option(help="URI of the registry.")] = f"{DEFAULT_ROOT}/registry",
    model: Annotated[str, typer.Option(help="Name in the registry.")] = "pirl",
    metric: Annotated[str, typer.Option(help="Probe that the gate compares.")] = "linear_1pct",
    min_gain: Annotated[float, typer.Option(help="Least gain over random weights; 0.01 is a point.")] = 0.01,
    dry_run: Annotated[bool, typer.Option(help="Only ask the gate.")] = False,
) -> None:
    """Register a run's trunk, if it passes the gate.

    Example: pirl register runs/mine --registry runs/registry
    """
    from ..gate import decide, register_run
    from ..outputs import check_registry

    if not dry_run:
        check_registry(registry)
    decision = decide(run, registry, model, metric, min_gain, dry_run)
    if dry_run or not decision.promote:
        console.print("would be registered:" if decision.promote else "not registered:")
    for reason in decision.reasons:
        console.print(f"  {reason}")
    if dry_run or not decision.promote:
        raise typer.Exit(0 if decision.promote else EXIT_FAILURE)
    version = register_run(run, registry, model)
    console.print(f"{version.model} {version.version}: {version.uri}")


@app.command()
def models(
    registry: Annotated[str, typer.Argument(help="URI of a registry.")] = f"{DEFAULT_ROOT}/registry",
    as_json: Json = False,
) -> None:
    """List the registered models.

    Example: pirl models runs/demo/registry
    """
    from ..registry import open_registry

    opened_registry = open_registry(registry)
    rows = []
    for name in opened_registry.models():
        pointers = {pointer: _pointer(opened_registry, name, pointer) for pointer in ("champion", "latest")}
        for version in opened_registry.versions(name):
            scores = version.evaluation.pretrained if version.evaluation else {}
            rows.append(
                {
                    "model": name,
                    "version": version.version,
                    "is": " ".join(pointer for pointer, at in pointers.items() if at == version.version),
                    **{f"{key}_top1": round(value.top1.mean, 4) for key, value in scores.items()},
                    "created": version.record.created,
                    "uri": version.uri,
                }
            )
    show_rows(rows, as_json)


def _pointer(registry: Registry, model: str, pointer: str) -> str | None:
    """Return the version that a pointer names; a damaged one is left out, with a warning."""
    try:
        return registry.pointer(model, pointer)
    except RegistryError as error:
        logs.warn(f"left out: {error}")
        return None


@app.command("import")
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="Checkpoint of VISSL's, a converted trunk, or a ResNet's state dict.")],
    out: Annotated[str, typer.Option(help="URI of the run to make.")],
    data: Annotated[str | None, typer.Option(help="URI of the shards that it was trained on, to continue.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe that it is of, if the file does not name one.")] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Make a run of a checkpoint of VISSL's model zoo: to evaluate, to export, or to train on.

    Example: pirl import model_final_checkpoint_phase199.torch --out runs/zoo
    """
    from ..export import examine, import_file

    if dry_run:
        result = examine(file, data, recipe, overrides or [])
    else:
        result = import_file(file, out, data, recipe, overrides or [])
    console.print(result.summary())
    for note in result.notes:
        console.print(f"note: {note}")
    if not dry_run:
        console.print(f"run: {out}")


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="URI of a run or of one of its checkpoints.")],
    out: Annotated[
        str,
        typer.Argument(
            help="File to write, a path or an s3:// URI: .safetensors, .onnx, .pkl (Detectron2), .torch (VISSL); or a "
            "folder for huggingface."
        ),
    ],
    layout: Annotated[
        Literal["torchvision", "vissl", "onnx", "detectron2", "huggingface"],
        typer.Option(help="Library that reads it. torchvision's is also timm's; vissl: all of a training."),
    ] = "torchvision",
) -> None:
    """Write a backbone for another library, or a checkpoint that VISSL reads.

    Example: pirl export runs/mine trunk.safetensors

    Example: pirl export runs/mine hub/mine --layout huggingface
    """
    from ..export import export as write

    console.print(write(checkpoint, out, layout))
