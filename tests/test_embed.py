"""Features in files, nearest neighbours, and runs next to each other: `pirl embed`, `neighbours`, `runs`, `compare`."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import IMAGES, tiny_recipe
from images import flat_folder, folder_of_classes, truncated_jpeg
from PIL import Image

import pirl
from pirl import cli
from pirl.embedding import open_images
from pirl.embedding.output import embed_to
from pirl.embedding.search import find_neighbours
from pirl.errors import DataError, UsageError
from pirl.results import Evaluation
from pirl.run import Run
from pirl.shards import SourceOptions
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """A finished training of the tiny recipe."""
    run = tmp_path_factory.mktemp("embed") / "run"
    train(tiny_recipe("train.epochs=1"), Options(data=shards, out=str(run), log_every=1), World())
    return run


@pytest.fixture(scope="module")
def encoder(run: Path) -> pirl.Encoder:
    return pirl.load(run)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four images; one image of the second class is broken."""
    folder = folder_of_classes(tmp_path_factory.mktemp("photos") / "images", classes=3, images=4)
    (folder / "class1" / "002.jpg").write_bytes(truncated_jpeg())
    return folder


def pirl_command(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The output of a command that succeeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pirl", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    return printed.out


def read(path: Path) -> tuple[list[str], np.ndarray, list[int], list[str]]:
    """Names, features, labels and class names of a file of features, by the library of its format."""
    if path.suffix == ".npz":
        file = np.load(path)
        classes = [str(file["classes"][label]) for label in file["labels"]]
        return file["names"].tolist(), file["features"], file["labels"].tolist(), classes
    if path.suffix == ".csv":
        with path.open(newline="") as lines:
            rows = list(csv.reader(lines))[1:]
        features = np.array([row[3:] for row in rows], np.float32)
        return [row[0] for row in rows], features, [int(row[1]) for row in rows], [row[2] for row in rows]
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = parquet.read_table(path).to_pydict()
    return columns["name"], np.array(columns["embedding"], np.float32), columns["label"], columns["class"]


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".parquet"])
def test_a_file_has_the_features_of_all_images(
    suffix: str, run: Path, photos: Path, encoder: pirl.Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"features{suffix}"
    printed = json.loads(pirl_command(capsys, "embed", run, photos, "--out", out, "--batch-size", 5, "--json"))
    assert (printed["images"], [name for name, _ in printed["skipped"]]) == (11, ["class1/002.jpg"])
    names, features, labels, classes = read(out)
    expected = encoder.embed(photos, batch_size=5, errors="skip")
    assert names == expected.names
    assert np.array_equal(features, expected.features)
    assert labels == [0] * 4 + [1] * 3 + [2] * 4
    assert classes == [f"class{label}" for label in labels]
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_names_its_weights(encoder: pirl.Encoder, tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "images", images=2)
    result = embed_to(encoder, folder, tmp_path / "features.npz")
    file = np.load(result.out)
    provenance = json.loads(str(file["provenance"]))
    assert (provenance["weights"], provenance["crop"], provenance["version"]) == (encoder.weights, 16, pirl.__version__)
    assert (file["labels"].tolist(), file["classes"].tolist()) == ([-1, -1], [])


def test_wrong_outputs_are_refused_before_the_work(encoder: pirl.Encoder, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in '\.txt', expected one of \.npz, \.csv, \.parquet"):
        embed_to(encoder, photos, tmp_path / "x.txt")
    with pytest.raises(UsageError, match="lies inside the images"):
        embed_to(encoder, photos, photos / "x.npz")
    broken = folder_of_classes(tmp_path / "broken", classes=1, images=1)
    (broken / "class0" / "000.jpg").write_bytes(truncated_jpeg())
    with pytest.raises(DataError, match=r"none of 1 images could be read: class0/000\.jpg"):
        embed_to(encoder, broken, tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_images_that_are_left_out_are_counted_and_a_missing_folder_is_made(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/class0/._000.jpg").write_bytes(b"x")
    out = tmp_path / "new/of/several" / "x [b].csv"
    pirl_command(capsys, "embed", run, tmp_path / "photos", "--out", out)
    assert out.exists()
    pirl.load(run).embed(tmp_path / "photos", errors="skip")
    assert f"left out of {tmp_path / 'photos'}: 1 hidden" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "turned"])
def test_an_image_in_memory_has_the_features_of_its_file(encoder: pirl.Encoder, tmp_path: Path, mode: str) -> None:
    """Transparency, 16 bits and EXIF orientation are read alike, with either background."""
    grey = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20
    image = Image.fromarray(grey)
    if mode != "I;16":
        image = Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGBA")
        image.putalpha(Image.fromarray((grey > 30_000).astype(np.uint8) * 255))
    if mode == "P":
        image = image.quantize(16)
    path, exif = tmp_path / "image.png", Image.Exif()
    if mode == "turned":
        exif[0x0112] = 6
    image.save(path, exif=exif)
    features = encoder.embed([path]).features
    assert np.array_equal(encoder.embed([Image.open(path)]).features, features)
    black = open_images([Image.open(path)], SourceOptions(background="black"))
    assert np.array_equal(encoder.embed(black).features, features) == (mode == "I;16")


def test_the_options_of_a_source_are_those_of_embed(
    run: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.new("RGBA", (24, 20), (200, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    rows = []
    for background in ("white", "black"):
        out = tmp_path / f"{background}.npz"
        pirl_command(capsys, "embed", run, tmp_path / "clear.png", "--out", out, "--background", background)
        rows.append(np.load(out)["features"])
    assert not np.array_equal(*rows)
    with pytest.raises(UsageError, match="was read with the settings of its manifest"):
        open_images(shards, SourceOptions(background="black"))


@pytest.mark.parametrize("batch_size", [2, 64])
def test_neighbours_are_those_of_a_full_search(batch_size: int, encoder: pirl.Encoder, shards: str) -> None:
    names, features = encoder.embed(shards)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    expected = np.sort(similarity, axis=1)[:, ::-1][:, :3]
    results = find_neighbours(encoder, shards, count=3, batch_size=batch_size)
    assert [each.query for each in results] == names
    assert np.allclose([each.similarities for each in results], expected, atol=1e-3)
    assert all(each.query not in each.names for each in results)


def test_queries_come_from_several_places(
    run: Path, photos: Path, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = photos / "class0" / "001.jpg"
    words = ["neighbours", run, photos, "--query", image, "--query", photos / "class2", "--count", 2]
    results = json.loads(pirl_command(capsys, *words, "--json"))
    assert len(results) == 5
    assert results[0]["names"][0] == "class0/001.jpg"
    assert results[0]["similarities"][0] == pytest.approx(1, abs=1e-3)
    assert "class0/001.jpg (1.000)" in pirl_command(capsys, *words).replace("\n", "")
    assert f"and {IMAGES - 20} more images" in pirl_command(capsys, "neighbours", run, shards)


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def root(run: Path, tmp_path: Path) -> Path:
    """Three runs: one that is evaluated, a later one with another recipe, and one that was preempted."""
    for name, recipe, top1 in (("a", "", 0.5), ("b", "optim.base_lr=0.4", 0.75), ("c", "", None)):
        shutil.copytree(run, tmp_path / name)
        place = Run.at(str(tmp_path / name))
        place.save_recipe(tiny_recipe("train.epochs=1", *filter(None, [recipe])))
        if top1 is not None:
            place.save_evaluation(evaluation(top1))
    (tmp_path / "c" / "DONE.json").unlink()
    lines = (tmp_path / "c" / "events.jsonl").read_text().splitlines()
    lines[-1] = json.dumps({"time": json.loads(lines[-1])["time"] + 9, "event": "preempted", "step": 5})
    (tmp_path / "c" / "events.jsonl").write_text("\n".join(lines))
    return tmp_path


def evaluation(top1: float, test_data: str = "t") -> Evaluation:
    scores = {"knn": {"top1": {"mean": top1, "std": 0.1, "runs": [top1]}}}
    values: dict[str, Any] = {"checkpoint": "step-00000005", "train_data": "d", "test_data": test_data}
    return Evaluation.parse({**values, "pretrained": scores, "random": scores}, "a test")


def test_the_table_of_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(pirl_command(capsys, "runs", root, "--json"))
    assert rows[0]["run"] == "c"
    by_name = {row["run"]: row for row in rows}
    assert {name: row["state"] for name, row in by_name.items()} == {"a": "done", "b": "done", "c": "preempted"}
    assert (by_name["a"]["recipe"], by_name["a"]["epoch"], by_name["a"]["epochs"]) == ("tiny", 1.0, 1)
    assert (by_name["b"]["knn_top1"], by_name["c"]["knn_top1"]) == (0.75, None)
    table = pirl_command(capsys, "runs", root)
    assert " ago" in table
    assert "registered" not in table  # a column without a value


def test_runs_are_compared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(pirl_command(capsys, "compare", root / "a", root / "b", "--json"))
    rows = {row["what"]: row for row in result["rows"]}
    assert [key for key in rows if "." in key] == ["optim.base_lr"]
    assert (rows["optim.base_lr"]["a"], rows["optim.base_lr"]["b"]) == (0.8, 0.4)
    assert rows["knn, pretrained, top-1, %"]["difference"] == "+25.00"
    assert result["notes"] == []
    assert "optim.base_lr" in pirl_command(capsys, "compare", root / "a", root / "b", root / "c")


def test_scores_that_cannot_be_compared_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run.at(str(root / "b")).save_evaluation(evaluation(0.5, "other"))
    printed = pirl_command(capsys, "compare", root / "a", root / "b", root / "c")
    assert "note: c has no evaluation" in printed
    assert "note: the evaluations have different test images: their scores cannot be compared" in printed
