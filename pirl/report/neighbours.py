"""The nearest training images of a few test images, by the trunk and by random weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pirl.evaluate import nearest
from pirl.order import epoch_order
from pirl.report.gallery import Gallery
from pirl.report.pictures import Picture, picture
from pirl.shards import ShardReader

QUERIES, SHOWN = 10, 6


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


def find_neighbours(gallery: Gallery, test: ShardReader) -> Neighbours:
    """Search a gallery that has the features of both trunks. Which images take part depends on the seed alone."""
    train = gallery.reader
    queries = choose_queries(test, gallery.trunks.recipe.train.seed)

    def show(reader: ShardReader, id: int, similarity: float = 1.0, like: str | None = None) -> Shown:
        classes = reader.manifest.classes
        label = classes[reader.label(id)] if classes else None
        wrong = None not in (label, like) and label != like
        return Shown(id, picture(reader.image(id), 160), label, similarity, wrong)

    shown = [show(test, id) for id in queries]
    rows: list[list[list[Shown]]] = []
    for features, query in zip(gallery.features, gallery.trunks.features(test, queries)):
        index, similarity = nearest(features, query, min(SHOWN, len(gallery.ids)))
        rows.append(
            [
                [show(train, gallery.ids[i], s, like=example.label) for i, s in zip(row, similarities)]
                for row, similarities, example in zip(index.tolist(), similarity.tolist(), shown)
            ]
        )
    return Neighbours(gallery.trunks.checkpoint, len(gallery.ids), len(train), shown, *rows)


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
