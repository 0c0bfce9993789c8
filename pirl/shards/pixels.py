"""From the pixels that a decoder gives to 8-bit RGB: ranges, transparency, orientation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pirl.errors import DataError

OPAQUE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the operation that shows the image upright."""


def array_turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of (H, W, 3) pixels, upright by their EXIF orientation: the operations of `TRANSPOSES`."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels.swapaxes(0, 1) if orientation > 4 else pixels


class GreyScale(NamedTuple):
    """Meaning of the samples of a deep grey image."""

    white: int = 65535
    """The value that is white, or black where `inverted`."""
    inverted: bool = False


SIXTEEN_BITS = GreyScale()


def flattened(
    image: Image.Image, name: str, background: str | None, depth: int = 8, grey: GreyScale = SIXTEEN_BITS
) -> Image.Image:
    """Return the RGB form of an image, transparent pixels composed on `background` (None: alpha is dropped).

    `depth` is the bits of a sample in a PNG. Raises DataError where the pixels have no defined 8-bit form.
    """
    alpha = None if background is None else transparency(image, depth)
    rgb = _rgb(image, name, alpha is not None, grey)
    if alpha is None or background is None:
        return rgb
    below = Image.new("RGB", rgb.size, background)
    below.paste(rgb, mask=alpha)
    return below


def transparency(image: Image.Image, depth: int = 8) -> Image.Image | None:
    """Return the alpha of an image, mode L; None where all pixels are opaque."""
    key = image.info.get("transparency")
    if image.mode in ALPHA_MODES:
        alpha = with_alpha(image).getchannel("A")
    elif key is None:
        return None
    elif image.mode == "P":
        alpha = image.convert("RGBA").getchannel("A")
    else:
        alpha = _keyed(image, key, depth)
    return None if alpha.getextrema()[0] == 255 else alpha


def with_alpha(image: Image.Image) -> Image.Image:
    """Return an image of one of `ALPHA_MODES` as RGBA."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _keyed(image: Image.Image, key: Any, depth: int) -> Image.Image:
    """Return the alpha of an image in which one colour, in samples of `depth` bits, is transparent (PNG, GIF)."""
    pixels = np.asarray(image) if image.mode.startswith("I") else np.asarray(image.convert("RGB"))
    if pixels.ndim == 2:  # 16-bit grey keeps its range
        return Image.fromarray(np.where(pixels == key, 0, 255).astype(np.uint8))
    # Pillow scales pixels to 8 bits, but not the key
    scaled = np.asarray(key) * 255 // (2**depth - 1) if depth < 8 else np.asarray(key) >> depth - 8
    return Image.fromarray(np.where((pixels == scaled).all(axis=2), 0, 255).astype(np.uint8))


def _rgb(image: Image.Image, name: str, has_alpha: bool, grey: GreyScale) -> Image.Image:
    if image.mode == "RGB":
        image.load()  # the pixels stay when the file is closed
        return image
    if image.mode in OPAQUE_MODES or image.mode in ALPHA_MODES:
        if has_alpha and image.mode in ALPHA_MODES:
            return with_alpha(image).convert("RGB")  # not multiplied with alpha any more
        image.info.pop("transparency", None)  # changes no pixel, but Pillow warns when it drops one itself
        return image.convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"{name}: 32-bit values from {values.min()} to {values.max()}; only 8 and 16 bits have a meaning"
            )
        scaled = (values.clip(max=grey.white) * 255 + grey.white // 2) // grey.white
        return Image.fromarray((255 - scaled if grey.inverted else scaled).astype(np.uint8)).convert("RGB")
    raise DataError(f"{name}: pixels of kind {image.mode!r} have no defined 8-bit RGB form")
