"""The parts of an image file's bytes that are read without a decoder: format, EXIF orientation, PNG chunks."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

ORIENTATION_TAG = 0x0112
PROGRESSIVE_FRAMES = (0xC2, 0xC6, 0xCA, 0xCE)
NO_FRAMES = (0xC4, 0xC8, 0xCC)  # markers between C0 and CF that start no frame
HEAD_BYTES = 32  # that decide the format of a file
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG = b"\x89PNG\r\n\x1a\n"
_MAGIC = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(re.escape(_PNG))),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    # "BM" alone begins many a text: the size of the header behind it, too
    ("BMP", re.compile(rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL)),
    ("PPM", re.compile(rb"P[1-6](?:\s+[0-9#]|#)")),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]")),
    # the brand of the file, or, where that names the container only, one of the first compatible brands
    ("AVIF", re.compile(rb".{4}ftyp(?:avi[fs]|m[is]f1.{4}(?:.{4}){0,3}avi[fs])", re.DOTALL)),
    ("HEIF", re.compile(rb".{4}ftyp(?:he[iv][cxms]|m[is]f1)", re.DOTALL)),
)


def image_format(data: bytes) -> str | None:
    """Return the format of an image file by its first `HEAD_BYTES`, as Pillow names it; None for any other file."""
    return next((kind for kind, magic in _MAGIC if magic.match(data)), None)


class JpegHeader(NamedTuple):
    """Facts from the segments of a JPEG before its first scan."""

    orientation: int
    """EXIF's, 1 to 8."""
    buffered: bool
    """True where a decoder holds all coefficients in memory: progressive, or with a scan for each colour."""


def jpeg_header(data: bytes) -> JpegHeader:
    """Read the segments of a JPEG up to the first scan. Damaged ones count as absent: the decoder reports them."""
    orientation, components, progressive, exif_seen = 1, 0, False, False
    position = 2
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 10:  # junk before a marker is skipped
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker < 0x02 or 0xD0 <= marker <= 0xD8:  # without a length
            position += 2
            continue
        body = position + 4
        if marker == 0xDA:
            return JpegHeader(orientation, progressive or data[body] < components)
        if marker == 0xD9:
            break
        position += 2 + (data[position + 2] << 8 | data[position + 3])
        if marker == 0xE1 and not exif_seen and data.startswith(b"Exif\0", body):
            orientation, exif_seen = exif_orientation(data[body:position]), True
        elif 0xC0 <= marker <= 0xCF and marker not in NO_FRAMES:
            progressive, components = marker in PROGRESSIVE_FRAMES, data[body + 5]
    return JpegHeader(orientation, progressive)


def exif_orientation(exif: bytes) -> int:
    """Return the orientation 1 to 8 of an EXIF block; 1, as it is stored, where it names none that is valid."""
    exif = exif[6:] if exif.startswith(b"Exif\0") else exif
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == ORIENTATION_TAG:
                (value,) = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


class PngHeader(NamedTuple):
    """A PNG file, reduced to what decides its pixels."""

    data: bytes
    """The file without text, profiles and animation, whatever their size."""
    depth: int
    """Bits of a sample, 1 to 16."""
    orientation: int
    several: bool


def png_header(data: bytes) -> PngHeader:
    """Read the chunks of a PNG; none of them is decompressed."""
    parts: list[bytes] = []
    start = position = len(_PNG)
    orientation, frames = 1, 1
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind == b"eXIf":
            orientation = exif_orientation(data[position + 8 : end - 4])
        elif kind == b"acTL" and length >= 4:
            (frames,) = struct.unpack_from(">I", data[position + 8 : position + 12].ljust(4, b"\0"))
        if kind not in PIXEL_CHUNKS:
            parts.append(data[start:position])
            start = end
        position = end
    kept = _PNG + b"".join([*parts, data[start:]]) if parts else data
    return PngHeader(kept, data[24] if len(data) > 24 else 8, orientation, frames > 1)
