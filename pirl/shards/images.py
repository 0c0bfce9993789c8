"""Encoded images: whether a file is whole, and its RGB pixels. Untrusted bytes meet a decoder in this module only."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pirl.errors import DataError
from pirl.shards.decoding import DEFAULT, MAX_PIXELS, Checked, Decoding
from pirl.shards.headers import exif_orientation, image_format, jpeg_header, png_header
from pirl.shards.pixels import SIXTEEN_BITS, TRANSPOSES, GreyScale, array_turned, flattened, transparency

# torchvision's ImageFolder takes the same file names.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# An allow-list: Pillow knows formats that start other programs (EPS) or that nobody trains on.
FORMATS = {
    **{"JPEG": "jpg", "PNG": "png", "PPM": "ppm", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp", "GIF": "gif"},
    **{"AVIF": "avif", "HEIF": "heic"},
}
# Named one by one: Image.open would refuse a large JPEG by its full size, and reads a phone's second picture (MPO).
_OPENERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "PPM": PpmImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
}
MAX_IMAGE_BYTES = 512 * 2**20  # of one encoded file, which is held in memory whole
JPEG_MODES = ("L", "RGB", "CMYK")
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
MIN_IS_WHITE = 0
UNSIGNED = {1, 4}  # 4: unspecified

# Pillow only warns between one and two times its limit. Both are made refusals, for the whole process.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data", module="PIL")  # its resolution is not used


@dataclass
class _Opened:
    """An image file whose header was read."""

    image: Image.Image
    kind: str
    name: str
    orientation: int = 1
    """EXIF's. Always 1 for TIFF and HEIC, whose decoders turn the image themselves."""
    several: bool = False
    depth: int = 8
    grey: GreyScale = SIXTEEN_BITS
    factor: int = 1
    """By which the sides are divided while decoding."""

    def turn(self, decoding: Decoding) -> int:
        return self.orientation if decoding.exif == "apply" else 1

    def rgb(self, background: str | None) -> Image.Image:
        """Return the RGB pixels as they are stored, not turned."""
        if self.factor > 1:
            self.image.draft(None, (self.image.width // self.factor, self.image.height // self.factor))
        return flattened(self.image, self.name, background, self.depth, self.grey)


@contextmanager
def _opened(data: bytes, name: str, decoding: Decoding) -> Iterator[_Opened]:
    if not data:
        raise DataError(f"{name}: the file is empty")
    kind = image_format(data)
    if kind is None:
        raise DataError(f"{name}: not an image in one of the formats {', '.join(FORMATS)}")
    if decoding.max_pixels > (Image.MAX_IMAGE_PIXELS or 0):  # else Pillow refuses what the setting allows
        Image.MAX_IMAGE_PIXELS = decoding.max_pixels
    try:
        with _open(data, kind, name, decoding) as file:
            yield file
    except DataError:
        raise
    # on broken bytes Pillow's decoders raise anything: OSError, SyntaxError, struct.error...
    except Exception as error:
        raise DataError(f"{name}: cannot be decoded: {error or type(error).__name__}") from error


@contextmanager
def _open(data: bytes, kind: str, name: str, decoding: Decoding) -> Iterator[_Opened]:
    png = png_header(data) if kind == "PNG" else None
    with _opener(kind, name)(io.BytesIO(png.data if png else data)) as image:
        file = _Opened(image, kind, name)
        if png:
            file.orientation, file.several, file.depth = png.orientation, png.several, png.depth
        elif kind == "TIFF" and not decoding.is_legacy:
            file.grey = _grey_scale(image, name)
        elif kind in ("WEBP", "AVIF"):
            file.orientation = exif_orientation(image.info.get("exif", b""))
        buffered = False
        if kind == "JPEG":
            file.orientation, buffered = jpeg_header(data)
        file.factor = _factor(image, kind, name, decoding.max_pixels, buffered)
        yield file


def _opener(kind: str, name: str) -> Callable[[io.BytesIO], Image.Image]:
    """Return the class that reads a format. DataError naming what to install where it is missing."""
    if kind == "HEIF":
        try:
            import pillow_heif
            from pillow_heif.as_plugin import HeifImageFile
        except ImportError:
            raise DataError(f"{name}: HEIC is read by an extra: pip install 'pirl-pipeline[heif]'") from None
        pillow_heif.options.DECODE_THREADS = 1  # each process decodes one image at a time
        return HeifImageFile
    if kind == "AVIF":
        try:
            from PIL.AvifImagePlugin import SUPPORTED, AvifImageFile
        except ImportError:
            SUPPORTED = False
        if not SUPPORTED:
            raise DataError(f"{name}: AVIF is read by Pillow 11.3 or newer: pip install 'pirl-pipeline[heif]'")
        return AvifImageFile
    return _OPENERS[kind]


def _grey_scale(image: Image.Image, name: str) -> GreyScale:
    """Return what the samples of a TIFF mean. DataError where they have no defined 8-bit form."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, kinds = int(tags.get(BITS_PER_SAMPLE, (1,))[0]), set(tags.get(SAMPLE_FORMAT, ()))
    if kinds - UNSIGNED or bits > 16:
        kind = "signed or float" if kinds - UNSIGNED else "unsigned"
        raise DataError(f"{name}: {bits}-bit {kind} samples; only unsigned ones of up to 16 bits have a meaning")
    deep = image.mode.startswith("I")
    return GreyScale(2**bits - 1, tags.get(PHOTOMETRIC) == MIN_IS_WHITE) if deep else SIXTEEN_BITS


def _factor(image: Image.Image, kind: str, name: str, max_pixels: int, buffered: bool) -> int:
    """Return by what the sides are divided so that the image keeps the limit. DataError where it cannot.

    Only JPEG has a scaled decoding. One whose coefficients are held whole, 6 bytes a pixel, may have twice the limit.
    """
    width, height = image.size
    if kind == "JPEG" and not (buffered and width * height > 2 * max_pixels):
        for factor in (1, 2, 4, 8):
            if -(-width // factor) * -(-height // factor) <= max_pixels:
                return factor
    check_limit(image.size, name, max_pixels)
    return 1


def check_limit(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Raise DataError if an image has too many pixels."""
    if size[0] * size[1] > max_pixels:
        raise DataError(f"{name}: {size[0]}x{size[1]} pixels, more than the limit of {max_pixels:,} (`max_pixels`)")


def check_image(data: bytes, name: str, decoding: Decoding = DEFAULT) -> Checked:
    """Decode the whole of an encoded image; return its extension for the shard ("jpg"...) and what is special about it.

    A JPEG is decoded at 1/8 scale: every coded byte is still read, so that a cut is found, for a third of the time.
    Raises DataError with the reason when the image is broken, too large, or of a kind that has no 8-bit RGB form.
    """
    with _opened(data, name, decoding) as file:
        image, transparent = file.image, False
        several = file.several or _has_several(image)
        if file.kind == "JPEG" and image.mode in JPEG_MODES:
            image.draft(None, (1, 1))
            image.load()
        else:
            transparent = transparency(image, file.depth) is not None
            file.rgb(decoding.background)
        return Checked(FORMATS[file.kind], several, transparent, file.orientation != 1, file.factor > 1)


def _has_several(image: Image.Image) -> bool:
    """Return whether a GIF, TIFF or WebP holds more than one picture. A JPEG's second one is a preview: not counted."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # there is another one, and it is broken
        return True


def decode_image(data: bytes, name: str, decoding: Decoding = DEFAULT) -> Image.Image:
    """Return the RGB image of encoded bytes, as a viewer shows it on the background of `decoding`.

    A palette is looked up, CMYK is converted without a colour profile, and of a file with several pictures the first
    is taken. 16-bit grey is scaled to 8 bits (v / 257, rounded), where Pillow would clip everything above 255 to white.
    With `LEGACY` settings these are the pixels of `PIL.Image.open(...).convert("RGB")`, on which the reference trains.
    Raises DataError naming the image.
    """
    with _opened(data, name, decoding) as file:
        image = file.rgb(decoding.background)
        method = TRANSPOSES.get(file.turn(decoding))
        return image if method is None else image.transpose(method)


def image_size(data: bytes, name: str, decoding: Decoding = DEFAULT) -> tuple[int, int]:
    """Return (height, width) of the decoded image, from its header. Raises DataError naming the image."""
    if size := _jpeg_size(data, decoding.max_pixels):
        turned = decoding.exif == "apply" and jpeg_header(data).orientation > 4
        return size[::-1] if turned else size
    with _opened(data, name, decoding) as file:
        size = -(-file.image.height // file.factor), -(-file.image.width // file.factor)
        return size[::-1] if file.turn(decoding) > 4 else size


def decode_pixels(data: bytes, name: str, decoding: Decoding = DEFAULT, buffer: bytearray | None = None) -> np.ndarray:
    """Return the pixels of `decode_image`, (height, width, 3) uint8, in less time: libjpeg-turbo itself decodes JPEGs.

    A JPEG that fits is decoded into `buffer`, which the next call may overwrite: new memory for every image would cost
    a third of the decoder's time. A turned image is a view with other strides. What libjpeg-turbo does not take without
    a warning is left to Pillow, and where Pillow refuses it too, DataError names the image.
    """
    if size := _jpeg_size(data, decoding.max_pixels):
        fits = buffer is not None and 3 * size[0] * size[1] <= len(buffer)
        with suppress(ValueError):
            pixels = simplejpeg.decode_jpeg(data, buffer=buffer if fits else None)
            return array_turned(pixels, jpeg_header(data).orientation) if decoding.exif == "apply" else pixels
    return np.asarray(decode_image(data, name, decoding))


def _jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG whose RGB form has one meaning and an allowed size; None for any other file."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if colours in ("YCbCr", "RGB", "Gray") and height * width <= max_pixels else None
