"""Tar files as a source of images: each is scanned once, and images are read from where they lie in it.

The members become samples in `samples`. What a scan finds is remembered in the cache under `tars/`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pirl import logs
from pirl.errors import DataError, StorageError, StorageNotFoundError, UsageError
from pirl.shards.fashion import cache_root
from pirl.shards.filter import HIDDEN, TAR_BESIDE_IMAGES, TAR_SUFFIX, Kind, LeftOut, hidden_part, is_image, kind_of
from pirl.shards.headers import HEAD_BYTES
from pirl.shards.labels import by_folder, check_level, numbered
from pirl.shards.objects import THREADS, Objects, ObjectSource
from pirl.shards.place import shown_path
from pirl.shards.samples import Grouped, Member, Parts, check_words, group_samples
from pirl.storage import Entry, open_storage
from pirl.text import count

SCAN_BYTES = 4 * 2**20
REPORT_S = 10.0  # between two lines on the progress of the scan
MAX_LABEL_BYTES = 2**20
NO_FILE = "a link, or no regular file, in a tar file"
SCAN_VERSION = 4  # of what is remembered
ABOVE = re.compile(r"^(?:\.{0,2}/)+")  # of names that were packed from elsewhere: /data/ant/0.jpg, ../ant/0.jpg

Read = Callable[[int, int], bytes]


class LocalObjects:
    """Files below a local folder, read as objects on S3 are."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = self.root.as_uri()

    def entry(self, name: str) -> Entry:
        """Return the file as it is now."""
        info = os.stat(self.root / name)
        return Entry(name, info.st_size, f"{info.st_size} {info.st_mtime_ns}")

    def read_version(self, name: str, version: str, offset: int, length: int) -> bytes | None:
        """Return the bytes; None where the file has another size or time than `version`."""
        try:
            with open(self.root / name, "rb", buffering=0) as file:
                info = os.fstat(file.fileno())
                if f"{info.st_size} {info.st_mtime_ns}" != version:
                    return None
                file.seek(offset)
                return io.BufferedReader(file).read(length)
        except FileNotFoundError:
            raise StorageNotFoundError(f"{self.root / name} does not exist", "check the path") from None
        except OSError as error:
            raise StorageError(
                f"{self.root / name} cannot be read: {error.strerror}", "check the path and its permissions"
            ) from None


