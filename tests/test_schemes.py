"""A storage scheme is one class and one line of `SCHEMES`: shards, runs and registries then live there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import tiny_recipe
from memory_storage import OBJECTS, MemoryStorage

from pirl.backends import ClusterBackend
from pirl.errors import UsageError
from pirl.jobs.pytorchjob import PyTorchJob
from pirl.run import Run, Workspace
from pirl.storage import SCHEMES, local_path, open_storage, split_file_uri
from pirl.training.loop import train
from pirl.training.spec import Options, TrainingSpec
from pirl.world import World


@pytest.fixture(autouse=True)
def scheme(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(SCHEMES, "mem", MemoryStorage)
    yield
    OBJECTS.clear()


def test_the_uri_opens_the_storage() -> None:
    storage = open_storage("mem://box/prefix")
    assert isinstance(storage, MemoryStorage)
    assert open_storage((storage / "a").uri) == storage / "a"
    assert local_path(storage) is None
    folder, name = split_file_uri("mem://box/report.html")
    assert (folder.uri, name) == ("mem://box", "report.html")
    with pytest.raises(UsageError, match="Did you mean 'mem'"):
        open_storage("men://box")


def test_specifications_and_backends_take_it() -> None:
    made = TrainingSpec.parse("demo", data="mem://box/train", out="mem://box/run")
    assert made.data == "mem://box/train"
    ClusterBackend((PyTorchJob(),)).check_location("out", "mem://box/run")


def test_a_run_lives_there(shards: str) -> None:
    """Lease, checkpoints, metrics and completion, and a second call that is a no-op."""
    options = Options(data=shards, out=Workspace("mem://box").run_uri("tiny"), workers=0)
    recipe = tiny_recipe("train.epochs=1")
    train(recipe, options, World())
    run = Run.at("mem://box/runs/tiny")
    assert run.completion() is not None
    assert run.recipe() == recipe
    before = dict(OBJECTS)
    train(recipe, options, World())
    assert {key for key in OBJECTS if "/lease/" not in key} == {key for key in before if "/lease/" not in key}
