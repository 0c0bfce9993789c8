"""Fixtures that several test modules share: a tiny recipe and tiny shards, made once."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from images import flat_folder, folder_of_classes

from pirl.config import Recipe, parse_recipe
from pirl.shards import open_source, write_shards
from pirl.storage import open_storage
from pirl.training.spec import TrainingOptions, TrainingSpec

torch.set_num_threads(1)

# Modules whose tests start programs or ranks, the longest first: `make test-fast` leaves them out.
PROCESSES = [
    "pipeline",
    "readme",
    "train_faults",
    "train",
    "retrain",
    "train_s3",
    "outages",
    "lease",
    "distributed",
    "bank_rows",
    "bank_forward",
    "console",
    "operations",
    "kills",
    "docker",
    "new_option",
    "evaluate_ranks",
    "metrics",
    "cache",
    "benchmarks",
    "submit",
    "schedule",
    "export",
    "plan",
    "storage",
    "data",
    "cli",
    "outputs",
    "ways",
    "gpu",
    "api",
    "monitoring",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes, and run them first: two workers then end at about the same time."""

    def rank(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return PROCESSES.index(name) if name in PROCESSES else len(PROCESSES)

    for item in items:
        if rank(item) < len(PROCESSES):
            item.add_marker(pytest.mark.process)
    items.sort(key=rank)


@contextmanager
def warned(pattern: str) -> Iterator[io.StringIO]:
    """Require a warning of this process on stderr that the pattern matches."""
    with redirect_stderr(io.StringIO()) as printed:
        yield printed
    assert re.search(f"warning: .*{pattern}", printed.getvalue()), printed.getvalue()


TRAIN = [str(Path(sys.executable).with_name("pirl")), "train"]  # as a process
IMAGES = 42  # not a multiple of the batch: every epoch ends with a smaller one

# Everything of PIRL in small: 16-pixel views, 2x2 patches, a trunk of 4 to 32 channels, 5 steps an epoch.
TINY = """
format = 1
name = "tiny"

[views]
image_size = 16
patch_crop_size = 12
grid = 2
patch_size = 5

[model]
block = "basic"
layers = [1, 1, 1, 1]
width = 0.0625
stem = "small"
stem_stride = 1
head = "mlp"
embedding_dim = 8

[loss]
negatives = 16

[optim]
base_lr = 0.8

[train]
epochs = 3
batch_size = 9

[eval]
resize = 16
crop = 16
"""


def tiny_recipe(*overrides: str) -> Recipe:
    return parse_recipe(TINY, overrides)


def pirl_train(*arguments: object) -> int:
    """Run `pirl train` in this process; returns its exit code."""
    from pirl import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pirl", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def training(recipe: str | Path, data: str, out: object, overrides: Sequence[str] = (), **options: Any) -> TrainingSpec:
    """The specification of a training by the names of its options."""
    return TrainingSpec.parse(
        str(recipe), data=data, out=str(out), overrides=overrides, options=TrainingOptions(**options)
    )


@pytest.fixture
def tiny() -> Recipe:
    return tiny_recipe()


@pytest.fixture
def tiny_toml(tmp_path: Path) -> Path:
    """The tiny recipe as a file, for the command line."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def shards_of(folder: Path, out: Path) -> str:
    storage = open_storage(out)
    write_shards(open_source(str(folder)), storage, shard_bytes=16 << 10)
    return storage.uri


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of 42 labelled images in 3 classes and several shards."""
    root = tmp_path_factory.mktemp("tiny")
    return shards_of(folder_of_classes(root / "images", classes=3, images=IMAGES // 3, width=24, height=20), root / "s")


@pytest.fixture(scope="session")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of as many images, unlabelled, in other sizes: another data set."""
    root = tmp_path_factory.mktemp("other")
    return shards_of(flat_folder(root / "images", images=IMAGES, width=20, height=28), root / "s")
