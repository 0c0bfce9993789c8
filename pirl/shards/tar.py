"""Tar files that are the same bytes wherever and whenever they are written, hashed on the way to the disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
END = bytes(2 * BLOCK)  # of an archive
WRITE_BYTES = 4 * 2**20  # collected before a write: far fewer system calls for small images

# A USTAR header with everything that could differ between two machines set to zero: time, owner, group, devices.
_AFTER_NAME = b"0000644\0" + b"0000000\0" * 2
_AFTER_SIZE = b"0" * 11 + b"\0" + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
_CONSTANT_SUM = sum(_AFTER_NAME) + sum(_AFTER_SIZE)
_CHECKSUM_AT = 148


class Written(NamedTuple):
    """What is in a tar file: where each member's bytes lie in it, its size, its SHA-256."""

    offsets: list[int]
    sizes: list[int]
    bytes: int
    sha256: str


def padded(size: int) -> int:
    """Bytes that a member of `size` bytes takes in an archive, with its header."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member of `size` bytes, < 8 GiB, with an ASCII name of at most 100 characters."""
    name_field = name.encode("ascii").ljust(100, b"\0")
    size_field = b"%011o\0" % size
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(name_field) + sum(size_field))
    header = name_field + _AFTER_NAME + size_field + _AFTER_SIZE
    return header[:_CHECKSUM_AT] + checksum + header[_CHECKSUM_AT + 8 :]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Written:
    """Write (name, content) members to a new file, synced to the disk."""
    digest = hashlib.sha256()
    offsets: list[int] = []
    sizes: list[int] = []
    position = 0
    with open(path, "wb", buffering=0) as file:
        pieces: list[bytes] = []
        held = 0

        def flush() -> None:
            data = b"".join(pieces)
            digest.update(data)
            left = memoryview(data)
            while left:
                left = left[os.write(file.fileno(), left) :]
            pieces.clear()

        for name, content in members:
            size = len(content)
            offsets.append(position + BLOCK)
            sizes.append(size)
            pieces += (tar_header(name, size), content, bytes(-size % BLOCK))
            position += padded(size)
            held += padded(size)
            if held >= WRITE_BYTES:
                flush()
                held = 0
        pieces.append(END)
        flush()
        os.fsync(file.fileno())
    return Written(offsets, sizes, position + len(END), digest.hexdigest())
