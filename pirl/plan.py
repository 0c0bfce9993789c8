"""Prediction of the resources of a training before it is paid for: time, money, memory, network and storage.

Sizes are exact: the recipe's own network is built without memory (on PyTorch's meta device) and counted. Times follow
from the rates in `Machine`, which are assumptions until they are measured where the training will run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import Recipe
from .errors import UsageError
from .model import build_model
from .training.placement import WHOLE_SHARE, BankPlacement, bank_bytes
from .views import open_pretext

ROW_ID_BYTES = 8
QUERY_WORDS, SUM_WORDS = 6, 6  # of 4 bytes a sample, besides embeddings: row and seeds; loss, cosines and own score
BACKWARD_SHARE = 2 / 3  # of a step's arithmetic; gradients travel during it
PASSES = 14  # over each convolution's output in a step, forward and backward, with batch norm and ReLU fused
GROWTH = ((1_281_167, 4), (10_000_000, 4), (100_000_000, 16), (1_000_000_000, 64))  # images and nodes


@dataclass(frozen=True)
class Machine:
    """Assumed rates of a GPU, a node and the storage."""

    images_per_s: float | None = None
    """Of one GPU in training; None: `step_bytes_per_s` over the bytes that the recipe's network moves."""
    step_bytes_per_s: float = 1.46e12
    """Memory traffic that a training step sustains: a third of an H200's bandwidth, 2,700 images/s of a bf16 R50."""
    gpu_bytes: float = 141e9
    worker_images_per_s: float = 320.0
    """Views of one loading process: measured by `benchmarks/g3_loader.py` on photographs of 500x375, exact pixels."""
    cpus: int | None = None
    """Cores of a node that load data; None: as many as are needed."""
    network_bytes_per_s: float = 12.5e9
    """Of one node."""
    storage_bytes_per_s: float = 1e9
    """Of one writer."""
    copy_bytes_per_s: float = 5e9
    """From the GPU into the host's memory, which is all that a checkpoint stops training for."""
    image_bytes: float = 110e3
    gpu_hours_between_failures: float = 50_700.0
    """Of one GPU; a few hundred where machines are preempted."""
    restart_s: float = 300.0
    """From a failure to the next new step."""
    price: float = 3.5
    """Of a GPU for an hour."""
    shard_images_per_s: float = 1100.0
    """Checked, hashed and written by one core: `benchmarks/g1_sharding.py`, photographs of 500x375."""

    def gpu_rate(self, traffic: float) -> float:
        """Return the images/s of a GPU in training, from the bytes that a step moves for one image."""
        return self.images_per_s or self.step_bytes_per_s / traffic


@dataclass(frozen=True)
class Sizes:
    """Counted on the recipe's network."""

    parameters: int
    buffer_bytes: int
    """Batch norm's running statistics."""
    convolution_values: float
    """Outputs of all convolutions for one image with its second view."""
    saved_bytes: float
    """Held for the backward pass, for one image with its second view, in the recipe's precision."""


@dataclass(frozen=True)
class Plan:
    """One training on one set of machines. Bytes, seconds and hours by the names; a rank is a GPU."""

    nodes: int
    gpus: int
    images: int
    batch_size: int
    steps_per_epoch: int
    images_per_s: float
    """Of all GPUs together."""
    limited_by: str
    step_s: float
    epoch_s: float
    hours: float
    cost_per_epoch: float
    cost: float
    bank: str
    """whole or rows."""
    bank_bytes_per_rank: int
    whole_bank_bytes: int
    sharded_bank_bytes_per_rank: int
    """Bytes that a bank cut by rows over all ranks needs (`--bank rows`)."""
    weights_bytes_per_rank: int
    """Parameters, gradients and momentum."""
    activation_bytes_per_rank: int
    memory_bytes_per_rank: int
    fits: bool
    workers_per_gpu: int
    """Loading processes that keep up with a GPU."""
    loader_bytes_per_s_per_node: float
    """Compressed images read."""
    gradient_bytes_per_rank: int
    """Summed over all ranks in each step."""
    gathered_bytes_per_rank: int
    """New rows of the bank and their ids, from all ranks, in each step; with a bank by rows, the queries."""
    returned_bytes_per_rank: int
    """Sums over a rank's rows that it gives to the other ranks in each step; 0 for a whole bank."""
    network_bytes_per_node: float
    """Sent between nodes in each step."""
    network_s: float
    dataset_bytes: float
    checkpoint_bytes: int
    checkpoint_stall_s: float
    checkpoint_write_s: float
    checkpoint_interval_s: float
    lost_share: float
    """Of the time: stalls, work done twice and restarts."""


