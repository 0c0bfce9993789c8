"""Image files of odd kinds, made here, and what each gives: the table of docs/images.md.

`python -m tests.odd_images > docs/images.md` writes the page. Each picture has a light left half and a dark right half.
"""

from __future__ import annotations

import io
import re
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from images import bmp_with_alpha, bomb_png, encoded, raw_png
from PIL import Image

from pirl.shards import MAX_PIXELS, Quarantine, ShardReader, check_image, open_source, write_shards
from pirl.shards.decoding import Decoding
from pirl.storage import open_storage

WIDTH, HEIGHT = 24, 16
LIGHT, DARK = (200, 60, 60), (20, 20, 20)
GREY = 102  # of LIGHT
LIMIT = 10_000  # pixels, so that a large file is small
NOTES = {
    "several": "the first of several pictures",
    "transparent": "composed on white",
    "rotated": "turned as EXIF names it",
    "reduced": "read at a reduced size",
}
PAGE = """# Image files

Files of odd kinds, and what `pirl shard` makes of each. A test makes these files, shards them and compares this page:
`PYTHONPATH=.:tests python -m tests.odd_images > docs/images.md`.

An image keeps its bytes; its pixels are decoded when it is read. No file is lost silently. One that cannot be read is
quarantined, any other file is left out, and both are named in `quarantine.json` with the reason. The limit of a decoded
image is {limit:,} pixels here, {default:,} by default.

{table}

HEIC needs the extra `heif`: `pip install 'pirl-pipeline[heif]'`. Without it such files are quarantined, with a reason
that names it. Every machine that reads the shards needs it too.
"""


