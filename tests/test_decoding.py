"""Decoding: which pixels an image file of any kind has, and what is refused."""

from __future__ import annotations

import io
import struct
import time
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from images import bmp_with_alpha, bomb_png, cmyk_jpeg, encoded, grey16_png, jpeg, picture, png_chunk, raw_png
from PIL import Image, ImageOps

from pirl.errors import DataError, UsageError
from pirl.shards import DEFAULT, LEGACY, Decoding, check_image, decode_image, decode_pixels, image_size
from pirl.shards.decoding import Checked
from pirl.shards.headers import HEAD_BYTES, exif_orientation, image_format
from pirl.shards.spec import sharding_options

EXTENSION = {"PNG": "png", "JPEG": "jpg", "TIFF": "tif", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "PPM": "ppm"}
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"),
    "WEBP": ("L", "LA", "P", "RGB", "RGBA", "CMYK"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P"),
    "PPM": ("1", "L", "RGB"),
}


def decoded(data: bytes, decoding: Decoding = DEFAULT) -> np.ndarray:
    """Return the pixels of an image after asserting that every way to decode it agrees on them."""
    pixels = np.asarray(decode_image(data, "x", decoding))
    for buffer in (None, bytearray(pixels.nbytes), bytearray(5)):
        assert np.array_equal(decode_pixels(data, "x", decoding, buffer), pixels)
    assert image_size(data, "x", decoding) == pixels.shape[:2]
    return pixels


def with_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# ---- whole files


def test_every_cut_that_full_decoding_finds_is_found() -> None:
    for data in (jpeg(3), encoded(picture(4), progressive=True), cmyk_jpeg(), encoded(picture(5).convert("L"))):
        check_image(data, "x")
        for cut in range(2, len(data) - 2, 37):
            try:
                with Image.open(io.BytesIO(data[:cut])) as image:
                    image.load()
                whole = True
            except Exception:
                whole = False
            if whole:
                check_image(data[:cut], "x")
            else:
                with pytest.raises(DataError):
                    check_image(data[:cut], "x")


@pytest.mark.filterwarnings("ignore")  # Pillow's, about odd metadata
def test_random_damage_raises_nothing_but_data_errors() -> None:
    rng = np.random.default_rng(0)
    for kind in EXTENSION:
        options = {"exif": with_exif(6)} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
        data = np.frombuffer(encoded(picture(1, 24, 24), kind, **options), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            for function in (check_image, decode_image, decode_pixels, image_size):
                with suppress(DataError):  # anything else fails the test
                    function(damaged.tobytes(), "x.img")


def test_damaged_jpegs_end_as_with_pil() -> None:
    """What libjpeg-turbo only warns of is for Pillow to take or to refuse, with the image's name."""
    whole = encoded(picture(1, 60, 40))
    rng = np.random.default_rng(0)
    refused = taken = 0
    for trial in range(300):
        data = bytearray(whole)
        for place in rng.integers(20, len(data), 2):
            data[place] = rng.integers(0, 256)
        damaged = bytes(data) if trial % 3 else whole[: rng.integers(1, len(whole))]
        try:
            expected = np.asarray(decode_image(damaged, "cat.jpg"))
        except DataError:
            refused += 1
            with pytest.raises(DataError, match=r"cat\.jpg"):
                decode_pixels(damaged, "cat.jpg")
            continue
        taken += 1
        assert np.array_equal(decode_pixels(damaged, "cat.jpg"), expected)
    assert refused > 30
    assert taken > 30


# ---- kinds


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in MODES for mode in MODES[kind]])
def test_legacy_decoding_is_pils_convert(mode: str, kind: str) -> None:
    image = picture(1).convert(mode)
    if mode == "P" and kind != "GIF":
        image.info["transparency"] = bytes(range(256))
    data = encoded(image, kind)
    with Image.open(io.BytesIO(data)) as reference:
        reference.info.pop("transparency", None)
        expected = np.asarray(reference.convert("RGB"))
    assert np.array_equal(decoded(data, LEGACY), expected)
    assert check_image(data, "x").extension == EXTENSION[kind]
    assert image_format(data[:HEAD_BYTES]) == kind
    if "A" not in mode and mode != "P":  # nothing that the settings decide
        assert np.array_equal(decoded(data), expected)
        assert check_image(data, "x") == Checked(EXTENSION[kind])


