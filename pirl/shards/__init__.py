"""Images -> WebDataset shards and a manifest, and back by id.

out/shard-000000.tar    {id:09d}.jpg|png|..., and {id:09d}.cls (ASCII class index) when labelled
out/shard-000000.json   index in columns: offset, size, crc32, label (or null), name
out/quarantine.json     images that could not be read, and files left out, with reasons; see `Quarantine`
out/manifest.json       published last; see `Manifest`
"""

from __future__ import annotations

import re
from pathlib import Path

from braceexpand import braceexpand

from pirl.errors import DataError, UsageError, did_you_mean
from pirl.logs import with_options
from pirl.shards.decoding import (
    DEFAULT,
    LEGACY,
    MAX_PIXELS,
    Decoding,
    Pictures,
    decoding_notes,
)
from pirl.shards.fashion import cache_root, fashion_mnist, find_fashion_mnist
from pirl.shards.filter import PARQUET_SUFFIX, TAR_SUFFIX, Kind, kind_of
from pirl.shards.folders import folder_source, packed_source
from pirl.shards.images import check_image, decode_image, decode_pixels, image_size
from pirl.shards.labels import class_summary, listed, match_classes, untested_notes
from pirl.shards.lists import list_source
from pirl.shards.manifest import MANIFEST, QUARANTINE, Manifest, Quarantine, Shard, check_same_decoding
from pirl.shards.objects import ObjectSource
from pirl.shards.parquet import ParquetSource
from pirl.shards.place import shown_path
from pirl.shards.prefix import object_source
from pirl.shards.read import ShardReader
from pirl.shards.samples import Parts
from pirl.shards.sources import ArraySource, DatasetSource, FileSource, Source
from pirl.shards.spec import ShardingOptions, SourceOptions, sharding_options
from pirl.shards.write import SHARD_BYTES, write_shards
from pirl.storage import expand_home

__all__ = [
    "DEFAULT",
    "LEGACY",
    "MANIFEST",
    "MAX_PIXELS",
    "QUARANTINE",
    "SHARD_BYTES",
    "ArraySource",
    "DatasetSource",
    "Decoding",
    "FileSource",
    "Manifest",
    "ObjectSource",
    "Pictures",
    "Quarantine",
    "Shard",
    "ShardReader",
    "ShardingOptions",
    "Source",
    "SourceOptions",
    "cache_root",
    "check_image",
    "check_same_decoding",
    "compare_classes",
    "decode_image",
    "decode_pixels",
    "decoding_notes",
    "fashion_mnist",
    "find_fashion_mnist",
    "image_size",
    "listed",
    "match_classes",
    "open_source",
    "sharding_options",
    "summary",
    "untested_notes",
    "write_shards",
]


def open_source(spec: str, options: SourceOptions = SourceOptions()) -> Source:  # noqa: B008 (frozen)
    """Return the source that the user named.

    It is a folder of images, tar or parquet files, a `.txt` list of files, a tar or parquet file or a pattern of such,
    `fashion-mnist:train` / `:test`, or a place on S3 with images, tar or parquet files.

    `options` choose the parts of a sample in tar files, or columns; the pixels are decoded by `options.decoding`.
    """
    chosen = options.image or options.label
    source = _open(spec, Parts(options.image, options.label))
    if chosen and not isinstance(source, ObjectSource | ParquetSource):
        raise UsageError(f"{spec} has no tar files, whose parts {chosen!r} could be", "omit `image` and `label`")
    return source


def summary(source: Source) -> list[str]:
    """Return lines for the user: images and classes, images a class, what is left out, and what else to know."""
    lines = [*class_summary(source.labels, source.classes, len(source)), *source.notes]
    if source.left_out:
        lines.append(with_options(f"left out, each named in {QUARANTINE}: {source.left_out}"))
    return lines


def compare_classes(train: Source | Manifest, test: Source) -> list[str]:
    """Return notes on the classes of test images compared with those of training: which the test images lack.

    UsageError where either has no classes, or both are the same images; DataError naming classes that training does
    not have.
    """
    for split, images in (("training", train), ("test", test)):
        if images.classes is None:
            origin = images.source if isinstance(images, Manifest) else images.description
            raise UsageError(
                f"the {split} images have no classes: {origin}", "give one folder a class: an evaluation needs labels"
            )
    if isinstance(train, Source) and train.fingerprint() == test.fingerprint():
        raise UsageError(
            f"training and test images are the same: {train.description} and {test.description}",
            "name test images that the classifier is not trained on",
        )
    assert train.classes is not None
    assert test.classes is not None
    assert test.labels is not None
    held = set(test.labels[test.labels >= 0].tolist())
    _, absent = match_classes(train.classes, test.classes, held, test.description)
    return untested_notes(absent)


def _matching(path: Path) -> list[Path]:
    """Return the tar or parquet files that a pattern names: `train-*.parquet`, `train-{000..146}.tar`.

    DataError where a file that the braces name does not exist: half of a data set would be trained on.
    """
    if not re.search(r"[*?{]", path.name) or kind_of(path.name) not in (Kind.TAR, Kind.PARQUET):
        return []
    paths: list[Path] = []
    for name in braceexpand(path.name):
        matches = sorted(path.parent.glob(name))
        if not matches:
            raise DataError(f"no file {path.parent / name}, which {path.name} names", "check the pattern")
        paths += matches
    return list(dict.fromkeys(paths))


def _open(spec: str, parts: Parts) -> Source:
    if spec.startswith("s3://"):
        return object_source(spec, parts)
    if not spec:
        raise UsageError("the source is an empty text", "name a folder; the current one is `.`")
    name, _, split = spec.partition(":")
    path = expand_home(spec)
    try:
        if path.is_dir():
            return folder_source(path, parts)
        if path.is_file() and path.suffix == ".txt":
            return list_source(path)
        if path.is_file() and path.suffix.lower() in (TAR_SUFFIX, PARQUET_SUFFIX):
            return packed_source([path], parts, f"{path.suffix[1:].lower()} file {shown_path(path)}")
        if not path.exists() and (paths := _matching(path)):
            return packed_source(paths, parts, f"files {shown_path(path)}")
    except OSError as error:
        raise UsageError(
            f"{error.filename or spec} cannot be read: {error.strerror}", "check the path and its permissions"
        ) from None
    forms = (
        "a source is a folder of images, .tar or .parquet files, a pattern of these (train-*.tar), a .txt list of "
        "files, fashion-mnist:train, fashion-mnist:test, or s3://bucket/prefix with images, .tar or .parquet files"
    )
    if name == "fashion-mnist":
        return fashion_mnist(split)
    if path.is_file():
        raise UsageError(f"{spec} is neither a folder nor a .txt list of files", forms)
    near = did_you_mean(spec, ("fashion-mnist:train", "fashion-mnist:test"))
    raise UsageError(f"{spec} does not exist.{near}", forms)
