"""The work of a sharding process: check a part of the images, or write one shard."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng import zlib_ng

from pirl.errors import DataError, StorageError
from pirl.shards.decoding import Decoding, Pictures
from pirl.shards.filter import LeftOut
from pirl.shards.manifest import Shard
from pirl.shards.sources import Source
from pirl.shards.tar import Digest, Load, write_tar
from pirl.storage import encode_json, local_path, open_storage

WORK = "_work"


@dataclass
class Plan:
    """One shard to be written: which images of the source, under which ids."""

    number: int
    first_id: int
    images: np.ndarray  # int64, indices into the source
    extensions: list[str]

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}.tar"


def record_name(number: int) -> str:
    return f"shard-{number:06d}.json"


def ascii_json(value: Any, indent: int | None = None) -> bytes:
    """Return ASCII JSON, so that file names that are not UTF-8 (lone surrogates) survive the round trip."""
    separators = (",", ":") if indent is None else None
    return (json.dumps(value, indent=indent, separators=separators) + "\n").encode("ascii")


class PartWorker:
    """The work on one part, in whichever process. Methods take one task and return something small."""

    digest: Callable[[], Digest] = staticmethod(hashlib.sha256)
    checksum: Callable[[bytes | memoryview], int] = staticmethod(zlib_ng.crc32)  # zlib's, five times as fast

    def __init__(self, source: Source, uri: str, key: str, decoding: Decoding) -> None:
        self.source, self.uri, self.key, self.decoding = copy.copy(source), uri, key, decoding
        self.source.left_out = LeftOut()  # no worker needs the names, which may be many

    def check(self, images: np.ndarray) -> dict[str, Any]:
        """Decode images (int64 indices) -> columns "ext" and "size" (-1: unreadable), and "bad" {index: reason}.

        "pictures" are the counts of special kinds among the readable ones (`Pictures`).
        """
        pictures = Pictures()
        extensions: list[str] = []
        sizes: list[int] = []
        bad: dict[str, str] = {}
        self.source.expect(images.tolist())
        for i in images.tolist():
            try:
                checked, size = self.source.check(i, self.decoding)
                extension = checked.extension
                pictures.add(checked)
            except DataError as error:
                extension, size = "", -1
                bad[str(i)] = error.what.removeprefix(f"{self.source.names[i]}: ")
            extensions.append(extension)
            sizes.append(size)
        return {"ext": extensions, "size": sizes, "bad": bad, "pictures": pictures.model_dump()}

    def write(self, plan: Plan) -> Shard:
        """Write one shard, its index and its record, each published whole and in this order."""
        out = open_storage(self.uri)
        folder = local_path(out)
        checksums: list[int] = []
        try:
            with Unfinished(folder / WORK if folder else None) as path:
                tar = write_tar(path, self._members(plan, checksums), self.digest())
                if folder:
                    os.replace(path, folder / plan.name)
                else:
                    out.upload(path, plan.name)
        except OSError as error:
            raise StorageError(
                f"{out.uri}/{plan.name} cannot be written: {error.strerror or error}",
                "make room or choose another place, then run the same command again; it continues where it was",
            ) from error
        images = plan.images.tolist()
        step = 1 if self.source.labels is None else 2  # members per image
        index = {
            "offset": tar.offsets[::step],
            "size": tar.sizes[::step],
            "crc32": checksums,
            "label": None if self.source.labels is None else self.source.labels[plan.images].tolist(),
            "name": [self.source.names[i] for i in images],
        }
        data = ascii_json(index)
        shard = Shard(
            name=plan.name,
            first_id=plan.first_id,
            images=len(images),
            bytes=tar.bytes,
            sha256=tar.digest,
            index_sha256=hashlib.sha256(data).hexdigest(),
        )
        out.write_bytes(shard.index_name, data)
        (out / WORK / self.key[:16]).write_bytes(record_name(plan.number), encode_json(shard.model_dump()))
        return shard

    def _members(self, plan: Plan, checksums: list[int]) -> Iterator[tuple[str, Load]]:
        """Yield the members of a shard; the checksum of each image is appended when it is loaded."""

        def image(i: int, buffer: memoryview) -> bytes | memoryview:
            try:
                data = self.source.load_into(i, buffer)
            except DataError as error:
                raise DataError(
                    f"{error.what} (it was readable when it was checked)",
                    "leave the images alone while they are sharded, then run this again",
                ) from None
            checksums.append(self.checksum(data))
            return data

        labels = self.source.labels
        self.source.expect(plan.images.tolist())
        for id, i, extension in zip(itertools.count(plan.first_id), plan.images.tolist(), plan.extensions):
            yield f"{id:09d}.{extension}", partial(image, i)
            if labels is not None:
                yield f"{id:09d}.cls", partial(_label, str(labels[i]).encode())


def _label(text: bytes, buffer: memoryview) -> bytes:
    return text


class Unfinished:
    """A path for an unfinished shard, next to the output so that it can be renamed, or in TMPDIR."""

    def __init__(self, folder: Path | None) -> None:
        self.own = None if folder else tempfile.mkdtemp(prefix="pirl-shard-")
        self.folder = folder or Path(self.own or "")

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"unfinished-{uuid.uuid4().hex}"
        return self.path

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        if self.own:
            shutil.rmtree(self.own, ignore_errors=True)