def tar_source(
    objects: Objects, tars: Sequence[Entry], left_out: LeftOut, parts: Parts, description: str
) -> ObjectSource:
    """Return the images of tar files as a source.

    Their labels are those of `parts`, or else the folders in which they lie, or else none.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        groups: list[Grouped] = []
        reported = time.monotonic()
        for group in pool.map(lambda entry: _samples(objects, entry, parts), tars):
            groups.append(group)
            if time.monotonic() - reported > REPORT_S:
                reported = time.monotonic()
                logs.info(f"{len(groups):,} of {count(len(tars), 'tar file')} scanned")
    check_words(groups)
    for entry, group in zip(tars, groups):
        left_out.update((reason, f"{entry.name}/{name}", files) for reason, name, files in group.left_out)
    numbers = [number for number, group in enumerate(groups) for _ in group.samples]
    samples = [sample for group in groups for sample in group.samples]
    if not samples:
        note = f"; left out: {left_out}" if left_out else ""
        raise DataError(
            f"no image in the tar files of {description}{note}", "check the files, and `image` if you gave it"
        )
    names = [sample.name for sample in samples]
    labels: np.ndarray | None
    classes: list[str] | None
    texts = [sample.label for sample in samples if sample.label is not None]
    if texts or parts.label:
        for number, sample in zip(numbers, samples):
            if sample.label is None:
                others = "others have" if texts else "expected one"
                raise UsageError(
                    f"{sample.name} in {tars[number].name} has no .{parts.label_part} next to it, {others}",
                    "give every image a label, or none; `label`=PART chooses another part",
                )
        labels, classes = numbered(texts, description)
    else:
        labels, classes = by_folder(names, description)
    notes = check_level(names, classes, description) if classes and not texts else []
    source = ObjectSource(
        objects,
        tars,
        numbers,
        [sample.offset for sample in samples],
        [sample.size for sample in samples],
        [f"{tars[number].name}/{name}" for number, name in zip(numbers, names)],
        labels,
        classes,
        left_out=left_out,
        description=description,
    )
    source.notes = notes
    return source


def refuse_compressed(name: str, where: str) -> DataError:
    """Return the refusal of a compressed tar file."""
    return DataError(
        f"{name} in {where} is compressed; images are read from where they lie in a tar file, without unpacking it",
        "decompress it (`gunzip`, `unzstd` ...) next to the others, or move it away",
    )


def _samples(objects: Objects, entry: Entry, parts: Parts) -> Grouped:
    """Return the samples of one tar file. To find them it is read once; the cache keeps its members."""
    key = hashlib.sha256(repr((SCAN_VERSION, objects.uri, entry, parts.label_part)).encode()).hexdigest()
    root = cache_root()
    remembered = open_storage(root / "tars" if root else os.path.join(os.devnull, "tars"))  # kept nowhere
    members: list[Member] = []
    left_out: list[tuple[str, str, int]] = []
    with suppress(StorageError):
        record = remembered.read_json(f"{key}.json")
        members = [Member(*row) for row in record["members"]]
        left_out = [(reason, name, files) for reason, name, files in record["left_out"]]
    if not members:
        members, left_out = _scan(objects, entry, parts.label_part)
        with suppress(StorageError, UnicodeEncodeError):
            remembered.write_json(f"{key}.json", {"members": members, "left_out": left_out})
    try:
        group = group_samples(members, parts)
    except UsageError as error:
        raise UsageError(f"{_shown(objects, entry)}: {error.what}", error.hint) from None
    group.left_out += left_out
    return group


def _shown(objects: Objects, entry: Entry) -> str:
    """Return a tar file as messages name it."""
    place = shown_path(objects.root) if isinstance(objects, LocalObjects) else objects.uri
    return f"{place}/{entry.name}"


def _scan(objects: Objects, entry: Entry, label_part: str) -> tuple[list[Member], list[tuple[str, str, int]]]:
    """Return the members of a tar file that are not hidden, and (reason, name, 1) of those that cannot be read."""
    where = _shown(objects, entry)
    members: list[Member] = []
    nested: list[tuple[tarfile.TarInfo, str]] = []
    left_out = LeftOut()

    def read(start: int, length: int) -> bytes:
        data = objects.read_version(entry.name, entry.version, start, length)
        if data is None:
            raise DataError(f"{where} changed while it was read", "leave it alone, then run this again")
        return data

    try:
        for tar, member in _tar_members(io.BufferedReader(Ranged(read, entry.bytes), SCAN_BYTES), entry.bytes):
            name = ABOVE.sub("", member.name)
            if member.isdir():
                continue
            if part := hidden_part(name):
                left_out.add(HIDDEN, part)
            elif not member.isreg() or member.sparse is not None:
                left_out.add(NO_FILE, name)
            elif kind_of(name) is Kind.TAR:  # of a class, as ImageNet packs them
                nested.append((member, name))
            else:
                members.append(_member(tar, member, name, label_part, where))
        has_images = any(member.image for member in members)
        for info, name in nested:
            if has_images:
                left_out.add(TAR_BESIDE_IMAGES, name)
            else:
                members += _nested(read, info, name, label_part, where, left_out)
    except tarfile.TarError as error:
        raise DataError(
            f"{where} is not a tar file, or was cut: {error}", "compressed ones must be unpacked; upload it again"
        ) from None
    return members, list(left_out.items())


def _nested(
    read: Read, outer: tarfile.TarInfo, name: str, label_part: str, where: str, left_out: LeftOut
) -> list[Member]:
    """Return the members of a tar file in a tar file; its name is their folder, and so their class."""
    members: list[Member] = []

    def within(start: int, length: int) -> bytes:
        return read(outer.offset_data + start, length)

    folder = name[: -len(TAR_SUFFIX)]
    for tar, info in _tar_members(io.BufferedReader(Ranged(within, outer.size), SCAN_BYTES), outer.size):
        inner = f"{folder}/{ABOVE.sub('', info.name)}"
        if info.isdir():
            continue
        if part := hidden_part(inner):
            left_out.add(HIDDEN, part)
        elif not info.isreg() or info.sparse is not None or kind_of(inner) is Kind.TAR:
            left_out.add(NO_FILE, inner)
        else:
            member = _member(tar, info, inner, label_part, where)
            members.append(member._replace(offset=outer.offset_data + member.offset))
    return members


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, name: str, label_part: str, where: str) -> Member:
    text = None
    kind = kind_of(name)
    image = kind is Kind.IMAGE
    if name.lower().endswith(f".{label_part}"):
        if info.size > MAX_LABEL_BYTES:
            raise DataError(
                f"{name} in {where} is not a label: {info.size:,} bytes", "choose another part by `label`=PART"
            )
        content = tar.extractfile(info)
        text = _text(content.read() if content else b"", name, where)
    elif kind is Kind.UNKNOWN:
        content = tar.extractfile(info)
        image = content is not None and is_image(name, content.read(HEAD_BYTES))
    return Member(name, info.offset_data, info.size, image, text)


def _text(data: bytes, name: str, where: str) -> str:
    """Return the text of a label. UsageError for other bytes: two labels must not become one."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the label {name} in {where} is not UTF-8 text: {error.reason} at byte {error.start}",
            "write it as UTF-8, or choose another part by `label`=PART",
        ) from None


def _tar_members(file: io.BufferedReader, size: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members of an archive and of those joined to it (`cat a.tar b.tar`). TarError for anything else."""
    start: int | None = 0
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} goes beyond its end")
                yield tar, member
            end = tar.offset
        if size - end < tarfile.BLOCKSIZE:  # of zeros, which tarfile does not miss
            raise tarfile.ReadError("its end is missing")
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a broken header for the end
            raise tarfile.ReadError(f"the header at byte {end:,} is broken")
        start = _next_archive(file, end + tarfile.BLOCKSIZE)


def _next_archive(file: io.BufferedReader, start: int) -> int | None:
    """Return the position of the first byte from `start` on that is not zero."""
    file.seek(start)
    while data := file.read(SCAN_BYTES):
        if behind := len(data.lstrip(b"\0")):
            return start + len(data) - behind
        start += len(data)
    return None


class Ranged(io.RawIOBase):
    """An object as a file."""

    def __init__(self, read: Read, size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._read(self._position, min(len(buffer), max(self._size - self._position, 0)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
