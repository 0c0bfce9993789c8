"""The program as a user meets it: what it prints, its exit codes, and its answers to mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TRAIN
from images import cmyk_jpeg, flat_folder, folder_of_classes, grey16_png, jpeg, truncated_jpeg

from pirl import cli
from pirl.config import load_recipe, parse_recipe, recipe_names
from pirl.shards import ShardReader


@dataclass
class Shown:
    code: int
    out: str
    err: str


Pirl = Callable[..., Shown]


@pytest.fixture
def pirl(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pirl:
    """Run a `pirl` command in this process. A traceback fails the test: it is an exception here."""

    def run(*arguments: object) -> Shown:
        monkeypatch.setattr(sys, "argv", ["pirl", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        shown = capfd.readouterr()
        return Shown(exit.value.code if isinstance(exit.value.code, int) else 0, shown.out, shown.err)

    return run


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what commands say ---------------------------------------------------------------------------


def test_every_command_has_an_example_in_its_help(pirl: Pirl) -> None:
    listed = pirl("--help").out
    names = re.findall(r"^│ ([a-z]+) ", listed, re.MULTILINE)
    assert {"demo", "shard", "train", "eval", "report", "register", "export", "recipes", "show", "preview"} <= set(
        names
    )
    for name in names:
        shown = pirl(name, "--help")
        assert shown.code == 0
        assert f"Example: pirl {name}" in " ".join(shown.out.split()), name


def test_recipes_are_listed_as_json(pirl: Pirl) -> None:
    rows = json.loads(pirl("recipes", "--json").out)
    assert [row["recipe"] for row in rows] == recipe_names()
    published = {row["recipe"]: row["published_top1"] for row in rows}
    assert published["r50-800ep-mlp"] == 69.9


def test_show_prints_a_recipe_that_reads_back(pirl: Pirl) -> None:
    shown = pirl("show", "demo", "train.epochs=3", "loss.kind=nce")
    assert shown.code == 0
    assert parse_recipe(shown.out) == load_recipe("demo", ["train.epochs=3", "loss.kind=nce"])


def test_doctor_finds_torch_and_fails_only_on_what_is_bad(pirl: Pirl) -> None:
    shown = pirl("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(shown.out)}
    assert checks["torch"]["state"] == "ok"
    assert (shown.code == 0) == all(check["state"] != "bad" for check in checks.values())
    assert all(check["fix"] for check in checks.values() if check["state"] != "ok")


def test_doctor_names_a_storage_that_is_down(pirl: Pirl, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PIRL_BUCKET": "s3://bucket",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-shown",
        "PIRL_S3_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    shown = pirl("doctor", "--json")
    check = next(check for check in json.loads(shown.out) if check["name"] == "S3")
    assert shown.code == 1
    assert check["state"] == "bad"
    assert "127.0.0.1:9" in check["finding"]
    assert "not-to-be-shown" not in shown.out


def test_lists_are_empty_before_anything_ran(pirl: Pirl, tmp_path: Path) -> None:
    assert pirl("runs", tmp_path).out == "none\n"
    assert json.loads(pirl("models", tmp_path / "registry", "--json").out) == []


def test_a_dry_run_says_what_it_would_do_and_does_nothing(
    pirl: Pirl, tmp_path: Path, shards: str, tiny_toml: Path
) -> None:
    source = flat_folder(tmp_path / "images", images=3)
    assert "3 images" in pirl("shard", source, tmp_path / "out", "--dry-run").out
    shown = pirl("train", tiny_toml, "--data", shards, "--out", tmp_path / "run", "--dry-run", "train.epochs=2")
    assert shown.code == 0
    assert "2 epochs of 42 images, 5 steps each" in shown.out
    assert {path.name for path in tmp_path.iterdir()} == {"images", "tiny.toml"}


# --- images that are not as one hopes ------------------------------------------------------------


def test_odd_images_are_taken_and_unreadable_ones_named(pirl: Pirl, tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "images", images=4)
    (folder / "cmyk.jpg").write_bytes(cmyk_jpeg())
    (folder / "deep.png").write_bytes(grey16_png())
    (folder / "small.jpg").write_bytes(jpeg(1, 5, 3))
    (folder / "cut.jpg").write_bytes(truncated_jpeg())
    shown = pirl("shard", folder, tmp_path / "out", "--max-bad-share", "0.2", "--processes", "1")
    assert shown.code == 0, shown.err
    assert "7 images" in shown.out
    assert "1 quarantined" in shown.out
    assert "cut.jpg" in (tmp_path / "out" / "quarantine.json").read_text()
    assert len(ShardReader(tmp_path / "out")) == 7
    preview = pirl("preview", "demo", folder, "--out", tmp_path / "sheet.html", "--count", "3")
    assert preview.code == 0, preview.err


@pytest.mark.parametrize(
    ("prepare", "code", "says"),
    [
        (lambda folder: None, 2, "nowhere"),
        (lambda folder: folder.mkdir(), 1, "no image"),
        (
            lambda folder: flat_folder(folder, 0) and (folder / "a.jpg").write_bytes(truncated_jpeg()),
            1,
            "unreadable|readable",
        ),
    ],
    ids=["no folder", "empty folder", "no readable image"],
)
def test_a_source_without_images(
    pirl: Pirl, tmp_path: Path, prepare: Callable[[Path], object], code: int, says: str
) -> None:
    folder = tmp_path / "nowhere"
    prepare(folder)
    shown = pirl("shard", folder, tmp_path / "out", "--processes", "1")
    assert shown.code == code
    assert re.search(says, shown.err), shown.err
    assert "->" in shown.err
    assert not (tmp_path / "out" / "manifest.json").exists()


# --- shards, recipes and runs that do not fit ----------------------------------------------------


@pytest.fixture
def copied(shards: str, tmp_path: Path) -> Path:
    """The tiny shards, to be damaged."""
    return Path(shutil.copytree(shards.removeprefix("file://"), tmp_path / "copied"))


def cut_a_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.tar"))[1]
    path.write_bytes(path.read_bytes()[:-2000])


def drop_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.tar"))[0].unlink()


def count_one_more(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["images"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


def cut_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:100])


@pytest.mark.parametrize("damage", [cut_a_shard, drop_a_shard, count_one_more, cut_the_manifest])
def test_damaged_shards_stop_a_training_before_it_starts(
    pirl: Pirl, copied: Path, tiny_toml: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(copied)
    shown = pirl("train", tiny_toml, "--data", copied, "--out", tmp_path / "run")
    assert shown.code == 1
    assert str(copied) in shown.err
    assert "->" in shown.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["r50-200ep-liner"], "Did you mean 'r50-200ep-linear'"),
        (["{tiny}", "train.epoch=3"], "Did you mean 'train.epochs'"),
        (["{tiny}", "train.epochs=0", "loss.temperature=-1", "model.head=mpl"], "3 problems"),
        (["{tiny}", "train.batch_size=64", "loss.negatives=50"], "42 images to train on.*only 42 rows"),
        (["{tiny}", "views.patch_size=3"], "too small"),
        (["{folder}/none.toml"], "cannot read"),
    ],
)
def test_a_wrong_recipe_is_a_usage_error_with_all_its_reasons(
    pirl: Pirl, shards: str, tiny_toml: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    filled = [argument.format(tiny=tiny_toml, folder=tmp_path) for argument in arguments]
    shown = pirl("train", *filled, "--data", shards, "--out", tmp_path / "run")
    assert shown.code == 2
    assert re.search(says, shown.err), shown.err
    assert "->" in shown.err
    assert not (tmp_path / "run").exists()


def test_a_run_takes_no_other_recipe_and_no_other_data(
    tmp_path: Path, pirl: Pirl, shards: str, other_shards: str, tiny_toml: Path
) -> None:
    run = tmp_path / "run"
    command = [
        *TRAIN,
        str(tiny_toml),
        "--data",
        shards,
        "--out",
        str(run),
        "train.epochs=1",
    ]
    subprocess.run([*command, "--processes", "1"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    before = files(run)
    other = pirl("train", tiny_toml, "--data", shards, "--out", run, "train.epochs=1", "loss.temperature=0.2")
    assert other.code == 2
    assert "loss.temperature: 0.07 -> 0.2" in other.err
    moved = pirl("train", tiny_toml, "--data", other_shards, "--out", run, "train.epochs=1")
    assert moved.code == 2
    assert "trained on other data" in moved.err
    assert files(run) == before

    exported = pirl("export", run, tmp_path / "trunk.safetensors")
    assert exported.code == 0
    assert (tmp_path / "trunk.safetensors").stat().st_size > 1000
    missing = pirl("export", f"{run}/checkpoints/step-00000099", tmp_path / "other.safetensors")
    assert missing.code == 1
    assert "complete ones here: step-00000000, step-00000005" in missing.err
    rows = json.loads(pirl("runs", tmp_path, "--json").out)
    assert [(row["run"], row["state"], row["step"]) for row in rows] == [("run", "done", 5)]


def test_an_evaluation_needs_labels_and_a_run(pirl: Pirl, shards: str, other_shards: str, tmp_path: Path) -> None:
    shown = pirl("eval", tmp_path / "no-run", "--data", shards, "--test", shards)
    assert shown.code == 1
    assert "no checkpoint" in shown.err
    nothing = pirl("register", tmp_path / "no-run", "--registry", tmp_path / "registry")
    assert nothing.code == 1
    assert "no evaluation" in nothing.err
    assert list(tmp_path.iterdir()) == []


# --- storage that does not serve -----------------------------------------------------------------


def test_a_storage_that_cannot_be_reached(
    pirl: Pirl, tmp_path: Path, tiny_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-shown",
        "PIRL_S3_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    shown = pirl("train", tiny_toml, "--data", "s3://bucket/shards", "--out", tmp_path / "run")
    assert shown.code == 1
    assert "127.0.0.1:9" in shown.err
    assert "not-to-be-shown" not in shown.err
    wrong = pirl("train", tiny_toml, "--data", "s4://bucket/shards", "--out", tmp_path / "run")
    assert wrong.code == 2
    assert "s3" in wrong.err


def test_an_output_that_cannot_be_written(pirl: Pirl, tmp_path: Path) -> None:
    images = folder_of_classes(tmp_path / "images", classes=1, images=2)
    (tmp_path / "file").write_text("in the way")
    shown = pirl("shard", images, tmp_path / "file" / "out", "--processes", "1")
    assert shown.code == 1
    assert "->" in shown.err
    assert (tmp_path / "file").read_text() == "in the way"
