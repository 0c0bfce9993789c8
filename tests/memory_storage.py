"""A toy storage scheme, mem://NAME/prefix: objects in a dictionary of this process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from pirl.errors import StorageError, StorageNotFoundError
from pirl.storage import Storage
from pirl.storage.base import checked, checked_prefix, too_short

OBJECTS: dict[str, bytes] = {}
LOCK = threading.Lock()


class MemoryStorage(Storage):
    """A prefix of `OBJECTS`."""

    shared = True

    def __init__(self, rest: str) -> None:
        self.uri = f"mem://{rest.strip('/')}"

    def __truediv__(self, part: str) -> MemoryStorage:
        return MemoryStorage(f"{self.uri}/{checked(part.strip('/'), self.uri)}".removeprefix("mem://"))

    def _key(self, name: str) -> str:
        return f"{self.uri}/{checked(name, self.uri)}"

    def read_bytes(self, name: str) -> bytes:
        try:
            return OBJECTS[self._key(name)]
        except KeyError:
            raise StorageNotFoundError(f"{self._key(name)} does not exist.", "Write it first.") from None

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        return self.read_bytes(name)[offset : offset + max(length, 0)]

    def read_into(self, name: str, buffer: memoryview) -> None:
        data = self.read_range(name, 0, len(buffer))
        if len(data) < len(buffer):
            raise too_short(name, self.uri)
        buffer[:] = data

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        OBJECTS[self._key(name)] = bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        with LOCK:
            return self._key(name) not in OBJECTS and not OBJECTS.update({self._key(name): data})

    def upload(self, path: Path, name: str) -> None:
        try:
            self.write_bytes(name, path.read_bytes())
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error}", "Look at the file.") from error

    def download(self, name: str, path: Path) -> None:
        data = self.read_bytes(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def list(self, prefix: str = "") -> list[str]:  # type: ignore[valid-type]
        start = f"{self.uri}/{checked_prefix(prefix, self.uri)}"
        return sorted(key.removeprefix(f"{self.uri}/") for key in OBJECTS if key.startswith(start))

    def size(self, name: str) -> int:
        return len(self.read_bytes(name))

    def delete(self, name: str) -> None:
        OBJECTS.pop(self._key(name), None)

    def children(self) -> Any:
        return sorted({name.split("/")[0] + "/" * ("/" in name) for name in self.list()})

    def require_writable(self, name: str = "probe") -> None:
        self._key(name)