def measure(recipe: Recipe) -> Sizes:
    """Count the recipe's network on two images without weights or pixels."""
    views, images = recipe.views, 2  # batch norm wants more than one value for each channel
    elements, height, width, _ = open_pretext(views).shape
    convolutions = 0

    def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal convolutions
        convolutions += output.numel()

    with torch.device("meta"):
        model = build_model(recipe)
        inputs = (
            torch.empty(images, 3, views.image_size, views.image_size),
            torch.empty(images * elements, 3, height, width),
        )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with saved_storages() as saved:
        model(*inputs)
    held = sum(size for storage, size in saved.items() if storage not in weights)
    return Sizes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        convolution_values=convolutions / images,
        saved_bytes=held / images * value_bytes(recipe) / 4,
    )


@contextmanager
def saved_storages() -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd holds for the backward pass of what is computed inside, by its address."""
    sizes_by_storage: dict[int, int] = {}
    kept = []  # an address is only its own as long as its storage lives

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.append(storage)
        sizes_by_storage[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes_by_storage


def step_traffic(recipe: Recipe, sizes: Sizes) -> float:
    """Return the bytes of memory that a training step moves for one image with its second view."""
    return sizes.convolution_values * PASSES * value_bytes(recipe)


def value_bytes(recipe: Recipe) -> int:
    """Of one activation."""
    return 4 if recipe.train.precision == "fp32" else 2


def plan_training(
    recipe: Recipe,
    nodes: int,
    gpus: int,
    images: int,
    machine: Machine = Machine(),
    placement: BankPlacement = "auto",
) -> Plan:
    """Return the plan of a training. `gpus` are those of a node; `images` those of the data set."""
    recipe.check_data(images)
    return predict(recipe, measure(recipe), nodes, gpus, images, machine, placement)


class Bank(NamedTuple):
    """Memory bank of a plan: bytes of a rank, and bytes of the two messages of a step."""

    kind: str
    bytes_per_rank: int
    gathered: int
    returned: int


def plan_bank(recipe: Recipe, rows: int, ranks: int, machine: Machine, placement: BankPlacement) -> Bank:
    """Return the bank as a training with this placement holds it; auto chooses as a training does."""
    batch, dim = recipe.train.batch_size, recipe.model.embedding_dim
    whole = bank_bytes(recipe, rows)
    too_large = ranks > 1 and whole > WHOLE_SHARE * machine.gpu_bytes
    if placement == "rows" or (placement == "auto" and too_large):
        queries, sums = 4 * (2 * dim + QUERY_WORDS), 4 * (3 * dim + SUM_WORDS)
        return Bank("rows", bank_bytes(recipe, -(-rows // ranks)), batch * queries, batch * sums)
    return Bank("whole", whole, batch * (4 * dim + ROW_ID_BYTES), 0)


class Step(NamedTuple):
    """Predicted times and traffic of a training step."""

    stepping_s: float
    """The GPU's own time, with what the network adds."""
    step_s: float
    limited_by: str
    sent: float
    """Bytes that a node sends."""
    network_s: float


