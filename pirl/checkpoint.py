"""Checkpoints: one unit each, written aside, checksummed, and published by a last small object.

    checkpoints/step-00000120/state.pt      model, bank, Z, optimiser, recipe: `torch.save` of tensors and plain values
    checkpoints/step-00000120/COMMIT.json   size and SHA-256 of it, cursor, digests: without it, there is no checkpoint
    checkpoints/LATEST.json                 the name of the newest

Loading unpickles nothing but tensors and plain containers (`weights_only=True`).
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, StorageError, StorageNotFoundError
from .storage import Storage

FORMAT = 1


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: it does not depend on ranks or workers."""

    epoch: int = 0
    samples: int = 0
    """Of this epoch, seen by all ranks together."""
    step: int = 0
    seconds: float = 0.0
    """Of training, over all restarts."""


@dataclass(frozen=True)
class Commit:
    """What is known of a complete checkpoint without reading it."""

    name: str
    cursor: Cursor
    recipe_digest: str
    data_digest: str
    bytes: int
    sha256: str


class Checkpoints:
    """The checkpoints of one run. One process writes; any may read."""

    def __init__(self, storage: Storage, keep: int = 2) -> None:
        self.storage = storage
        self.keep = keep
        self.failures = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        state: dict[str, Any],
        cursor: Cursor,
        recipe_digest: str,
        data_digest: str,
        done: Callable[[Commit, float], None] = lambda commit, seconds: None,
    ) -> None:
        """Copy `state` to host memory and write it in the background; waits for a save that is still under way.

        `done` is called from the writing thread. A failed save does not stop training: `wait` tells.
        """
        self.wait()
        copy = _to_host(state)

        def write() -> None:
            started = time.perf_counter()
            try:
                done(self._write(copy, cursor, recipe_digest, data_digest), time.perf_counter() - started)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> StorageError | None:
        """Wait for a save under way; the error that ended it, if a storage failed. Other errors are raised."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return None
        if not isinstance(error, StorageError):
            raise error
        self.failures += 1
        return error

    def _write(self, state: dict[str, Any], cursor: Cursor, recipe_digest: str, data_digest: str) -> Commit:
        name = f"step-{cursor.step:08d}"
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        data = buffer.getbuffer()
        commit = Commit(name, cursor, recipe_digest, data_digest, len(data), hashlib.sha256(data).hexdigest())
        folder = self.storage / name
        folder.write_bytes("state.pt", data)  # type: ignore[arg-type]
        folder.write_json("COMMIT.json", {"format": FORMAT, **asdict(commit)})
        self.storage.write_json("LATEST.json", {"name": name})
        self._retire(newest=name)
        return commit

    def _retire(self, newest: str) -> None:
        """Delete all but the last `keep` complete checkpoints, commit object first; and the unfinished before them."""
        kept = self.names()[-self.keep :]
        folders = {name.partition("/")[0] for name in self.storage.list("step-")}
        for name in sorted(folders - set(kept)) if newest in kept else []:
            if name < newest:
                (self.storage / name).delete("COMMIT.json")
                (self.storage / name).delete("state.pt")

    def names(self) -> list[str]:
        """Names of the complete checkpoints, oldest first."""
        found = (name.split("/") for name in self.storage.list())
        return sorted(parts[0] for parts in found if len(parts) == 2 and parts[1] == "COMMIT.json")

    def newest(self) -> str | None:
        """Name of the newest complete checkpoint, without listing where `LATEST.json` tells it."""
        try:
            name = str(json.loads(self.storage.read_bytes("LATEST.json"))["name"])
        except (StorageNotFoundError, ValueError, TypeError, KeyError):
            pass  # absent or damaged: it only saves a listing
        else:
            if (self.storage / name).exists("COMMIT.json"):
                return name
        names = self.names()
        return names[-1] if names else None

    def load(self, name: str | None = None) -> tuple[Commit, dict[str, Any]] | None:
        """The checkpoint `name`, or the newest that is whole; None where the run has none at all.

        A broken one that was not asked for by name is skipped, with a warning, if an older whole one exists.
        """
        if name is not None:
            return self._read(name)
        newest = self.newest()
        if newest is None:
            return None
        try:
            return self._read(newest)
        except CheckpointError as error:
            for older in reversed([other for other in self.names() if other < newest]):
                try:
                    found = self._read(older)
                except CheckpointError:
                    continue
                warnings.warn(f"{error.what}; going on from the older {older}", stacklevel=2)
                return found
            raise

    def commit(self, name: str) -> Commit:
        """The commit object of the checkpoint `name`."""
        where = f"{self.storage.uri}/{name}"
        try:
            fields = json.loads((self.storage / name).read_bytes("COMMIT.json"))
            version = fields.pop("format")
            commit = Commit(**{**fields, "cursor": Cursor(**fields["cursor"])})
        except StorageNotFoundError:
            known = ", ".join(self.names()) or "none"
            raise CheckpointError(f"there is no complete checkpoint {where}", f"complete ones here: {known}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where}/COMMIT.json is damaged: {error}", "use an older checkpoint") from None
        if version != FORMAT:
            raise CheckpointError(f"{where} has format {version}, this version reads {FORMAT}", "upgrade pirl-pipeline")
        return commit

    def _read(self, name: str) -> tuple[Commit, dict[str, Any]]:
        commit = self.commit(name)
        where = f"{self.storage.uri}/{name}/state.pt"
        try:
            data = (self.storage / name).read_bytes("state.pt")
        except StorageNotFoundError:
            raise CheckpointError(f"{where} is missing", "use an older checkpoint") from None
        if len(data) != commit.bytes or hashlib.sha256(data).hexdigest() != commit.sha256:
            raise CheckpointError(
                f"{where} is damaged: {len(data)} of {commit.bytes} bytes, or another SHA-256 than was committed",
                "delete this checkpoint to go on from an older one",
            )
        try:
            return commit, torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # a bad pickle can end in anything
            raise CheckpointError(
                f"{where} holds more than tensors and plain values, or is no checkpoint: it was refused",
                "it was not written by this program: delete it, and find out who wrote it",
            ) from error


def _to_host(value: Any) -> Any:
    """A copy that later training steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_host(item) for item in value)
    return value
