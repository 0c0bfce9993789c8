"""Pictures inside the page: pixels as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

SMALL = 96  # pixels; images up to this size are shown as they are, with visible pixels
THUMBNAIL = 64  # pixels
SHEET = 16  # thumbnails in each row and column of a sheet
SHEETS_BYTES = 3_000_000
"""Of all sheets of a page as files. Sheets of noisy images are compressed more to stay below it."""
QUALITIES = (80, 60, 40, 20, 5)


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
    if max(image.size) <= SMALL:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return Picture(_data_uri("png", buffer.getvalue()), width, height, True)
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return Picture(_data_uri("jpeg", _jpeg(image, 88)), width, height, False)


def sprite_sheets(images: Iterable[Image.Image]) -> tuple[dict[str, int], list[Picture]]:
    """Return thumbnails in sheets of 16 x 16, in order, and the sizes that the page's script needs to cut them.

    Images smaller than a thumbnail keep their pixels, and all are centred in their cell.
    """
    sheets: list[Image.Image] = []
    for number, image in enumerate(images):
        at = number % SHEET**2
        if at == 0:
            sheets.append(Image.new("RGB", (SHEET * THUMBNAIL, SHEET * THUMBNAIL), (128, 128, 128)))
        thumbnail = image.convert("RGB")
        scale = THUMBNAIL / max(thumbnail.size)
        size = (max(1, round(thumbnail.width * scale)), max(1, round(thumbnail.height * scale)))
        thumbnail = thumbnail.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
        row, column = divmod(at, SHEET)
        left, top = (THUMBNAIL - thumbnail.width) // 2, (THUMBNAIL - thumbnail.height) // 2
        sheets[-1].paste(thumbnail, (column * THUMBNAIL + left, row * THUMBNAIL + top))
    for quality in QUALITIES:
        files = [_jpeg(sheet, quality) for sheet in sheets]
        if sum(map(len, files)) <= SHEETS_BYTES:
            break
    side = SHEET * THUMBNAIL
    cell = {"cell": THUMBNAIL, "columns": SHEET}
    return cell, [Picture(_data_uri("jpeg", data), side, side, False) for data in files]


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
