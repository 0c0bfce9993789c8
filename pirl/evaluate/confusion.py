"""Confusion matrix of a linear probe, bounded for any number of classes."""

from __future__ import annotations

import torch
from torch import Tensor

from pirl.evaluate.features import ROWS
from pirl.evaluate.sgd import Standardised
from pirl.results import Confusion
from pirl.world import World

MOST_CLASSES = 20
"""Classes with a row of their own: those with the most errors. All others are one row and column."""


@torch.no_grad()
def confusion(test: Standardised, weights: Tensor, classes: int, world: World) -> Confusion:
    """Return the counts of the probe with (D + 1, classes) weights. Every rank calls it with its own rows."""
    y = test.labels[test.first : test.first + test.count].to(weights.device)
    predicted = torch.empty_like(y)
    for start in range(0, test.count, ROWS // 4):
        places = torch.arange(start, min(start + ROWS // 4, test.count))
        predicted[places] = torch.addmm(weights[-1], test.rows(places), weights[:-1]).argmax(1)
    wrong = y != predicted
    errors = torch.bincount(y[wrong], minlength=classes) + torch.bincount(predicted[wrong], minlength=classes)
    errors = world.sum(errors)
    shown = errors.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values
    size = len(shown) + (len(shown) < classes)
    place = torch.full((classes,), size - 1, device=y.device)
    place[shown] = torch.arange(len(shown), device=y.device)
    counts = world.sum(torch.bincount(place[y] * size + place[predicted], minlength=size * size))
    return Confusion(classes=shown.tolist(), counts=counts.view(size, size).tolist())
