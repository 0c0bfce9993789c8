"""Prediction of the other steps of the DAG, next to the training: sharding and evaluation.

Bytes and counts follow from the images, the recipe's network and the protocol. Times rest on the rates of `Machine`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import Recipe
from .evaluate.features import precision
from .evaluate.neighbours import QUERIES
from .evaluate.probe import FAST
from .evaluate.zoo import ZooProtocol
from .model import build_model
from .plan import Machine, Plan, measure, step_traffic, value_bytes

FORWARD_PASSES = 4  # over a convolution's output without a backward pass: written, normalised in place, read again
RANK_BYTES = 1.5e9  # of an evaluation's process, without its share of the features: the bound of docs/evaluation.md
BACKBONES = 2  # of the fast protocol: the pretrained one and the one with its initial weights
SHARD_PROCESS_BYTES = 0.4e9  # measured at 1.28 million images, docs/performance.md


@dataclass(frozen=True)
class StepPlan:
    """One step of the DAG. A rank is a GPU of the evaluation, a process of the sharding."""

    step: str
    seconds: float
    limited_by: str
    ranks: int
    memory_bytes_per_rank: float
    """Of the host, for the sharding and the evaluation; of the GPU, for the training."""
    network_bytes_per_node: float
    """Read from and written to storage or sent to other nodes, in the whole step."""
    storage_bytes: float
    """Left in the storage."""
    cost: float
    """Of GPUs; 0 for a step without."""


@dataclass(frozen=True)
class TrunkSizes:
    """Counted on the recipe's backbone for one evaluated image."""

    convolution_values: float
    features: int


def measure_trunk(recipe: Recipe) -> TrunkSizes:
    """Count the backbone on one centre crop without weights or pixels."""
    convolutions = 0

    def count(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal convolutions
        convolutions += output.numel()

    with torch.device("meta"):
        trunk = build_model(recipe).trunk.eval()
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        features = trunk(torch.empty(1, 3, recipe.eval.crop, recipe.eval.crop))
    return TrunkSizes(convolutions, features.shape[1])


def plan_sharding(images: int, cores: int, machine: Machine) -> StepPlan:
    """Return the plan of the sharding on one machine: every image is read, checked, hashed and written once."""
    total = images * machine.image_bytes
    seconds, limit = max(
        (images / (cores * machine.shard_images_per_s), "checking"),
        (total / machine.network_bytes_per_s, "reading"),
        (total / machine.storage_bytes_per_s, "writing"),
    )
    return StepPlan("shard", seconds, limit, cores, SHARD_PROCESS_BYTES, 2 * total, total, 0.0)


def plan_evaluation(recipe: Recipe, plan: Plan, test_images: int, machine: Machine, protocol: str) -> StepPlan:
    """Return the plan of an evaluation on the training's machines.

    fast: every image passes two backbones once, is decoded once, and its features stay on one rank. zoo: every image
    passes one backbone in each epoch, and the test images once. Probes and neighbours on stored features are counted
    by their arithmetic; they are small compared with the backbone's.
    """
    trunk, ranks = measure_trunk(recipe), plan.nodes * plan.gpus
    step = step_traffic(recipe, measure(recipe))
    forward = trunk.convolution_values * FORWARD_PASSES * value_bytes(recipe)
    bytes_per_s = machine.gpu_rate(step) * step  # of memory, also where the speed of a GPU was given
    train_passes = ZooProtocol().epochs if protocol == "zoo" else 1
    decoded = plan.images * train_passes + test_images
    passes = decoded * (1 if protocol == "zoo" else BACKBONES)
    compute_s = passes * forward / bytes_per_s / ranks
    stored = 0.0
    if protocol == "fast":
        value = precision(plan.images, trunk.features).itemsize
        stored = BACKBONES * (plan.images + test_images) * trunk.features * value
        compute_s += _probe_bytes(plan.images, test_images, trunk.features) / bytes_per_s / ranks
    processes = machine.cpus * plan.nodes if machine.cpus else plan.workers_per_gpu * ranks
    read = decoded * machine.image_bytes
    seconds, limit = max(
        (compute_s, "gpu"),
        (decoded / (processes * machine.worker_images_per_s), "decoding"),
        (read / plan.nodes / machine.network_bytes_per_s, "reading"),
    )
    return StepPlan(
        step=f"evaluate ({protocol})",
        seconds=seconds,
        limited_by=limit,
        ranks=ranks,
        memory_bytes_per_rank=RANK_BYTES + stored / ranks,
        network_bytes_per_node=read / plan.nodes,
        storage_bytes=stored,
        cost=seconds / 3600 * ranks * machine.price,
    )


def _probe_bytes(train: int, test: int, features: int) -> float:
    """Return the bytes of features that the probes' steps and the neighbours read."""
    steps = FAST.steps(train) + FAST.steps(round(train * FAST.label_share))
    rows = steps * FAST.batch_size * len(FAST.seeds) + math.ceil(test / QUERIES) * train
    return 4.0 * BACKBONES * features * rows


def plan_dag(
    recipe: Recipe, plan: Plan, test_images: int, cores: int, machine: Machine, protocol: str = "fast"
) -> list[StepPlan]:
    """Return the steps of the DAG in their order; what follows the evaluation takes seconds and is left out."""
    ranks = plan.nodes * plan.gpus
    training = StepPlan(
        step="pretrain",
        seconds=plan.hours * 3600,
        limited_by=plan.limited_by,
        ranks=ranks,
        memory_bytes_per_rank=plan.memory_bytes_per_rank,
        network_bytes_per_node=(plan.network_bytes_per_node + plan.loader_bytes_per_s_per_node * plan.step_s)
        * plan.steps_per_epoch
        * recipe.train.epochs,
        storage_bytes=2 * plan.checkpoint_bytes,
        cost=plan.cost,
    )
    shard = plan_sharding(plan.images + test_images, cores, machine)
    return [shard, training, plan_evaluation(recipe, plan, test_images, machine, protocol)]
