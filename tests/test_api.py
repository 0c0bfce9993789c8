"""The Python interface: names, features of images of any kind, weights from any place, scikit-learn."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGES, TINY, tiny_recipe, warned
from images import folder_of_classes, truncated_jpeg
from PIL import Image

import pirl
from pirl.config import Recipe
from pirl.embedding.encoder import AHEAD
from pirl.embedding.images import SourceImages
from pirl.errors import CheckpointError, ConfigError, DataError, UsageError
from pirl.evaluate import centre_crop, extract, load_trunk
from pirl.export import export, trunk_bytes
from pirl.model import build_model, weights_digest
from pirl.registry import TRUNK, Provenance, open_registry
from pirl.shards import ShardReader, open_source
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """A finished training of the tiny recipe."""
    run = tmp_path_factory.mktemp("api") / "run"
    train(tiny_recipe("train.epochs=1"), Options(data=shards, out=str(run)), World())
    return run


@pytest.fixture(scope="module")
def encoder(run: Path) -> pirl.Encoder:
    return pirl.load(run)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the shards, as a folder."""
    root = tmp_path_factory.mktemp("photos") / "images"
    return folder_of_classes(root, classes=3, images=IMAGES // 3, width=24, height=20)


# --- names ---------------------------------------------------------------------------------------


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, pirl; print(sorted({'torch', 'numpy', 'pydantic', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_every_public_name_is_loaded_and_listed() -> None:
    assert set(pirl.__all__) <= set(dir(pirl))
    assert all(getattr(pirl, name) for name in pirl.__all__)
    assert callable(pirl.evaluate)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        pirl.lode  # noqa: B018


def test_the_package_is_typed() -> None:
    assert (Path(pirl.__file__).parent / "py.typed").exists()


# --- features ------------------------------------------------------------------------------------


def test_features_are_those_of_the_evaluation(run: Path, encoder: pirl.Encoder, shards: str) -> None:
    recipe, _, trunk = load_trunk(str(run))
    reader = ShardReader(shards)
    pixels = np.stack([centre_crop(reader.image(id), recipe) for id in range(len(reader))])
    expected = extract(trunk, lambda: [torch.from_numpy(pixels)], recipe).numpy()
    names, features = encoder.embed(shards, batch_size=256)
    assert features.dtype == np.float32
    assert np.allclose(features, expected, rtol=1e-4, atol=1e-5)  # the evaluation folds batch norm
    assert names[:2] == ["class0/000.jpg", "class0/001.jpg"]
    assert encoder.features == features.shape[1]
    assert encoder.weights == weights_digest(trunk.state_dict())


def kinds_of_images(photos: Path) -> Iterator[tuple[str, Any]]:
    paths = sorted(photos.rglob("*.jpg"))[:5]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    yield "strings", [str(path) for path in paths]
    yield "paths in an array", np.array([str(path) for path in paths])
    yield "pictures", pictures
    yield "a generator", (picture for picture in pictures)
    yield "arrays", arrays
    yield "an array", np.stack(arrays)
    yield "a mixture", [paths[0], pictures[1], arrays[2], *pictures[3:]]


@pytest.mark.parametrize("kind", range(7))
def test_images_of_every_kind_have_the_same_features(kind: int, photos: Path, encoder: pirl.Encoder) -> None:
    name, images = list(kinds_of_images(photos))[kind]
    expected = encoder.embed(photos).features[:5]
    result = encoder.embed(images, batch_size=2, workers=3)
    # another decoder of JPEGs may round a pixel differently; batches of another size, a sum
    assert np.allclose(result.features, expected, atol=1e-4), name
    assert len(set(result.names)) == 5


def test_a_single_image_is_a_batch_of_one(photos: Path, encoder: pirl.Encoder) -> None:
    path = photos / "class1" / "003.jpg"
    for image in (path, str(path), Image.open(path), np.asarray(Image.open(path))):
        assert encoder.embed(image).features.shape == (1, encoder.features)
    assert encoder.embed(path).names == [str(path)]


def test_memory_does_not_grow_with_the_images(photos: Path, encoder: pirl.Encoder) -> None:
    images, read = SourceImages(open_source(str(photos))), []
    load = images.source.load
    images.source.load = lambda i: read.append(i) or load(i)  # type: ignore[method-assign]
    batches = encoder.batches(images, batch_size=4, workers=2)
    assert len(next(batches).names) == 4
    assert 4 <= len(read) <= AHEAD * 4 + 4 < IMAGES
    batches.close()  # type: ignore[attr-defined]
    assert len(read) <= AHEAD * 4 + 4


def test_broken_images_are_named_or_left_out_with_a_warning(tmp_path: Path, encoder: pirl.Encoder) -> None:
    folder = folder_of_classes(tmp_path / "images", classes=1, images=5)
    (folder / "class0" / "002.jpg").write_bytes(truncated_jpeg())
    with pytest.raises(DataError, match=r"class0/002\.jpg") as caught:
        encoder.embed(folder)
    assert 'errors="skip"' in caught.value.hint
    with warned(r"1 image could not be read and is left out: class0/002\.jpg"):
        names, features = encoder.embed(folder, errors="skip")
    assert names == [f"class0/{i:03d}.jpg" for i in (0, 1, 3, 4)]
    assert features.shape == (4, encoder.features)
    with pytest.raises(DataError, match=r"missing\.jpg: No such file"):
        encoder.embed([tmp_path / "missing.jpg"])


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros((2, 8, 8, 3)), "float64 .8, 8, 3., expected uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"uint8 \[3, 8, 8\], expected uint8 \(height, width, 3\)"),
        (17, "type int, expected a path"),
        ([None], "NoneType"),
        ("nowhere", "nowhere does not exist"),
    ],
)
def test_what_is_not_an_image_is_refused(images: Any, reason: str, encoder: pirl.Encoder) -> None:
    with pytest.raises(UsageError, match=reason):
        encoder.embed(images)


def test_damaged_weights_are_reported(photos: Path, tiny: Recipe) -> None:
    trunk = build_model(tiny).trunk
    with torch.no_grad():
        trunk.conv1.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"class0/000\.jpg are NaN"):
        pirl.Encoder(trunk, tiny).embed(photos)


# --- weights from any place ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with one model of two versions; the second has other weights and is not the champion."""
    root = open_registry(str(tmp_path_factory.mktemp("registry")))
    recipe, _, trunk = load_trunk(str(run))
    for name, weights, promote in (("a", trunk, True), ("b", build_model(recipe).trunk, False)):
        root.register(
            "m",
            run_id=name,
            files={TRUNK: trunk_bytes(weights, recipe)},
            provenance=Provenance(config=recipe),
            promote=promote,
        )
    return root.uri


@pytest.mark.parametrize("place", ["", "/m", "/m/versions/v0001"])
def test_a_registered_version_is_loaded(place: str, registry: str, encoder: pirl.Encoder) -> None:
    assert pirl.load(registry + place).weights == encoder.weights


def test_a_version_is_chosen_by_name(registry: str, encoder: pirl.Encoder, run: Path) -> None:
    other = pirl.load(registry, model="m", version="v0002")
    assert other.weights != encoder.weights
    assert pirl.load(open_registry(registry).get("m", "v0001")).weights == encoder.weights
    for checkpoint in (f"{run}/checkpoints", f"{run}/checkpoints/step-00000005", pirl.Run.at(str(run))):
        assert pirl.load(checkpoint).weights == encoder.weights
    with pytest.raises(UsageError, match="has no version 'v0009'"):
        pirl.load(registry, version="v0009")


def test_an_exported_file_has_the_same_features(run: Path, encoder: pirl.Encoder, photos: Path, tmp_path: Path) -> None:
    loaded = pirl.load(export(str(run), tmp_path / "trunk.safetensors"))
    assert loaded.recipe.eval == encoder.recipe.eval
    assert np.array_equal(loaded.embed(photos).features, encoder.embed(photos).features)


def test_a_state_dict_needs_its_recipe(run: Path, encoder: pirl.Encoder, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY)
    torch.save(encoder.trunk.state_dict(), tmp_path / "weights.pth")
    assert pirl.load(tmp_path / "weights.pth", recipe=recipe).weights == encoder.weights
    with pytest.raises(CheckpointError, match="of another architecture"):
        pirl.load(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth does not fit the architecture of recipe demo"):
        pirl.load(tmp_path / "weights.pth", recipe="demo")


def test_files_of_version_01_are_loaded_by_their_recipes_name(tmp_path: Path) -> None:
    """They have the architecture and the name, neither mean nor crop."""
    from safetensors.torch import save_file

    recipe = pirl.config.load_recipe("demo")
    trunk = build_model(recipe).trunk
    old = {"format": "pt", **{key: str(value) for key, value in recipe.model.model_dump().items()}}
    save_file(trunk.state_dict(), tmp_path / "a.safetensors", {**old, "recipe": "demo"})
    save_file(trunk.state_dict(), tmp_path / "b.safetensors", {**old, "recipe": "mine"})
    assert pirl.load(tmp_path / "a.safetensors").recipe == recipe
    with pytest.raises(UsageError, match="does not state its architecture, mean and std"):
        pirl.load(tmp_path / "b.safetensors")
    assert pirl.load(tmp_path / "b.safetensors", recipe="demo").recipe == recipe


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda path: path.mkdir(), UsageError, "neither a run nor a registered model"),
        (lambda path: None, UsageError, "neither a run nor a registered model"),
        (lambda path: path.with_suffix(".safetensors").write_bytes(b"x" * 20), CheckpointError, "is damaged"),
        (lambda path: path.with_suffix(".pth").write_bytes(b"x" * 20), CheckpointError, "not a file of torch.save"),
    ],
)
def test_what_cannot_be_loaded_is_named(make: Any, error: type[Exception], reason: str, tmp_path: Path) -> None:
    make(tmp_path / "it")
    place = next(tmp_path.glob("it.*"), tmp_path / "it")
    with pytest.raises(error, match=reason):
        pirl.load(place)


