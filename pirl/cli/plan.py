"""`pirl plan`: what a training will take."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import logs
from ..errors import UsageError
from ..jobs.resources import derived, formulas
from ..text import count, duration, size
from ..training.placement import BankPlacement
from .app import Json, Overrides, RecipeName, app, console, show_rows

if TYPE_CHECKING:
    from ..plan import Plan
    from ..plan_steps import StepPlan

Bank = Annotated[
    BankPlacement, typer.Option(help="Memory bank: whole, or by rows over all GPUs; auto: as a training does.")
]
PlannedProtocol = Literal["fast", "zoo"]
ASSUMPTIONS = (
    "speed of a GPU: {}. The bank is cut by rows where the whole one would take more than a quarter of a GPU's memory; "
    "--bank whole or rows decides it. A row is written once an epoch, so a bank needs several."
)
SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_count(text: str) -> int:
    """1281167, 1_281_167, 70k, 1.28M or 1B, as a number."""
    match = re.fullmatch(r"([\d_,]*\.?\d+)([kmb]?)", text.strip().lower())
    number = round(float(re.sub("[_,]", "", match[1])) * SUFFIXES[match[2]]) if match else 0
    if number < 1:
        raise UsageError(f"--images {text!r} is not a number of images", "e.g. 70000, 70k, 1.28M or 1B")
    return number


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Machines.", min=1)] = 4,
    gpus: Annotated[int, typer.Option(help="GPUs of each.", min=1)] = 8,
    images: Annotated[str, typer.Option(help="Images of the data set: 70000, 1.28M, 1B.")] = "1281167",
    price: Annotated[float, typer.Option(help="Of a GPU for an hour.", min=0)] = 3.5,
    images_per_s: Annotated[
        float | None, typer.Option(help="Measured speed of one GPU; else estimated for an H200.", min=0.01)
    ] = None,
    gpu_gb: Annotated[float, typer.Option(help="Memory of a GPU.", min=0.1)] = 141.0,
    cpus: Annotated[int | None, typer.Option(help="Cores of a node that load data; else as many as needed.", min=1)] = (
        None
    ),
    worker_images_per_s: Annotated[float, typer.Option(help="Speed of one loading process.", min=0.01)] = 320.0,
    network_gbit: Annotated[float, typer.Option(help="Network of a node, Gbit/s.", min=0.01)] = 100.0,
    storage_mb: Annotated[float, typer.Option(help="Speed of writing a checkpoint, MB/s.", min=0.01)] = 1000.0,
    image_kb: Annotated[float, typer.Option(help="Mean size of an image file.", min=0.01)] = 110.0,
    mtbf_hours: Annotated[
        float, typer.Option(help="Hours between failures of one GPU; a few hundred if preemptible.", min=0.01)
    ] = 50_700.0,
    bank: Bank = "auto",
    test_images: Annotated[str, typer.Option(help="Images of the test set.")] = "50000",
    shard_cpus: Annotated[int, typer.Option(help="Cores of the sharding.", min=1)] = 8,
    protocol: Annotated[PlannedProtocol, typer.Option(help="Protocol of the evaluation.")] = "fast",
    as_json: Json = False,
) -> None:
    """Tell what each step of the DAG will take, before anything runs: hours, cost, memory, network, checkpoints.

    Sizes are counted on the recipe's network. Times rest on the rates given: measure yours and give them.

    Example: pirl plan r50-200ep-mlp --nodes 4 --gpus 8 --images 1.28M --price 3.5
    """
    from ..config import load_recipe
    from ..plan import Machine, growth, plan_training
    from ..plan_steps import plan_dag

    chosen = load_recipe(recipe, overrides or [])
    machine = Machine(
        images_per_s=images_per_s,
        gpu_bytes=gpu_gb * 1e9,
        worker_images_per_s=worker_images_per_s,
        cpus=cpus,
        network_bytes_per_s=network_gbit * 1e9 / 8,
        storage_bytes_per_s=storage_mb * 1e6,
        image_bytes=image_kb * 1e3,
        gpu_hours_between_failures=mtbf_hours,
        price=price,
    )
    training_plan = plan_training(chosen, nodes, gpus, parse_count(images), machine, bank)
    steps = plan_dag(chosen, training_plan, parse_count(test_images), shard_cpus, machine, protocol)
    grown = growth(chosen, gpus, -(-training_plan.batch_size // (nodes * gpus)), machine, bank)
    if as_json:
        rows = {"steps": [asdict(each) for each in steps], "growth": [asdict(each) for each in grown]}
        result = {"plan": asdict(training_plan), **rows}
        logs.output(f"{json.dumps(result)}\n")
        return
    print_plan(chosen.name, training_plan, chosen.train.epochs, steps, grown, bool(images_per_s))


def print_plan(
    name: str, plan: Plan, epochs: int, steps: Sequence[StepPlan], grown: Sequence[Plan], measured: bool
) -> None:
    """Print the training, the steps of the DAG, the resources of a pod, and the growth."""
    show_rows([{"what": what, name: text} for what, text in summary(plan, epochs)], False)
    console.print("\nthe steps of the DAG:")
    show_rows([step_row(each) for each in steps], False)
    for line in formulas(derived(plan.gpus) | {"gpus": plan.gpus, "processes": 0}, plan.gpus):
        console.print(f"pod of {count(plan.gpus, 'GPU')}: {line}")
    console.print("\nthe same training with more images and nodes, the batch growing with the GPUs:")
    show_rows([growth_row(each) for each in grown], False)
    console.print(ASSUMPTIONS.format("given" if measured else "estimated for an H200: give yours by --images-per-s"))


def summary(plan: Plan, epochs: int) -> list[tuple[str, str]]:
    fits = "fits" if plan.fits else "DOES NOT FIT"
    return [
        (
            "machines",
            f"{count(plan.nodes, 'node')} x {count(plan.gpus, 'GPU')}, {count(plan.images, 'image')}, "
            f"batch {plan.batch_size:,}",
        ),
        ("speed", f"{plan.images_per_s:,.0f} images/s, limited by: {plan.limited_by}"),
        (
            "time",
            f"{plan.hours:,.2f} h: {count(epochs, 'epoch')} of {plan.epoch_s:,.1f} s, "
            f"{count(plan.steps_per_epoch, 'step')} each",
        ),
        ("cost", f"{plan.cost:,.2f}: {plan.cost_per_epoch:,.3f} an epoch"),
        ("memory of a rank", f"{size(plan.memory_bytes_per_rank)}, {fits}"),
        ("- memory bank", f"{size(plan.bank_bytes_per_rank)}, {plan.bank} of {size(plan.whole_bank_bytes)}"),
        ("- weights, gradients, momentum", size(plan.weights_bytes_per_rank)),
        ("- activations", size(plan.activation_bytes_per_rank)),
        ("loading processes", f"{plan.workers_per_gpu} for each GPU, {plan.workers_per_gpu * plan.gpus} a node"),
        (
            "reading, each node",
            f"{size(plan.loader_bytes_per_s_per_node)}/s of a data set of {size(plan.dataset_bytes)}",
        ),
        (
            "network, each step",
            f"gradients {size(plan.gradient_bytes_per_rank)}, bank {bank_message(plan)}; a node "
            f"sends {size(plan.network_bytes_per_node)} in {plan.network_s * 1e3:.1f} of {plan.step_s * 1e3:.1f} ms",
        ),
        (
            "checkpoint",
            f"{size(plan.checkpoint_bytes)}, stops training for {plan.checkpoint_stall_s:.2f} s, written in "
            f"{plan.checkpoint_write_s:.1f} s",
        ),
        (
            "checkpoint every",
            f"{plan.checkpoint_interval_s / 60:,.1f} min; stalls, lost work and restarts take {plan.lost_share:.3%}",
        ),
    ]


def bank_message(plan: Plan) -> str:
    """Return what a rank gathers and gives out for the bank in each step."""
    returned = f", sums {size(plan.returned_bytes_per_rank)}" if plan.returned_bytes_per_rank else ""
    return f"queries {size(plan.gathered_bytes_per_rank)}{returned}"


def step_row(step: StepPlan) -> dict[str, Any]:
    """Return a row of the table of steps."""
    return {
        "step": step.step,
        "time": duration(step.seconds),
        "limited by": step.limited_by,
        "ranks": step.ranks,
        "memory of a rank": size(step.memory_bytes_per_rank),
        "network, each node": size(step.network_bytes_per_node),
        "storage": size(step.storage_bytes),
        "cost": f"{step.cost:,.2f}",
    }


def growth_row(plan: Plan) -> dict[str, Any]:
    return {
        "images": short_count(plan.images),
        "nodes": plan.nodes,
        "bank": size(plan.whole_bank_bytes),
        "of a rank": f"{size(plan.bank_bytes_per_rank)}, {plan.bank}",
        "rank's memory": size(plan.memory_bytes_per_rank) + ("" if plan.fits else " (!)"),
        "sent a step": size(plan.network_bytes_per_node),
        "node reads": f"{size(plan.loader_bytes_per_s_per_node)}/s",
        "data set": size(plan.dataset_bytes),
        "checkpoint": size(plan.checkpoint_bytes),
        "epoch": f"{plan.epoch_s / 60:,.1f} min",
        "epoch's cost": f"{plan.cost_per_epoch:,.2f}",
    }


def short_count(count: int) -> str:
    for unit, times in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= times:
            return f"{count / times:.3g}{unit}"
    return str(count)
