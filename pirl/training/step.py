"""One optimiser step of PIRL on one global batch."""

from __future__ import annotations

import torch
from torch import nn

from ..config import Recipe
from ..data import Batch, Share, negative_seeds, step_seed
from ..loss import Samples, StepLoss
from ..model import memory_format
from ..views import apply_photometrics, draw_photometrics, open_pretext
from ..world import World
from .state import TrainState

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train_step(
    recipe: Recipe, network: nn.Module, state: TrainState, world: World, epoch: int, share: Share, batch: Batch
) -> StepLoss:
    """Make one optimiser step on one global batch; return this rank's losses."""
    seed, views, device = recipe.train.seed, recipe.views, world.device
    ids = batch.ids.numpy()
    images, elements = (
        apply_photometrics(pixels.to(device, non_blocking=True), parameters, views)
        for pixels, parameters in (
            (batch.images, draw_photometrics(views, seed, epoch, ids, [0])),
            (batch.elements, open_pretext(views).photometrics(seed, epoch, ids)),
        )
    )
    rows = batch.rows.to(device, non_blocking=True)
    samples = Samples(
        rows,
        torch.stack([negative_seeds(seed, epoch, ids, view) for view in (0, 1)]),
        torch.full((len(rows),), share.weight, device=device),
        share.counts,
        step_seed(seed, epoch, share.first),
    )
    layout = memory_format(state.model.trunk)
    with torch.autocast(device.type, PRECISIONS.get(recipe.train.precision), recipe.train.precision != "fp32"):
        second, first = network(images.to(memory_format=layout), elements.to(memory_format=layout))
    result = state.criterion(state.bank, samples, second, first)
    state.bank.update(result.rows, result.embeddings)

    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(result.loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return result


def warm_up_ddp(network: nn.Module, recipe: Recipe, world: World) -> None:
    """Run a dummy backward pass, so that DDP rebuilds its gradient buckets before the first step.

    The layout of the buckets decides in which order more than two ranks' gradients are summed. Without this, the first
    step after a restart would sum in another order than the same step of an uninterrupted run, with other bits.
    """
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    views, device = recipe.views, world.device
    images = torch.zeros(2, 3, views.image_size, views.image_size, device=device)
    count, height, width, _ = open_pretext(views).shape
    elements = torch.zeros(2 * count, 3, height, width, device=device)
    with torch.autocast(device.type, PRECISIONS.get(recipe.train.precision), recipe.train.precision != "fp32"):
        embeddings = network(images, elements)
    sum(embedding.float().sum() for embedding in embeddings).backward()
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])
    network.zero_grad(set_to_none=True)
