"""Tar files that are the same bytes wherever and whenever they are written, hashed on the way to the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

BLOCK = 512
END = bytes(2 * BLOCK)  # of an archive
BUFFER_BYTES = 2 * 2**20  # filled, hashed and written while it is still in the processor's cache

# A USTAR header with everything that could differ between two machines set to zero: time, owner, group, devices.
_AFTER_NAME = b"0000644\0" + b"0000000\0" * 2
_AFTER_SIZE = b"0" * 11 + b"\0" + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
_CONSTANT_SUM = sum(_AFTER_NAME) + sum(_AFTER_SIZE)
_CHECKSUM_AT = 148


class Digest(Protocol):
    """Methods of hashlib's objects."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class Written(NamedTuple):
    """Content of a tar file: the offset and size of each member's bytes, the size and digest of the whole."""

    offsets: list[int]
    sizes: list[int]
    bytes: int
    digest: str


Load = Callable[[memoryview], bytes | memoryview]
"""Gives a member's content: in the front of the buffer that it is handed, as a view of that, or else as bytes."""


def padded(size: int) -> int:
    """Return the bytes that a member of `size` bytes takes in an archive, with its header."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def tar_header(name: str, size: int) -> bytes:
    """Return the 512 bytes before a member of `size` bytes, < 8 GiB, with an ASCII name of at most 100 characters."""
    name_field = name.encode("ascii").ljust(100, b"\0")
    size_field = b"%011o\0" % size
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(name_field) + sum(size_field))
    header = name_field + _AFTER_NAME + size_field + _AFTER_SIZE
    return header[:_CHECKSUM_AT] + checksum + header[_CHECKSUM_AT + 8 :]


def write_tar(path: Path, members: Iterable[tuple[str, Load]], digest: Digest) -> Written:
    """Write (name, content) members to a new file, synced to the disk.

    A file of up to half of the buffer goes through memory once: read into its place, hashed and written with others.
    """
    offsets: list[int] = []
    sizes: list[int] = []
    position = held = 0
    buffer = memoryview(bytearray(BUFFER_BYTES + len(END)))  # the rest is for padding and the end
    with open(path, "wb", buffering=0) as file:

        def put(data: memoryview) -> None:
            digest.update(data)
            while data:
                data = data[os.write(file.fileno(), data) :]

        for name, load in members:
            start = held + BLOCK
            content = load(buffer[start:BUFFER_BYTES])
            size = len(content)
            offsets.append(position + BLOCK)
            sizes.append(size)
            position += padded(size)
            buffer[held:start] = tar_header(name, size)
            held = start + size
            if not isinstance(content, memoryview):
                if held <= BUFFER_BYTES:
                    buffer[start:held] = content
                else:
                    put(buffer[:start])
                    put(memoryview(content))
                    held = 0
            padding = -size % BLOCK
            buffer[held : held + padding] = END[:padding]
            held += padding
            if held >= BUFFER_BYTES // 2:
                put(buffer[:held])
                held = 0
        buffer[held : held + len(END)] = END
        put(buffer[: held + len(END)])
        os.fsync(file.fileno())
    return Written(offsets, sizes, position + len(END), digest.hexdigest())
