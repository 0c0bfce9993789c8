"""Layers of a frozen trunk: the maps of an image, pooled to about 9,000 values each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pirl.config import Recipe
from pirl.model import Trunk

MAX_FEATURES = 9216  # of one layer: the zoo's largest

LAYERS = ("conv1", "res2", "res3", "res4", "res5", "res5avg")
ZOO_POOLS: dict[int, tuple[nn.Module, ...]] = {
    1: (nn.AvgPool2d(10, 10, 4), nn.AvgPool2d(16, 8), nn.AvgPool2d(13, 5), nn.AvgPool2d(8, 3), nn.AvgPool2d(6, 1)),
    2: (
        nn.AvgPool2d(20, 13, 4),
        nn.AvgPool2d(32, 8),
        nn.AvgPool2d(13, 7),
        nn.AvgPool2d(8, 6),
        nn.AdaptiveAvgPool2d((2, 1)),
    ),
}
"""By the trunk's width, for conv1 to res5 of a bottleneck ResNet on crops of 224 pixels. Padding counts as zeros."""

Shapes = dict[str, tuple[int, int, int]]
"""Layer -> channels, height, width of its map."""


def layer_maps(trunk: Trunk, x: Tensor) -> dict[str, Tensor]:
    """(n, 3, H, W) images -> the map of each of `LAYERS`, (n, C, h, w), after its last ReLU."""
    maps = {"conv1": trunk.relu(trunk.bn1(trunk.conv1(x)))}
    x = trunk.maxpool(maps["conv1"])
    for name, stage in zip(LAYERS[1:5], (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)):
        x = maps[name] = stage(x)
    maps["res5avg"] = trunk.avgpool(x)
    return maps


def adaptive_pool(channels: int, height: int, width: int) -> nn.AdaptiveAvgPool2d:
    """To the largest square of at most 9,216 features, or 2 x 1 where only that fits; never larger than the map.

    This gives the zoo's sizes where the zoo's trunks are: it differs in where the windows lie.
    """
    side = math.isqrt(MAX_FEATURES // channels)
    rows, columns = (2, 1) if side == 1 and 2 * channels <= MAX_FEATURES else (max(side, 1),) * 2
    return nn.AdaptiveAvgPool2d((min(rows, height), min(columns, width)))


def zoo_shapes(width: int) -> Shapes:
    """Return the maps of the zoo's ResNets of this width on crops of 224 pixels."""
    sides, channels = (112, 56, 28, 14, 7, 1), (64, 256, 512, 1024, 2048, 2048)
    return {name: (width * planes, side, side) for name, planes, side in zip(LAYERS, channels, sides)}


def choose_pools(shapes: Shapes) -> tuple[bool, dict[str, nn.Module]]:
    """(whether these are the zoo's own, layer -> pooling) for maps of these shapes."""
    for width, pools in ZOO_POOLS.items():
        if shapes == zoo_shapes(width):
            return True, dict(zip(LAYERS, (*pools, nn.Identity())))
    return False, {name: nn.Identity() if name == "res5avg" else adaptive_pool(*shapes[name]) for name in LAYERS}


class FrozenLayers:
    """Pixels -> the pooled maps of every layer, by a frozen trunk in evaluation mode."""

    def __init__(self, trunk: Trunk, recipe: Recipe, device: torch.device) -> None:
        self.device = device
        self.trunk = trunk.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self.mean, self.std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (recipe.views.mean, recipe.views.std)
        )
        side = recipe.eval.crop
        with torch.no_grad():
            maps = layer_maps(self.trunk, torch.zeros(1, 3, side, side, device=device))
        self.exact, self.pools = choose_pools({name: (x.shape[1], x.shape[2], x.shape[3]) for name, x in maps.items()})
        self.shapes: Shapes = {}
        for name, x in maps.items():
            _, channels, height, width = self.pools[name](x).shape
            self.shapes[name] = channels, height, width

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """(n, S, S, 3) uint8 -> layer -> (n, C, h, w) float32."""
        x = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        maps = layer_maps(self.trunk, x.div_(255).sub_(self.mean).div_(self.std))
        return {name: self.pools[name](x).contiguous() for name, x in maps.items()}
