"""Features of any number of images in one file: npz, parquet or csv, written with bounded memory.

npz: `names`, `features` (n, D) float32, `labels` (-1: none), `classes`, and `provenance`, a JSON text. parquet: columns
`name`, `label`, `class`, `embedding`. csv: `name`, `label`, `class`, and a column for each feature. The file appears
when it is complete.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np

from pirl import __version__
from pirl.embedding.encoder import Batch, Encoder
from pirl.embedding.images import Given, Images, SourceImages, open_images
from pirl.errors import DataError, UsageError
from pirl.extras import require
from pirl.outputs import check_file_output
from pirl.shards import SourceOptions
from pirl.storage import local_path, split_file_uri

COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class Embedded:
    """Result of `embed_to`."""

    out: str
    images: int
    features: int
    skipped: list[tuple[str, str]]
    """Name and reason."""


def embed_to(
    encoder: Encoder,
    images: Given,
    out: str | Path,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    options: SourceOptions | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Embedded:
    """Write the features of images to a file, a path or an s3:// URI; return what was written.

    Images that cannot be read are left out, and named in the result. `DataError` where none can be read.
    """
    folder, name = split_file_uri(out)
    kind = _kind(name)
    opened = open_images(images, options)
    check_file_output(out, [opened.source] if isinstance(opened, SourceImages) else [])
    if target := local_path(folder):
        target.mkdir(parents=True, exist_ok=True)
    skipped: list[tuple[str, str]] = []
    done = 0
    with tempfile.TemporaryDirectory(prefix=".pirl-embed-", dir=target) as temporary:
        writer = kind(Path(temporary), encoder.features, opened.classes or [], provenance(encoder, opened))
        for batch in encoder.batches(opened, batch_size=batch_size, workers=workers, errors="skip"):
            writer.write(batch)
            skipped += batch.skipped
            done += len(batch.names)
            progress(done + len(skipped), len(opened))
        if not done:
            first = f": {skipped[0][1]}" if skipped else ""
            raise DataError(f"none of {len(opened):,} images could be read{first}", "give other images")
        path = writer.close()
        if target:
            os.replace(path, target / name)
        else:
            folder.upload(path, name)
    return Embedded(str(target / name) if target else f"{folder.uri}/{name}", done, encoder.features, skipped)


def provenance(encoder: Encoder, images: Images) -> dict[str, Any]:
    """Return the origin of features: weights, preprocessing, version."""
    recipe = encoder.recipe
    return {
        "model": encoder.origin,
        "weights": encoder.weights,
        "recipe": recipe.name,
        "resize": recipe.eval.resize,
        "crop": recipe.eval.crop,
        "images": len(images),
        "version": __version__,
    }


class Writer(ABC):
    """A file of features in `folder`, written batch by batch."""

    def __init__(self, folder: Path, features: int, classes: list[str], provenance: dict[str, Any]) -> None:
        self.folder, self.features, self.classes, self.provenance = folder, features, classes, provenance
        self.path = folder / "features"

    @abstractmethod
    def write(self, batch: Batch) -> None:
        """Add some images."""

    @abstractmethod
    def close(self) -> Path:
        """Complete the file; return its path."""

    def class_of(self, label: int) -> str:
        """Return the name of a class, "" without one."""
        return self.classes[label] if 0 <= label < len(self.classes) else ""


class NpzWriter(Writer):
    """An npz of arrays whose length is unknown until the end: columns are collected in files, then copied."""

    def __init__(self, folder: Path, features: int, classes: list[str], provenance: dict[str, Any]) -> None:
        super().__init__(folder, features, classes, provenance)
        self._columns = {name: (folder / name).open("wb") for name in ("rows", "labels", "names")}
        self._count, self._longest = 0, 1

    def write(self, batch: Batch) -> None:
        """Append to the three columns."""
        self._columns["rows"].write(np.ascontiguousarray(batch.features, "<f4").data)
        self._columns["labels"].write(batch.labels.astype("<i8").data)
        self._columns["names"].write("".join(json.dumps(name) + "\n" for name in batch.names).encode())
        self._count += len(batch.names)
        self._longest = max(self._longest, *map(len, batch.names), 1)

    def close(self) -> Path:
        """Copy the columns into one npz."""
        for column in self._columns.values():
            column.close()
        with zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with _member(archive, "features", (self._count, self.features), "<f4") as member:
                _copy(self.folder / "rows", member)
            with _member(archive, "labels", (self._count,), "<i8") as member:
                _copy(self.folder / "labels", member)
            kind = f"<U{self._longest}"
            with (
                _member(archive, "names", (self._count,), kind) as member,
                (self.folder / "names").open(encoding="utf-8") as lines,
            ):
                for line in lines:
                    member.write(np.array([json.loads(line)], kind).data)
            for name, value in (
                ("classes", np.array(self.classes, "U")),
                ("provenance", np.array(json.dumps(self.provenance))),
            ):
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, value, allow_pickle=False)
        return self.path


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], kind: str) -> IO[bytes]:
    member = archive.open(f"{name}.npy", "w", force_zip64=True)
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    return member


def _copy(path: Path, member: IO[bytes]) -> None:
    with path.open("rb") as column:
        shutil.copyfileobj(column, member, COPY_BYTES)
    path.unlink()


class CsvWriter(Writer):
    """A csv with a header; floats have the digits that make them the same float32 again."""

    def __init__(self, folder: Path, features: int, classes: list[str], provenance: dict[str, Any]) -> None:
        super().__init__(folder, features, classes, provenance)
        self._file = self.path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        self._csv = csv.writer(self._file)
        self._csv.writerow(["name", "label", "class", *(f"f{i}" for i in range(features))])

    def write(self, batch: Batch) -> None:
        """Append one line for each image."""
        for name, label, row in zip(batch.names, batch.labels.tolist(), batch.features.astype("U").tolist()):
            self._csv.writerow([name, label if label >= 0 else "", self.class_of(label), *row])

    def close(self) -> Path:
        """Close the file."""
        self._file.close()
        return self.path


class ParquetWriter(Writer):
    """A parquet with one row group a batch; `provenance` is in the metadata of its schema."""

    def __init__(self, folder: Path, features: int, classes: list[str], provenance: dict[str, Any]) -> None:
        super().__init__(folder, features, classes, provenance)
        require("parquet", "a .parquet file")
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa = pa
        columns = {"name": pa.string(), "label": pa.int64(), "class": pa.string()}
        self._schema = pa.schema(
            {**columns, "embedding": pa.list_(pa.float32(), features)}, {"pirl": json.dumps(provenance)}
        )
        self._parquet = pq.ParquetWriter(self.path, self._schema)

    def write(self, batch: Batch) -> None:
        """Append a row group."""
        if not batch.names:
            return
        pa, labels = self._pa, batch.labels.tolist()
        columns = [
            pa.array(batch.names, pa.string()),
            pa.array([label if label >= 0 else None for label in labels], pa.int64()),
            pa.array([self.class_of(label) or None for label in labels], pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(batch.features.reshape(-1)), self.features),
        ]
        self._parquet.write_table(pa.Table.from_arrays(columns, schema=self._schema))

    def close(self) -> Path:
        """Write the footer."""
        self._parquet.close()
        return self.path


WRITERS: dict[str, type[Writer]] = {".npz": NpzWriter, ".csv": CsvWriter, ".parquet": ParquetWriter}


def _kind(name: str) -> type[Writer]:
    suffix = PurePath(name).suffix
    if suffix not in WRITERS:
        raise UsageError(f"{name} ends in {suffix or 'no suffix'!r}, expected one of {', '.join(WRITERS)}", "rename it")
    if suffix == ".parquet":
        require("parquet", "a .parquet file")
    return WRITERS[suffix]
