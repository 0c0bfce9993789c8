"""The nearest training images of a few test images, by the trunk and by random weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pirl.evaluate import centre_crop, extract, load_trunk, nearest, require_finite
from pirl.model import build_model
from pirl.order import epoch_order
from pirl.report.pictures import Picture, picture
from pirl.shards import ShardReader

QUERIES, SHOWN = 10, 6
GALLERY = 10_000  # training images that are searched
BATCH = 256
BUDGET_S = 8.0
"""Of extracting features: a large trunk on a slow machine searches fewer images, and the page shows how many."""


@dataclass(frozen=True)
class Shown:
    """An image with its class name; `wrong` where that differs from the test image's."""

    id: int
    picture: Picture
    label: str | None
    similarity: float = 1.0
    wrong: bool = False


@dataclass(frozen=True)
class Neighbours:
    """Test images, each with its nearest by either trunk."""

    checkpoint: str
    searched: int
    images: int
    queries: list[Shown]
    pretrained: list[list[Shown]]
    random: list[list[Shown]]

    @property
    def labelled(self) -> bool:
        return all(query.label is not None for query in self.queries)

    def right(self, trunk: str) -> int:
        """How many of all neighbours shown have the test image's class."""
        return sum(not shown.wrong for row in getattr(self, trunk) for shown in row)


def find_neighbours(run: str, train: ShardReader, test: ShardReader) -> Neighbours:
    """Search with the newest checkpoint of a run. Which images take part depends on the recipe's seed alone."""
    recipe, commit, trained = load_trunk(run)
    trunks = (trained, build_model(recipe).trunk.eval())

    def features(reader: ShardReader, ids: Sequence[int]) -> list[torch.Tensor]:
        images = [reader.image(id) for id in ids]
        pixels = torch.from_numpy(np.stack([centre_crop(image, recipe) for image in images]))
        extracted = [extract(trunk, lambda: iter([pixels]), recipe) for trunk in trunks]
        for name, values in zip(("pretrained", "random"), extracted):
            require_finite(values, ids, reader, name)
        return extracted

    queries = choose_queries(test, recipe.train.seed)
    query_features = features(test, queries)
    ids = epoch_order(recipe.train.seed, 0, len(train))[:GALLERY].tolist()
    gathered: list[list[torch.Tensor]] = [[], []]
    started = time.perf_counter()
    searched = 0
    while searched < len(ids) and (searched == 0 or time.perf_counter() - started < BUDGET_S):
        part = ids[searched : searched + BATCH]
        for parts, new in zip(gathered, features(train, part)):
            parts.append(new)
        searched += len(part)

    def show(reader: ShardReader, id: int, similarity: float = 1.0, like: str | None = None) -> Shown:
        classes = reader.manifest.classes
        label = classes[reader.label(id)] if classes else None
        wrong = None not in (label, like) and label != like
        return Shown(id, picture(reader.image(id), 160), label, similarity, wrong)

    shown = [show(test, id) for id in queries]
    rows: list[list[list[Shown]]] = []
    for parts, query in zip(gathered, query_features):
        index, similarity = nearest(torch.cat(parts), query, min(SHOWN, searched))
        rows.append(
            [
                [show(train, ids[i], s, like=example.label) for i, s in zip(row, similarities)]
                for row, similarities, example in zip(index.tolist(), similarity.tolist(), shown)
            ]
        )
    return Neighbours(commit.name, searched, len(train), shown, *rows)


def choose_queries(test: ShardReader, seed: int) -> list[int]:
    """Return the first test image of each class in a fixed order, for up to 10 classes; any 10 without labels."""
    order = epoch_order(seed, 0, len(test))
    labels = test.labels()[order]
    if test.manifest.classes is None:
        return order[:QUERIES].tolist()
    _, first = np.unique(labels, return_index=True)  # sorted by label
    chosen = np.sort(first)[:QUERIES]
    if len(chosen) < QUERIES:  # few classes: some come twice
        rest = np.setdiff1d(np.arange(len(order)), chosen)
        chosen = np.concatenate([chosen, rest[: QUERIES - len(chosen)]])
    return order[chosen[np.argsort(labels[chosen], kind="stable")]].tolist()
