"""Images to embed: by their place (a file, a folder, shards, any source of `pirl shard`), or in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from pirl import logs
from pirl.errors import DataError, PirlError, UsageError
from pirl.shards import DEFAULT, MANIFEST, Decoding, ShardReader, Source, SourceOptions, decode_image, open_source
from pirl.shards.headers import exif_orientation
from pirl.shards.pixels import TRANSPOSES, flattened
from pirl.storage import expand_home, open_storage

Loader: TypeAlias = Callable[[], Image.Image]
"""Decodes one image to RGB; raises DataError where it is broken."""
Given: TypeAlias = "Images | str | Path | Image.Image | np.ndarray | Source | ShardReader | Iterable[Any]"
"""Images as a caller names them."""


class Images(ABC):
    """Images in a fixed order. They are read in that order by one thread, and decoded by several."""

    classes: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Return the name of image i: a path relative to its folder, or its position."""

    def label(self, i: int) -> int:
        """Return the class index of image i, -1 without one."""
        return -1

    @abstractmethod
    def loaders(self) -> Iterator[Loader]:
        """Yield for each image in order the function that decodes it. The bytes are read by then."""


class ShardImages(Images):
    """The images of a sharded data set, decoded with the settings of its manifest."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader, self.classes = reader, reader.manifest.classes

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, i: int) -> str:
        """Return the file name that the image had."""
        return self.reader.name(i)

    def label(self, i: int) -> int:
        """Return the class index."""
        return self.reader.label(i)

    def loaders(self) -> Iterator[Loader]:
        """Yield the decoders of all images; on S3 the next images are read ahead."""
        for i in range(len(self)):
            data = self.reader.read(i)
            yield partial(decode_image, data, f"image {i} ({self.name(i)})", self.reader.manifest.decoding)


class SourceImages(Images):
    """The images of a source of `pirl shard`: a folder, a list, tar files, a prefix on S3."""

    def __init__(self, source: Source, decoding: Decoding = DEFAULT) -> None:
        self.source, self.decoding, self.classes = source, decoding, source.classes

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        """Return the path relative to the source."""
        return str(self.source.names[i])

    def label(self, i: int) -> int:
        """Return the class index, -1 when unlabelled."""
        return -1 if self.source.labels is None else int(self.source.labels[i])

    def loaders(self) -> Iterator[Loader]:
        """Yield the decoders of all images; an image that cannot be read raises in its decoder."""
        self.source.expect(range(len(self)))
        for i in range(len(self)):
            try:
                data = self.source.load(i)
            except DataError as error:
                yield partial(_raise, error)
                continue
            yield partial(decode_image, data, self.name(i), self.decoding)


class ListedImages(Images):
    """A sequence of paths, PIL images and uint8 arrays, in any mixture."""

    def __init__(self, items: Sequence[Any] | np.ndarray, decoding: Decoding = DEFAULT) -> None:
        self.items, self.decoding = items, decoding

    def __len__(self) -> int:
        return len(self.items)

    def name(self, i: int) -> str:
        """Return the path, or the position of an image in memory."""
        item = self.items[i]
        return str(item) if isinstance(item, str | Path) else getattr(item, "filename", "") or str(i)

    def loaders(self) -> Iterator[Loader]:
        """Yield the decoders of all images."""
        for i, item in enumerate(self.items):
            if isinstance(item, str | Path):
                yield partial(_decode_file, item, self.decoding)
            elif isinstance(item, Image.Image):
                yield partial(_rgb, item, self.name(i), self.decoding)
            else:
                yield partial(_array_image, item, self.name(i))


def open_images(given: Given, options: SourceOptions | None = None) -> Images:
    """Return images by their place or in memory, read with `options`.

    A text or a path is a folder, an image file, shards, or any other source that `pirl shard` takes. In memory: a PIL
    image, an array (height, width, 3) or (n, height, width, 3) of uint8, or a sequence of paths, PIL images and arrays.
    """
    if isinstance(given, Images):
        return given
    if isinstance(given, ShardReader):
        return ShardImages(given)
    own = options or SourceOptions()
    decoding = own.decoding
    if isinstance(given, Source):
        return SourceImages(given, decoding)
    if isinstance(given, str | Path):
        return _open_place(str(given), own)
    if isinstance(given, Image.Image):
        return ListedImages([given], decoding)
    if isinstance(given, np.ndarray):
        single = given.ndim == 2 or (given.ndim == 3 and given.shape[2] == 3 and given.dtype != object)
        return ListedImages([given] if single else given, decoding)
    if isinstance(given, Iterable):
        return ListedImages(given if isinstance(given, Sequence) else list(given), decoding)
    raise UsageError(
        f"images are of the type {type(given).__name__}, expected a path, PIL images or uint8 arrays",
        "give a folder, a list of paths, a list of PIL images, or an array (n, height, width, 3)",
    )


def _open_place(place: str, options: SourceOptions) -> Images:
    path = expand_home(place) if place and "://" not in place else None
    if path is not None and path.is_file() and path.suffix.lower() not in (".txt", ".tar", ".parquet"):
        return ListedImages([path], options.decoding)
    if _is_shards(place):
        if given := options.model_dump(exclude_defaults=True):
            names = ", ".join(f"`{name}`" for name in given)
            raise UsageError(
                f"{place} is a sharded data set, which was read with the settings of its manifest", f"omit {names}"
            )
        return ShardImages(ShardReader(place))
    source = open_source(place, options)
    if source.left_out:
        logs.warn(f"left out of {place}: {source.left_out}")
    return SourceImages(source, options.decoding)


def _is_shards(place: str) -> bool:
    try:
        return open_storage(place).exists(MANIFEST)
    except PirlError:
        return False  # a source that is not a storage, such as fashion-mnist:test


def _decode_file(path: str | Path, decoding: Decoding) -> Image.Image:
    try:
        data = expand_home(str(path)).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return decode_image(data, str(path), decoding)


def _rgb(image: Image.Image, name: str, decoding: Decoding) -> Image.Image:
    """Return the pixels that the file of the image has by these settings: transparency, 16 bits and EXIF alike."""
    try:
        image.load()
        upright = flattened(image, f"image {name}", decoding.background)
        turn = TRANSPOSES.get(exif_orientation(image.getexif().tobytes())) if decoding.exif == "apply" else None
        return upright if turn is None else upright.transpose(turn)
    except DataError:
        raise
    except Exception as error:  # a file that PIL opened and has not decoded yet may be broken in any way
        raise DataError(f"image {name}: cannot be decoded: {error or type(error).__name__}") from error


def _array_image(item: Any, name: str) -> Image.Image:
    pixels = np.asarray(item)
    grey = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 1)
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] == 3)) or not pixels.size:
        raise UsageError(
            f"image {name} is a {type(item).__name__} of {pixels.dtype} {list(pixels.shape)}, "
            "expected uint8 (height, width, 3)",
            "give RGB pixels from 0 to 255, channels last; resizing and normalisation are done by the encoder",
        )
    return Image.fromarray(pixels.reshape(pixels.shape[:2]) if grey else pixels).convert("RGB")


def _raise(error: DataError) -> Image.Image:
    raise error
