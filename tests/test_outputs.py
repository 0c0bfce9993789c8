"""Places of results: refused before the computing starts, or good at its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from images import flat_folder, folder_of_classes, jpeg
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 (fixtures)
from test_cli import Pirl, files, pirl

from pirl.errors import StorageError, UsageError
from pirl.outputs import check_file_output, check_registry, check_run_output, check_shards_output
from pirl.shards import open_source, write_shards
from pirl.storage import open_storage

__all__ = ["pirl"]  # the fixture


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place, on this machine and on S3."""
    return str(tmp_path / "root") if request.param == "folder" else request.getfixturevalue("bucket")


def fill(root: str) -> None:
    """photos/ in two classes, their shards, a run of version 0.1, a registry, another program's files."""
    for number, name in enumerate(("photos/bee/0.jpg", "photos/bee/1.jpg", "photos/cow/0.jpg")):
        open_storage(root).write_bytes(name, jpeg(number))
    write_shards(open_source(f"{root}/photos"), open_storage(f"{root}/shards"))
    for name in ("run/config.toml", "run/checkpoints/step-1/COMMIT.json", "registry/pirl/versions/v0001/model.json"):
        open_storage(root).write_bytes(name, b"{}")
    open_storage(root).write_bytes("web/manifest.json", b'{"name": "a web page"}')
    open_storage(root).write_bytes("notes/today.txt", b"buy milk")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("shards", "inside the shards"),
        ("shards/run", "inside the shards"),
        ("photos", "inside the images"),
        ("photos/cow/run", "inside the images"),
        ("notes", "not empty and holds no run: today.txt"),
        ("run/checkpoints", "inside the run"),
        ("run/checkpoints/step-1", "inside the run"),
        ("run/steps", "inside the run"),
    ],
)
def test_a_place_that_is_not_for_a_run_is_refused(root: str, place: str, says: str) -> None:
    fill(root)
    before = open_storage(root).list()
    with pytest.raises(UsageError, match=says):
        check_run_output(f"{root}/{place}", data=f"{root}/shards")
    assert open_storage(root).list() == before


@pytest.mark.parametrize("begun", ["config.toml", "lease/00000001.json", "steps/shard-train.json", ".hidden"])
def test_a_run_is_a_place_for_a_run(root: str, begun: str) -> None:
    fill(root)
    open_storage(root).write_bytes(f"begun/{begun}", b"{}")
    before = open_storage(root).list()
    for place in ("begun", "run", "new", "web/run", "new/of/several/levels"):
        check_run_output(f"{root}/{place}", data=f"{root}/shards")
    assert open_storage(root).list() == before


def test_shards_go_to_an_empty_place_or_to_shards(root: str) -> None:
    fill(root)
    for name in ("begun/_work/claim.json", "begun/shard-000000.tar", "web/_work.txt"):
        open_storage(root).write_bytes(name, b"{}")
    before = open_storage(root).list()
    photos = open_source(f"{root}/photos")
    for place in ("shards", "begun", "new", "new/of/several/levels"):
        check_shards_output(f"{root}/{place}", photos)
    for place, text in (("notes", "no shards: today.txt"), ("run", "no shards"), ("photos/cow", "inside the images")):
        with pytest.raises(UsageError, match=text):
            check_shards_output(f"{root}/{place}", photos)
    assert open_storage(root).list() == before


def test_a_registry_is_a_place_for_a_registry(root: str) -> None:
    fill(root)
    for place in ("registry", "new"):
        check_registry(f"{root}/{place}")
    for place, says in (
        ("photos", "holds no registry"),
        ("shards/registry", "inside the shards"),
        ("run", "no regist"),
    ):
        with pytest.raises(UsageError, match=says):
            check_registry(f"{root}/{place}")


def test_a_check_leaves_no_upload_behind(bucket: str) -> None:  # noqa: F811
    check_run_output(f"{bucket}/run")
    name = bucket.removeprefix("s3://")
    assert "Uploads" not in boto3.client("s3", region_name="us-east-1").list_multipart_uploads(Bucket=name)


@pytest.mark.parametrize("place", ["{}/file/run", "/proc/run", "s3://no-such-bucket-of-pirl/run"])
def test_a_place_that_cannot_be_written_is_refused(bucket: str, tmp_path: Path, place: str) -> None:  # noqa: F811
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        check_run_output(place.format(tmp_path))


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sheet.html").mkdir()
    with pytest.raises(StorageError):
        check_file_output(tmp_path / "sheet.html")


TINY = ("loss.negatives=1", "train.batch_size=2")
COMMANDS: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "shard into a run": (lambda at: ["shard", at / "photos", at / "run"], "holds no shards"),
    "train into images": (
        lambda at: ["train", "demo", "--data", at / "shards", "--out", at / "photos/x", *TINY],
        "inside the images",
    ),
    "train onto shards": (
        lambda at: ["train", "demo", "--data", at / "shards", "--out", at / "shards", *TINY],
        "inside the shards",
    ),
    "import": (lambda at: ["import", at / "zoo.torch", "--out", at / "shards/x"], "the shards"),
    "export": (lambda at: ["export", at / "run", at / "shards/trunk.safetensors"], "the shards"),
    "preview": (lambda at: ["preview", "demo", at / "photos", "--out", at / "photos/bee/sheet.html"], "the images"),
    "run": (lambda at: ["run", at / "photos", at / "others", "--root", at / "photos/cow", *TINY], "the images"),
    "register": (lambda at: ["register", at / "run", "--registry", at / "photos"], "no registry"),
    "retrain": (
        lambda at: [
            *("retrain", "--train-source", at / "photos", "--test-source", at / "others", "--root", at / "photos"),
        ],
        "the images",
    ),
}


@pytest.mark.parametrize(("command", "says"), COMMANDS.values(), ids=COMMANDS)
def test_no_command_writes_among_images_or_shards(
    pirl: Pirl, tmp_path: Path, command: Callable[[Path], list[object]], says: str
) -> None:
    folder_of_classes(tmp_path / "photos", classes=2, images=2)
    folder_of_classes(tmp_path / "others", classes=2, images=2, first=10)
    fill(str(tmp_path))
    before = files(tmp_path)
    shown = pirl(*command(tmp_path))
    assert (shown.code, says in shown.err) == (2, True), shown
    assert files(tmp_path) == before


def test_equal_training_and_test_images_are_refused_before_anything_is_written(pirl: Pirl, tmp_path: Path) -> None:
    photos = folder_of_classes(tmp_path / "photos", classes=2, images=2)
    shown = pirl("run", photos, f"{photos}/", "--root", tmp_path / "root", *TINY)
    assert shown.code == 2
    assert "training and test images are the same" in shown.err
    assert not (tmp_path / "root").exists()


def test_results_are_not_computed_for_a_place_that_cannot_be_written(pirl: Pirl, tmp_path: Path) -> None:
    flat_folder(tmp_path / "images", images=1)
    shutil.copy(tmp_path / "images" / next(iter(files(tmp_path / "images"))), tmp_path / "file")
    shown = pirl("preview", "demo", tmp_path / "images", "--out", tmp_path / "file" / "sheet.html")
    assert shown.code == 1
    assert "Cannot write" in shown.err