def picture(mode: str = "RGB", width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    image = Image.new("RGB", (width, height), DARK)
    image.paste(LIGHT, (0, 0, width // 2, height))
    return image.convert(mode, palette=Image.Palette.ADAPTIVE)


def grey(bits: int) -> np.ndarray:
    """The picture in grey samples, (height, width, 1)."""
    values = np.full((HEIGHT, WIDTH, 1), 20 * (2**bits - 1) // 255)
    values[:, : WIDTH // 2] = GREY * (2**bits - 1) // 255
    return values


def tiff(samples: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A TIFF of (H, W, 1) samples without compression, of kinds that Pillow does not write."""
    height, width = samples.shape[:2]
    if bits == 12:
        planes = (samples.reshape(height, -1)[..., None] >> np.arange(11, -1, -1)) & 1
        raw = np.packbits(planes.astype(np.uint8).reshape(height, -1), axis=1).tobytes()
    else:
        raw = samples.astype(f"<{'-uif'[sample_format]}{bits // 8}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height, 279: len(raw)}
    tags |= {339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + raw


def turned(kind: str, orientation: int) -> bytes:
    """The picture as a camera stores it, with the orientation that shows it."""
    turn = {3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture().transpose(turn), kind, exif=exif, **({} if kind == "PNG" else {"quality": 95}))


def animated(kind: str, **options: object) -> bytes:
    return encoded(picture(), kind, save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))], **options)


def heic() -> bytes:
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(picture()).save(file, quality=95)
    return file.getvalue()


def half_clear() -> np.ndarray:
    """The picture with half of its light, so that white below shows it lighter."""
    return np.asarray(picture("RGBA")) * np.uint8(1) - np.array([0, 0, 0, 127], np.uint8)


def files() -> dict[str, bytes]:
    """Return name -> content."""
    rgba = half_clear()
    sixteen = np.asarray(picture()).astype(np.uint16) * 257
    key = np.array(DARK, np.uint16)
    jpeg, png = encoded(picture(), quality=95), encoded(picture(), "PNG")
    return {
        "rgb.jpg": jpeg,
        "grey.jpg": encoded(picture("L"), quality=95),
        "cmyk.jpg": encoded(picture("CMYK"), quality=95),
        "progressive.jpg": encoded(picture(), progressive=True, quality=95),
        "turned-6.jpg": turned("JPEG", 6),
        "two-pictures-of-a-phone.jpg": encoded(
            picture(), "MPO", save_all=True, append_images=[picture("L")], quality=95
        ),
        "without-a-suffix": jpeg,
        "jpeg.jfif": jpeg,
        "png-named.jpg": png,
        "rgb.png": png,
        "palette.png": encoded(picture("P"), "PNG"),
        "one-bit.png": encoded(picture("L").point(lambda v: 255 * (v > 50), "1"), "PNG"),
        "half-clear.png": encoded(Image.fromarray(rgba), "PNG"),
        "clear-colour.png": raw_png(np.asarray(picture()).astype(np.uint16), 8, key=key),
        "16-bit-grey.png": raw_png(grey(16).astype(np.uint16), 16),
        "16-bit-rgb.png": raw_png(sixteen, 16),
        "turned-3.png": turned("PNG", 3),
        "three-frames.png": animated("PNG"),
        "palette.gif": encoded(picture("P"), "GIF"),
        "animated.gif": animated("GIF"),
        "rgb.webp": encoded(picture(), "WEBP", lossless=True),
        "animated.webp": animated("WEBP", lossless=True),
        "turned-5.webp": turned("WEBP", 5),
        "rgb.bmp": encoded(picture(), "BMP"),
        "half-clear.bmp": bmp_with_alpha(rgba),
        "rgb.ppm": encoded(picture(), "PPM"),
        "16-bit.pgm": b"P5 %d %d 65535 " % (WIDTH, HEIGHT) + grey(16).astype(">u2").tobytes(),
        "rgb.tif": encoded(picture(), "TIFF"),
        "cmyk-lzw.tif": encoded(picture("CMYK"), "TIFF", compression="tiff_lzw"),
        "12-bit.tif": tiff(grey(12), 12),
        "16-bit.tif": tiff(grey(16), 16),
        "16-bit-min-is-white.tif": tiff(65535 - grey(16), 16, photometric=0),
        "signed-16-bit.tif": tiff(grey(16) // 2, 16, sample_format=2),
        "32-bit.tif": tiff(grey(8), 32, sample_format=1),
        "float.tif": tiff(grey(8) / 255, 32, sample_format=3),
        "three-pages.tif": animated("TIFF"),
        "rgb.avif": encoded(picture(), "AVIF", quality=95),
        "animated.avif": animated("AVIF", quality=95),
        "photo.heic": heic(),
        "one-pixel.png": encoded(Image.new("RGB", (1, 1), LIGHT), "PNG"),
        "sliver.png": encoded(picture(width=2, height=3000), "PNG"),
        "large.jpg": encoded(picture(width=160, height=100), quality=95),
        "large.png": encoded(picture(width=160, height=100), "PNG"),
        "400-megapixels-in-200-bytes.png": bomb_png(),
        "empty.jpg": b"",
        "cut.jpg": jpeg[: len(jpeg) * 2 // 3],
        "cut.png": png[:-30],
        "cut.heic": heic()[:300],
        "page-of-an-error.jpg": b"<!DOCTYPE html><title>404</title>",
        "text.png": b"not an image",
        "camera-raw.nef": tiff(grey(16), 16),
        "drawing.svg": b"<svg/>",
        "layers.psd": b"8BPS\0\1",
        "film.mp4": b"\0\0\0\x20ftypisom",
        ".hidden.jpg": jpeg,
        "._mac.jpg": b"\0\5\x16\7",
        "Thumbs.db": jpeg,
        "notes.txt": b"notes",
    }


def outcomes(contents: Mapping[str, bytes], folder: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Shard the files; return what each gave in words, and the pixels of those that are images of the data set."""
    (folder / "in").mkdir()
    for name, data in contents.items():
        (folder / "in" / name).write_bytes(data)
    decoding = Decoding(max_pixels=LIMIT)
    write_shards(open_source(str(folder / "in")), open_storage(folder / "out"), max_bad_share=1, decoding=decoding)
    quarantine, reader = Quarantine.load(open_storage(folder / "out")), ShardReader(str(folder / "out"))
    # the words of a decoder are not ours
    reasons = {image.name: re.sub("(cannot be decoded):.*", r"\1", image.reason) for image in quarantine.images}
    words = {name: f"quarantined: {reason}" for name, reason in reasons.items()}
    words |= {name: f"left out: {part.reason}" for part in quarantine.left_out for name in part.names}
    pixels = {reader.name(id): np.asarray(reader.image(id)) for id in range(len(reader))}
    for name, array in pixels.items():
        checked = check_image(contents[name], name, decoding)
        notes = [note for kind, note in NOTES.items() if getattr(checked, kind)]
        words[name] = ", ".join([f"{array.shape[1]}x{array.shape[0]}", *notes])
    return words, pixels


def page() -> str:
    """Return docs/images.md."""
    with tempfile.TemporaryDirectory() as folder:
        words, _ = outcomes(files(), Path(folder))
    rows = [f"| `{name}` | {words[name]} |" for name in files()]
    table = "\n".join(["| file | gives |", "|---|---|", *rows])
    return PAGE.format(table=table, limit=LIMIT, default=MAX_PIXELS)


if __name__ == "__main__":
    print(page(), end="")
