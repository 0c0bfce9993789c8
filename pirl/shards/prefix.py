"""Source of the objects under an S3 prefix: images, each an object, or tar files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from pirl.errors import DataError, StorageNotFoundError
from pirl.shards.filter import (
    BAD_KEY,
    HIDDEN,
    IMAGE_SUFFIXES,
    PARQUET_SUFFIX,
    TAR_BESIDE_IMAGES,
    TAR_SUFFIX,
    Kind,
    LeftOut,
    hidden_part,
    is_image,
    kind_of,
    not_an_image,
)
from pirl.shards.headers import HEAD_BYTES
from pirl.shards.labels import by_folder, check_level, listed, top_folder
from pirl.shards.objects import THREADS, ObjectSource
from pirl.shards.parquet import ParquetSource
from pirl.shards.samples import WHOLE, Parts
from pirl.shards.sources import Source
from pirl.shards.tars import refuse_compressed, tar_source
from pirl.storage import Entry, S3Storage, open_storage


def object_source(uri: str, parts: Parts = WHOLE) -> Source:
    """Return what lies under s3://bucket/prefix: images as in `folder_source`, or tar files (also one alone)."""
    storage = open_storage(uri)
    assert isinstance(storage, S3Storage)
    unusable: list[str] = []
    entries = storage.entries(unusable=unusable)
    if not entries and storage.prefix.endswith((TAR_SUFFIX, PARQUET_SUFFIX)):
        folder, _, name = storage.prefix.rpartition("/")
        storage = S3Storage(storage.bucket, folder)
        entries = [entry for entry in storage.entries(name) if entry.name == name]
    left_out = LeftOut()
    for key in unusable:
        left_out.add(BAD_KEY, key)
    kinds: dict[Kind, list[Entry]] = {kind: [] for kind in Kind}
    for entry in entries:
        if part := hidden_part(entry.name):
            left_out.add(HIDDEN, part)
        else:
            kinds[kind_of(entry.name)].append(entry)
    parquets = kinds[Kind.PARQUET]
    images, tars, compressed = kinds[Kind.IMAGE], kinds[Kind.TAR], kinds[Kind.COMPRESSED_TAR]
    sniffed = set(_sniffed(storage, kinds[Kind.UNKNOWN]))
    images = images + sorted(sniffed)
    others = kinds[Kind.UNKNOWN] + kinds[Kind.COMPANION]
    for entry in others + (parquets if images or tars or compressed else []):
        if entry not in sniffed:
            left_out.add(not_an_image(entry.name), entry.name)
    if images:
        for entry in tars + compressed:
            left_out.add(TAR_BESIDE_IMAGES, entry.name)
        return _from_images(storage, images, left_out)
    if compressed:
        raise refuse_compressed(compressed[0].name, uri)
    if tars:
        return tar_source(storage, tars, left_out, parts, storage.uri)
    if parquets:
        return ParquetSource(storage, parquets, parts, left_out, storage.uri)
    note = f"; left out: {left_out}" if left_out else ""
    raise DataError(
        f"no image in {uri}{note}",
        f"there should be objects ending in {' '.join(sorted(IMAGE_SUFFIXES))}, below their classes, .tar or .parquet",
    )


def _sniffed(storage: S3Storage, entries: list[Entry]) -> list[Entry]:
    """Return the entries whose first bytes are those of an image: a small request for each, several at a time."""

    def sniff(entry: Entry) -> bool:
        if not entry.bytes:
            return False
        try:
            return is_image(entry.name, storage.read_range(entry.name, 0, HEAD_BYTES))
        except StorageNotFoundError:  # deleted since it was listed
            return False

    with ThreadPoolExecutor(THREADS) as pool:
        return [entry for entry, image in zip(entries, pool.map(sniff, entries)) if image]


def _from_images(storage: S3Storage, entries: list[Entry], left_out: LeftOut) -> ObjectSource:
    # as a walk through a folder tree meets them: the classes, in each the folders, in each the files
    entries = sorted(entries, key=lambda entry: (top_folder(entry.name), entry.name.rpartition("/")[0], entry.name))
    names = [entry.name for entry in entries]
    sizes = [entry.bytes for entry in entries]
    labels, classes = by_folder(names, storage.uri)
    notes = check_level(names, classes, storage.uri, storage.uri) if classes else []
    tops = {top_folder(name) for reason, name, _ in left_out.items() if reason not in (HIDDEN, BAD_KEY)}
    if classes and (empty := sorted(tops - {"", *classes})):
        notes.append(f"no class, since no image is in it: {listed(empty)}")
    source = ObjectSource(
        storage, entries, range(len(entries)), [0] * len(entries), sizes, names, labels, classes, left_out
    )
    source.notes = notes
    return source
