"""The embedded model registry: a folder or an S3 prefix that holds immutable versions and two pointers.

    <root>/<model>/versions/v0001/model.json         claims the number (created once), holds the whole record
                                  trunk.safetensors  and whatever else was given
                                  README.md          the model card, made from the record
                                  COMMIT.json        written last: from here on the version is visible
                                  GATE.json          present when the version came through the gate
    <root>/<model>/champion/00000001.json            {"version", "updated"}: one for each move, the last one counts
    <root>/<model>/champion.json, latest.json        {"version", "updated"}: the first is a copy, for people and 0.1
    <root>/<model>/claims.json                       which run has which number: only spares reading every model.json

A version that a crash left without COMMIT.json is invisible and is completed by registering the same run again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pirl import logs
from pirl.errors import RegistryError, StorageError, StorageNotFoundError, UsageError, did_you_mean
from pirl.registry.card import model_card
from pirl.results import Evaluation, Lineage
from pirl.storage import Storage, encode_json, open_storage, sha256_file

CHAMPION = "champion"
LATEST = "latest"
TRUNK = "trunk.safetensors"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NUMBER = re.compile(r"v(\d{4,})")
_MOVE = re.compile(rf"{CHAMPION}/(\d{{8}})\.json")
_RECORD, _CARD, _COMMIT, _GATE = "model.json", "README.md", "COMMIT.json", "GATE.json"
_CLAIMS = "claims.json"
_CHUNK_BYTES = 16 << 20
_OWN_FILES = (_RECORD, _CARD, _COMMIT, _GATE)
_OWN_FIELDS = ("name", "version", "run_id", "created", "files")


@dataclass(frozen=True)
class Version:
    """One registered version. `record` is its model.json, `gated` whether it came through the gate."""

    model: str
    version: str
    uri: str
    record: dict[str, Any]
    gated: bool

    @property
    def lineage(self) -> Lineage:
        return Lineage.parse(self.record.get("lineage") or {}, f"the lineage in {self.uri}/{_RECORD}")

    @property
    def evaluation(self) -> Evaluation | None:
        """What was measured before it was registered; None where nothing was."""
        metrics = self.record.get("metrics")
        return Evaluation.parse(metrics, f"the evaluation in {self.uri}/{_RECORD}") if metrics else None


class Registry:
    """Versions of models under `root`. Safe for any number of processes at once, without a server or a lock."""

    def __init__(self, root: Storage | str) -> None:
        self.storage = open_storage(root) if isinstance(root, str) else root
        self.uri = self.storage.uri

    def register(
        self,
        model: str,
        *,
        run_id: str,
        files: Mapping[str, Path | bytes],
        record: Mapping[str, Any],
        promote: bool,
        ask: Callable[[], bool] | None = None,
    ) -> Version:
        """Store `files` and `record` as the version of this run; with `promote` it also becomes latest and champion.

        The same run gives the same version, however often it is registered and wherever an earlier attempt broke off;
        the record of the first attempt stays. `RegistryError` when the run was registered with other files.
        Promotion never moves a pointer back: an older version, or one that was promoted before, moves nothing.
        `ask` is called before each attempt to move the champion's pointer, which succeeds only if no other process has
        moved it since; where it returns False, the version stays registered and is not promoted. Without it, the newer
        of two versions that are registered at once becomes the champion.
        """
        check_name(model, "model")
        for name in files:
            check_name(name, "file")
            if name in _OWN_FILES:
                raise ValueError(f"{name} is written by the registry itself")
        if clash := set(_OWN_FIELDS) & set(record):
            raise ValueError(f"the record may not set {sorted(clash)}: the registry does")

        stamps = {name: _stamp(content) for name, content in files.items()}
        version, claim = self._claim(model, run_id, stamps, dict(record))
        place = self._place(model, version)
        if version not in self._with(model, _COMMIT):
            for name, content in files.items():
                if isinstance(content, bytes):
                    place.write_bytes(name, content)
                else:
                    place.upload(content, name)
            for name in files:  # the source may have changed while it was copied
                _verify(place, name, stamps[name], "Register the run again, while nothing else writes its files.")
            place.write_bytes(_CARD, model_card(json.loads(claim)).encode())
            self._commit(model, version, _sha256(claim))
        if promote:
            self._advance(model, version, ask)
        return self._load(model, version)

    def _claim(self, model: str, run_id: str, stamps: dict[str, Any], record: dict[str, Any]) -> tuple[str, bytes]:
        """The version that belongs to this run, and its model.json.

        Every contender walks the numbers upwards from 1 and stops at the first that is free or its own; creating
        model.json has one winner. So no number is given twice, and no run, even when racing itself, gets two. What
        claims.json knows of taken numbers stays true; what a race makes it forget is read again.
        """
        claims = self._claims(model)
        for number in itertools.count(1):
            version = f"v{number:04d}"
            if claims.get(version, run_id) != run_id:
                continue
            place = self._place(model, version)
            claim = new_record(model, version, run_id, stamps, record)
            try:  # reading first, since on the way nearly all numbers are taken
                found = place.read_small(_RECORD)
            except StorageNotFoundError:
                if place.create(_RECORD, claim):
                    (self.storage / model).write_json(_CLAIMS, {**claims, version: run_id})
                    return version, claim
                found = place.read_small(_RECORD)
            theirs = parse(found, place)
            claims[version] = theirs["run_id"]
            if theirs["run_id"] == run_id:
                require_same_files(theirs, stamps, version)
                return version, found
        raise AssertionError  # the numbers have no end

    def _claims(self, model: str) -> dict[str, str]:
        try:
            found = json.loads((self.storage / model).read_small(_CLAIMS))
        except (StorageNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _commit(self, model: str, version: str, record_sha256: str) -> None:
        """Make the version visible: all its files are there."""
        self._place(model, version).write_json(_COMMIT, {"version": version, "record_sha256": record_sha256})

    def _pass_gate(self, model: str, version: str) -> None:
        self._place(model, version).create(_GATE, encode_json({"passed": _now()}))

    def models(self) -> list[str]:
        """Names of all models that have a visible version, sorted."""
        names = (name.split("/") for name in self.storage.list())
        return sorted(
            {parts[0] for parts in names if len(parts) == 4 and parts[1] == "versions" and parts[3] == _COMMIT}
        )

    def has(self, model: str) -> bool:
        """Whether the model has a visible version."""
        return bool(self._with(model, _COMMIT))

    def versions(self, model: str) -> list[Version]:
        """Return all visible versions, oldest first; leave out damaged ones, with a warning.

        `UsageError` for a model that does not exist.
        """
        versions = []
        for number in self._require(model):
            try:
                versions.append(self._load(model, number))
            except (RegistryError, StorageNotFoundError) as error:
                logs.warn(f"{model} {number} is left out: {error.what}")
        return versions

    def get(self, model: str, version: str = CHAMPION, *, verify: bool = False) -> Version:
        """Return a version by number, or the one that "champion" or "latest" points to.

        `verify` reads all its files and compares their digests (`RegistryError` names the one that changed).
        """
        committed = self._require(model)
        number = version
        if version in (CHAMPION, LATEST):
            pointed = self.pointer(model, version)
            if pointed is None:
                raise UsageError(
                    f"Model {model!r} has no {version} yet: no version came through the gate.",
                    f"Name a version ({', '.join(committed[-3:])}), or promote one.",
                )
            number = pointed
        if number not in committed:
            if version in (CHAMPION, LATEST):
                raise RegistryError(
                    f"{version} of {model!r} points to {number}, which is not in {self.uri}.",
                    f"Restore that version, or promote another one ({', '.join(committed[-3:])}).",
                )
            raise UsageError(
                f"Model {model!r} has no version {version!r}.{did_you_mean(version, [*committed, CHAMPION, LATEST])}",
                f"It has {', '.join(committed[-5:])}, and the names champion and latest.",
            )
        found = self._load(model, number)
        if verify:
            place = self._place(model, number)
            for name, stamp in found.record["files"].items():
                _verify(place, name, stamp, RESTORE)
        return found

    def promote(self, model: str, version: str) -> Version:
        """Make this version the champion, also to go back to an older one, or to repair a damaged pointer."""
        chosen = self.get(model, version)
        while not self._move_champion(model, chosen.version, self._moves(model)):
            pass  # another process has moved it just now
        return chosen

    def is_newer(self, version: Version) -> bool:
        """Return whether a version is newer than `latest`, so that registering it again would move the pointers."""
        latest = self.pointer(version.model, LATEST)
        return latest is None or order(version.version) > order(latest)

    def _advance(self, model: str, version: str, ask: Callable[[], bool] | None) -> None:
        """Make a version champion and latest, unless that was done before or `ask` says no.

        `latest` is written last and so shows whether it was done. Of two that register at once the slower may write an
        older version to it than the newer one has; the newer one's gate was written before, so a second look finds it.
        """
        latest = self.pointer(model, LATEST)
        if latest is not None and order(latest) >= order(version):
            return
        for attempt in itertools.count():
            moves = self._moves(model)
            if ask and not ask():
                return
            if not ask and attempt and order(self.pointer(model, CHAMPION) or "") > order(version):
                return
            self._pass_gate(model, version)
            if self._move_champion(model, version, moves):
                break
        written = ""
        while written != (newest := self._with(model, _COMMIT, _GATE)[-1]):
            self._point(model, LATEST, newest)
            written = newest

    def _moves(self, model: str) -> Any:
        """Return the state of the champion's pointer, which `_move_champion` compares: how often it was moved."""
        return max((number for number, _ in self._moved(model)), default=0)

    def _moved(self, model: str) -> list[tuple[int, str]]:
        """Return the numbers and names of the moves of the champion's pointer."""
        names = (self.storage / model).list(f"{CHAMPION}/")
        return [(int(match[1]), name) for name in names if (match := _MOVE.fullmatch(name))]

    def _move_champion(self, model: str, version: str, moves: Any) -> bool:
        """Point to this version if the pointer is as `_moves` saw it; of several processes one succeeds."""
        place, number = self.storage / model, moves + 1
        name = f"{CHAMPION}/{number:08d}.json"
        if not place.create(name, encode_json({"version": version, "updated": _now()})):
            return False
        written = 0
        while written < number:  # the copy of a slow process must not stay over that of a faster one
            place.write_bytes(f"{CHAMPION}.json", place.read_small(name))
            written, (number, name) = number, max(self._moved(model))
        return True

    def _point(self, model: str, pointer: str, version: str) -> None:
        (self.storage / model).write_json(f"{pointer}.json", {"version": version, "updated": _now()})

    def pointer(self, model: str, pointer: str) -> str | None:
        """Return the version that "champion" or "latest" points to; None before the first came through the gate."""
        place = self.storage / model
        name = f"{pointer}.json"
        if pointer == CHAMPION and (moved := self._moved(model)):
            name = max(moved)[1]
        try:
            return str(place.read_json(name)["version"])
        except StorageNotFoundError:
            return None
        except (KeyError, TypeError, StorageError) as error:
            if isinstance(error, StorageError) and not isinstance(error.__cause__, ValueError):
                raise  # the storage has failed, the pointer has not
            raise RegistryError(
                f"{place.uri}/{name} is damaged: it names no version.",
                f"`pirl promote {model} VERSION --registry {self.uri}` writes it again.",
            ) from error

    def _place(self, model: str, version: str) -> Storage:
        return self.storage / model / "versions" / version

    def _with(self, model: str, *wanted: str) -> list[str]:
        """Versions that have all the `wanted` files, oldest first."""
        found: dict[str, set[str]] = {}
        for name in (self.storage / model).list("versions/"):
            parts = name.split("/")
            if len(parts) == 3 and _NUMBER.fullmatch(parts[1]):
                found.setdefault(parts[1], set()).add(parts[2])
        return sorted((version for version, names in found.items() if names.issuperset(wanted)), key=order)

    def _require(self, model: str) -> list[str]:
        """The visible versions of a model that must have one, oldest first."""
        check_name(model, "model")
        committed = self._with(model, _COMMIT)
        if not committed:
            known = self.models()
            raise UsageError(
                f"There is no model {model!r} in {self.uri}.{did_you_mean(model, known)}",
                f"It holds {', '.join(known)}." if known else "It holds no model yet: register a run first.",
            )
        return committed

    def _load(self, model: str, version: str) -> Version:
        place = self._place(model, version)
        record = place.read_small(_RECORD)
        require_digest(record, place.read_json(_COMMIT)["record_sha256"], place)
        return Version(model, version, place.uri, parse(record, place), place.exists(_GATE))


