"""Images -> WebDataset shards and a manifest, and back by id.

out/shard-000000.tar    {id:09d}.jpg|png|..., and {id:09d}.cls (ASCII class index) when labelled
out/shard-000000.json   index in columns: offset, size, crc32, label (or null), name
out/quarantine.json     images that could not be read, with the reason; they have no id
out/manifest.json       published last; see `Manifest`
"""

from __future__ import annotations

from pathlib import Path

from pirl.errors import UsageError, did_you_mean
from pirl.shards.decoding import (
    DEFAULT,
    LEGACY,
    MAX_PIXELS,
    Decoding,
    Pictures,
    decoding_notes,
    decoding_settings,
)
from pirl.shards.fashion import cache_root, fashion_mnist, find_fashion_mnist
from pirl.shards.images import check_image, decode_image, decode_pixels, image_size
from pirl.shards.manifest import MANIFEST, QUARANTINE, Manifest, Shard
from pirl.shards.objects import ObjectSource, object_source
from pirl.shards.read import ShardReader
from pirl.shards.sources import ArraySource, DatasetSource, FileSource, Source, folder_source, list_source
from pirl.shards.write import SHARD_BYTES, write_shards

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
    "Shard",
    "ShardReader",
    "Source",
    "cache_root",
    "check_image",
    "decode_image",
    "decode_pixels",
    "decoding_notes",
    "decoding_settings",
    "fashion_mnist",
    "find_fashion_mnist",
    "image_size",
    "open_source",
    "write_shards",
]


def open_source(spec: str) -> Source:
    """What the user named: a folder of images, a `.txt` list of files, `fashion-mnist:train` / `:test`, or a place on
    S3 with images or tar files."""
    if spec.startswith("s3://"):
        return object_source(spec)
    name, _, split = spec.partition(":")
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            return folder_source(path)
        if path.is_file() and path.suffix == ".txt":
            return list_source(path)
    except OSError as error:
        raise UsageError(
            f"{error.filename or spec} cannot be read: {error.strerror}", "check the path and its permissions"
        ) from None
    known = (
        "a source is a folder of images, a .txt list of files, fashion-mnist:train, fashion-mnist:test, "
        "or s3://bucket/prefix with images or tar files"
    )
    if name == "fashion-mnist":
        return fashion_mnist(split)
    if path.is_file():
        raise UsageError(f"{spec} is neither a folder nor a .txt list of files", known)
    near = did_you_mean(spec, ("fashion-mnist:train", "fashion-mnist:test"))
    raise UsageError(f"{spec} does not exist.{near}", known)
