"""Projection heads: linear layers from a trunk's features to an embedding."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp(sizes: list[int], relu: str) -> nn.Sequential:
    """Return linear layers between `sizes`, with a ReLU after "every" one, after the "hidden" ones, or after "none"."""
    layers: list[nn.Module] = []
    for index, (inside, out) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(inside, out))
        if relu == "every" or (relu == "hidden" and index < len(sizes) - 2):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