RESTORE = "Restore the version from a backup, or register the run again under a new run id."


def new_record(model: str, version: str, run_id: str, stamps: dict[str, Any], record: Mapping[str, Any]) -> bytes:
    """The content of a version's model.json."""
    own = {"name": model, "version": version, "run_id": run_id, "created": _now(), "files": stamps}
    return encode_json({**own, **record})


def require_same_files(record: Mapping[str, Any], stamps: dict[str, Any], version: str) -> None:
    """`RegistryError` unless a record that is there is of the same files as those to be registered now."""
    if record["files"] != stamps:
        raise RegistryError(
            f"Run {record['run_id']!r} is registered as {record.get('name')} {version} with other files: "
            f"{', '.join(_differing(record['files'], stamps))}.",
            "A version never changes. Move this training to a folder of its own (mv, or aws s3 mv), then register it "
            "from there; or give another --model.",
        )


def require_digest(record: bytes, sha256: str, place: Storage) -> None:
    """`RegistryError` unless a model.json is the one that was registered."""
    if _sha256(record) != sha256:
        raise RegistryError(f"{place.uri}/{_RECORD} was changed after it was registered.", RESTORE)


def order(version: str) -> int:
    """The number in a version's name, 0 for another name."""
    match = _NUMBER.fullmatch(version)
    return int(match[1]) if match else 0


