"""Real image files for tests, made here: photographs of a kind, in every format, and the ways in which files break."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int = 0, width: int = 64, height: int = 48) -> Image.Image:
    """An RGB image with smooth colours, edges and some noise; another one for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(x / rng.uniform(3, 20) + y / rng.uniform(3, 20) + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 127 + 80 * np.stack(waves, axis=2) + rng.normal(0, 8, (height, width, 3))
    left, top = rng.integers(0, max(width // 2, 1)), rng.integers(0, max(height // 2, 1))
    pixels[top : top + height // 3, left : left + width // 3] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file, kind as Pillow names it ("JPEG", "PNG", "TIFF"...)."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, width: int = 64, height: int = 48) -> bytes:
    return encoded(picture(seed, width, height), quality=90)


def truncated_jpeg(seed: int = 0) -> bytes:
    """The first two thirds of a JPEG, as an interrupted copy leaves it."""
    data = jpeg(seed)
    return data[: len(data) * 2 // 3]


def grey16_png(width: int = 32, height: int = 32) -> bytes:
    """A 16-bit grey PNG from 0 to 65535."""
    ramp = np.linspace(0, 65535, width * height).astype(np.uint16).reshape(height, width)
    return encoded(Image.fromarray(ramp), "PNG")


def cmyk_jpeg(seed: int = 0) -> bytes:
    return encoded(picture(seed).convert("CMYK"), quality=90)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(samples: np.ndarray, depth: int, key: np.ndarray | None = None) -> bytes:
    """A PNG of uint16 (H, W, channels) samples of `depth` bits, also of kinds that Pillow does not write.

    `key` is the transparent colour, one sample for each channel.
    """
    height, width, channels = samples.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    bits = np.unpackbits(samples.astype(">u2").view(np.uint8).reshape(height, -1, 2), axis=2)[:, :, 16 - depth :]
    rows = np.packbits(bits.reshape(height, -1), axis=1)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)
    chunks = [png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    if key is not None:
        chunks.append(png_chunk(b"tRNS", key.astype(">u2").tobytes()))
    chunks += [png_chunk(b"IDAT", zlib.compress(filtered.tobytes())), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def bmp_with_alpha(rgba: np.ndarray) -> bytes:
    """A BMP of version 4 of uint8 (H, W, 4), whose header names a mask for alpha."""
    height, width = rgba.shape[:2]
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    header = struct.pack("<IiiHHIIiiII", 108, width, -height, 1, 32, 3, rgba.nbytes, 0, 0, 0, 0) + masks
    return struct.pack("<2sIHHI", b"BM", 122 + rgba.nbytes, 0, 0, 122) + header + rgba[..., [2, 1, 0, 3]].tobytes()


def bomb_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG of a few hundred bytes that promises 400 million pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in chunks)


def folder_of_classes(
    root: Path, classes: int = 3, images: int = 4, width: int = 64, height: int = 48, first: int = 0
) -> Path:
    """A tree in ImageFolder form: class0/000.jpg ... with `images` JPEGs per class; other ones for another `first`."""
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(images):
            (root / f"class{c}" / f"{i:03d}.jpg").write_bytes(jpeg(first + c * images + i, width, height))
    return root


def flat_folder(root: Path, images: int = 4, width: int = 64, height: int = 48) -> Path:
    """A folder of JPEGs without classes: 000.jpg ..."""
    root.mkdir(parents=True)
    for i in range(images):
        (root / f"{i:03d}.jpg").write_bytes(jpeg(i, width, height))
    return root


def write_idx(path: Path, array: np.ndarray) -> None:
    """An IDX file of bytes, gzipped when its name says so (MNIST's format)."""
    import gzip

    data = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def small_fashion_mnist(folder: Path, train: int = 60, test: int = 20, seed: int = 0) -> Path:
    """The four files of Fashion-MNIST with random clothes."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return folder
