"""Image files of odd kinds: each gives the right picture, or is named with a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import odd_images
import pytest
from odd_images import DARK, GREY, LIGHT

from pirl.errors import DataError
from pirl.shards import LEGACY, check_image, decode_image

DOCUMENT = Path(__file__).parent.parent / "docs" / "images.md"
WHITE = (255, 255, 255)
HALF = tuple((value + 255) // 2 for value in LIGHT)  # half of the light on white
HALVES = {  # of the files whose halves are not those of the picture
    **dict.fromkeys(["grey.jpg", "16-bit-grey.png", "16-bit.pgm"], ((GREY,) * 3, DARK)),
    **dict.fromkeys(["12-bit.tif", "16-bit.tif", "16-bit-min-is-white.tif"], ((GREY,) * 3, DARK)),
    **dict.fromkeys(["half-clear.png", "half-clear.bmp"], (HALF, tuple((value + 255) // 2 for value in DARK))),
    "clear-colour.png": (LIGHT, WHITE),
    "one-bit.png": (WHITE, (0, 0, 0)),
    "one-pixel.png": (LIGHT, LIGHT),
}


def test_every_file_gives_its_picture_or_a_reason(tmp_path: Path) -> None:
    contents = odd_images.files()
    words, pixels = odd_images.outcomes(contents, tmp_path)
    assert set(words) == set(contents)  # none is lost
    for name, array in pixels.items():
        middle = array.shape[0] // 2
        halves = array[middle, array.shape[1] // 4], array[middle, -1]
        assert np.abs(np.array(halves, int) - np.array(HALVES.get(name, (LIGHT, DARK)))).max() <= 12, (name, halves)
    assert odd_images.page() == DOCUMENT.read_text(), "PYTHONPATH=.:tests python -m tests.odd_images > docs/images.md"


def test_heic_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = odd_images.heic()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError, match=r"^a\.heic: HEIC is read by an extra: .*pirl-pipeline\[heif\]"):
        check_image(data, "a.heic")


def test_shards_of_version_0_1_keep_their_pixels() -> None:
    """Deep TIFFs were darker, or inverted: a training on such shards resumes on the same pixels."""
    for name, light in (("12-bit.tif", GREY // 16), ("16-bit-min-is-white.tif", 255 - GREY), ("32-bit.tif", 0)):
        pixel = decode_image(odd_images.files()[name], name, LEGACY).getpixel((0, 0))
        assert pixel == pytest.approx((light,) * 3, abs=1)