# --- steps ---------------------------------------------------------------------------------------


def test_a_data_set_is_sharded(tmp_path: Path) -> None:
    class Pairs:
        classes = ("a", "b")

        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (24, 20), (40 * i, 0, 0)), i % 2

    manifest = pirl.shard(Pairs(), tmp_path / "shards", processes=1)
    assert (manifest.images, manifest.classes) == (6, ["a", "b"])


def test_wrong_options_are_refused_before_anything_starts(tmp_path: Path, shards: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'worker'. Did you mean 'workers'"):
        pirl.pretrain("demo", shards, tmp_path / "run", worker=1)
    with pytest.raises(UsageError, match="views is a object, expected a number"):
        pirl.pretrain("demo", shards, tmp_path / "run", overrides={"views": object()})
    with pytest.raises(ConfigError, match="unknown option 'epoch'"):
        pirl.evaluate(tmp_path / "run", shards, shards, epoch=1)
    assert not (tmp_path / "run").exists()


# --- scikit-learn --------------------------------------------------------------------------------


def test_features_are_a_step_of_a_pipeline(run: Path, photos: Path) -> None:
    pytest.importorskip("sklearn")
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    paths = np.array([str(path) for path in sorted(photos.rglob("*.jpg"))])
    labels = np.repeat(["a", "b", "c"], IMAGES // 3)
    embedder = pirl.Embedder(str(run), batch_size=16)
    model = make_pipeline(clone(embedder), StandardScaler(), LogisticRegression(max_iter=500))
    assert len(cross_val_score(model, paths, labels, cv=2)) == 2
    model.fit(paths, labels)
    again = pickle.loads(pickle.dumps(model))
    assert list(again.predict(paths)) == list(model.predict(paths))
    assert model.score(paths, labels) > 0.5  # of images that it was fitted on
    embedder.set_output(transform="default").fit(paths)
    assert len(embedder.get_feature_names_out()) == embedder.transform(paths[:2]).shape[1]
    assert embedder.get_params() == {"batch_size": 16, "model": str(run), "workers": None}


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pirl.extras.EXTRAS, "sklearn", ("absent_library",))
    with pytest.raises(UsageError, match="absent_library, which is not installed") as caught:
        pirl.extras.require("sklearn", "pirl.Embedder")
    assert caught.value.hint == "pip install 'pirl-pipeline[sklearn]'"


# --- the page ------------------------------------------------------------------------------------


def test_the_examples_of_the_page_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    folder_of_classes(tmp_path / "photos" / "train", classes=2, images=64, width=40, height=30)
    folder_of_classes(tmp_path / "photos" / "test", classes=2, images=6, width=40, height=30, first=900)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), scope)
    assert scope["features"].shape == (12, scope["encoder"].features)
