"""The features of training images that a report searches: extracted once, for the neighbours and for the map."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pirl.config import Recipe
from pirl.evaluate import centre_crop, extract, load_trunk, require_finite
from pirl.model import Trunk, build_model
from pirl.order import epoch_order
from pirl.shards import ShardReader

GALLERY = 10_000  # training images that are searched
BATCH = 256
BUDGET_S = 8.0
"""Of extracting features: a large trunk on a slow machine searches fewer images, and the page shows how many."""


@dataclass(frozen=True)
class Trunks:
    """The trunk of a run's newest checkpoint and, where it is to be compared, that of random weights, by name."""

    recipe: Recipe
    checkpoint: str
    trunks: dict[str, Trunk]

    def features(self, reader: ShardReader, ids: Sequence[int]) -> list[torch.Tensor]:
        """Return the features (n, D) of some images by each trunk."""
        images = [reader.image(id) for id in ids]
        pixels = torch.from_numpy(np.stack([centre_crop(image, self.recipe) for image in images]))
        extracted = [extract(trunk, lambda: iter([pixels]), self.recipe) for trunk in self.trunks.values()]
        for name, values in zip(self.trunks, extracted):
            require_finite(values, ids, reader, name)
        return extracted


@dataclass(frozen=True)
class Gallery:
    """Training images in a fixed random order, with their features (n, D) by each trunk."""

    trunks: Trunks
    reader: ShardReader
    ids: list[int]
    features: list[torch.Tensor]

    @property
    def pretrained(self) -> torch.Tensor:
        return self.features[0]

    def including(self, ids: Sequence[int]) -> Gallery:
        """Return the gallery with these images appended where it does not have them."""
        present = set(self.ids)
        missing = [id for id in dict.fromkeys(ids) if id not in present]
        if not missing:
            return self
        new = self.trunks.features(self.reader, missing)
        joined = [torch.cat(pair) for pair in zip(self.features, new)]
        return replace(self, ids=[*self.ids, *missing], features=joined)


def read_gallery(run: str, train: ShardReader, compared: bool) -> Gallery:
    """Extract features by the newest checkpoint of a run; with `compared` also by random weights.

    Up to `GALLERY` images, fewer after `BUDGET_S`. Their order depends on the recipe's seed alone.
    """
    recipe, commit, trained = load_trunk(run)
    trunks = {"pretrained": trained}
    if compared:
        trunks["random"] = build_model(recipe).trunk.eval()
    given = Trunks(recipe, commit.name, trunks)
    ids = epoch_order(recipe.train.seed, 0, len(train))[:GALLERY].tolist()
    gathered: list[list[torch.Tensor]] = [[] for _ in trunks]
    started = time.perf_counter()
    searched = 0
    while searched < len(ids) and (searched == 0 or time.perf_counter() - started < BUDGET_S):
        part = ids[searched : searched + BATCH]
        for parts, new in zip(gathered, given.features(train, part)):
            parts.append(new)
        searched += len(part)
    return Gallery(given, train, ids[:searched], [torch.cat(parts) for parts in gathered])
