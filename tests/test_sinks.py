"""TensorBoard, MLflow, Weights & Biases: each file is read back by its own library."""

from __future__ import annotations

import json
import math
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import tiny_recipe, warned
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401

from pirl import extras
from pirl.errors import ConfigError, UsageError
from pirl.metrics import ALWAYS, SINKS, Context, open_log
from pirl.metrics import background as module
from pirl.metrics.background import Background
from pirl.metrics.wandb import has_login
from pirl.run import Run
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options, TrainingSpec, training_options
from pirl.training.start import plan
from pirl.world import World

Curve = dict[int, float]
BLOCK = 32768


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a server nor a login."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def of_tensorboard(run: Path) -> Curve:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "sinks" / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


def of_mlflow(run: Path) -> Curve:
    from mlflow import MlflowClient

    kept = json.loads((run / "sinks" / "mlflow.json").read_text())
    client = MlflowClient(tracking_uri=kept["tracking_uri"])
    (only,) = client.search_runs([client.get_experiment_by_name("pirl").experiment_id])
    assert only.info.run_id == kept["run_id"]
    assert only.info.status == "FINISHED"
    assert only.data.params["optim.base_lr"] == "0.8"
    assert only.data.tags["pirl.run"] == open_storage(run).uri
    history = client.get_metric_history(kept["run_id"], "loss")
    return {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format behind a header of 7 bytes, in blocks of 32 KiB."""
    position, parts = 7, []
    while position + 7 <= len(data):
        if (left := BLOCK - position % BLOCK) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def of_wandb(run: Path) -> Curve:
    from wandb.proto import wandb_internal_pb2

    curve: Curve = {}
    ids = set()
    for path in sorted((run / "sinks" / "wandb").rglob("run-*.wandb")):  # folders are named by their time
        if path.parent.is_symlink():
            continue
        ids.add(path.name)
        for data in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            line = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if "loss" in line:
                curve[int(line["step"])] = line["loss"]
    assert len(ids) == 1  # one run, however often it was resumed
    return curve


READERS: dict[str, Callable[[Path], Curve]] = {"tensorboard": of_tensorboard, "mlflow": of_mlflow, "wandb": of_wandb}


def read_back(name: str, run: Path, complete: Callable[[Curve], bool]) -> Curve:
    """The curve once it is complete: the process of Weights & Biases writes its last lines after `finish` returned."""
    deadline = time.monotonic() + 60
    while not complete(curve := READERS[name](run)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return curve


installed = [name for name in extras.SINKS if not extras.missing(name)]


def log_steps(run: Path | str, names: list[str], first: int, last: int, final: str) -> None:
    """Log metrics of some steps by these sinks alone, as one process of a training does."""
    storage = open_storage(run)
    context = Context(storage, steps=9, epochs=1, recipe=tiny_recipe())
    log = open_log(context, ["jsonl", *names])
    log.resume(first)
    for step in range(first + 1, last + 1):
        log.step(step=step, epoch=step / 9, loss=10.0 * first + step, lr=0.1)
    log.event(final, step=last)
    log.flush()
    log.close()


@pytest.mark.parametrize("name", READERS)
def test_a_resumed_run_is_one_curve(name: str, tmp_path: Path) -> None:
    """Steps after the checkpoint are made again: the last value counts."""
    if name not in installed:
        pytest.skip(f"the extra {name} is not installed")
    log_steps(tmp_path / "run", [name], 0, 5, "preempted")
    if name == "wandb":
        time.sleep(1.1)  # it names its folder by the second, and a process does not restart within one
    log_steps(tmp_path / "run", [name], 3, 6, "done")
    expected = {1: 1.0, 2: 2.0, 3: 3.0, 4: 34.0, 5: 35.0, 6: 36.0}
    assert read_back(name, tmp_path / "run", lambda curve: curve == expected) == expected


def test_a_training_feeds_several_at_once(tmp_path: Path, shards: str) -> None:
    if not installed:
        pytest.skip("no extra is installed")
    options = Options(data=shards, out=str(tmp_path / "run"), log_every=1, sinks=",".join(installed))
    train(tiny_recipe("train.epochs=1"), options, World())
    expected = {line["step"]: line["loss"] for line in Run.at(str(tmp_path / "run")).record().metrics}
    assert len(expected) == 5
    for name in installed:
        curve = read_back(name, tmp_path / "run", lambda curve: curve.keys() == expected.keys())
        assert curve.keys() == expected.keys()
        assert all(math.isclose(curve[step], expected[step], rel_tol=1e-4) for step in expected)


@pytest.mark.usefixtures("s3_environment")
def test_files_of_a_remote_run_are_copied_to_it(bucket: str) -> None:  # noqa: F811
    pytest.importorskip("tensorboard")
    log_steps(f"{bucket}/run", ["tensorboard"], 0, 3, "done")
    names = [name for name in open_storage(f"{bucket}/run").list("sinks/tensorboard/") if "tfevents" in name]
    assert len(names) == 1
    assert open_storage(f"{bucket}/run").size(names[0]) > 100


def test_mlflow_needs_a_server_for_a_remote_run(bucket: str) -> None:  # noqa: F811
    pytest.importorskip("mlflow")
    with warned("MLflow failed and is left out, training continues: UsageError: MLFLOW_TRACKING_URI is not set"):
        log_steps(f"{bucket}/run", ["mlflow"], 0, 3, "done")


class Toy(Background):
    """A sink whose place hangs, or fails at a step."""

    name = "tensorboard"
    hang = threading.Event()
    fails_at = 0

    def write(self, values: object) -> None:
        if self.fails_at:
            raise OSError("the place is gone")
        self.hang.wait()


@pytest.mark.parametrize(
    ("fails_at", "message"),
    [(1, "Toy failed and is left out, training continues: OSError"), (0, "too slow: .* lines? of metrics left out")],
)
def test_a_place_that_fails_or_hangs_never_harms(
    fails_at: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SINKS, "toy", Toy)
    monkeypatch.setattr(module, "CLOSE_S", 0.3)
    monkeypatch.setattr(module, "LINES", 4)
    monkeypatch.setattr(Toy, "fails_at", fails_at)
    monkeypatch.setattr(Toy, "hang", threading.Event())
    if extras.missing("tensorboard"):
        monkeypatch.setitem(extras.EXTRAS, "tensorboard", ())
    with warned(message):
        log_steps(tmp_path / "run", ["toy"], 0, 9, "done")
    Toy.hang.set()
    assert len(Run.at(str(tmp_path / "run")).record().metrics) == 9


def test_a_missing_library_is_named_before_the_start(
    tmp_path: Path, shards: str, tiny_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(extras.EXTRAS, "mlflow", ("absent_library",))
    spec = TrainingSpec.parse(str(tiny_toml), data=shards, out=str(tmp_path / "run"), options="sinks=mlflow")
    with pytest.raises(UsageError, match="--sinks mlflow needs absent_library") as caught:
        plan(spec)
    assert caught.value.hint == "pip install 'pirl-pipeline[mlflow]'"
    with warned(r"MLflow failed and is left out, .* absent_library"):
        log_steps(tmp_path / "run", ["mlflow"], 0, 2, "done")


def test_names_are_checked() -> None:
    assert training_options("sinks=wandb,tensorboard,wandb").sink_names == ["wandb", "tensorboard"]
    assert training_options([]).sink_names == []
    with pytest.raises(ConfigError, match=r"unknown sink 'tensorbord'. Did you mean 'tensorboard'"):
        training_options("sinks=tensorbord")
    assert set(SINKS) == {*ALWAYS, *extras.SINKS}


def test_a_stored_login_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_login()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_login()