@pytest.mark.parametrize("size", [(1, 1), (17, 9), (64, 48), (500, 375)])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 20}]
)
def test_pixels_of_a_jpeg_are_pils(size: tuple[int, int], options: dict[str, Any]) -> None:
    for mode in ("RGB", "L", "CMYK"):
        data = encoded(picture(3, *size).convert(mode), **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decoded(data), expected)
        room = bytearray(expected.nbytes)
        decode_pixels(data, "x", buffer=room)
        assert mode == "CMYK" or bytes(room) == expected.tobytes()  # decoded in place


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    expected = np.rint(ramp / 257).astype(np.uint8)
    for data in (grey16_png(), encoded(Image.fromarray(ramp), "TIFF"), encoded(Image.fromarray(ramp), "PPM")):
        assert np.array_equal(decoded(data), np.repeat(expected[..., None], 3, axis=2))
        check_image(data, "x")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_channels_keep_their_high_byte(channels: int) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (9, 7, channels)).astype(np.uint16)
    if channels != 3:
        samples[..., -1] = 65535
    high = (samples >> 8).astype(np.uint8)
    expected = np.repeat(high[..., :1], 3, axis=2) if channels == 2 else high[..., :3]
    assert np.array_equal(decoded(raw_png(samples, 16)), expected)


def test_pixels_without_a_meaning_are_refused() -> None:
    for array in (np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32)):
        data = encoded(Image.fromarray(array), "TIFF")
        for function in (check_image, decode_image):
            with pytest.raises(DataError, match=r"^depth\.tif: "):
                function(data, "depth.tif")


# ---- transparency


def blended(colour: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + np.array(background) * (1 - share)


def random_rgba() -> np.ndarray:
    rgba = np.random.default_rng(1).integers(0, 256, (16, 12, 4)).astype(np.uint8)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    return rgba


@pytest.mark.parametrize(("background", "values"), [("#ffffff", (255, 255, 255)), ("#102030", (16, 32, 48))])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "BMP", "PNG16"])
def test_alpha_is_composed_on_the_background(kind: str, background: str, values: tuple[int, int, int]) -> None:
    rgba = random_rgba()
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    made = {"PNG16": raw_png(rgba.astype(np.uint16) * 257, 16), "BMP": bmp_with_alpha(rgba)}
    data = made.get(kind) or encoded(Image.fromarray(rgba), kind, **options)
    expected = blended(rgba[..., :3], rgba[..., 3], values)
    assert np.abs(decoded(data, Decoding(background=background)) - expected).max() <= 1
    assert check_image(data, "x").transparent
    assert np.array_equal(decoded(data, LEGACY), rgba[..., :3])


def test_alpha_of_grey_and_of_palettes_is_composed() -> None:
    grey = random_rgba()[..., [0, 3]]
    expected = blended(grey[..., :1].repeat(3, axis=2), grey[..., 1], (255, 255, 255))
    assert np.abs(decoded(encoded(Image.fromarray(grey, "LA"), "PNG")) - expected).max() <= 1
    indexed = picture(2).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    index, palette = np.asarray(indexed), np.array(indexed.getpalette("RGB")).reshape(-1, 3)
    alphas = np.linspace(0, 255, 16).astype(np.uint8)
    data = encoded(indexed, "PNG", transparency=bytes(alphas))
    assert np.abs(decoded(data) - blended(palette[index], alphas[index], (255, 255, 255))).max() <= 1
    for kind in ("PNG", "GIF"):
        shown = decoded(encoded(indexed, kind, transparency=3))
        assert (shown[index == 3] == 255).all()
        assert np.array_equal(shown[index != 3], palette[index][index != 3])


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_is_composed(depth: int, channels: int) -> None:
    if channels == 3 and depth < 8:
        pytest.skip("PNG has no such kind")
    samples = np.random.default_rng(2).integers(0, 2**depth, (8, 16, channels)).astype(np.uint16)
    key = samples[3, 5].copy()
    data = raw_png(samples, depth, key=key)
    opaque, shown = decoded(data, LEGACY), decoded(data)
    clear = (samples == key).all(axis=2)
    assert (shown[clear] == 255).all()
    assert np.array_equal(shown[~clear], opaque[~clear])
    assert check_image(data, "x").transparent


def test_opaque_alpha_changes_no_pixel() -> None:
    rgba = random_rgba()
    rgba[..., 3] = 255
    data = encoded(Image.fromarray(rgba), "PNG")
    assert np.array_equal(decoded(data), rgba[..., :3])
    assert not check_image(data, "x").transparent


