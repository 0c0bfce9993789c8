"""The one file filter: which files are images, for folders, lists, S3 prefixes and tar files alike.

Hidden files and folders and those that systems leave behind are left out at every level. A usual suffix makes a file a
candidate at once, without a look into it; any other file is an image if its first bytes are those of one. What is left
out is kept by reason, for the console and quarantine.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

from pirl.shards.headers import image_format
from pirl.shards.images import EXTENSIONS

IMAGE_SUFFIXES = frozenset(
    (*EXTENSIONS, ".gif", ".jpe", ".jfif", ".pjpeg", ".pbm", ".pnm", ".heic", ".heif", ".hif", ".avif")
)
TAR_SUFFIX = ".tar"
PARQUET_SUFFIX = ".parquet"
COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|zstd|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$")
SYSTEM_NAMES = frozenset(
    {
        *("__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    }
)
# Files that lie next to images by the million: to open each of them would cost a pass over the data set.
COMPANION_SUFFIXES = frozenset(
    {
        *(".txt", ".xml", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".htm", ".yaml", ".yml", ".toml", ".ini"),
        *(".cfg", ".log", ".pdf", ".py", ".sh", ".ipynb", ".cls", ".npy", ".npz", ".mat", ".pkl", ".pt", ".pth", ".h5"),
        *(".safetensors", ".arrow", ".tfrecord", ".db", ".sqlite", ".zip", ".gz", ".bz2", ".xz", ".zst"),
        *(".7z", ".rar", ".mp4", ".avi", ".mov", ".mkv", ".webm", ".mp3", ".wav", ".flac", ".svg", ".ps", ".eps"),
    }
)

HIDDEN = "hidden, or of a system"
LOOP = "a link to a folder above it"
BAD_KEY = "its key has an empty or dot part"
TAR_BESIDE_IMAGES = "a tar file next to images"
_REASONS_SHOWN = 8


class Kind(Enum):
    """Kind of a file by its name."""

    IMAGE = "image"
    TAR = "tar"
    COMPRESSED_TAR = "compressed tar"
    PARQUET = "parquet"
    COMPANION = "companion"
    UNKNOWN = "unknown"


def suffix_of(name: str) -> str:
    """Return the suffix of a path in lower case, empty without one: ".jpg"."""
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""


def kind_of(name: str) -> Kind:
    """Return what a file is by its name alone."""
    suffix = suffix_of(name)
    if suffix in IMAGE_SUFFIXES:
        return Kind.IMAGE
    if suffix == TAR_SUFFIX:
        return Kind.TAR
    if suffix == PARQUET_SUFFIX:
        return Kind.PARQUET
    if COMPRESSED_TAR.search(name.lower()):
        return Kind.COMPRESSED_TAR
    return Kind.COMPANION if suffix in COMPANION_SUFFIXES else Kind.UNKNOWN


def is_image(name: str, head: bytes) -> bool:
    """Return whether the first bytes of a file of kind UNKNOWN are those of an image in a format that is read.

    Camera raw files begin as a TIFF does and hold a thumbnail only, so a TIFF counts only without another suffix.
    """
    kind = image_format(head)
    return kind is not None and (kind != "TIFF" or not suffix_of(name))


def is_hidden(part: str) -> bool:
    """Return whether a file or folder of this name is left out wherever it lies."""
    return part.startswith(".") or part.lower() in SYSTEM_NAMES


def hidden_part(name: str) -> str | None:
    """Return the relative path `name` up to its first hidden part ("ant/@eaDir/", "ant/._1.jpg"), None without one."""
    if "/." not in name and not name.startswith(".") and not any(p in SYSTEM_NAMES for p in name.lower().split("/")):
        return None
    parts = name.split("/")
    for number, part in enumerate(parts):
        if is_hidden(part):
            return "/".join(parts[: number + 1]) + ("/" if number + 1 < len(parts) else "")
    return None


def not_an_image(name: str) -> str:
    """Return the reason for leaving out a file that is not an image, with its suffix where it has a usual one."""
    suffix = suffix_of(name)
    usual = re.fullmatch(r"\.(?=.*[a-z])[a-z0-9_-]{1,10}", suffix)
    return f"not an image ({suffix if usual else 'no usual suffix'})"


class LeftOut:
    """Names of files that a source leaves out, by reason. A folder, which ends in a slash, stands for all below it."""

    def __init__(self) -> None:
        self.names: dict[str, dict[str, int]] = {}  # reason -> name -> files

    def add(self, reason: str, name: str, files: int = 1) -> None:
        """Add a file, a folder (counted once), or a pattern that stands for several files."""
        names = self.names.setdefault(reason, {})
        names[name] = files if name not in names or name.endswith("/") else names[name] + files

    def update(self, items: Iterable[tuple[str, str, int]]) -> None:
        """Add several (reason, name, files)."""
        for item in items:
            self.add(*item)

    def items(self) -> Iterator[tuple[str, str, int]]:
        """Yield (reason, name, files) in the order in which they were added."""
        for reason, names in self.names.items():
            for name, files in names.items():
                yield reason, name, files

    def counts(self) -> dict[str, int]:
        """Return the number of files and folders by reason, the largest first."""
        counts = {reason: sum(names.values()) for reason, names in self.names.items()}
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def __len__(self) -> int:
        return sum(self.counts().values())

    def __str__(self) -> str:
        counts = [f"{count:,} {reason}" for reason, count in self.counts().items()]
        rest = len(counts) - _REASONS_SHOWN
        return ", ".join(counts[:_REASONS_SHOWN]) + (f", and {rest} more reasons" if rest > 0 else "")

    def as_json(self) -> list[dict[str, Any]]:
        """Return the part of quarantine.json: reason, count and names, sorted."""
        return [
            {"reason": reason, "count": count, "names": sorted(self.names[reason])}
            for reason, count in self.counts().items()
        ]
