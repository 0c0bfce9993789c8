"""One optimiser step of PIRL on one global batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ..config import Recipe
from ..data import Share, step_seed
from ..loss import Samples, StepLoss
from ..model import memory_format
from ..views import apply_photometrics, open_pretext
from ..world import World
from .feed import Inputs
from .state import TrainState

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train_step(
    recipe: Recipe, network: nn.Module, state: TrainState, world: World, epoch: int, share: Share, inputs: Inputs
) -> StepLoss:
    """Make one optimiser step on one global batch; return this rank's losses."""
    images = apply_photometrics(inputs.images, inputs.image_photometrics, recipe.views)
    elements = apply_photometrics(inputs.elements, inputs.element_photometrics, recipe.views)
    samples = Samples(
        inputs.rows,
        inputs.seeds,
        torch.full((len(inputs.rows),), share.weight, device=world.device),
        share.counts,
        step_seed(recipe.train.seed, epoch, share.first),
    )
    layout = memory_format(state.model.trunk)
    with autocast(recipe, world):
        second, first = network(images.to(memory_format=layout), elements.to(memory_format=layout))
    result = state.criterion(state.bank, samples, second, first)
    state.bank.update(result.rows, result.embeddings)

    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(result.loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return result


def autocast(recipe: Recipe, world: World) -> AbstractContextManager[object]:
    """Return the context in which the network runs in the recipe's precision."""
    half = PRECISIONS.get(recipe.train.precision)
    return torch.autocast(world.device.type, half) if half else nullcontext()


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
    with autocast(recipe, world):
        embeddings = network(images, elements)
    sum(embedding.float().sum() for embedding in embeddings).backward()
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])
    network.zero_grad(set_to_none=True)
