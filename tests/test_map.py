"""The report's map of the data: places, likely duplicates and outliers of features, and the page in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shards_of, tiny_recipe
from images import picture
from jinja2 import ChoiceLoader, DictLoader, PackageLoader
from PIL import Image

from pirl.model import build_model
from pirl.report import data_map, pictures
from pirl.report.data_map import draw_map, embed, nearest_others
from pirl.report.gallery import Gallery, Trunks
from pirl.report.page import render, script
from pirl.shards import ShardReader

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGE = """{% extends "base.html.j2" %}{% import "map.html.j2" as maps %}{% block css %}{{ maps.css() }}{% endblock %}
{% block body %}<h2 id="map">Map of the data</h2>{{ maps.section(map, map_script) }}{% endblock %}"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    """Forty images of two classes; an equal file in the other class, a copy saved again, and a black image."""
    root = tmp_path_factory.mktemp("map")
    for name in ("a </script> b", "zebra"):
        (root / "images" / name).mkdir(parents=True)
    for number in range(40):
        folder = root / "images" / ("zebra" if number % 2 else "a </script> b")
        picture(number, 48, 36).save(folder / f"{number:02d}.png")
    first = root / "images" / "a </script> b"
    shutil.copy(first / "02.png", root / "images" / "zebra" / "equal.png")
    Image.open(first / "04.png").save(first / "again.jpg", quality=97, subsampling=0)
    Image.new("RGB", (48, 36)).save(first / "black.png")
    return ShardReader(shards_of(root / "images", root / "shards"))


@pytest.fixture(scope="module")
def gallery(reader: ShardReader) -> Gallery:
    recipe = tiny_recipe()
    trunks = Trunks(recipe, "step-00000001", {"pretrained": build_model(recipe).trunk.eval()})
    ids = list(range(len(reader)))
    return Gallery(trunks, reader, ids, trunks.features(reader, ids))


def names(reader: ShardReader, *ids: int) -> set[str]:
    return {reader.name(id).rpartition("/")[2] for id in ids}


def test_duplicates_are_equal_files_and_nearly_equal_pixels(gallery: Gallery) -> None:
    drawn = draw_map(gallery)
    assert drawn is not None
    pairs = {frozenset(name.rpartition("/")[2] for name in (p.first.name, p.second.name)): p for p in drawn.pairs}
    assert set(pairs) == {frozenset({"02.png", "equal.png"}), frozenset({"04.png", "again.jpg"})}
    assert pairs[frozenset({"02.png", "equal.png"})].detail == "equal files, two classes"
    assert not pairs[frozenset({"04.png", "again.jpg"})].exact
    assert drawn.copies == 1
    assert (drawn.shown, drawn.images, drawn.searched) == (43, 43, 43)


def test_outliers_are_least_like_their_nearest(gallery: Gallery) -> None:
    features = [torch.randn(8, generator=torch.Generator().manual_seed(0)) + 0.01 * torch.randn(43, 8)]
    features[0][7] *= -1
    drawn = draw_map(replace(gallery, features=features))
    assert drawn is not None
    assert drawn.outliers[0].member.name == gallery.reader.name(7)
    assert [each.similarity for each in drawn.outliers] == sorted(each.similarity for each in drawn.outliers)


def test_neighbours_are_the_nearest_others() -> None:
    features = torch.nn.functional.normalize(torch.randn(30, 6))
    features[4:24] = features[4]  # more copies than neighbours
    index, cosines = nearest_others(features, 5)
    expected = (features @ features.T).fill_diagonal_(-2).topk(5).values
    torch.testing.assert_close(cosines, expected)
    assert not (index == torch.arange(30)[:, None]).any()


@pytest.mark.parametrize("count", [5, 6, 60])
def test_places_are_the_same_for_the_same_seed(count: int) -> None:
    features = np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)
    places = embed(features, 3)
    assert places.shape == (count, 2)
    assert (places.min(), places.max()) == (0, 10_000)
    np.testing.assert_array_equal(places, embed(features, 3))


def test_places_keep_groups_together() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(4), 40)
    features = rng.normal(size=(4, 32))[groups] + 0.2 * rng.normal(size=(160, 32))
    places = embed(features.astype(np.float32), 0).astype(float)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + np.eye(160) * 1e9
    assert (groups[distances.argmin(1)] == groups).mean() > 0.95


def test_collapsed_features_have_one_place() -> None:
    assert np.ptp(embed(np.ones((9, 4), np.float32), 0)) == 0


def test_the_map_is_bounded_and_has_what_is_listed(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_map, "IMAGES", 20)
    monkeypatch.setattr(pictures, "SHEETS_BYTES", 40_000)
    searched = Gallery(gallery.trunks, gallery.reader, gallery.ids[5:], [gallery.pretrained[5:]])
    drawn = draw_map(searched)
    assert drawn is not None
    assert drawn.shown == 20
    listed = [member for pair in drawn.pairs for member in (pair.first, pair.second)]
    listed += [outlier.member for outlier in drawn.outliers]
    assert {"02.png", "equal.png"} <= {member.name.rpartition("/")[2] for member in listed}  # 02 was not searched
    assert all(drawn.points["names"][member.point] == member.name for member in listed)
    assert sum(len(sheet.src) for sheet in drawn.sheets) < 54_000


def test_too_few_images_make_no_map(tmp_path: Path, gallery: Gallery) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        picture(number, 20, 20).save(tmp_path / "images" / f"{number}.png")
    few = ShardReader(shards_of(tmp_path / "images", tmp_path / "shards"))
    assert draw_map(Gallery(gallery.trunks, few, [0, 1], [gallery.pretrained[:2]])) is None


def dom_and_picture(page: Path, out: Path, fragment: str, size: str) -> tuple[str, np.ndarray]:
    """Return what a browser makes of a page, without a network: its elements, and its pixels (H, W, 3)."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={out.parent / 'profile'}"]
    command += ["--virtual-time-budget=3000", f"--window-size={size}", f"{page.as_uri()}{fragment}"]
    dom = subprocess.run([*command[:-1], "--dump-dom", command[-1]], capture_output=True, text=True, timeout=240)
    subprocess.run([*command[:-1], f"--screenshot={out}", command[-1]], capture_output=True, timeout=240, check=True)
    return dom.stdout, np.asarray(Image.open(out).convert("RGB"))


