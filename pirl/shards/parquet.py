"""Parquet files with encoded images as a source, in the layout of Hugging Face: a column `image.bytes`, and `label`.

A file is read by row groups, 64 rows at a time: images are asked for in their order, so that each is read once a pass
and a process holds no more than one batch.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pirl.errors import DataError, UsageError
from pirl.extras import require
from pirl.shards.decoding import Checked, Decoding
from pirl.shards.filter import LeftOut
from pirl.shards.images import MAX_IMAGE_BYTES, check_image
from pirl.shards.labels import SPLITS, check_class, numbered
from pirl.shards.objects import Objects
from pirl.shards.samples import Parts
from pirl.shards.sources import Source
from pirl.shards.tars import Ranged
from pirl.storage import Entry

BATCH_ROWS = 64
BUFFER_BYTES = 2**20
IMAGE, LABEL = "image", "label"  # names of columns, unless others are chosen


class ParquetSource(Source):
    """Images that are rows of parquet files, in the order of the files and rows."""

    def __init__(
        self, objects: Objects, entries: Sequence[Entry], parts: Parts, left_out: LeftOut, description: str
    ) -> None:
        require("parquet", "a parquet source")
        self.objects, self.entries, self.description, self.left_out = objects, list(entries), description, left_out
        self.uri = objects.uri
        self._check_splits()
        files = [self._opened(entry) for entry in entries]
        self.columns = {_image_column(file, parts.image, entry.name) for file, entry in zip(files, entries)}
        if len(self.columns) > 1:
            raise UsageError(
                f"{description}: images are in several columns, {', '.join(sorted(self.columns))}",
                "choose one by `image`=COLUMN",
            )
        rows = [file.metadata.num_rows for file in files]
        self.first_rows = np.cumsum([0, *rows])
        self.names = [f"{entry.name}/{row:07d}" for entry, count in zip(entries, rows) for row in range(count)]
        if not self.names:
            raise DataError(f"{description} has no rows", "give parquet files with images")
        self.labels, self.classes = self._labels(files, parts.label)
        self._forget()

    def _forget(self) -> None:
        self._rows: tuple[int, _Rows] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def fingerprint(self) -> str:
        content = (sorted(self.columns), self.classes, self.entries, self.first_rows.tolist())
        digest = hashlib.sha256(repr(content).encode("utf-8", "backslashreplace"))
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()

    def check(self, i: int, decoding: Decoding) -> tuple[Checked, int]:
        data = self.load(i)
        return check_image(data, self.names[i], decoding), len(data)

    def load(self, i: int) -> bytes:
        number = int(np.searchsorted(self.first_rows, i, "right")) - 1
        if self._rows is None or self._rows[0] != number:
            self._rows = number, _Rows(self._opened(self.entries[number]), next(iter(self.columns)))
        try:
            data = self._rows[1].image(i - int(self.first_rows[number]))
        except _errors() as error:
            self._forget()
            raise DataError(f"{self.names[i]}: the parquet file cannot be read: {error}") from None
        if data is None:
            raise DataError(f"{self.names[i]}: the row has no bytes")
        if len(data) > MAX_IMAGE_BYTES:
            raise DataError(f"{self.names[i]}: {len(data):,} bytes, more than the limit of {MAX_IMAGE_BYTES:,}")
        return data

    def _check_splits(self) -> None:
        """Raise UsageError where the files are those of several splits: the test images would be trained on."""
        splits = {part for entry in self.entries for part in _words(entry.name) if part in SPLITS}
        if len(splits) > 1:
            names = ", ".join(sorted(splits))
            raise UsageError(
                f"{self.description} has parquet files of several splits: {names}, expected one",
                f"give the files of one split, such as FOLDER/{sorted(splits)[-1]}-*.parquet",
            )

    def _opened(self, entry: Entry) -> Any:
        """Return pyarrow's file of an entry."""
        from pyarrow import parquet

        def read(start: int, length: int) -> bytes:
            data = self.objects.read_version(entry.name, entry.version, start, length)
            if data is None:
                raise DataError(f"{entry.name}: changed since it was listed")
            return data

        file = io.BufferedReader(Ranged(read, entry.bytes), BUFFER_BYTES)
        try:
            return parquet.ParquetFile(file, pre_buffer=False)
        except _errors() as error:
            raise DataError(
                f"{entry.name} in {self.description} is not a parquet file, or was cut: {error}", "upload it again"
            ) from None

    def _labels(self, files: Sequence[Any], chosen: str) -> tuple[np.ndarray | None, list[str] | None]:
        """Return the labels of all rows, int64 (N,), and their classes; None without a column of labels."""
        column = chosen or LABEL
        held = [column in file.schema_arrow.names for file in files]
        if not all(held):
            if chosen or any(held):
                entry, file = next((entry, file) for entry, file, has in zip(self.entries, files, held) if not has)
                raise _no_column(column, entry.name, file, "label")
            return None, None
        values = [value for file in files for value in file.read(columns=[column]).column(0).to_pylist()]
        names = [_class_names(file, column) for file in files]
        if any(each != names[0] for each in names):
            raise UsageError(f"{self.description}: the files have different classes", "give files of one data set")
        if set(values) == {-1}:  # of test sets that are published without labels
            return None, None
        if wrong := next((v for v in values if isinstance(v, bool) or not isinstance(v, int | str) or v == -1), None):
            raise UsageError(
                f"{self.description}: the column {column} holds {wrong!r}, expected class indices or names",
                "choose another by `label`=COLUMN",
            )
        if None in values or "" in values:
            raise UsageError(
                f"{self.description}: the column {column} lacks labels", "give every image a label, or none"
            )
        classes = names[0]
        if classes is None or not all(isinstance(value, int) for value in values):
            return numbered([str(value) for value in values], self.description)
        labels = np.array(values, np.int64)
        if labels.max() >= len(classes):
            raise UsageError(
                f"{self.description}: label {labels.max()}, but {len(classes)} classes", "write the files again"
            )
        for name in classes:
            check_class(name)
        return labels, classes