# ---- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "CMYK", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_as_viewers_do(kind: str, orientation: int) -> None:
    image = picture(orientation, 30, 18).convert("CMYK" if kind == "CMYK" else "RGB")
    data = encoded(image, "JPEG" if kind == "CMYK" else kind, exif=with_exif(orientation))
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(decoded(data), expected)
    assert expected.shape[:2] == ((30, 18) if orientation > 4 else (18, 30))
    if kind != "TIFF":  # whose tag is part of the format
        assert check_image(data, "x").rotated == (orientation != 1)
        with Image.open(io.BytesIO(data)) as stored:
            assert np.array_equal(decoded(data, Decoding(exif="ignore")), np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_marked_corner_is_where_a_viewer_shows_it(orientation: int) -> None:
    image = Image.new("RGB", (64, 48), (20, 20, 20))
    image.paste((230, 60, 60), (0, 0, 16, 16))
    pixels = decoded(encoded(image, exif=with_exif(orientation), quality=95))
    bottom, right = divmod({1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}[orientation], 2)
    assert pixels[-8 if bottom else 8, -8 if right else 8, 0] > 200
    assert (pixels[..., 0] > 150).sum() in range(230, 290)


def test_orientation_of_odd_exif() -> None:
    little = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    big = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    assert exif_orientation(little) == exif_orientation(b"Exif\0\0" + big) == exif_orientation(big) == 6
    for broken in (b"", b"II*\0", little[:-6], little.replace(b"\x06", b"\x09"), b"II*\0\xff\xff\xff\xff", b"\0" * 40):
        assert exif_orientation(broken) == 1
    whole = encoded(picture(3, 30, 18))
    before = [b"\xff\xe2\x00\x06ICC_", b"\xff\xff\xff", b"\xff\xe1\x00\x0bhttp://xm", b"\xff\xfe\x00\x04hi\0\0\0"]
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(big)) + b"Exif\0\0" + big
    for start in before:  # other segments, padding and junk before the one that counts
        assert image_size(whole[:2] + start + segment + whole[2:], "x") == (30, 18)


# ---- size, metadata, several pictures


@pytest.mark.filterwarnings("ignore")  # pytest has undone that they are errors
def test_bombs_are_refused_before_they_are_decoded() -> None:
    start = time.monotonic()
    for width, height in ((20_000, 20_000), (11_000, 11_000), (65_000, 2_000)):
        with pytest.raises(DataError, match=r"limit of 100,000,000 \(`max_pixels`\)"):
            decode_image(bomb_png(width, height), "x")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("most", "factor"), [(64 * 48, 1), (64 * 48 - 1, 2), (800, 2), (767, 4), (48, 8)])
def test_a_large_jpeg_is_decoded_at_a_reduced_size(most: int, factor: int, mode: str) -> None:
    data = encoded(picture(5).convert(mode), exif=with_exif(6))
    decoding = Decoding(max_pixels=most)
    pixels = decoded(data, decoding)
    assert pixels.shape == (64 // factor, 48 // factor, 3)
    assert check_image(data, "x", decoding) == Checked("jpg", rotated=True, reduced=factor > 1)
    small = picture(5).convert(mode).convert("RGB").reduce(factor).transpose(Image.Transpose.ROTATE_270)
    assert np.abs(pixels.astype(int) - np.asarray(small)).mean() < 12


def test_what_cannot_be_reduced_is_refused_with_the_option() -> None:
    large = {kind: encoded(picture(5), kind) for kind in EXTENSION if kind != "JPEG"}
    for data in (*large.values(), encoded(picture(5), progressive=True)):
        for function in (check_image, decode_image, decode_pixels, image_size):
            with pytest.raises(DataError, match=r"^x: 64x48 pixels, more than the limit of 1,000 \(`max_pixels`\)"):
                function(data, "x", Decoding(max_pixels=1000))
    assert image_size(encoded(picture(5), progressive=True), "x", Decoding(max_pixels=1600)) == (24, 32)
    with pytest.raises(DataError, match="limit"):
        decode_pixels(jpeg(5), "x", Decoding(max_pixels=47))


def test_a_limit_above_pillows_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(picture(5), "WEBP", lossless=True)
    assert decoded(data, Decoding(max_pixels=64 * 48)).shape == (48, 64, 3)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"tEXt"])
def test_large_text_and_profiles_do_not_matter(kind: bytes) -> None:
    whole = encoded(picture(3), "PNG")
    head = {b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0", b"tEXt": b"comment\0"}.get(kind, b"profile\0\0")
    content = head + (b"x" * 9_000_000 if kind == b"tEXt" else zlib.compress(bytes(64 << 20), 9))
    data = whole[:33] + png_chunk(kind, content) + whole[33:]
    assert np.array_equal(decoded(data), np.asarray(picture(3)))
    assert check_image(data, "x") == Checked("png")


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "PNG", "GIF"])
def test_of_several_pictures_the_first_is_used(kind: str) -> None:
    pages = [Image.new("RGB", (64, 64), colour) for colour in ("#c81414", "#14c814", "#1414c8")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(pages[0], kind, save_all=True, append_images=pages[1:], **options)
    assert (decoded(data) == (200, 20, 20)).all()
    assert check_image(data, "x") == Checked(EXTENSION[kind], several=True)
    assert check_image(encoded(pages[0], kind), "x") == Checked(EXTENSION[kind])


def test_a_phones_second_picture_is_not_counted() -> None:
    pages = [picture(1), picture(2)]
    data = encoded(pages[0], "MPO", save_all=True, append_images=pages[1:])
    assert check_image(data, "x") == Checked("jpg")
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("background", ["#10203040", "transparent", "None", ""])
def test_a_background_is_an_opaque_colour(background: str) -> None:
    with pytest.raises(UsageError, match="expected an opaque colour"):
        sharding_options([f"background={background}"])
