"""Softmax regressions that are trained together by SGD: one for each backbone and seed, over all ranks.

All backbones see the same batches, so that a batch is read once; each seed has its own order. A rank has the gradient
of its own images of a batch, in closed form, and one all-reduce adds up those of all probes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pirl.evaluate.features import Features, Moments
from pirl.evaluate.progress import Progress
from pirl.world import World

if TYPE_CHECKING:
    from pirl.evaluate.probe import Protocol

RESIDENT_SHARE = 0.2  # of a GPU's free memory that the features of one set may take


class Standardised:
    """Features of one data set with the mean and standard deviation of the training images: 0 and 1."""

    def __init__(self, features: Features, moments: Moments, device: torch.device) -> None:
        self.features, self.first, self.labels = features, features.first, features.y
        self.mean, self.std = moments.mean.to(device), moments.std.to(device)
        self.device, self.x = device, features.x
        if device.type == "cuda" and features.x.nbytes < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            self.x = features.x.to(device)

    @property
    def count(self) -> int:
        """Rows of this rank."""
        return len(self.x)

    @property
    def dim(self) -> int:
        """Values of a row."""
        return self.x.shape[1]

    def rows(self, places: Tensor) -> Tensor:
        """Return (k, D) float32 of these places of this rank, on the device."""
        return self.x[places.to(self.x.device)].to(self.device).float().sub_(self.mean).div_(self.std)


class Order:
    """Batches of ids by a seed: permutations one after the other, whose rest that is too small is left out."""

    def __init__(self, ids: Tensor, batch: int, generator: torch.Generator) -> None:
        self.ids, self.batch, self.generator = ids, batch, generator
        self.left = ids[:0]

    def next(self) -> Tensor:
        """Return (batch,) ids."""
        if len(self.left) < self.batch:
            self.left = self.ids[torch.randperm(len(self.ids), generator=self.generator)]
        part, self.left = self.left[: self.batch], self.left[self.batch :]
        return part


def initial(dim: int, classes: int, generator: torch.Generator) -> Tensor:
    """Return (D + 1, classes) weights: uniform in +-1/sqrt(D), and a last row of zeros for the bias."""
    weight = torch.empty(classes, dim).uniform_(-(dim**-0.5), dim**-0.5, generator=generator)
    return torch.cat([weight.T, torch.zeros(1, classes)])


@torch.no_grad()
def train_probes(
    train: Sequence[Standardised],
    subsets: Sequence[Tensor],
    classes: int,
    protocol: Protocol,
    world: World,
    progress: Progress,
    name: str,
) -> Tensor:
    """Return (backbones * seeds, D + 1, classes) weights, the bias last, after SGD with a cosine schedule.

    `subsets` has the ids with labels for each of the protocol's seeds, as many for each.
    """
    images, dim = len(subsets[0]), train[0].dim
    batch, steps = protocol.batch(images), protocol.steps(images)
    generators = [torch.Generator().manual_seed(seed) for seed in protocol.seeds]
    start = torch.stack([initial(dim, classes, generator) for generator in generators])
    orders = [Order(ids, batch, generator) for ids, generator in zip(subsets, generators)]
    weights = start.repeat(len(train), 1, 1).to(world.device)
    gradient, momentum = torch.empty_like(weights), torch.zeros_like(weights)
    progress.begin(f"probes {name}", steps, "steps")
    for step in range(steps):
        world.moment = f"step {step} of the probes {name}"
        rate = protocol.lr * (1 + math.cos(math.pi * step / steps)) / 2
        _gradient(train, torch.stack([order.next() for order in orders]), weights, gradient)
        world.sum(gradient).add_(weights, alpha=protocol.weight_decay)
        momentum.mul_(protocol.momentum).add_(gradient)
        weights.sub_(gradient.add_(momentum, alpha=protocol.momentum), alpha=rate)  # Nesterov's
        progress.advance(1)
    return weights


def _gradient(train: Sequence[Standardised], ids: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write this rank's part of the gradients of the mean cross entropy over the ids (seeds, B), each its own batch.

    With softmax p of the logits and one-hot labels y it is x' (p - y) / B.
    """
    dim, device = weights.shape[1] - 1, weights.device
    places, share = _own(ids, train[0].first, train[0].count)
    if not places.numel():
        out.zero_()
        return
    seeds, most = places.shape
    x = torch.cat([each.rows(places.flatten()).view(seeds, most, dim) for each in train])
    y = train[0].labels[places + train[0].first].to(device).repeat(len(train), 1)
    error = torch.baddbmm(weights[:, dim:], x, weights[:, :dim]).softmax(2)
    error.scatter_add_(2, y[:, :, None], error.new_full((*y.shape, 1), -1.0))
    error.mul_((share / ids.shape[1]).to(device).repeat(len(train), 1)[:, :, None])
    torch.bmm(x.transpose(1, 2), error, out=out[:, :dim])
    torch.sum(error, 1, out=out[:, dim])


def _own(ids: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the places (seeds, m) of the ids (seeds, B) that a rank has, and 1 for each, 0 for a filler."""
    places = ids - first
    own = (places >= 0) & (places < count)
    most = int(own.sum(1).max())
    if most == ids.shape[1]:
        return places, torch.ones(ids.shape)
    front = own.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    share = own.gather(1, front)
    return places.gather(1, front) * share, share.float()
