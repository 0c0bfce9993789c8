"""Decoding settings from `pirl shard` through the manifest to whatever reads the shards."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_recipe
from images import encoded, picture
from PIL import Image
from typer.testing import CliRunner

from pirl.cli import app
from pirl.data import CropDataset
from pirl.errors import UsageError
from pirl.evaluate.crops import LabelledCrops, centre_crop
from pirl.shards import (
    LEGACY,
    ArraySource,
    DatasetSource,
    Decoding,
    Manifest,
    Pictures,
    ShardReader,
    SourceOptions,
    check_same_decoding,
    open_source,
    write_shards,
)
from pirl.storage import open_storage
from pirl.views import crop_batch

BLACK = Decoding(background="#000000")


def shard(folder: Path, out: Path, **options: Any) -> Manifest:
    return write_shards(open_source(str(folder)), open_storage(out), **options)


def turned(seed: int, orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(seed, 90, 60), exif=exif, quality=95)


def shape_on_clear() -> bytes:
    rgba = np.zeros((60, 90, 4), np.uint8)
    rgba[20:40, 20:40, 3] = 255
    return encoded(Image.fromarray(rgba), "PNG")


@pytest.fixture
def special(tmp_path: Path) -> Path:
    """Two classes with a plain photograph, a transparent, a turned and a large one, and one of two pages, in each."""
    page = picture(7, 90, 60)
    for name in ("ant", "bee"):
        (tmp_path / "in" / name).mkdir(parents=True)
        files = {
            "clear.png": shape_on_clear(),
            "large.jpg": encoded(picture(1, 200, 150)),
            "pages.tif": encoded(page, "TIFF", save_all=True, append_images=[page]),
            "plain.jpg": encoded(picture(2, 90, 60)),
            "turned.jpg": turned(3),
        }
        for file, data in files.items():
            (tmp_path / "in" / name / file).write_bytes(data)
    return tmp_path / "in"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    (tmp_path / "plain").mkdir()
    for k in range(3):
        (tmp_path / "plain" / f"{k}.jpg").write_bytes(encoded(picture(k)))
    return tmp_path / "plain"


def legacy_digest(out: Path) -> str:
    """The digest as version 0.1 computes it."""
    manifest = json.loads((out / "manifest.json").read_text())
    content = [[shard["images"], shard["sha256"], shard["index_sha256"]] for shard in manifest["shards"]]
    return hashlib.sha256(json.dumps([1, manifest["classes"], content]).encode()).hexdigest()


def make_legacy(folder: Path, out: Path) -> Manifest:
    """Shards as version 0.1 wrote them."""
    shard(folder, out, decoding=LEGACY)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["decoding"], manifest["pictures"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    return Manifest.load(open_storage(out))


# ---- manifest and digest


def test_the_manifest_records_settings_and_counts(special: Path, tmp_path: Path) -> None:
    decoding = Decoding(background="#102030", max_pixels=20_000)
    assert shard(special, tmp_path / "out", decoding=decoding, processes=2) == Manifest.load(
        open_storage(tmp_path / "out")
    )
    record = json.loads((tmp_path / "out/manifest.json").read_text())
    assert record["decoding"] == {"background": "#102030", "exif": "apply", "max_pixels": 20_000}
    assert record["pictures"] == {"several": 2, "transparent": 2, "rotated": 2, "reduced": 2}


def test_the_digest_covers_settings_that_change_a_pixel(special: Path, plain: Path, tmp_path: Path) -> None:
    settings = [Decoding(), BLACK, Decoding(exif="ignore"), Decoding(max_pixels=20_000), LEGACY]
    digests = {shard(special, tmp_path / f"s{k}", decoding=one).digest for k, one in enumerate(settings)}
    assert len(digests) == 5
    assert legacy_digest(tmp_path / "s0") in digests
    assert Manifest.load(open_storage(tmp_path / "s4")).digest == legacy_digest(tmp_path / "s4")
    untouched = {shard(plain, tmp_path / f"p{k}", decoding=one).digest for k, one in enumerate(settings)}
    assert untouched == {legacy_digest(tmp_path / "p0")}  # a run of 0.1 resumes on each of them


def test_shards_of_version_0_1_keep_their_pixels(special: Path, tmp_path: Path) -> None:
    before = make_legacy(special, tmp_path / "out")
    assert (before.decoding, before.pictures) == (LEGACY, None)
    assert shard(special, tmp_path / "out") == before  # up to date
    reader = ShardReader(tmp_path / "out")
    for id in range(len(reader)):
        with Image.open(special / reader.name(id)) as image:
            image.info.pop("transparency", None)
            assert np.array_equal(np.asarray(reader.image(id)), np.asarray(image.convert("RGB")))
    with pytest.raises(UsageError, match=r"another input.*background #000000, EXIF apply"):
        shard(special, tmp_path / "out", decoding=BLACK)


def test_other_settings_into_the_same_place_are_refused(special: Path, tmp_path: Path) -> None:
    shard(special, tmp_path / "out")
    with pytest.raises(UsageError, match=r"background #ffffff.*; this is .*background #000000"):
        shard(special, tmp_path / "out", decoding=BLACK)


def test_settings_are_checked_when_a_manifest_is_read(special: Path, tmp_path: Path) -> None:
    shard(special, tmp_path / "out")
    record = json.loads((tmp_path / "out/manifest.json").read_text())
    record["decoding"]["background"] = "#000000"
    (tmp_path / "out/manifest.json").write_text(json.dumps(record))
    with pytest.raises(Exception, match="the digest does not belong"):
        Manifest.load(open_storage(tmp_path / "out"))


def test_training_and_test_images_are_decoded_alike(special: Path, plain: Path, tmp_path: Path) -> None:
    white, black = (shard(special, tmp_path / name, decoding=d) for name, d in (("w", Decoding()), ("b", BLACK)))
    legacy, neutral = make_legacy(special, tmp_path / "l"), shard(plain, tmp_path / "p", decoding=BLACK)
    for train, test in ((white, white), (legacy, legacy), (neutral, neutral), (legacy, neutral)):
        check_same_decoding(train, test)
    for train, test, value in ((white, black, "#ffffff"), (black, white, "#000000"), (legacy, white, "none")):
        with pytest.raises(UsageError) as refusal:
            check_same_decoding(train, test)
        assert f"--background '{value}'" in str(refusal.value)


# ---- the same pixels everywhere


@pytest.mark.parametrize("decoding", [Decoding(max_pixels=20_000), BLACK, LEGACY])
def test_all_readers_see_the_same_pixels(special: Path, tmp_path: Path, decoding: Decoding) -> None:
    shard(special, tmp_path / "out", decoding=decoding)
    reader = ShardReader(tmp_path / "out")
    images = [np.asarray(reader.image(id)) for id in range(len(reader))]
    sizes = {reader.name(id).rpartition("/")[2]: images[id].shape[:2] for id in range(len(reader))}
    assert sizes["turned.jpg"] == ((90, 60) if decoding.exif == "apply" else (60, 90))
    assert sizes["large.jpg"] == ((75, 100) if decoding.max_pixels < 30_000 else (150, 200))
    clear = images[next(id for id in range(len(reader)) if "clear" in reader.name(id))]
    assert clear[0, 0].tolist() == ([255] * 3 if decoding.background == "#ffffff" else [0] * 3)
    recipe, rows = tiny_recipe(), np.arange(len(reader))
    batch = CropDataset(str(tmp_path / "out"), recipe)[1, rows]
    expected, patches = crop_batch(images, rows, recipe.train.seed, 1, recipe.views)
    assert np.array_equal(batch.images.numpy(), expected)
    assert np.array_equal(batch.elements.numpy(), patches)
    probed = np.stack([centre_crop(reader.image(id), recipe) for id in rows.tolist()])
    crops, _ = LabelledCrops(reader, recipe, seed=0)[None, rows]
    assert np.array_equal(crops.numpy(), probed)


def test_a_data_sets_own_images_keep_their_meaning(tmp_path: Path) -> None:
    rgba = picture(1).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    wide = Image.fromarray(np.linspace(0, 65535, 64 * 48).astype(np.int32).reshape(48, 64))
    float_image = Image.fromarray(np.ones((48, 64), np.float32))
    items = [(rgba, 0), (rgba.convert("RGBa"), 0), (rgba.convert("L").convert("PA"), 0), (wide, 0), (float_image, 0)]
    options = {"max_bad_share": 0.5, "decoding": Decoding(max_pixels=64 * 48)}
    large = (picture(2, 65, 48), 0)
    manifest = write_shards(DatasetSource([*items, large]), open_storage(tmp_path / "out"), **options)
    reasons = [entry["reason"] for entry in json.loads((tmp_path / "out/quarantine.json").read_text())["images"]]
    assert "'F' have no defined 8-bit RGB form" in reasons[0]
    assert "limit of 3,072 (`max_pixels`)" in reasons[1]
    assert manifest.pictures == Pictures(transparent=2)
    reader = ShardReader(tmp_path / "out")
    one, premultiplied = (np.asarray(reader.image(id)).astype(int) for id in (0, 1))
    assert np.abs(one - premultiplied).max() <= 2
    assert (one[0] > 250).all()  # clear at the top
    assert np.asarray(reader.image(3))[[0, 24, -1], [0, 0, -1], 0].tolist() == [0, 128, 255]


# ---- commands


def test_the_command_counts_and_names_its_options(special: Path, tmp_path: Path) -> None:
    (special / "bee" / "bomb.png").write_bytes(encoded(picture(4, 300, 200), "PNG"))
    arguments = ["--max-pixels", "20000", "--background", "navy", "--max-bad-share", "0.2", "--processes", "1"]
    result = CliRunner().invoke(app, ["shard", str(special), str(tmp_path / "out"), *arguments])
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "2 files hold more than one picture; the first is used" in output
    assert "2 files hold transparency; it is composed on #000080" in output
    assert "2 files hold an EXIF orientation; it is applied" in output
    assert "2 files hold more than 20,000 pixels (--max-pixels); read at a reduced size" in output
    reason = "300x200 pixels, more than the limit of 20,000 (`max_pixels`)"
    assert reason in (tmp_path / "out/quarantine.json").read_text()


@pytest.mark.parametrize(
    "verb",
    [
        ["shard", "{}", "{}/out"],
        ["preview", "demo", "{}"],
        ["run", "{}", "{}", "--root={}/r"],
        ["retrain", "--train-source={}", "--test-source={}", "--root={}/r"],
    ],
    ids=lambda verb: verb[0],
)
def test_wrong_settings_are_refused_by_name_all_at_once(plain: Path, verb: list[str]) -> None:
    words = [word.format(plain) for word in verb]
    wrong = ["--background", "whitish", "--max-pixels", "0", "--image", "a b", "--label", "cls:key"]
    result = CliRunner().invoke(app, [*words, *wrong])
    assert isinstance(result.exception, UsageError)
    for option in ("--background: ", "--max-pixels: ", "--image: ", "--label: "):
        assert option in str(result.exception)
    result = CliRunner().invoke(app, [*words, "--exif", "maybe"])
    assert (result.exit_code, "--exif" in result.output) == (2, True)


def test_the_preview_shows_what_the_settings_make(special: Path, tmp_path: Path) -> None:
    from pirl.report.sheet import write_preview

    sheets = []
    black = SourceOptions(background="black")
    for k, one in enumerate((SourceOptions(), black, SourceOptions(exif="ignore"), SourceOptions())):
        write_preview(tiny_recipe(), str(special), tmp_path / f"{k}.png", count=10, options=one)
        sheets.append((tmp_path / f"{k}.png").read_bytes())
    assert len(set(sheets)) == 3
    assert sheets[0] == sheets[3]


def test_a_photograph_of_108_megapixels_in_little_memory(tmp_path: Path) -> None:
    Image.new("RGB", (12_000, 9_000), (139, 230, 46)).save(tmp_path / "large.jpg", quality=30)
    program = """
import resource, sys
from pirl.shards import check_image, decode_pixels
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(check_image(data, "x").reduced, *decode_pixels(data, "x").shape)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "large.jpg")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert output[:4] == ["True", "4500", "6000", "3"]
    assert int(output[4]) < 300  # MiB; its RGB pixels alone have 309


def test_arrays_have_the_same_pixels_and_digest_with_any_settings(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (4, 28, 28)).astype(np.uint8)
    source = ArraySource("arrays", grey, np.arange(4) % 2, ["a", "b"], "x/")
    before = write_shards(source, open_storage(tmp_path / "out"), decoding=LEGACY)
    assert write_shards(source, open_storage(tmp_path / "out"), decoding=BLACK) == before  # up to date
    assert write_shards(source, open_storage(tmp_path / "other"), decoding=BLACK).digest == before.digest
    assert before.digest == legacy_digest(tmp_path / "out")
