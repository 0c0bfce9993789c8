"""Saving, publishing, finding, loading and retiring checkpoints."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from torch import Tensor

from pirl import logs
from pirl.checkpoint.commit import Commit, Cursor, Part, parse_commit, parse_part
from pirl.checkpoint.reading import read_pieces, read_state
from pirl.checkpoint.state import Image, describe, share_of
from pirl.errors import CheckpointError, StorageError, StorageNotFoundError
from pirl.storage import Storage
from pirl.world import World

_PEERS_S = 3600.0  # a rank whose part is not there by then fails the save
# errors of reading a file that is as it was committed, but was not written by this program
_BAD_PART = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError)


class Checkpoints:
    """The checkpoints of one run. The ranks of one training write together; any process may read.

    Where `world` has several ranks, all of them make this object, and call `save` together.
    """

    def __init__(
        self,
        storage: Storage,
        keep: int = 2,
        world: World | None = None,
        *,
        keep_best: bool = False,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep the newest `keep` checkpoints, milestones, and with `keep_best` the one of the lowest loss.

        The loss shows how a training goes, not how good the backbone is: the evaluation shows that. `guard` is called
        on rank 0 before anything is published, and raises if that is not permitted any more.
        """
        self.storage = storage
        self._target = storage.patient(0)  # a save that fails is repeated as a whole, and training does not wait for it
        self.keep = keep
        self.keep_best = keep_best
        self.world = world or World()
        self.guard = guard
        self.failures = 0
        self.broken = ""
        """Name of a non-finite tensor in the last state to be saved, on rank 0 once the save has ended."""
        self.skipped: list[str] = []
        """Names of broken ones that `load` passed over."""
        self._image = Image()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = threading.Event()
        self._complete: dict[str, Commit] | None = None  # known after the first listing, kept from then on

    # ---- saving

    def save(
        self,
        state: Mapping[str, Any],
        cursor: Cursor,
        recipe_digest: str,
        data_digest: str,
        done: Callable[[Commit, float], None] = lambda commit_of, seconds: None,
        *,
        loss: float | None = None,
        milestone: bool = False,
        of_main: Collection[str] = (),
    ) -> None:
        """Copy this rank's share of `state` to host memory and write it in the background.

        All ranks hold the same state, but for `Rows`, of which each writes its own, and the tensors that `of_main`
        names by their paths, such as "model/trunk.bn1.running_mean": those are taken from rank 0. Waits for a save
        that is still under way. `done` is called on rank 0, from the writing thread. Errors are
        returned by `wait`, not raised here. A state with NaN or infinity, as found in the copy, is not published.
        """
        self.wait()
        tree, tensors = describe(state)
        attempt = self.world.broadcast_object(secrets.token_hex(4))
        pieces = share_of(tensors, self.world.size, self.world.rank, of_main)
        metadata = {"state": json.dumps(tree)} if self.world.is_main else {}
        data, ready = self._image.fill(tensors, pieces, metadata)
        name = f"step-{cursor.step:08d}"
        commit_of = lambda parts: Commit(name, cursor, recipe_digest, data_digest, parts, loss, milestone)  # noqa: E731

        def work() -> None:
            started = time.perf_counter()
            try:
                ready()
                commit = self._write(name, attempt, data, commit_of)
                if commit:
                    done(commit, time.perf_counter() - started)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> StorageError | CheckpointError | None:
        """Wait for a save under way; return the error that ended it on rank 0, if any.

        It is one of the storage, or that the state is `broken`. Other errors are raised.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return None
        if not isinstance(error, StorageError | CheckpointError):
            raise error
        self.failures += 1
        return error

    @property
    def saving(self) -> bool:
        """True while a save is under way on this rank. Rank 0's ends after those of all ranks."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """True if the last save has failed, as far as this rank has seen."""
        return self._error is not None

    def close(self) -> None:
        """End what is under way without waiting for other ranks, which may be gone."""
        self._abandoned.set()
        with suppress(Exception):
            self.wait()

    def _write(
        self, name: str, attempt: str, data: memoryview, commit_of: Callable[[tuple[Part, ...]], Commit]
    ) -> Commit | None:
        """Write this rank's part; on rank 0 also publish them all. None on the other ranks."""
        folder, rank = self._target / name, self.world.rank
        file = f"part-{rank:05d}-of-{self.world.size:05d}-{attempt}.safetensors"
        try:
            if self.world.is_main and self._complete is None:
                self._complete = self._tidy(attempt)
            outcome: dict[str, Any] = {"broken": self._image.not_finite()}
            if not outcome["broken"]:
                folder.write_bytes(file, data)
                outcome = asdict(self._image.part(file, data))
        except StorageError as error:
            outcome = {"what": error.what, "hint": error.hint, "transient": error.transient}
        outcomes: list[dict[str, Any]] = []
        try:
            outcomes = self._gather(attempt, outcome)
            if not self.world.is_main:
                return None
            for other in outcomes:
                if "broken" in other:
                    self.broken = other["broken"]
                    raise CheckpointError(
                        f"{self.broken} is not finite: the state was not saved", "resume from an older one"
                    )
            for other in outcomes:
                if "what" in other:
                    raise StorageError(other["what"], other["hint"], transient=other["transient"])
            commit = commit_of(tuple(parse_part(part) for part in outcomes))
            self._publish(commit)
        except StorageError:
            # The next save looks again at what there is. A COMMIT.json whose answer was lost may yet appear, so what it
            # names is left until then; but on a full disk nothing that is of no use may stay.
            self._complete = None
            with suppress(StorageError):
                if any("what" in other for other in outcomes):
                    self._tidy()
            raise
        return commit

    def _gather(self, attempt: str, outcome: dict[str, Any]) -> list[dict[str, Any]]:
        """Return all ranks' outcomes on rank 0, [] on the others.

        They travel through the key-value store of the process group: a collective would get in the way of training's
        own, and could not be abandoned when a rank is gone.
        """
        if self.world.size == 1:
            return [outcome]
        store = self.world.store
        keys = [f"pirl/checkpoint/{attempt}/{rank}" for rank in range(self.world.size)]
        store.set(keys[self.world.rank], json.dumps(outcome))
        if not self.world.is_main:
            return []
        deadline = time.monotonic() + _PEERS_S
        while not store.check(keys):
            if self._abandoned.wait(0.02) or time.monotonic() > deadline:
                missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
                raise StorageError(
                    f"the parts of ranks {missing} of the checkpoint were not written in time",
                    "look for what slows or stops the storage of their machines",
                )
        outcomes = [json.loads(store.get(key)) for key in keys]
        for key in keys:
            store.delete_key(key)
        return outcomes

    def _publish(self, commit: Commit) -> None:
        """Make the checkpoint visible, then retire older ones."""
        assert self._complete is not None
        self.guard()
        before = next((name for name in reversed(self._complete) if name != commit.name), None)
        # first the pointer: until the commit object exists, a reader takes the one before
        self._target.write_json("LATEST.json", {"name": commit.name, "before": before})
        (self._target / commit.name).write_json("COMMIT.json", commit.to_json())
        replaced = self._complete.pop(commit.name, None)
        self._complete[commit.name] = commit
        with suppress(StorageError):  # what is left over costs space, no more
            self._delete(replaced.name, replaced.parts) if replaced else None
            self._retire(commit.name)

    def _retire(self, newest: str) -> None:
        """Delete the complete checkpoints up to `newest` that need not be kept, commit object first."""
        assert self._complete is not None
        names = sorted(name for name in self._complete if name <= newest)
        kept = {*names[-self.keep :], *(name for name in names if self._complete[name].milestone)}
        losses = [(loss, name) for name in names if (loss := self._complete[name].loss) is not None]
        if self.keep_best and losses:
            kept.add(min(losses)[1])
        for name in names:
            if name not in kept:
                commit = self._complete.pop(name)
                (self._target / name).delete("COMMIT.json")
                self._delete(name, commit.parts)

    def _delete(self, name: str, parts: Collection[Part]) -> None:
        for part in parts:
            (self._target / name).delete(part.file)

    def _tidy(self, attempt: str = "") -> dict[str, Commit]:
        """Delete parts that no commit object names, but those of `attempt`. Returns the complete checkpoints."""
        files: dict[str, list[str]] = {}
        for path in self._target.list("step-"):
            name, _, file = path.partition("/")
            files.setdefault(name, []).append(file)
        complete = {}
        for name, present in sorted(files.items()):
            named: set[str] = set()
            if "COMMIT.json" in present:
                try:
                    complete[name] = self._commit(self._target, name)
                except CheckpointError:
                    continue  # not to be judged here
                named = {"COMMIT.json", *(part.file for part in complete[name].parts)}
            for file in present:
                if file not in named and not (attempt and f"-{attempt}." in file):
                    (self._target / name).delete(file)
        return complete

    # ---- finding and loading

    def names(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first."""
        paths = (name.split("/") for name in self.storage.list("step-"))
        return sorted(parts[0] for parts in paths if len(parts) == 2 and parts[1] == "COMMIT.json")

    def newest(self) -> str | None:
        """Return the name of the newest complete checkpoint; without a listing if `LATEST.json` has it."""
        try:
            latest = json.loads(self.storage.read_small("LATEST.json"))
            for name in [str(name) for name in (latest["name"], latest["before"]) if name]:
                if (self.storage / name).exists("COMMIT.json"):
                    return name
        except (StorageNotFoundError, ValueError, TypeError, KeyError):
            pass  # absent or damaged: it only saves a listing
        names = self.names()
        return names[-1] if names else None

    def load(
        self, name: str | None = None, rows: Mapping[str, range] | None = None
    ) -> tuple[Commit, dict[str, Any]] | None:
        """Return the checkpoint `name`, or the newest that is whole; None where the run has none at all.

        Of the tensors in `rows` only these rows are read. A broken checkpoint that was not asked for by name is
        skipped, with a warning, if an older whole one exists.
        """
        if name is not None:
            return self._read(name, rows)
        newest = self.newest()
        if newest is None:
            return None
        try:
            return self._read(newest, rows)
        except CheckpointError as error:
            skipped = [newest]
            for older in reversed([other for other in self.names() if other < newest]):
                try:
                    checkpoint = self._read(older, rows)
                except CheckpointError:
                    skipped.append(older)
                    continue
                self.skipped += skipped
                logs.warn(f"{error.what}; resuming from the older {older}")
                return checkpoint
            raise

    def pieces(self, name: str, tensor: str) -> Iterator[tuple[int, Tensor]]:
        """Yield the pieces of one tensor of the checkpoint `name`, such as "bank/memory", each with its first row."""
        try:
            yield from read_pieces(self.storage / name, self.commit(name), tensor)
        except _BAD_PART as error:
            raise self._no_state(name, error) from error

    def commit(self, name: str) -> Commit:
        """Return the commit object of the checkpoint `name`."""
        return self._commit(self.storage, name)

    def _commit(self, storage: Storage, name: str) -> Commit:
        where = f"{storage.uri}/{name}"
        try:
            return parse_commit((storage / name).read_small("COMMIT.json"), where)
        except StorageNotFoundError:
            hint = f"complete ones here: {', '.join(self.names()) or 'none'}"
            raise CheckpointError(f"complete checkpoint not found: {where}", hint) from None

    def _read(self, name: str, rows: Mapping[str, range] | None = None) -> tuple[Commit, dict[str, Any]]:
        commit = self.commit(name)
        try:
            return commit, read_state(self.storage / name, commit, rows or {})
        except CheckpointError:
            if self.commit(name) == commit:
                raise
            return self._read(name, rows)  # it was written again meanwhile
        except _BAD_PART as error:
            raise self._no_state(name, error) from error

    def _no_state(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.storage.uri}/{name} is as it was committed, but no state: it was refused ({error})",
            "it was not written by this program: delete it, and find out who wrote it",
        )
