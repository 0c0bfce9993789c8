"""A version and its record, model.json: made, read and verified."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from pirl.config import Recipe
from pirl.errors import RegistryError, StorageNotFoundError, UsageError
from pirl.results import Content, Evaluation, GateDecision, Lineage, Versioned
from pirl.storage import Storage, encode_json, sha256_file

CHAMPION = "champion"
LATEST = "latest"
TRUNK = "trunk.safetensors"
RECORD, CARD, COMMIT, GATE = "model.json", "README.md", "COMMIT.json", "GATE.json"
OWN_FILES = (RECORD, CARD, COMMIT, GATE)
RESTORE = "restore the version from a backup, or register the run again under a new run id"

NUMBER = re.compile(r"v(\d{4,})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CHUNK_BYTES = 16 << 20


class Stamp(Content):
    """Size and SHA-256 of a file of a version."""

    bytes: int
    sha256: str


Stamps = dict[str, Stamp]
"""By the name of the file."""


class Provenance(Content):
    """Origin of a version: its training, recipe, evaluation and the decision of the gate."""

    lineage: Lineage = Lineage()
    config: Recipe | None = None
    """The resolved recipe."""
    metrics: Evaluation | None = None
    gate: GateDecision | None = None


class VersionRecord(Versioned, Provenance):
    """`model.json`. Version 0.1 wrote no format number."""

    name: str = ""
    version: str = ""
    run_id: str
    created: str = ""
    files: Stamps


@dataclass(frozen=True)
class Version:
    """One registered version. `record` is its model.json, `gated` is true if it came through the gate."""

    model: str
    version: str
    uri: str
    record: VersionRecord
    gated: bool

    @property
    def lineage(self) -> Lineage:
        """Data, recipe, code and weights that the version was made of."""
        return self.record.lineage

    @property
    def evaluation(self) -> Evaluation | None:
        """Its evaluation before the registration; None for a version that was not evaluated."""
        return self.record.metrics


def new_record(model: str, version: str, run_id: str, stamps: Stamps, provenance: Provenance) -> bytes:
    """Return the content of a version's model.json."""
    own = {"name": model, "version": version, "run_id": run_id, "created": now(), "files": stamps}
    record = VersionRecord(**own, **{name: getattr(provenance, name) for name in Provenance.model_fields})
    return encode_json(record.to_json())


def parse_record(data: bytes, files: Storage) -> VersionRecord:
    """Return a model.json; raise `RegistryError` where it is damaged."""
    try:
        return VersionRecord.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"])) or "content"
    raise RegistryError(f"{files.uri}/{RECORD} is damaged, or of a newer version: {where}: {problem['msg']}", RESTORE)


def require_digest(record: bytes, digest: str, files: Storage) -> None:
    """Raise `RegistryError` unless a model.json is the registered one."""
    if sha256(record) != digest:
        raise RegistryError(f"{files.uri}/{RECORD} was changed after it was registered: its SHA-256 differs", RESTORE)


def require_same_files(record: VersionRecord, stamps: Stamps, version: str) -> None:
    """Raise `RegistryError` unless the files of a record are those to be registered now."""
    if record.files != stamps:
        names = record.files.keys() | stamps.keys()
        differing = sorted(name for name in names if record.files.get(name) != stamps.get(name))
        raise RegistryError(
            f"run {record.run_id!r} is registered as {record.name} {version} with other files: {', '.join(differing)}",
            "a version never changes: move this training to a folder of its own (mv, or aws s3 mv) and register it "
            "from that folder, or give another --model",
        )


def stamp(content: Path | bytes) -> Stamp:
    """Return the size and the SHA-256 of a file."""
    if isinstance(content, bytes):
        return Stamp(bytes=len(content), sha256=sha256(content))
    try:
        return Stamp(bytes=content.stat().st_size, sha256=sha256_file(content))
    except OSError as error:
        raise RegistryError(
            f"{content} cannot be read: {error.strerror}", "run the step that exports it again"
        ) from error


def verify_file(files: Storage, name: str, expected: Stamp, hint: str) -> None:
    """Read a stored file back; raise `RegistryError` unless it has the expected stamp."""
    digest = hashlib.sha256()
    try:
        size = files.size(name)
        for offset in range(0, size, _CHUNK_BYTES):
            digest.update(files.read_range(name, offset, _CHUNK_BYTES))
    except StorageNotFoundError as error:
        raise RegistryError(f"{files.uri}/{name} is missing", hint) from error
    if Stamp(bytes=size, sha256=digest.hexdigest()) != expected:
        raise RegistryError(f"{files.uri}/{name} is not what was registered: its SHA-256 differs", hint)


def order(version: str) -> int:
    """Return the number in a version's name, 0 for another name."""
    match = NUMBER.fullmatch(version)
    return int(match[1]) if match else 0


def check_name(name: str, what: str) -> None:
    """Raise `UsageError` unless `name` can name a model or a file of the registry."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a name for a {what}",
            "use letters, digits, '-', '_' and '.', up to 128, the first one a letter or a digit",
        )


def now() -> str:
    """Return the time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