@pytest.mark.process
@pytest.mark.parametrize("size", ["1200,1400", "500,1800"])
def test_the_map_in_a_browser(gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    drawn = draw_map(gallery)
    assert drawn is not None
    page = tmp_path / "map.html"
    package = PackageLoader("pirl")
    monkeypatch.setattr(
        "pirl.report.page.PackageLoader", lambda _: ChoiceLoader([DictLoader({"page.html.j2": PAGE}), package])
    )
    page.write_text(render("page.html.j2", map=drawn, map_script=script("map.js")))
    dom, pixels = dom_and_picture(page, tmp_path / "map.png", "#image-3", size)
    chosen = re.search(r'id="map-chosen">(.*?)</div></div></div>', dom, re.S)
    assert chosen is not None, "the image that the address names was not chosen"
    assert chosen[1].count("<canvas") == 1 + 8
    nearest = [int(row) for row in nearest_others(gallery.pretrained, 8)[0][3]]
    titles = re.findall(r'title="([^"]*)"', chosen[1])
    assert names(gallery.reader, *nearest) == {title.rpartition("/")[2] for title in titles}
    assert "a &lt;/script&gt; b" in dom
    assert dom.count('aria-pressed="false"') == 1 + 2  # the button for images, and a class each
    saturated = (pixels.max(2).astype(int) - pixels.min(2) > 90).sum()
    assert saturated > 2_000, "no points were drawn"
