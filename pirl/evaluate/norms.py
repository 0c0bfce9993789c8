"""Batch norm over the images of all ranks, with gradients: each rank has its part of the batch.

Torch's `SyncBatchNorm` needs GPUs; this one works on gloo too. In a forward pass it makes two all-reduces of a layer's
channels (mean, then variance), in a backward pass one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pirl.world import World


class _WholeBatch(torch.autograd.Function):
    """Normalisation by mean and variance of the whole batch, and its gradient.

    With x' = (x - m) / s over N values a channel, dx = w / s (dy - mean(dy) - x' mean(dy x')). The gradients of weight
    and bias are those of this rank's part: the training adds them up with all others.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, number: Tensor, world: World
    ) -> Tensor:
        normal = (x - mean[:, None, None]).mul_(scale[:, None, None])
        context.save_for_backward(normal, weight, scale, number)
        context.world = world
        return normal * weight[:, None, None] + bias[:, None, None]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        normal, weight, scale, number = context.saved_tensors
        own = torch.stack([dy.sum((0, 2, 3)), (dy * normal).sum((0, 2, 3))])
        mean_dy, mean_product = context.world.sum(own.clone()) / number
        dx = dy - mean_dy[:, None, None] - normal * mean_product[:, None, None]
        return dx.mul_((weight * scale)[:, None, None]), own[1], own[0], None, None, None, None


class WholeBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of the batch of all ranks; in evaluation mode that of torch."""

    world: World = World()

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) -> the same shape, where a rank may have no image."""
        if not self.training or self.world.size == 1:
            return super().forward(x)
        mean, variance, number = self._moments(x)
        scale = torch.rsqrt(variance + self.eps)
        return _WholeBatch.apply(x, self.weight, self.bias, mean, scale, number, self.world)

    @torch.no_grad()
    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance (C,) of the whole batch and its number of values; move the running statistics."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        own = x.new_tensor([x.shape[0] * x.shape[2] * x.shape[3]])
        sums = self.world.sum(torch.cat([x.sum((0, 2, 3)), own]))
        number = sums[-1]
        mean = sums[:-1] / number
        squares = self.world.sum((x - mean[:, None, None]).square().sum((0, 2, 3)))
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(squares / (number - 1).clamp_min(1), self.momentum)
        self.num_batches_tracked += 1
        return mean, squares / number, number


def whole_batch_norms(network: nn.Module, world: World) -> nn.Module:
    """Give every batch norm of a network, in place, the statistics of the batch of all ranks; return the network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = WholeBatchNorm2d
            module.world = world  # type: ignore[assignment]
    return network
