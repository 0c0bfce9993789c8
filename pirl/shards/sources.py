"""Where images come from: a folder tree, a list of files, arrays, or a torchvision-style data set."""

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
from pirl.shards.images import EXTENSIONS, MAX_IMAGE_BYTES, check_image, check_limit
from pirl.shards.pixels import ALPHA_MODES, flattened, transparency, with_alpha

MAX_CLASSES = 1_000_000
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

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex SHA-256 that changes when the input does. Not a place: a copied array data set has the same."""

    @abstractmethod
    def check(self, i: int, decoding: Decoding) -> tuple[Checked, int]:
        """Decode image i; return what it is and an upper bound of its encoded bytes. DataError if it is unreadable."""

    @abstractmethod
    def load(self, i: int) -> bytes:
        """The encoded bytes of image i as they go into the shard. DataError if they are not what was checked."""

    def expect(self, indices: Sequence[int]) -> None:  # noqa: B027 (most need not know)
        """These will be loaded next, in this order."""

    def load_into(self, i: int, buffer: memoryview) -> bytes | memoryview:
        """The same, in the front of `buffer` (then a view of it) where that saves a copy."""
        return self.load(i)


class FileSource(Source):
    """Image files that keep their bytes. `names` are relative to `root`; every file's size and time are noted."""

    def __init__(
        self, description: str, root: Path, names: list[str], labels: np.ndarray | None, classes: list[str] | None
    ) -> None:
        self.description, self.root, self.names, self.labels, self.classes = description, root, names, labels, classes
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
        """(descriptor, size) of a file that is as it was when it was listed. DataError about it and its reading."""
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


def folder_source(root: Path) -> FileSource:
    """A folder in torchvision's ImageFolder order (classes sorted, paths sorted), or a flat folder without labels.

    Links to files and folders are followed, as torchvision does, but not into a loop. Hidden folders are no classes.
    """
    entries = list(os.scandir(root))
    classes = sorted(e.name for e in entries if _is_folder(e) and not e.name.startswith("."))
    flat = sorted(e.name for e in entries if _has_image_name(e.name) and not _is_folder(e))
    names: list[str] = []
    counts: list[int] = []
    for name in classes:
        before = len(names)
        folders = sorted(_walk(os.path.join(root, name), set()))
        names += [os.path.join(top, file)[len(str(root)) :].lstrip("/") for top, files in folders for file in files]
        counts.append(len(names) - before)
    if names and flat:
        raise UsageError(
            f"{root} mixes images ({flat[0]!r}, ...) with class folders that hold images ({names[0]!r}, ...)",
            "give a folder with one kind only: images, or one folder of images per class",
        )
    if not names and not flat:
        raise DataError(
            f"no image in {root}", f"it should hold files ending in {' '.join(EXTENSIONS)}, or one folder per class"
        )
    if flat:
        source = FileSource(f"folder {_shown(root)}", root, flat, None, None)
    else:
        for name in classes:
            check_class(name)
        source = FileSource(f"folder {_shown(root)}", root, names, np.repeat(np.arange(len(classes)), counts), classes)
    source.folder = root
    return source


def _has_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _walk(top: str, above: set[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
    """(folder, sorted image names) of a tree; a folder that is reached again below itself is left out."""
    info = os.stat(top)
    here = (info.st_dev, info.st_ino)
    if here in above:
        return
    with os.scandir(top) as entries:
        found = list(entries)
    yield top, sorted(e.name for e in found if _has_image_name(e.name) and not _is_folder(e))
    for entry in found:
        if _is_folder(entry):
            yield from _walk(entry.path, above | {here})


def _shown(path: Path) -> str:
    return os.fsencode(path.absolute()).decode("utf-8", "replace")


def check_class(name: str) -> None:
    """UsageError unless `name` can be written into our files."""
    if not name.isprintable():  # also the surrogates of a name that is no UTF-8, which JSON files cannot carry
        raise UsageError(f"the class name {name!r} has characters that cannot be written", "rename the class")


def list_source(path: Path) -> FileSource:
    """A text file with one image a line, `path` or `path<TAB>label`; paths are relative to the list's folder.

    Labels are class names, or class indices when every one of them is a number.
    """
    names: list[str] = []
    given: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check the permissions of the list") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, tab, label = line.partition("\t")
        unlike = bool(names) and bool(tab) != bool(given)
        if unlike or not name.strip() or (tab and not label.strip()):
            raise UsageError(
                f"{path}, line {number}: {line!r} is not like the lines before",
                "every line is `path`, or every line is `path<TAB>label`",
            )
        names.append(name)
        if tab:
            given.append(label.strip())
    if not names:
        raise DataError(f"{path} lists no image", "write one path a line, or path<TAB>label")
    labels, classes = numbered(given, str(path)) if given else (None, None)
    return FileSource(f"list {_shown(path)}", path.parent, names, labels, classes)


def numbered(given: list[str], where: str) -> tuple[np.ndarray, list[str]]:
    """Labels as they are written, class indices or names -> indices, int64 (N,), and the classes."""
    if all(label.isascii() and label.isdecimal() for label in given):
        indices = np.array([int(label[:20]) for label in given], dtype=object)
        if indices.max() >= MAX_CLASSES:
            raise UsageError(f"{where}: class index {indices.max()} is not below {MAX_CLASSES:,}", "number from 0 on")
        return indices.astype(np.int64), [str(i) for i in range(int(indices.max()) + 1)]
    classes = sorted(set(given))
    for name in classes:
        check_class(name)
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[label] for label in given], np.int64), classes


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
    """uint8 (H, W) -> PNG of mode L. Four times as fast as Pillow on 28x28, where a call costs more than the work."""
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
            except DataError as error:  # check() says so again, where it is put into quarantine
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
