"""Pictures inside the page: pixels as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

SMALL = 96  # pixels; images up to this size are shown as they are, with visible pixels


@dataclass(frozen=True)
class Picture:
    """An image to embed: `src` is a data URI, `small` asks the browser not to smooth it."""

    src: str
    width: int
    height: int
    small: bool


def picture(pixels: Image.Image | np.ndarray, longest: int = 320) -> Picture:
    """Embed an RGB image or (H, W, 3) uint8: small ones exactly (PNG), others at most `longest` pixels long (JPEG)."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    width, height = image.size
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, "PNG")
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{data}", width, height, max(width, height) <= SMALL)
