"""A catalogue in a folder or an S3 prefix, without a server or a lock.

    <root>/<model>/versions/v0001/model.json         claims the number (created once), holds the whole record
                                  trunk.safetensors  and the other files of the version
                                  README.md          the model card, made from the record
                                  COMMIT.json        written last: makes the version visible
                                  GATE.json          present when the version came through the gate
    <root>/<model>/champion/00000001.json            {"version", "updated"}: one for each move, the last one counts
    <root>/<model>/champion.json, latest.json        {"version", "updated"}: the first is a copy, for people and 0.1
    <root>/<model>/claims.json                       which run has which number: only spares reading every model.json

A version without COMMIT.json was interrupted. It is invisible, and registering the same run again completes it.
"""

from __future__ import annotations

import itertools
import json
import re

from pirl.errors import RegistryError, StorageError, StorageNotFoundError
from pirl.registry.record import (
    CHAMPION,
    COMMIT,
    GATE,
    NUMBER,
    RECORD,
    RESTORE,
    Provenance,
    Stamps,
    Version,
    new_record,
    now,
    order,
    parse_record,
    require_digest,
    require_same_files,
)
from pirl.storage import Storage, encode_json, open_storage

_MOVE = re.compile(rf"{CHAMPION}/(\d{{8}})\.json")
_CLAIMS = "claims.json"


class FolderCatalogue:
    """Versions of models below one URI."""

    def __init__(self, root: Storage | str) -> None:
        self.storage = open_storage(root) if isinstance(root, str) else root
        self.uri = self.storage.uri

    def claim(self, model: str, run_id: str, stamps: Stamps, provenance: Provenance) -> tuple[str, bytes]:
        """Return the version of this run and its model.json.

        Every process walks the numbers upwards from 1 and stops at the first that is free or its own; creating
        model.json has one winner. So a number is given once, and a run, even when racing itself, gets one. The
        numbers in claims.json stay taken; those that a race drops from it are read again.
        """
        claims = self._claims(model)
        for number in itertools.count(1):
            version = f"v{number:04d}"
            if claims.get(version, run_id) != run_id:
                continue
            files = self.files(model, version)
            claim = new_record(model, version, run_id, stamps, provenance)
            try:  # reading comes first, because nearly all numbers on the way are taken
                registered = files.read_small(RECORD)
            except StorageNotFoundError:
                if files.create(RECORD, claim):
                    (self.storage / model).write_json(_CLAIMS, {**claims, version: run_id})
                    return version, claim
                registered = files.read_small(RECORD)
            owner = parse_record(registered, files)
            claims[version] = owner.run_id
            if owner.run_id == run_id:
                require_same_files(owner, stamps, version)
                return version, registered
        raise AssertionError  # the numbers have no end

    def _claims(self, model: str) -> dict[str, str]:
        try:
            claims = json.loads((self.storage / model).read_small(_CLAIMS))
        except (StorageNotFoundError, ValueError):
            return {}
        return claims if isinstance(claims, dict) else {}

    def files(self, model: str, version: str) -> Storage:
        """Return the folder of a version."""
        return self.storage / model / "versions" / version

    def commit(self, model: str, version: str, record_sha256: str) -> None:
        """Write COMMIT.json."""
        self.files(model, version).write_json(COMMIT, {"version": version, "record_sha256": record_sha256})

    def gate(self, model: str, version: str) -> None:
        """Write GATE.json, once."""
        self.files(model, version).create(GATE, encode_json({"passed": now()}))

    def models(self) -> list[str]:
        """Return the names of all models that have a visible version, sorted."""
        names = (name.split("/") for name in self.storage.list())
        return sorted(
            {parts[0] for parts in names if len(parts) == 4 and parts[1] == "versions" and parts[3] == COMMIT}
        )

    def versions(self, model: str, gated: bool = False) -> list[str]:
        """Return the visible versions of a model, oldest first; with `gated` those that came through the gate."""
        required = {COMMIT, GATE} if gated else {COMMIT}
        present: dict[str, set[str]] = {}
        for name in (self.storage / model).list("versions/"):
            parts = name.split("/")
            if len(parts) == 3 and NUMBER.fullmatch(parts[1]):
                present.setdefault(parts[1], set()).add(parts[2])
        return sorted((version for version, names in present.items() if required <= names), key=order)

    def load(self, model: str, version: str) -> Version:
        """Return a visible version; raise `RegistryError` where its record is damaged."""
        files = self.files(model, version)
        record = files.read_small(RECORD)
        try:
            digest = files.read_json(COMMIT)["record_sha256"]
        except (KeyError, TypeError, StorageError) as error:
            _raise_unless_damaged(error)
            raise RegistryError(f"{files.uri}/{COMMIT} is damaged: expected `record_sha256`", RESTORE) from error
        require_digest(record, digest, files)
        return Version(model, version, files.uri, parse_record(record, files), files.exists(GATE))

    def pointer(self, model: str, pointer: str) -> str | None:
        """Return the version that a pointer names; raise `RegistryError` where it is damaged."""
        folder = self.storage / model
        name = f"{pointer}.json"
        if pointer == CHAMPION and (moves := self._moves(model)):
            name = max(moves)[1]
        try:
            return str(folder.read_json(name)["version"])
        except StorageNotFoundError:
            return None
        except (KeyError, TypeError, StorageError) as error:
            _raise_unless_damaged(error)
            raise RegistryError(
                f"{folder.uri}/{name} is damaged: it names no version",
                f"`pirl promote {model} VERSION --registry {self.uri}` writes it again",
            ) from error

    def point(self, model: str, pointer: str, version: str) -> None:
        """Write the file of a pointer."""
        (self.storage / model).write_json(f"{pointer}.json", {"version": version, "updated": now()})

    def moves(self, model: str) -> int:
        """Return how often the champion's pointer was moved."""
        return max((number for number, _ in self._moves(model)), default=0)

    def _moves(self, model: str) -> list[tuple[int, str]]:
        """Return the numbers and names of the moves of the champion's pointer."""
        names = (self.storage / model).list(f"{CHAMPION}/")
        return [(int(match[1]), name) for name in names if (match := _MOVE.fullmatch(name))]

    def move_champion(self, model: str, version: str, moves: int) -> bool:
        """Point to a version if the pointer was moved `moves` times; of several processes one succeeds."""
        folder, number = self.storage / model, moves + 1
        name = f"{CHAMPION}/{number:08d}.json"
        if not folder.create(name, encode_json({"version": version, "updated": now()})):
            return False
        written = 0
        while written < number:  # the copy of a slow process must not stay over that of a faster one
            folder.write_bytes(f"{CHAMPION}.json", folder.read_small(name))
            written, (number, name) = number, max(self._moves(model))
        return True


def _raise_unless_damaged(error: Exception) -> None:
    """Raise a `StorageError` again unless its cause is content that is not JSON: the storage failed, not the file."""
    if isinstance(error, StorageError) and not isinstance(error.__cause__, ValueError):
        raise error
