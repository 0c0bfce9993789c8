"""Features that a stopped evaluation has computed, kept in the run's storage: the next one continues from them.

A part is a range of ids. So another number of ranks can use it, and a short evaluation, which saves none, pays nothing.
"""

from __future__ import annotations

import io
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pirl import logs
from pirl.errors import StorageError
from pirl.storage import Storage

SAVE_EVERY_S = 60.0


class Parts:
    """The parts of one data set's features, below one name of a folder."""

    def __init__(self, folder: Storage | None, title: str, every_s: float = SAVE_EVERY_S) -> None:
        """`title` names the data set in file names and messages; without a folder nothing is kept."""
        self.folder, self.title, self.every_s = folder, title, every_s
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Return whether the last part is so old that the next one should be saved."""
        return self.folder is not None and time.monotonic() - self._saved_at >= self.every_s

    def save(self, ids: range, rows: Mapping[str, Tensor], scale: Mapping[str, float]) -> None:
        """Write the rows of `ids`, which were multiplied by `scale`, by the name of the backbone."""
        assert self.folder
        content = io.BytesIO()
        arrays: dict[str, Any] = {name: x.numpy() for name, x in rows.items()}
        np.savez(content, scale=np.array(list(scale.values())), **arrays)
        try:
            self.folder.write_bytes(f"{self.title}-{ids.start:012d}-{ids.stop:012d}.npz", content.getvalue())
        except StorageError as error:  # the evaluation does not need it
            logs.warn(f"features of the images {ids.start} to {ids.stop} were not saved: {error.what}")
        self._saved_at = time.monotonic()

    def restore(
        self, ids: range, names: list[str], put: Callable[[int, dict[str, Tensor], dict[str, float]], None]
    ) -> list[range]:
        """Hand the rows of `ids` that earlier processes have saved to `put`; return the ranges that are missing."""
        gaps, position = [], ids.start
        for span, file in self._files():
            start, stop = max(span.start, position), min(span.stop, ids.stop)
            if start >= stop:
                continue
            rows = self._read(file, span, names)
            if rows is None:
                continue
            scale = dict(zip(names, rows.pop("scale").tolist()))
            put(start, {name: x[start - span.start : stop - span.start] for name, x in rows.items()}, scale)
            if start > position:
                gaps.append(range(position, start))
            position = stop
        return [*gaps, range(position, ids.stop)] if position < ids.stop else gaps

    def _files(self) -> list[tuple[range, str]]:
        """Return the parts in the order of their ids."""
        if self.folder is None:
            return []
        pattern = re.compile(rf"{re.escape(self.title)}-(\d+)-(\d+)\.npz")
        matches = [match for file in self.folder.list(f"{self.title}-") if (match := pattern.fullmatch(file))]
        parts = [(range(int(match[1]), int(match[2])), match[0]) for match in matches]
        return sorted(parts, key=lambda part: (part[0].start, -part[0].stop))

    def _read(self, file: str, ids: range, names: list[str]) -> dict[str, Tensor] | None:
        """Return the tensors of a part; None, with a warning, for one that cannot be read."""
        assert self.folder
        try:
            with np.load(io.BytesIO(self.folder.read_bytes(file)), allow_pickle=False) as content:
                rows = {name: torch.from_numpy(content[name]) for name in (*names, "scale")}
            if any(len(rows[name]) != len(ids) for name in names) or len(rows["scale"]) != len(names):
                raise ValueError("it has another number of rows")
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, StorageError) as error:
            logs.warn(f"{self.folder.uri}/{file} cannot be read, its images are computed again: {error}")
            return None
        return rows
