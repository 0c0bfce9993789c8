"""Encoded images: is a file whole, and what are its RGB pixels. Here untrusted bytes meet a decoder."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import simplejpeg
from PIL import Image

from pirl.errors import DataError

# torchvision's ImageFolder takes the same file names.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# An allow-list: Pillow knows formats that start other programs (EPS) or that nobody trains on.
FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "PPM": "ppm", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp"}
OPENED_FORMATS = [name for name in FORMATS if name != "MPO"]  # Pillow opens an MPO (phones' JPEG) as JPEG
MAX_PIXELS = 100_000_000  # 300 MB of RGB; more is taken for a decompression bomb
MAX_IMAGE_BYTES = 512 * 2**20  # of one encoded file, which is held in memory whole
JPEG_MODES = ("L", "RGB", "CMYK")
PLAIN_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")

# Pillow only warns between one and two times its limit. Both are made refusals, for the whole process.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    if not data:
        raise DataError(f"{name}: the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=OPENED_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name}: {image.width}x{image.height} pixels, more than the limit of {MAX_PIXELS:,}")
            yield image
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(f"{name}: not an image in one of the formats {', '.join(OPENED_FORMATS)}") from None
    except (
        Exception
    ) as error:  # on broken bytes Pillow's decoders raise anything: OSError, SyntaxError, struct.error...
        raise DataError(f"{name}: cannot be decoded: {error or type(error).__name__}") from error


def check_image(data: bytes, name: str) -> str:
    """Decode the whole of an encoded image and return its extension for the shard ("jpg", "png"...).

    A JPEG is decoded at 1/8 scale: every coded byte is still read, so that a cut is found, for a third of the time.
    Raises DataError with the reason when the image is broken, too large, or of a kind that has no 8-bit RGB form.
    """
    with _opened(data, name) as image:
        kind = image.format or ""
        if FORMATS[kind] == "jpg" and image.mode in JPEG_MODES:
            image.draft(None, (1, 1))
            image.load()
        else:
            _rgb(image, name)
        return FORMATS[kind]


def decode_image(data: bytes, name: str) -> Image.Image:
    """Encoded bytes -> RGB image, as `PIL.Image.open(...).convert("RGB")`, which is what the reference trains on.

    So alpha is dropped (not composited), a palette is looked up, CMYK is converted without a colour profile and EXIF
    orientation is not applied. One thing differs: 16-bit grey is scaled to 8 bits (v / 257, rounded), where Pillow
    would clip everything above 255 to white. Raises DataError naming the image.
    """
    with _opened(data, name) as image:
        return _rgb(image, name)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) of an encoded image, from its header. Raises DataError naming the image."""
    if size := _jpeg_size(data):
        return size
    with _opened(data, name) as image:
        return image.height, image.width


def decode_pixels(data: bytes, name: str, buffer: bytearray | None = None) -> np.ndarray:
    """The pixels of `decode_image`, (height, width, 3) uint8, in less time: JPEGs are decoded by libjpeg-turbo itself.

    A JPEG that fits is decoded into `buffer`, which the next call may overwrite: new memory for every image would cost
    a third of the decoder's time. What libjpeg-turbo does not take without a warning is left to Pillow, and where
    Pillow refuses it too, DataError names the image.
    """
    if size := _jpeg_size(data):
        fits = buffer is not None and 3 * size[0] * size[1] <= len(buffer)
        with suppress(ValueError):
            return simplejpeg.decode_jpeg(data, buffer=buffer if fits else None)
    return np.asarray(decode_image(data, name))


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG whose RGB form has one meaning and an allowed size; None for any other file."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if colours in ("YCbCr", "RGB", "Gray") and height * width <= MAX_PIXELS else None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        image.load()  # the pixels stay when the file is closed
        return image
    if image.mode in PLAIN_MODES:
        image.info.pop("transparency", None)  # changes no pixel, but Pillow warns when it drops one itself
        return image.convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(
                f"{name}: 32-bit values from {grey.min()} to {grey.max()}; only 8 and 16 bits have a meaning"
            )
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    raise DataError(f"{name}: pixels of kind {image.mode!r} have no defined 8-bit RGB form")
