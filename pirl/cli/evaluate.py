"""`pirl eval` and `pirl report`: what a run has learned."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import UsageError, did_you_mean
from .app import Json, app, console


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
        from ..evaluate import ZooProtocol, evaluate_layers

        settings = ZooProtocol() if epochs is None else ZooProtocol(epochs=epochs)
        result = evaluate_layers(run, data, test, settings, workers, tell)
    else:
        if epochs is not None or workers:
            raise UsageError("--epochs and --workers are for --protocol zoo", "leave them out, or choose that protocol")
        from ..evaluate import evaluate_run

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
    from ..report import write_report

    console.print(write_report(run, data, test), soft_wrap=True)
