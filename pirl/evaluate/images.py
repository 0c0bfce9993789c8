"""Training and test images of an evaluation: what cannot be evaluated is refused, also before a training. No torch."""

from __future__ import annotations

import logging

import numpy as np

from pirl.errors import UsageError
from pirl.shards import Manifest, ShardReader, check_same_decoding, listed

log = logging.getLogger(__name__)


def check_images(train_data: str, test_data: str) -> None:
    """Raise what an evaluation on these shards would raise: about labels, classes, decoding, or equal images."""
    readers = ShardReader(train_data), ShardReader(test_data)
    check_labels(*readers)
    count_shared(*readers)


def check_labels(train: ShardReader, test: ShardReader) -> list[str]:
    """Return the classes of the training images, by which the labels of the test images are numbered from now on.

    Classes are matched by name. DataError naming those that only the test images have; a warning names those without a
    test image.
    """
    require_distinct(train.manifest, test.manifest)
    check_same_decoding(train.manifest, test.manifest)
    for reader in (train, test):
        if reader.manifest.classes is None:
            raise UsageError(
                f"{reader.storage.uri} has no labels: an evaluation needs them",
                "shard a folder with one subfolder for each class",
            )
        reader.check()
    assert train.manifest.classes is not None
    if absent := test.match_classes(train.manifest.classes):
        log.warning("%s has no image of %s: they count for nothing", test.storage.uri, listed(absent))
    return train.manifest.classes


def require_distinct(train: Manifest, test: Manifest) -> None:
    """Raise `UsageError` where training and test images are the same data set."""
    if train.digest == test.digest:
        raise UsageError(
            f"training and test images are the same: both have the digest {train.digest[:12]}",
            "name test images that the classifier is not trained on",
        )


def count_shared(train: ShardReader, test: ShardReader) -> int:
    """Return how many test images are training images too, by size and checksum: from the indexes, no image is read.

    0 where the shards of either have no checksums (version 0.1). `UsageError` where all of them are.
    """
    keys = []
    for reader in (test, train):
        if (checksums := reader.checksums()) is None:
            return 0
        keys.append(reader.sizes() << 32 | checksums)
    shared = int(np.isin(*keys).sum())
    if shared == len(test):
        raise UsageError(
            f"all {shared:,} test images of {test.storage.uri} are training images too",
            "name test images that the classifier is not trained on",
        )
    return shared
