"""Commit object of a checkpoint: its record, by which it is published."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from pirl.errors import CheckpointError

FORMAT = 2


@dataclass(frozen=True)
class Cursor:
    """Position of a run, which does not depend on ranks or workers."""

    epoch: int = 0
    samples: int = 0
    """Of this epoch, seen by all ranks together."""
    step: int = 0
    seconds: float = 0.0
    """Of training, over all restarts."""


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint."""

    file: str
    bytes: int
    sha256: str
    spans: tuple[tuple[int, int, str], ...] = ()
    """Start, end and SHA-256 of consecutive ranges, the first with the header; none where no tensor is cut by rank."""


@dataclass(frozen=True)
class Commit:
    """Record of a complete checkpoint, read without its parts."""

    name: str
    cursor: Cursor
    recipe_digest: str
    data_digest: str
    parts: tuple[Part, ...]
    loss: float | None = None
    """Of the global batch at this step."""
    milestone: bool = False
    """Kept for good."""

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def sha256(self) -> str:
        """Of the parts' own, in their order."""
        return hashlib.sha256("".join(part.sha256 for part in self.parts).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        for part in fields["parts"]:
            if not part["spans"]:
                del part["spans"]  # as version 0.1 wrote it
        return {"format": FORMAT, **fields}


def parse_part(fields: dict[str, Any]) -> Part:
    """Return the part that JSON describes. Raises `TypeError` or `ValueError` for anything else."""
    spans = tuple((int(start), int(stop), str(digest)) for start, stop, digest in fields.pop("spans", ()))
    part = Part(**fields, spans=spans)
    edges = [0, *(stop for _, stop, _ in spans)]
    if spans and (
        any(start != edge or stop <= start for (start, stop, _), edge in zip(spans, edges)) or edges[-1] != part.bytes
    ):
        raise ValueError("a part's ranges do not make up its file")
    return part


def parse_commit(data: bytes, where: str) -> Commit:
    """Return the content of the commit object of the checkpoint `where`; raise `CheckpointError` for anything else."""
    try:
        fields = json.loads(data)
        version = fields.pop("format")
        if version == FORMAT:
            parts = tuple(parse_part(part) for part in fields.pop("parts"))
            if not all(re.fullmatch(r"[\w.-]+\.safetensors", part.file) and part.bytes >= 0 for part in parts):
                raise ValueError("a part has no proper name or size")
            return Commit(**{**fields, "cursor": Cursor(**fields["cursor"]), "parts": parts})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}/COMMIT.json is damaged: {error}", "use an older checkpoint") from None
    raise CheckpointError(
        f"{where} has format {version}, this version reads {FORMAT}",
        "use the version of pirl-pipeline that wrote it, or start a new run",
    )