def check_name(name: str, what: str) -> None:
    """Raise `UsageError` unless `name` can name a model or a file of the registry."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a name for a {what}.",
            "Use letters, digits, '-', '_' and '.', up to 128, the first one a letter or a digit.",
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _stamp(content: Path | bytes) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"bytes": len(content), "sha256": _sha256(content)}
    try:
        return {"bytes": content.stat().st_size, "sha256": sha256_file(content)}
    except OSError as error:
        raise RegistryError(
            f"Cannot read {content}: {error.strerror}.", "Run the step that exports it again."
        ) from error


def _verify(place: Storage, name: str, stamp: dict[str, Any], hint: str) -> None:
    """Read a stored file back and compare its digest."""
    digest = hashlib.sha256()
    try:
        size = place.size(name)
        for offset in range(0, size, _CHUNK_BYTES):
            digest.update(place.read_range(name, offset, _CHUNK_BYTES))
    except StorageNotFoundError as error:
        raise RegistryError(f"{place.uri}/{name} is missing.", hint) from error
    if {"bytes": size, "sha256": digest.hexdigest()} != stamp:
        raise RegistryError(f"{place.uri}/{name} is not what was registered: its SHA-256 differs.", hint)


def parse(data: bytes, place: Storage) -> dict[str, Any]:
    """A model.json; `RegistryError` when it is none."""
    try:
        record = json.loads(data)
        if isinstance(record, dict) and {"run_id", "files"} <= record.keys():
            return record
    except ValueError:
        pass
    raise RegistryError(f"{place.uri}/{_RECORD} is damaged, or no record of this registry.", RESTORE)


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