class _Rows:
    """The images of one file, read forward."""

    def __init__(self, file: Any, column: str) -> None:
        self.file, self.column = file, column
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        self.first_rows = np.cumsum([0, *sizes])
        self.batches: Iterator[Any] = iter(())
        self.batch: Any = None
        self.group, self.start, self.stop = -1, 0, 0

    def image(self, row: int) -> bytes | None:
        """Return the bytes of a row; None where it has none."""
        group = int(np.searchsorted(self.first_rows, row, "right")) - 1
        if group != self.group or row < self.start:
            self.batches = self.file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[self.column])
            self.group = group
            self.start = self.stop = int(self.first_rows[group])
        while row >= self.stop:
            self.batch = next(self.batches)
            self.start, self.stop = self.stop, self.stop + len(self.batch)
        values = self.batch.column(0)
        value = values[row - self.start].as_py()
        return value.get("bytes") if isinstance(value, dict) else value


def _errors() -> tuple[type[Exception], ...]:
    from pyarrow import ArrowException

    return ArrowException, OSError, StopIteration


def _words(name: str) -> list[str]:
    """Return the folders of a name, and its file's name up to the first dash or dot, in lower case."""
    *folders, file = name.lower().split("/")
    return [*folders, file.partition(".")[0].partition("-")[0]]


def _image_column(file: Any, chosen: str, name: str) -> str:
    """Return the column of the encoded images: COLUMN, or COLUMN.bytes in Hugging Face's layout."""
    from pyarrow import types

    columns = {}
    for field in file.schema_arrow:
        if types.is_binary(field.type) or types.is_large_binary(field.type):
            columns[field.name] = field.name
        elif types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            columns[field.name] = f"{field.name}.bytes"
    if chosen and chosen not in columns:
        raise _no_column(chosen, name, file, "image")
    if not chosen and IMAGE not in columns and len(columns) != 1:
        raise _no_column(IMAGE, name, file, "image")
    return columns[chosen or (IMAGE if IMAGE in columns else next(iter(columns)))]


def _no_column(column: str, name: str, file: Any, option: str) -> UsageError:
    names = ", ".join(file.schema_arrow.names)
    kind = "of encoded images " if option == "image" else ""
    return UsageError(f"{name} has no column {kind}{column!r}: it has {names}", f"choose one by `{option}`=COLUMN")


def _class_names(file: Any, column: str) -> list[str] | None:
    """Return the names of the classes that Hugging Face writes into the schema; None without them."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(each) for each in names]
