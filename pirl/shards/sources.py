"""Sources of images: files, arrays, and torchvision-style data sets."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pirl.errors import DataError, UsageError
from pirl.shards.decoding import Checked, Decoding
from pirl.shards.filter import LeftOut
from pirl.shards.images import MAX_IMAGE_BYTES, check_image, check_limit
from pirl.shards.labels import MAX_CLASSES
from pirl.shards.pixels import ALPHA_MODES, flattened, transparency, with_alpha

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class Source(ABC):
    """An ordered collection of images. It is pickled into worker processes."""

    description: str  # what the user named, for messages and the manifest
    names: Sequence[str]
    labels: np.ndarray | None  # int64 (N,), class indices; None when unlabelled
    classes: list[str] | None
    folder: Path | None = None  # where the images lie; an output must not be put inside
    uri: str | None = None  # where they lie on S3; the same
    in_memory = False  # checking one costs nothing
    left_out: LeftOut = LeftOut()  # files that are not images of this source
    notes: Sequence[str] = ()  # for the user, one line each

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hex SHA-256 that changes when the input does. Not a place: a copied array data set has the same."""

    @abstractmethod
    def check(self, i: int, decoding: Decoding) -> tuple[Checked, int]:
        """Decode image i; return what it is and an upper bound of its encoded bytes. DataError if it is unreadable."""

    @abstractmethod
    def load(self, i: int) -> bytes:
        """Return the encoded bytes of image i as the shard holds them. DataError if they are not what was checked."""

    def expect(self, indices: Sequence[int]) -> None:  # noqa: B027 (most need not know)
        """Prepare for the images that are loaded next, in this order."""

    def load_into(self, i: int, buffer: memoryview) -> bytes | memoryview:
        """Return the same as `load`, in the front of `buffer` (then a view of it) where that saves a copy."""
        return self.load(i)


class FileSource(Source):
    """Image files that keep their bytes. `names` are relative to `root`; every file's size and time are noted."""

    def __init__(
        self,
        description: str,
        root: Path,
        names: list[str],
        labels: np.ndarray | None,
        classes: list[str] | None,
        left_out: LeftOut | None = None,
    ) -> None:
        self.description, self.root, self.names, self.labels, self.classes = description, root, names, labels, classes
        self.left_out = left_out or LeftOut()
        self.sizes = np.full(len(names), -1, np.int64)  # -1: not there, or no regular file
        self.mtimes_ns = np.zeros(len(names), np.int64)
        for i, name in enumerate(names):
            try:
                info = os.stat(os.path.join(root, name))
            except (OSError, ValueError):
                continue  # a dangling or looping link; check() finds the reason again and reports it
            if stat.S_ISREG(info.st_mode):
                self.sizes[i], self.mtimes_ns[i] = info.st_size, info.st_mtime_ns

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "backslashreplace"))
        for i, name in enumerate(self.names):
            label = -1 if self.labels is None else self.labels[i]
            digest.update(os.fsencode(name) + f"\0{self.sizes[i]} {self.mtimes_ns[i]} {label}\n".encode())
        return digest.hexdigest()

    def check(self, i: int, decoding: Decoding) -> tuple[Checked, int]:
        data = self.load(i)
        return check_image(data, self.names[i], decoding), len(data)

    def load(self, i: int) -> bytes:
        with self._opened(i) as (descriptor, size):
            content = bytearray(size)
            _fill(descriptor, memoryview(content), self.names[i])
            return bytes(content)

    def load_into(self, i: int, buffer: memoryview) -> bytes | memoryview:
        if self.sizes[i] > len(buffer):
            return self.load(i)
        with self._opened(i) as (descriptor, size):
            _fill(descriptor, buffer[:size], self.names[i])
            return buffer[:size]

    @contextmanager
    def _opened(self, i: int) -> Iterator[tuple[int, int]]:
        """Yield (descriptor, size) of a file; DataError where it has changed since it was listed or cannot be read."""
        name = self.names[i]
        try:
            # O_NONBLOCK: opening a FIFO that carries an image's name must not wait for a writer
            descriptor = os.open(os.path.join(self.root, name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                info = os.fstat(descriptor)
                if not stat.S_ISREG(info.st_mode):
                    raise DataError(f"{name}: not a regular file")
                if info.st_size > MAX_IMAGE_BYTES:
                    raise DataError(f"{name}: {info.st_size:,} bytes, more than the limit of {MAX_IMAGE_BYTES:,}")
                if (info.st_size, info.st_mtime_ns) != (self.sizes[i], self.mtimes_ns[i]):
                    raise _changed(name)
                yield descriptor, info.st_size
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


def _fill(descriptor: int, buffer: memoryview, name: str) -> None:
    while buffer:
        count = os.readv(descriptor, [buffer])
        if not count:
            raise _changed(name)
        buffer = buffer[count:]


def _changed(name: str) -> DataError:
    return DataError(f"{name}: changed since the folder was listed")


class ArraySource(Source):
    """Grey images in memory, uint8 (N, H, W); they become PNG files of mode L without loss."""

    in_memory = True

    def __init__(
        self, description: str, images: np.ndarray, labels: np.ndarray | None, classes: list[str] | None, prefix: str
    ) -> None:
        self.description, self.images, self.labels, self.classes = description, images, labels, classes
        self.names = [f"{prefix}{i:05d}" for i in range(len(images))]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.images.shape, self.classes, self.names[:1])).encode())
        digest.update(self.images.tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def check(self, i: int, decoding: Decoding) -> tuple[Checked, int]:
        height, width = self.images.shape[1:]
        return Checked("png"), height * (width + 1) + height * width // 1000 + 128  # deflate never grows data by more

    def load(self, i: int) -> bytes:
        return grey_png(self.images[i])


def grey_png(image: np.ndarray) -> bytes:
    """Return uint8 (H, W) as a PNG of mode L, on 28x28 four times as fast as Pillow, whose call costs more."""
    height, width = image.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row after its filter type, 0: as it is
    rows[:, 1:] = image
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.data)), (b"IEND", b""))
    packed = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


