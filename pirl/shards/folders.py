"""A folder of images as a source: one folder a class, or images only, or tar files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pirl.errors import DataError, UsageError
from pirl.shards.filter import (
    HIDDEN,
    IMAGE_SUFFIXES,
    LOOP,
    TAR_BESIDE_IMAGES,
    Kind,
    LeftOut,
    is_hidden,
    is_image,
    kind_of,
    not_an_image,
)
from pirl.shards.headers import HEAD_BYTES
from pirl.shards.labels import check_class, check_level
from pirl.shards.parquet import ParquetSource
from pirl.shards.place import shown_path
from pirl.shards.samples import WHOLE, Parts
from pirl.shards.sources import FileSource, Source
from pirl.shards.tars import LocalObjects, refuse_compressed, tar_source


@dataclass
class _Tree:
    """Result of a walk through a folder; names are relative to `root`."""

    root: str
    tars: list[str] = field(default_factory=list)
    compressed: list[str] = field(default_factory=list)
    parquets: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)

    def name(self, path: str) -> str:
        return path[len(self.root) :].lstrip("/")

    def images(self, entries: list[os.DirEntry[str]]) -> list[str]:
        """Return the sorted names of the images among the files of one folder; the rest is left out."""
        images = []
        for entry in entries:
            kind = kind_of(entry.name)
            if kind is Kind.IMAGE or (kind is Kind.UNKNOWN and is_image(entry.name, _head(entry))):
                images.append(entry.name)
            elif kind is Kind.TAR:
                self.tars.append(self.name(entry.path))
            elif kind is Kind.COMPRESSED_TAR:
                self.compressed.append(self.name(entry.path))
            elif kind is Kind.PARQUET:
                self.parquets.append(self.name(entry.path))
            else:
                self.left_out.add(not_an_image(entry.name), self.name(entry.path))
        return sorted(images)

    def split(self, top: str) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
        """Return the folders and the files in `top`; what is hidden is left out."""
        folders: list[os.DirEntry[str]] = []
        files: list[os.DirEntry[str]] = []
        with os.scandir(top) as entries:
            for entry in entries:
                folder = _is_folder(entry)
                if is_hidden(entry.name):
                    self.left_out.add(HIDDEN, self.name(entry.path) + "/" * folder)
                else:
                    (folders if folder else files).append(entry)
        return folders, files

    def walk(self, top: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, list[str]]]:
        """Yield (folder, image names) of a tree; a folder that is reached again below itself is left out."""
        info = os.stat(top)
        identity = (info.st_dev, info.st_ino)
        if identity in above:
            self.left_out.add(LOOP, self.name(top) + "/")
            return
        folders, files = self.split(top)
        yield top, self.images(files)
        for entry in folders:
            yield from self.walk(entry.path, above | {identity})


def _head(entry: os.DirEntry[str]) -> bytes:
    """Return the first bytes of a file; none where it is not a regular file or cannot be read."""
    try:
        if not entry.is_file():
            return b""
        with open(entry.path, "rb", buffering=0) as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def folder_source(root: Path, parts: Parts = WHOLE) -> Source:
    """Return the images in a folder, or the tar files in a folder without images.

    The order is that of torchvision's ImageFolder (classes sorted, paths sorted); a flat folder has no labels. Links
    to files and folders are followed, as torchvision does, but not into a loop.
    """
    tree = _Tree(os.fspath(root))
    folders, files = tree.split(tree.root)
    flat = tree.images(files)
    classes = sorted(entry.name for entry in folders)
    names: list[str] = []
    counts: list[int] = []
    for name in classes:
        before = len(names)
        for top, images in sorted(tree.walk(os.path.join(root, name))):
            names += [tree.name(os.path.join(top, image)) for image in images]
        counts.append(len(names) - before)
    if names and flat:
        raise UsageError(
            f"{root} mixes images ({flat[0]!r}, ...) with class folders that hold images ({names[0]!r}, ...)",
            "give a folder with one kind only: images, or one folder of images per class",
        )
    description = f"folder {shown_path(root)}"
    source: Source
    if not names and not flat:
        source = _tars_or_nothing(root, tree, parts, description)
    else:
        for name in tree.tars + tree.compressed:
            tree.left_out.add(TAR_BESIDE_IMAGES, name)
        for name in tree.parquets:
            tree.left_out.add(not_an_image(name), name)
        if flat:
            source = FileSource(description, root, flat, None, None, tree.left_out)
        else:
            for name in classes:
                check_class(name)
            labels = np.repeat(np.arange(len(classes)), counts)
            held = [name for name, count in zip(classes, counts) if count]
            notes = check_level(names, held, description, shown_path(root))
            source = FileSource(description, root, names, labels, classes, tree.left_out)
            source.notes = notes
    source.folder = root
    return source


def _tars_or_nothing(root: Path, tree: _Tree, parts: Parts, description: str) -> Source:
    if tree.compressed:
        raise refuse_compressed(sorted(tree.compressed)[0], description)
    objects = LocalObjects(root)
    if tree.parquets and not tree.tars:
        entries = [objects.entry(name) for name in sorted(tree.parquets)]
        return ParquetSource(objects, entries, parts, tree.left_out, description)
    for name in tree.parquets:
        tree.left_out.add(not_an_image(name), name)
    if not tree.tars:
        note = f"; left out: {tree.left_out}" if tree.left_out else ""
        raise DataError(
            f"no image in {root}{note}",
            f"it should hold files ending in {' '.join(sorted(IMAGE_SUFFIXES))}, one folder a class, .tar or .parquet",
        )
    return tar_source(objects, [objects.entry(name) for name in sorted(tree.tars)], tree.left_out, parts, description)


def packed_source(paths: Sequence[Path], parts: Parts, description: str) -> Source:
    """Return the images of tar files, or of parquet files, in one folder."""
    objects = LocalObjects(paths[0].parent)
    entries = [objects.entry(path.name) for path in paths]
    if kind_of(paths[0].name) is Kind.PARQUET:
        return ParquetSource(objects, entries, parts, LeftOut(), description)
    return tar_source(objects, entries, LeftOut(), parts, description)
