"""One optimiser step of PIRL on one global batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import Recipe
from ..data import Batch, Share, negative_seeds
from ..loss import StepLoss, contrast, draw_negatives
from ..memory import gather_updates
from ..model import memory_format
from ..views import apply_photometrics, draw_photometrics
from ..world import World
from .state import TrainState

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train_step(
    recipe: Recipe, network: nn.Module, state: TrainState, world: World, epoch: int, share: Share, batch: Batch
) -> tuple[StepLoss, Tensor]:
    """Make one optimiser step on one global batch; return this rank's losses and all ranks' unit image embeddings."""
    seed, views, device = recipe.train.seed, recipe.views, world.device
    ids = batch.ids.numpy()
    images, patches = (
        apply_photometrics(
            pixels.to(device, non_blocking=True), draw_photometrics(views, seed, epoch, ids, elements), views
        )
        for pixels, elements in ((batch.images, [0]), (batch.patches, range(1, 1 + views.patches)))
    )
    rows = batch.rows.to(device, non_blocking=True)
    patch_negatives, image_negatives = (
        draw_negatives(recipe.loss, len(state.bank.memory), rows, negative_seeds(seed, epoch, ids, view))
        for view in (0, 1)
    )
    layout = memory_format(state.model.trunk)
    with torch.autocast(device.type, PRECISIONS.get(recipe.train.precision), recipe.train.precision != "fp32"):
        patch_embeddings, image_embeddings = network(images.to(memory_format=layout), patches.to(memory_format=layout))
    weights = torch.full((len(rows),), share.weight, device=device)
    result, embeddings = contrast(
        recipe.loss,
        state.bank,
        world,
        rows,
        patch_embeddings,
        image_embeddings,
        patch_negatives,
        image_negatives,
        weights,
    )
    own = share.counts[world.rank]
    all_rows, all_embeddings = gather_updates(world, rows[:own], embeddings[:own], share.counts)
    state.bank.update(all_rows, all_embeddings)

    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(result.loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return result, all_embeddings


def warm_up_ddp(network: nn.Module, recipe: Recipe, world: World) -> None:
    """Run a dummy backward pass, so that DDP rebuilds its gradient buckets before the first step.

    The layout of the buckets decides in which order more than two ranks' gradients are summed. Without this, the first
    step after a restart would sum in another order than the same step of an uninterrupted run, with other bits.
    """
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    views, device = recipe.views, world.device
    images = torch.zeros(2, 3, views.image_size, views.image_size, device=device)
    patches = torch.zeros(2 * views.patches, 3, views.patch_size, views.patch_size, device=device)
    with torch.autocast(device.type, PRECISIONS.get(recipe.train.precision), recipe.train.precision != "fp32"):
        embeddings = network(images, patches)
    sum(embedding.float().sum() for embedding in embeddings).backward()
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])
    network.zero_grad(set_to_none=True)
