"""Images and outputs are kept apart: what is written among images would be taken for images the next time."""

from __future__ import annotations

import os
from pathlib import Path

from pirl.errors import UsageError
from pirl.shards.sources import Source
from pirl.storage import Storage, local_path, open_storage


def is_inside(storage: Storage, other: Storage) -> bool:
    """Return whether a place is another one or lies below it; links are followed."""
    folder, other_folder = local_path(storage), local_path(other)
    if folder and other_folder:
        return folder.resolve().is_relative_to(other_folder.resolve())
    return f"{storage.uri}/".startswith(f"{other.uri}/")


def require_outside(out: Storage, source: Source) -> None:
    """Raise `UsageError` for an output onto or inside the images."""
    for images in (source.folder, source.uri):
        if images is not None and is_inside(out, open_storage(images)):
            raise UsageError(
                f"the output {local_path(out) or out.uri} lies inside the images {images}", "choose a place outside"
            )


def shown_path(path: Path) -> str:
    """Return a path as it is written into messages and the manifest."""
    return os.fsencode(path.absolute()).decode("utf-8", "replace")
