"""`pirl eval` and `pirl report`: what a run has learned."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import logs
from ..errors import UsageError, did_you_mean
from ..results import Evaluation
from ..text import count, percent
from .app import Json, app, console, show_table

PROTOCOLS = ("fast", "zoo", "bank")


@app.command("eval")
def evaluate(
    run: Annotated[str, typer.Argument(help="URI of a run.")],
    data: Annotated[str, typer.Option(help="URI of labelled shards to train the probe on.")],
    test: Annotated[str, typer.Option(help="URI of labelled shards to test it on.")],
    protocol: Annotated[
        str, typer.Option(help="fast: features once; zoo: as the zoo's numbers were made; bank: its rows as they are.")
    ] = "fast",
    epochs: Annotated[int | None, typer.Option(help="Epochs of the protocol zoo, 28 if not given.", min=1)] = None,
    workers: Annotated[int, typer.Option(help="Data loading processes of the protocol zoo.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Probe a run's frozen trunk: beside the same trunk with random weights (fast), layer by layer (zoo), or by the
    nearest neighbours in its memory bank (bank), which takes a pass over the test images only.

    Example: pirl eval runs/mine --data shards/train --test shards/test
    """
    if protocol not in PROTOCOLS:
        guess = did_you_mean(protocol, PROTOCOLS)
        raise UsageError(f"there is no protocol {protocol!r}.{guess}", f"give --protocol {', '.join(PROTOCOLS)}")

    def tell(text: str) -> None:
        if not as_json:
            console.print(text)

    if protocol != "zoo" and (epochs is not None or workers):
        raise UsageError("--epochs and --workers are for --protocol zoo", "leave them out, or choose that protocol")
    if protocol == "zoo":
        from ..evaluate import ZooProtocol, evaluate_layers

        settings = ZooProtocol() if epochs is None else ZooProtocol(epochs=epochs)
        layers = evaluate_layers(run, data, test, settings, workers, tell)
        print(json.dumps(layers)) if as_json else show_layers(layers)
        return
    if protocol == "bank":
        from ..evaluate import evaluate_bank

        result = evaluate_bank(run, data, test)
    else:
        from ..evaluate import evaluate_run

        result = evaluate_run(run, data, test, progress=tell)
    logs.output(f"{json.dumps(result.to_json())}\n") if as_json else show_scores(result)


def show_scores(result: Evaluation) -> None:
    """Print the scores of the protocols fast and bank."""
    for trunk, scores in (("pretrained", result.pretrained), ("random", result.random)):
        if scores:
            rates = [f"{name} {percent(score.top1.mean)} %" for name, score in scores.items()]
            console.print(f"{trunk}: {', '.join(rates)}")
        if trunk in result.collapsed:
            console.print(f"{trunk}: the features have collapsed: they are the same for all training images")
    if bank := result.bank:
        console.print(f"memory bank: knn {percent(bank.top1.mean)} % among its {count(bank.rows, 'row')}")


def show_layers(result: dict[str, Any]) -> None:
    """The table of `pirl eval --protocol zoo`."""
    epochs = result["epochs"]
    trained = f"after {count(len(epochs), 'epoch')} of the zoo's linear protocol"
    table = Table(title=f"the frozen trunk, layer by layer, {trained}")
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
    show_table(table)
    for difference in result["differences"]:
        console.print(f"not as in the zoo: {difference}")


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

    console.print(write_report(run, data, test))
