"""Linear heads on the pooled maps of a frozen backbone, trained over ranks as one process would.

Each rank has its images of a batch. The statistics of batch norm are those of the whole batch: two small all-reduces
for all heads together. The maps need no gradient, so none goes back through the statistics. The gradients are added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pirl.evaluate.execution import ALONE
from pirl.evaluate.layers import LAYERS, Shapes
from pirl.layer_results import HeadRates
from pirl.world import World

if TYPE_CHECKING:
    from pirl.evaluate.zoo import ZooProtocol

HEADS = {**{name: name for name in LAYERS[:5]}, "res5avg_bn": "res5avg", "res5avg": "res5avg"}
"""Head -> the layer it reads, in the reference's order. Only the last one has no batch norm."""

Part = tuple[dict[str, Tensor], Tensor]
"""Features of n images by layer, (n, C, h, w) each, and their labels (n,)."""


class Head(nn.Module):
    """Batch norm over the channels of a pooled map (or none), then a linear layer on all of its values."""

    def __init__(self, shape: tuple[int, int, int], classes: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(shape[0]) if norm else nn.Identity()
        self.linear = nn.Linear(math.prod(shape), classes)

    def forward(self, x: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(n, C, h, w) -> (n, classes), with the mean and variance (C,) of a batch, else the running ones."""
        if isinstance(self.norm, nn.BatchNorm2d):
            mean, var = moments or (self.norm.running_mean, self.norm.running_var)
            x = F.batch_norm(x, mean, var, self.norm.weight, self.norm.bias, eps=self.norm.eps)
        return self.linear(x.flatten(1))


def build_heads(shapes: Shapes, classes: int, seed: int) -> nn.ModuleDict:
    """Return all heads, with PyTorch's default initial weights from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleDict({name: Head(shapes[layer], classes, name != "res5avg") for name, layer in HEADS.items()})


def head_optimizer(heads: nn.ModuleDict, protocol: ZooProtocol) -> torch.optim.SGD:
    """Return Nesterov's SGD, with decay on the linear layers' weights and biases; each epoch sets the rate."""
    groups: dict[str, list[Tensor]] = {"linear": [], "norm": []}
    for module in heads.modules():
        if isinstance(module, nn.Linear | nn.BatchNorm2d):
            groups["linear" if isinstance(module, nn.Linear) else "norm"] += [module.weight, module.bias]
    decay = {"linear": protocol.weight_decay, "norm": 0.0}
    return torch.optim.SGD(
        [{"name": name, "params": params, "weight_decay": decay[name]} for name, params in groups.items() if params],
        lr=protocol.base_lr,
        momentum=protocol.momentum,
        nesterov=True,
        fused=True,
    )


def train_step(
    heads: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    features: dict[str, Tensor],
    labels: Tensor,
    world: World = ALONE,
    images: int | None = None,
) -> Tensor:
    """Make one step of all heads on one batch; return their losses (heads,), each the mean cross entropy of the batch.

    `images` are those of all ranks, of which this one has `features` and `labels`.
    """
    images = len(labels) if images is None else images
    statistics = batch_statistics(heads, features, world, images)
    losses = torch.stack(
        [
            F.cross_entropy(head(features[HEADS[name]], statistics.get(name)), labels, reduction="sum") / images
            for name, head in heads.items()
        ]
    )
    optimizer.zero_grad(set_to_none=True)
    losses.sum().backward()
    for parameter in heads.parameters():
        assert parameter.grad is not None
        world.sum(parameter.grad)
    optimizer.step()
    return world.sum(losses.detach())


@torch.no_grad()
def batch_statistics(
    heads: nn.ModuleDict, features: dict[str, Tensor], world: World, images: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and variance (C,) of the whole batch by head, and move the running statistics of batch norm."""
    norms = {name: head.norm for name, head in heads.items() if isinstance(head.norm, nn.BatchNorm2d)}
    if not norms:
        return {}
    maps = [features[HEADS[name]] for name in norms]
    widths = [x.shape[1] for x in maps]
    places = [images * x.shape[2] * x.shape[3] for x in maps]
    sums = world.sum(torch.cat([x.sum((0, 2, 3)) for x in maps])).split(widths)
    means = [each / number for each, number in zip(sums, places)]
    centred = [(x - mean[:, None, None]).square().sum((0, 2, 3)) for x, mean in zip(maps, means)]
    squares = world.sum(torch.cat(centred)).split(widths)
    for norm, mean, square, number in zip(norms.values(), means, squares, places):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(square / (number - 1), norm.momentum)
        norm.num_batches_tracked += 1
    return {
        name: (mean, square / number) for name, mean, square, number in zip(norms, means, squares, places, strict=True)
    }


def top_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """(2,) int64: of (n, classes) scores, how many have their label first, and how many among the first five."""
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum()])


@torch.no_grad()
def score_heads(heads: nn.ModuleDict, parts: Iterable[Part], images: int, world: World = ALONE) -> HeadRates:
    """Return the rates over the parts of all ranks, which have `images` together."""
    hits = torch.zeros(len(heads), 2, dtype=torch.int64, device=world.device)
    for features, labels in parts:
        for row, (name, head) in enumerate(heads.items()):
            hits[row] += top_hits(head(features[HEADS[name]]), labels)
    shares = (world.sum(hits).double() / images).tolist()
    top1, top5 = ({name: shares[row][at] for row, name in enumerate(heads)} for at in (0, 1))
    return HeadRates(top1=top1, top5=top5)


def empty_part(shapes: Shapes, device: torch.device) -> Part:
    """Return the features of no image, of a rank that has none of a small batch."""
    features: dict[str, Any] = {name: torch.zeros(0, *shape, device=device) for name, shape in shapes.items()}
    return features, torch.zeros(0, dtype=torch.int64, device=device)


def join(parts: list[Part], shapes: Shapes, device: torch.device) -> Part:
    """Return several parts as one."""
    if not parts:
        return empty_part(shapes, device)
    features, labels = zip(*parts)
    return {name: torch.cat([part[name] for part in features]) for name in features[0]}, torch.cat(labels)
