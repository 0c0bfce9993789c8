"""Evaluations on several ranks: the same numbers as on one, resumed after an interruption, and a dead rank is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ranks
from conftest import shards_of, tiny_recipe
from images import folder_of_classes

from pirl.backends import open_backend
from pirl.errors import UsageError
from pirl.evaluate import Execution, Progress, Protocol, ZooProtocol, evaluate, evaluate_layers
from pirl.evaluate.crops import LabelledCrops
from pirl.evaluate.features import Extractor, extract_all
from pirl.evaluate.parts import Parts
from pirl.evaluate.spec import EvaluationSpec
from pirl.evaluate.start import progress_of
from pirl.model import build_model
from pirl.programs import EvaluationProgram
from pirl.run import Run
from pirl.shards import ShardReader
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World

QUICK = Protocol(seeds=(0, 1), epochs=2, min_steps=60, neighbours=5)
ZOO = ZooProtocol(epochs=2, batch_size=16, base_lr=0.1)


@pytest.fixture(scope="module")
def run(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    train(tiny_recipe("train.epochs=2"), Options(data=shards, out=str(out), log_every=5), World())
    return open_storage(out).uri


@pytest.fixture(scope="module")
def test_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("test")
    return shards_of(folder_of_classes(root / "images", classes=3, images=5, width=20, height=24), root / "s")


def copy_of(run: str, folder: Path) -> str:
    shutil.copytree(open_storage(run).path, folder)  # type: ignore[attr-defined]
    return open_storage(folder).uri


def flat(value: Any, path: str = "") -> dict[str, float]:
    """Return the numbers of a JSON value by their paths, but for times and the number of ranks."""
    if isinstance(value, Mapping):
        items = [(f"{path}/{key}", each) for key, each in value.items() if key not in ("seconds", "ranks")]
    elif isinstance(value, list):
        items = [(f"{path}/{index}", each) for index, each in enumerate(value)]
    else:
        return {path: value} if isinstance(value, int | float) else {}
    return {name: number for key, each in items for name, number in flat(each, key).items()}


def both(world: World, run: str, zoo_run: str, shards: str, test: str) -> dict[str, Any]:
    fast = evaluate(run, shards, test, QUICK, Execution(world))
    return {"fast": fast.to_json(), "zoo": evaluate_layers(zoo_run, shards, test, ZOO, Execution(world)).to_json()}


def test_the_same_numbers_on_any_number_of_ranks(run: str, shards: str, test_shards: str, tmp_path: Path) -> None:
    alone = flat(both(World(), run, copy_of(run, tmp_path / "1"), shards, test_shards))
    assert len(alone) > 60
    for size in (2, 4):
        out = copy_of(run, tmp_path / str(size))
        results = ranks.run(both, size, tmp_path / f"ranks-{size}", run, out, shards, test_shards)
        assert results[0]["fast"]["ranks"] == size
        for result in results:
            assert flat(result) == pytest.approx(alone, abs=1e-5)
        layers = Run.at(out).layers()
        assert layers
        assert layers.to_json() == results[0]["zoo"]


def foreign(world: World, run: str, data: str, test: str) -> list[str]:
    """Return the progress that an early checkpoint's evaluation on other images names, and a refusal."""
    early = f"{run}/checkpoints/step-00000000"
    try:
        evaluate(early, data, data + "-copy", QUICK, Execution(world))
    except UsageError as error:
        return [evaluate(early, data, test, QUICK, Execution(world)).unfinished, str(error)]
    return []


def test_ranks_agree_on_other_images_than_those_of_the_training(run: str, test_shards: str, tmp_path: Path) -> None:
    images = folder_of_classes(tmp_path / "images", classes=3, images=7, width=24, height=20, first=500)
    data = shards_of(images, tmp_path / "data")
    for image in list(images.rglob("*.jpg"))[::2]:  # the others are training images too
        image.unlink()
    shards_of(images, tmp_path / "data-copy")
    alone = foreign(World(), run, data, test_shards)
    assert alone[0] == "in epoch 1 of 2"
    assert "test images" in alone[1]
    assert ranks.run(foreign, 2, tmp_path / "ranks", run, data, test_shards) == [alone] * 2


# ---- resuming


class Stop(Exception):
    """An interruption."""


def stop_after(phase: str, units: int) -> Progress:
    progress = Progress()
    advance = progress.advance

    def stopping(count: int) -> None:
        advance(count)
        if progress.phase == phase and progress.done >= units:
            raise Stop

    progress.advance = stopping  # type: ignore[method-assign]
    return progress


