"""`pirl eval` and `pirl report`: probes of a run's backbone, and its page."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated

import typer
from rich.table import Table

from .. import logs
from ..backends import prepare_evaluation
from ..evaluate.spec import EvaluationOptions
from ..gains import caveats, gains, row_title, score_text
from ..layer_results import LayersEvaluation
from ..results import Evaluation
from ..shards import untested_notes
from ..text import count, with_paths
from .app import DRY_RUN_HELP, BackendName, JobItems, Json, app, console, show_table
from .options import options_of


@app.command("eval")
@options_of(EvaluationOptions)
def evaluate(
    run: Annotated[str, typer.Argument(help="URI of a run.")],
    data: Annotated[str, typer.Option(help="URI of labelled shards to train the probe on.")],
    test: Annotated[str, typer.Option(help="URI of labelled shards to test it on.")],
    options: EvaluationOptions,
    backend: BackendName = "local",
    job: JobItems = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP + " With a cluster: print the job.")] = False,
    as_json: Json = False,
) -> None:
    """Probe a run's frozen backbone.

    Protocol fast compares it with its random initial weights; zoo probes it layer by layer; finetune trains the whole
    network with 1 % and 10 % of the labels; bank searches the nearest neighbours in its memory bank, with one pass over
    the test images alone.

    An interrupted evaluation continues where it stopped. With --dry-run --json it prints the specification that
    `python -m pirl.evaluate SPEC.json` takes.

    Example: pirl eval runs/mine --data shards/train --test shards/test

    Example: pirl eval s3://bucket/run --data s3://bucket/train --test s3://bucket/test --backend pytorchjob \
--job nodes=2 --job gpus=8
    """
    chosen, program = prepare_evaluation(run, data=data, test=test, options=options, backend=backend, job=job or ())
    if dry_run:
        plan = chosen.plan(program)
        logs.output(program.spec.to_json() if as_json else with_paths(plan))
        return
    if program.result() is None:
        with stdout_to_stderr() if as_json else nullcontext():
            code = chosen.run(program)
        if code:
            raise typer.Exit(code)
    else:
        program.update()
    result = program.result()
    if as_json:
        logs.output(f"{json.dumps(result.to_json())}\n")
    elif isinstance(result, LayersEvaluation):
        show_layers(result)
    else:
        show_scores(result)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Have this process and those that it starts write their lines to stderr: stdout is for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def show_scores(result: Evaluation) -> None:
    """Print the scores of the protocols fast and bank."""
    if result.pretrained:
        show_gains(result)
    if bank := result.bank:
        rate = score_text(bank.top1, result.test_images)
        console.print(f"memory bank: knn {rate} % among its {count(bank.rows, 'row')}")
    if not result.pretrained:
        show_caveats(result)


def show_gains(result: Evaluation) -> None:
    """Print the table of an evaluation, a decision for each line, and what the numbers cannot show."""
    table = Table(
        title="top-1 of the frozen trunk, in %" if not result.finetune else "frozen and fine-tuned trunk, in %"
    )
    for column in ("", "pretrained", "random weights", "gain", "pretraining"):
        table.add_column(column, justify="left" if column in ("", "pretraining") else "right")
    tuned = result.fine_tuned()
    for gain in gains(result):
        if gain.rate == "top1" or gain.probe in tuned:
            title = row_title(gain.probe, result) + (
                f", {gain.rate.replace('top', 'top-')}" if gain.probe in tuned else ""
            )
            sides = (score_text(side, gain.images) for side in (gain.pretrained, gain.random))
            table.add_row(title, *sides, f"{100 * gain.gain:+.2f}", gain.decision)
    show_table(table)
    for difference in result.finetune.differences if result.finetune else ():
        console.print(f"fine-tuning is not as in the paper: {difference}")
    console.print(
        f"\N{PLUS-MINUS SIGN}: standard error, of the probe's seeds and of {count(result.test_images, 'test image')}; "
        "a gain counts where it exceeds both errors together"
    )
    show_caveats(result)


def show_caveats(result: Evaluation) -> None:
    """Print what an evaluation cannot show, and the backbones whose features have collapsed."""
    for name in result.collapsed:
        console.print(f"the features of the {name} trunk have collapsed: they are the same for all training images")
    for line in [*untested_notes(result.untested), *caveats(result)]:
        console.print(f"note: {line}")


def show_layers(result: LayersEvaluation) -> None:
    """Print the table of the protocol zoo."""
    trained = f"after {count(len(result.epochs), 'epoch')} of the zoo's linear protocol"
    table = Table(title=f"the frozen trunk, layer by layer, {trained}")
    for column in ("head", "pooling", "features", "top-1, %", "top-5, %", "best top-1, %"):
        table.add_column(column, justify="left" if column in ("head", "pooling") else "right")
    for name, head in result.protocol.heads.items():
        best = max(result.epochs, key=lambda epoch: epoch.top1[name])
        table.add_row(
            name,
            head.pooling,
            str(head.features),
            f"{100 * result.top1[name]:.2f}",
            f"{100 * result.top5[name]:.2f}",
            f"{100 * best.top1[name]:.2f} (epoch {best.epoch})",
        )
    show_table(table)
    for note in untested_notes(result.untested):
        console.print(note)
    for difference in result.differences:
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