def predict_step(recipe: Recipe, sizes: Sizes, nodes: int, ranks: int, machine: Machine, bank: Bank) -> Step:
    """Return the times of a step; the slowest of GPU, decoding and reading sets the pace."""
    batch = recipe.train.batch_size
    compute_s = -(-batch // ranks) / machine.gpu_rate(step_traffic(recipe, sizes))
    gradients = 4 * sizes.parameters
    sent = 2 * (nodes - 1) / nodes * gradients + (nodes - 1) / nodes * (bank.gathered + bank.returned)
    network_s = sent / machine.network_bytes_per_s
    # gradients travel during the backward pass, so only the longer rest is waited for
    stepping_s = compute_s * (1 - BACKWARD_SHARE) + max(compute_s * BACKWARD_SHARE, network_s)
    loading_s = batch / nodes / (machine.cpus * machine.worker_images_per_s) if machine.cpus else 0.0
    reading_s = batch / nodes * machine.image_bytes / machine.network_bytes_per_s
    step_s, limit = max((stepping_s, "gpu"), (loading_s, "decoding"), (reading_s, "reading"))
    if limit == "gpu" and network_s > compute_s * BACKWARD_SHARE:
        limit = "network"
    return Step(stepping_s, step_s, limit, sent, network_s)


class Saving(NamedTuple):
    """Predicted times of the checkpoints."""

    stall_s: float
    write_s: float
    interval_s: float
    lost_share: float
    """Of the time: stalls, work done twice and restarts."""


def predict_saving(checkpoint: int, ranks: int, machine: Machine) -> Saving:
    """Return the times of checkpoints of so many bytes, saved at the best interval."""
    stall_s, write_s = checkpoint / machine.copy_bytes_per_s, checkpoint / machine.storage_bytes_per_s
    between_s = machine.gpu_hours_between_failures * 3600 / ranks
    # Young's optimum, but no save begins before the last one is written
    interval_s = max(math.sqrt(2 * stall_s * between_s), write_s)
    lost = stall_s / interval_s + (interval_s / 2 + machine.restart_s) / between_s
    return Saving(stall_s, write_s, interval_s, lost)


def predict(
    recipe: Recipe, sizes: Sizes, nodes: int, gpus: int, images: int, machine: Machine, placement: BankPlacement
) -> Plan:
    """Return the plan of a network that has been measured."""
    ranks, batch = nodes * gpus, recipe.train.batch_size
    rows = recipe.rows(images)
    if batch < ranks:
        larger = f"e.g. train.batch_size={min(32 * ranks, rows)}" if rows >= ranks else f"use at most {rows} GPUs"
        raise UsageError(f"a batch of {batch} images cannot be dealt to {ranks} GPUs", larger)
    share = -(-batch // ranks)
    bank = plan_bank(recipe, rows, ranks, machine, placement)
    step = predict_step(recipe, sizes, nodes, ranks, machine, bank)

    gradients = 4 * sizes.parameters
    weights = 3 * gradients + sizes.buffer_bytes
    activations = round(share * sizes.saved_bytes)
    memory = bank.bytes_per_rank + weights + activations
    checkpoint = bank_bytes(recipe, rows) + 2 * gradients + sizes.buffer_bytes
    saving = predict_saving(checkpoint, ranks, machine)

    steps = recipe.steps_per_epoch(rows)
    epoch_s = steps * step.step_s * (1 + saving.lost_share)
    epoch_cost = epoch_s / 3600 * ranks * machine.price
    return Plan(
        nodes=nodes,
        gpus=gpus,
        images=images,
        batch_size=batch,
        steps_per_epoch=steps,
        images_per_s=batch / step.step_s,
        limited_by=step.limited_by,
        step_s=step.step_s,
        epoch_s=epoch_s,
        hours=epoch_s * recipe.train.epochs / 3600,
        cost_per_epoch=epoch_cost,
        cost=epoch_cost * recipe.train.epochs,
        bank=bank.kind,
        bank_bytes_per_rank=bank.bytes_per_rank,
        whole_bank_bytes=bank_bytes(recipe, rows),
        sharded_bank_bytes_per_rank=bank_bytes(recipe, -(-rows // ranks)),
        weights_bytes_per_rank=weights,
        activation_bytes_per_rank=activations,
        memory_bytes_per_rank=memory,
        fits=memory <= machine.gpu_bytes,
        workers_per_gpu=math.ceil(share / step.stepping_s / machine.worker_images_per_s),
        loader_bytes_per_s_per_node=batch / nodes / step.step_s * machine.image_bytes,
        gradient_bytes_per_rank=gradients,
        gathered_bytes_per_rank=bank.gathered,
        returned_bytes_per_rank=bank.returned,
        network_bytes_per_node=step.sent,
        network_s=step.network_s,
        dataset_bytes=images * machine.image_bytes,
        checkpoint_bytes=checkpoint,
        checkpoint_stall_s=saving.stall_s,
        checkpoint_write_s=saving.write_s,
        checkpoint_interval_s=saving.interval_s,
        lost_share=saving.lost_share,
    )


def growth(
    recipe: Recipe,
    gpus: int,
    images_per_gpu: int,
    machine: Machine = Machine(),
    placement: BankPlacement = "auto",
) -> list[Plan]:
    """Return the plans of the recipe on more images and nodes, the batch growing with the GPUs as in the reference."""
    sizes = measure(recipe)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"images": 0})})
    plans = []
    for images, nodes in GROWTH:
        train = recipe.train.model_copy(update={"batch_size": images_per_gpu * nodes * gpus})
        grown = recipe.model_copy(update={"train": train})
        plans.append(predict(grown, sizes, nodes, gpus, images, machine, placement))
    return plans
