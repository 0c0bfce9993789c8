"""The places of results: one rule for every command, checked before the computing starts.

- Nothing goes onto or inside the images, nor a folder of shards: the next sharding would take it for images.
- A run, shards or a registry go to an empty place, or to one of their kind: a run also to one of version 0.1.
- `checkpoints/`, `steps/`, `sinks/` and `lease/` of a run hold no other run.
- The place can be written. The check leaves nothing behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from .errors import PirlError, UsageError
from .run import CHECKPOINTS, DONE, EVENTS, RECIPE, SINKS, STEPS
from .shards import MANIFEST, Manifest, Source
from .shards.place import is_inside, require_outside
from .shards.work import WORK
from .storage import LocalStorage, Storage, local_path, open_storage, split_file_uri

RESERVED = (CHECKPOINTS, STEPS, SINKS, "lease")  # folders of a run
RUN_MARKS = {RECIPE, DONE, EVENTS, *(f"{name}/" for name in RESERVED)}
SYSTEM_NAMES = ("lost+found/",)  # of a fresh disk
OUTSIDE = "choose a place outside"


def check_run_output(uri: str, sources: Sequence[Source] = (), data: str | None = None) -> Storage:
    """Return the storage of a run to be written; raise `UsageError` where the place is not for a run.

    sources: images that the run is made of, where they are known. data: its shards, whose manifest names the images.
    """
    storage = open_storage(uri)
    for above, rest in _ancestors(storage):
        if rest.partition("/")[0] in RESERVED and _has(above, RECIPE):
            raise UsageError(f"the output {uri} lies inside the run {above.uri}", "name the run itself, or a new place")
    check_outside(uri, sources, data)
    _require_kind(storage, "run", bool(RUN_MARKS & set(storage.children())))
    storage.require_writable()
    return storage


def check_shards_output(uri: str, source: Source) -> Storage:
    """Return the storage of shards to be written; raise `UsageError` where the place is not for shards."""
    storage = open_storage(uri)
    require_outside(storage, source)
    _require_kind(storage, "shards", storage.exists(MANIFEST) or bool((storage / WORK).children()))
    storage.require_writable()
    return storage


def check_registry(uri: str, sources: Sequence[Source] = ()) -> None:
    """Raise `UsageError` where a registry may not be; the URI of a server is not looked at."""
    if not uri.startswith("model-registry+"):
        storage = open_storage(uri)
        check_outside(uri, sources)
        folders = [name.rstrip("/") for name in storage.children() if name.endswith("/")]
        _require_kind(storage, "registry", any("versions/" in (storage / name).children() for name in folders[:100]))
        storage.require_writable()


def check_file_output(uri: str | Path, sources: Sequence[Source] = ()) -> None:
    """Raise `PirlError` where the file cannot be written, or lies inside images or shards."""
    folder, name = split_file_uri(uri)
    check_outside(f"{folder.uri}/{name}", sources)
    folder.require_writable(name)


def check_outside(uri: str, sources: Sequence[Source] = (), data: str | None = None) -> None:
    """Raise `UsageError` where the place lies onto or inside images or shards."""
    storage = open_storage(uri)
    for source in sources:
        require_outside(storage, source)
    images = _images_of(data) if data else None
    if images and is_inside(storage, open_storage(images)):
        raise UsageError(f"the output {uri} lies inside the images {images}", OUTSIDE)
    for above, _ in [(storage, ""), *_ancestors(storage)]:
        if _has(above, MANIFEST) and _is_manifest(above):
            raise UsageError(f"the output {uri} lies inside the shards {local_path(above) or above.uri}", OUTSIDE)


def _ancestors(storage: Storage) -> Iterator[tuple[Storage, str]]:
    """Yield each place above with the rest of the path below it, the nearest first."""
    folder = local_path(storage)
    if folder:
        for parent in folder.parents:
            yield LocalStorage(parent), folder.relative_to(parent).as_posix()
        return
    scheme, _, path = storage.uri.partition("://")
    parts = path.split("/")
    for length in range(len(parts) - 1, 0, -1):
        yield open_storage(f"{scheme}://{'/'.join(parts[:length])}"), "/".join(parts[length:])


def _has(storage: Storage, name: str) -> bool:
    """Return whether an object is there; False where one may not look: permissions often end at a prefix."""
    with suppress(PirlError):
        return storage.exists(name)
    return False


def _is_manifest(storage: Storage) -> bool:
    """Return whether the manifest is one of shards: other programs have files of that name too."""
    with suppress(PirlError):
        Manifest.load(storage)
        return True
    return False


def _images_of(data: str) -> str | None:
    """Return where the images of some shards lay, if their manifest names a folder or a prefix."""
    try:
        source = Manifest.load(open_storage(data)).source
    except PirlError:
        return None
    match = re.match(r"(?:folder (/.+?)|(s3://.+?))(?:, \d+ of \d+ images)?, shards of \d+ bytes, ", source)
    return (match[1] or match[2]) if match else None


def _require_kind(storage: Storage, kind: str, is_one: bool) -> None:
    others = [name for name in storage.children() if not name.startswith(".") and name not in SYSTEM_NAMES]
    if others and not is_one:
        names = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        place = local_path(storage) or storage.uri
        raise UsageError(f"{place} is not empty and holds no {kind}: {names}", "choose a new or empty place")