class DatasetSource(Source):
    """A torchvision-style map data set yielding (PIL image, int label); its images become lossless PNG files.

    It must give the same image each time (no random transform), and be picklable for more than one process. It is read
    once here, for the labels and the fingerprint, once when it is checked and once when it is written.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        name = type(dataset).__name__
        self.description = f"dataset {name}"
        self.names = [f"{name}/{i:07d}" for i in range(len(dataset))]
        if not self.names:
            raise DataError(f"the data set {name} is empty", "give one with images")
        digest = hashlib.sha256(name.encode())
        labels = np.full(len(self.names), -1, np.int64)
        for i in range(len(self.names)):
            try:
                image, labels[i] = self._item(i)
                digest.update(f"{image.mode} {image.size} {labels[i]}\n".encode() + image.tobytes())
            except DataError as error:  # check() raises it again, which puts the image into quarantine
                digest.update(error.what.encode("utf-8", "backslashreplace"))
        self._digest = digest.hexdigest()
        self.labels = labels
        count = int(labels.max()) + 1
        classes = [str(c) for c in getattr(dataset, "classes", None) or range(count)]
        if count > min(len(classes), MAX_CLASSES) or labels.min() < -1:
            raise UsageError(
                f"the data set {name} has labels from {labels.min()} to {labels.max()} and {len(classes)} classes",
                "labels are class indices from 0 on",
            )
        self.classes = classes

    def _item(self, i: int) -> tuple[Image.Image, int]:
        try:
            item = self.dataset[i]
        except Exception as error:  # whatever a foreign data set raises is the reason why this image is unreadable
            raise DataError(f"{self.names[i]}: {error or type(error).__name__}") from error
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Image.Image)):
            raise UsageError(
                f"{self.description} yields {type(item).__name__} {str(item)[:60]!r}, not (PIL image, label)",
                "create it without a transform to tensors",
            )
        return item[0], int(item[1])

    def fingerprint(self) -> str:
        return self._digest

    def check(self, i: int, decoding: Decoding) -> tuple[Checked, int]:
        image = self._saved(i)
        check_limit(image.size, self.names[i], decoding.max_pixels)
        checked = Checked("png", transparent=transparency(image) is not None)
        values = image.width * image.height * max(len(image.getbands()), 1) * (2 if image.mode == "I;16" else 1)
        return checked, values + image.height + values // 100 + 4096

    def load(self, i: int) -> bytes:
        buffer = io.BytesIO()
        self._saved(i).save(buffer, "PNG")
        return buffer.getvalue()

    def _saved(self, i: int) -> Image.Image:
        """Return image i in a mode that a PNG holds. DataError where it has no 8-bit form."""
        image, _ = self._item(i)
        if image.mode in PNG_MODES:
            return image
        return with_alpha(image) if image.mode in ALPHA_MODES else flattened(image, self.names[i], None)