def test_features_that_were_saved_are_not_computed_again(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped as one process, resumed as three; a damaged part is computed again, with a warning."""
    features = sys.modules["pirl.evaluate.features"]
    monkeypatch.setattr(features, "CHUNK", 5)
    recipe, folder = tiny_recipe(), open_storage(tmp_path)
    crops = LabelledCrops(ShardReader(shards), recipe, seed=0)
    extractor = Extractor({"a": build_model(recipe).trunk.eval()}, recipe, World().device)
    alone = extract_all(extractor, crops, World(), 0, Parts(None, "train"), Progress())["a"].x
    with pytest.raises(Stop):
        extract_all(
            extractor, crops, World(), 0, Parts(folder, "train", every_s=0), stop_after("features of train", 25)
        )
    assert len(list(folder.list())) == 4
    computed: list[range] = []
    compute = features.Table.compute

    def spy(self: Any, ids: range, workers: int) -> Any:
        computed.append(ids)
        return compute(self, ids, workers)

    monkeypatch.setattr(features.Table, "compute", spy)
    monkeypatch.setattr(World, "broadcast", lambda self, tensor: tensor)
    monkeypatch.setattr(World, "gather_objects", lambda self, value: [value])
    for rank in range(3):
        part = extract_all(extractor, crops, World(rank, 3), 0, Parts(folder, "train"), Progress())["a"]
        assert (part.x == alone[part.first : part.first + len(part.x)]).all()
    assert computed == [range(20, 28), range(28, 42)]
    name = sorted(folder.list())[1]
    folder.write_bytes(name, b"damaged")
    again = extract_all(extractor, crops, World(), 0, Parts(folder, "train"), Progress())["a"]
    assert (again.x == alone).all()
    assert computed[2:] == [range(5, 10), range(20, 42)]


def test_the_zoo_resumes_after_its_last_epoch(
    run: str, shards: str, test_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pirl.evaluate.states"].EpochStates.__init__, "__defaults__", (World(), 0.0))
    whole, out = copy_of(run, tmp_path / "whole"), copy_of(run, tmp_path / "out")
    protocol = ZooProtocol(epochs=4, batch_size=16)
    expected = evaluate_layers(whole, shards, test_shards, protocol)
    with pytest.raises(Stop):
        evaluate_layers(out, shards, test_shards, protocol, Execution(progress=stop_after("zoo", 100)))
    assert list((open_storage(out) / "eval_parts").list())
    notes: list[str] = []
    result = evaluate_layers(out, shards, test_shards, protocol, Execution(progress=Progress(notes.append)))
    assert "resumed after epoch 2" in notes
    assert flat(result.to_json()) == flat(expected.to_json())
    assert not list((open_storage(out) / "eval_parts").list())


# ---- the program


def program(run: str, shards: str, test: str, *options: str) -> EvaluationProgram:
    return EvaluationProgram(EvaluationSpec.parse(run, data=shards, test=test, options=options))


def test_the_program_by_its_backend(
    run: str, shards: str, test_shards: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two ranks as `pirl eval` starts them; a rank that dies is named, and the next start completes the result."""
    out = copy_of(run, tmp_path / "run")
    wanted = program(out, shards, test_shards, "protocol=zoo", "epochs=1", "processes=2")
    assert not wanted.is_complete()
    assert open_backend("local").plan(wanted).startswith("protocol zoo: step-00000010 of ")
    folder = tmp_path / "sitecustomize"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import pirl.evaluate.zoo as zoo\n"
        "    zoo.score_heads = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        assert open_backend("local").run(wanted) == 1
    assert f"rank 1 ended with signal {signal.SIGKILL.value}" in capfd.readouterr().err
    assert open_backend("local").run(wanted) == 0
    assert wanted.is_complete()
    result = Run.at(out).layers()
    assert result
    assert result.ranks == 2
    assert not program(out, shards, test_shards, "protocol=zoo", "epochs=2").is_complete()


def test_every_machine_of_an_evaluation_answers_prometheus(
    run: str, shards: str, test_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its first rank does: another one has no server. A pod that does not answer is a pod in trouble."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("PIRL_METRICS_PORT", str(port))
    spec = EvaluationSpec.parse(run, data=shards, test=test_shards)
    progress_of(spec, World(rank=3, size=4, local_rank=1))
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)
    progress_of(spec, World(rank=2, size=4, local_rank=0))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        assert reply.status == 200


def test_a_job_evaluates_under_a_name_of_its_own() -> None:
    """The job that trains the same run keeps its own."""
    from pirl.jobs.pod import job_name

    spec = EvaluationSpec.parse("s3://bucket/run", data="s3://bucket/a", test="s3://bucket/b", options="workers=3")
    wanted = EvaluationProgram(spec)
    names = {job_name(wanted.out), job_name(wanted.out, wanted.module)}
    assert len(names) == 2
    assert all(len(name) <= 44 for name in names)
    assert wanted.locations.keys() == {"run", "data", "test"}
    assert json.loads(wanted.file()[1])["workers"] == 3
