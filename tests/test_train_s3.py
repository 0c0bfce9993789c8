"""Trainings that read from and write to an S3 server which fails: they go on, and what they have saved is whole."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import certificates
import pytest
import ranks
from conftest import shards_of, tiny_recipe
from faulty_s3 import FAULTS, FaultyProcess, FaultyS3
from images import folder_of_classes
from paced import Act, HoldAt, SlowFrom, train_paced
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401
from test_train import assert_same_bits, final, wait_for

from pirl import logs
from pirl.checkpoint import Checkpoints
from pirl.config import Recipe
from pirl.metrics import read_lines
from pirl.storage import open_storage, retries
from pirl.training.spec import Options
from pirl.world import World

READ_TIMEOUT_S = 2


def train_counting(world: World, recipe: Recipe, options: Options, *acts: Act) -> int:
    """A training on a rank, and how many requests it has repeated."""
    train_paced(world, recipe, options, *acts)
    return retries()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 42 images that are too large to be kept decoded: each epoch reads them anew."""
    root = tmp_path_factory.mktemp("larger")
    shards_of(folder_of_classes(root / "images", classes=3, images=14, width=80, height=72), root / "s")
    return root / "s"


class Reader:
    """Somebody else who loads the newest checkpoint again and again, past the faults."""

    def __init__(self, out: str) -> None:
        self.checkpoints = Checkpoints(open_storage(out) / "checkpoints")
        self.steps: list[int] = []
        self.wrong: list[BaseException] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        try:
            while not self._ended.wait(0.1):
                if found := self.checkpoints.load():
                    self.steps.append(found[0].cursor.step)
        except BaseException as error:
            self.wrong.append(error)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.fixture
def environment(bucket: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:  # noqa: F811
    """What ranks need to reach the server through a proxy; this process reaches it directly."""
    monkeypatch.setenv("PIRL_S3_ATTEMPTS", "5")
    monkeypatch.setenv("PIRL_S3_READ_TIMEOUT_S", str(READ_TIMEOUT_S))
    names = [name for name in os.environ if name.startswith(("AWS_", "PIRL_S3_"))]

    def refuse(text: str, **_: object) -> None:
        raise AssertionError(text)

    monkeypatch.setattr(logs, "warn", refuse)  # a checkpoint that was passed over
    return {name: os.environ[name] for name in names} | {
        "PIRL_CACHE_GB": "0",
        "AWS_REGION": "us-east-1",
        "PIRL_STORAGE_PATIENCE_S": "180",
    }


def faulty(kind: str, environment: dict[str, str], folder: Path) -> FaultyS3 | FaultyProcess:
    """The proxy for an outage of this kind, which `environment` then leads to."""
    endpoint, share, slow_s = environment["AWS_ENDPOINT_URL"], 0.1, READ_TIMEOUT_S + 1
    if kind == "stopped":
        proxy: FaultyS3 | FaultyProcess = FaultyProcess(endpoint, share, slow_s)
    else:
        pair = None
        if kind == "certificate":
            bundle, pair = certificates.contexts(folder)
            environment["AWS_CA_BUNDLE"] = str(bundle)
            environment["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_required"  # the proxy reads no chunks
        proxy = FaultyS3(endpoint, share, slow_s, certificates=pair)
    environment["AWS_ENDPOINT_URL"] = proxy.url
    return proxy


@pytest.mark.parametrize(
    ("epochs", "kind", "away_s", "kill"),
    [
        (6, "reset", 3, False),
        pytest.param(24, "reset", 60, True, marks=pytest.mark.slow),
        pytest.param(24, "drop", 60, True, marks=pytest.mark.slow),
        pytest.param(24, "hang", 30, True, marks=pytest.mark.slow),
        pytest.param(24, "503", 30, True, marks=pytest.mark.slow),
        pytest.param(24, "refused", 15, True, marks=pytest.mark.slow),
        pytest.param(24, "certificate", 30, True, marks=pytest.mark.slow),
        pytest.param(24, "stopped", 30, True, marks=pytest.mark.slow),
    ],
)
def test_a_server_that_fails_a_tenth_of_the_requests_and_goes_away(
    bucket: str,  # noqa: F811
    environment: dict[str, str],
    local: Path,
    tmp_path: Path,
    epochs: int,
    kind: str,
    away_s: float,
    kill: bool,
) -> None:
    recipe = tiny_recipe(f"train.epochs={epochs}")
    data, out = f"{bucket}/data", f"{bucket}/run"
    for path in local.iterdir():
        open_storage(data).upload(path, path.name)
    quiet = Options(data=str(local), out=str(tmp_path / "quiet"))
    assert ranks.finish(ranks.start(train_counting, 2, tmp_path / "quiet.ranks", recipe, quiet), 400) == [0, 0]

    began, folder, output = time.monotonic(), tmp_path / "ranks", lambda: ranks.output(tmp_path / "ranks")
    half, away, killed = epochs * 5 // 2, tmp_path / "away", tmp_path / "killed"
    acts = [HoldAt(7, away), *([HoldAt(half, killed)] if kill else [])]
    with faulty(kind, environment, tmp_path) as proxy, Reader(out) as reader:
        options = Options(data=data, out=out, log_every=1, checkpoint_every_s=0.5, keep=1000)

        def start() -> list[Any]:
            return ranks.start(train_counting, 2, folder, recipe, options, *acts, **environment)

        processes = start()
        wait_for(lambda: "step 6/" in output(), 240)
        proxy.begin(kind)
        away.touch()
        time.sleep(away_s)
        proxy.end()
        if kill:
            wait_for(lambda: f"step {half - 1}/" in output(), 240)
            assert processes[1].pid
            os.kill(processes[1].pid, signal.SIGKILL)
            killed.touch()
            assert None not in ranks.finish(processes)
            processes = start()
        codes = ranks.finish(processes, 400)
        assert codes == [0, 0], (codes, output(), ranks.output(folder, 1))
    repeated = [int(ranks.result(folder, rank)) for rank in range(2)]
    events = read_lines(open_storage(out), "events.jsonl")
    kinds = [event["event"] for event in events]
    print(
        f"{proxy.count()}; {repeated} repeated by the ranks that came to the end; checkpoints: "
        f"{kinds.count('checkpoint')} saved, {kinds.count('checkpoint_failed')} failed; "
        f"loaded {len(reader.steps)} times meanwhile; {time.monotonic() - began:.0f} s"
    )
    assert not reader.wrong
    assert reader.steps == sorted(reader.steps)
    assert set(FAULTS) <= proxy.faults.keys()
    assert sum(repeated) > 0

    checkpoints = Checkpoints(open_storage(out) / "checkpoints")
    saved = {event["step"] for event in events if event["event"] == "checkpoint"}
    assert len(saved) > 2
    for step in saved:  # what the training has said to be saved
        found = checkpoints.load(f"step-{step:08d}")
        assert found is not None
    assert_same_bits(final(out), final(tmp_path / "quiet"))
    run, undisturbed = open_storage(out), open_storage(str(tmp_path / "quiet"))
    assert [line["step"] for line in read_lines(run, "metrics.jsonl")] == list(range(1, epochs * 5 + 1))
    for name in ("steps", "images_seen"):
        assert run.read_json("DONE.json")[name] == undisturbed.read_json("DONE.json")[name]


def test_steps_are_made_while_the_server_is_away(
    bucket: str,  # noqa: F811
    environment: dict[str, str],
    shards: str,
    tmp_path: Path,
) -> None:
    """Neither a checkpoint nor the record of the run holds them up, and both are there in the end."""
    recipe, folder, out = tiny_recipe("train.epochs=30"), tmp_path / "ranks", f"{bucket}/run"
    environment["PIRL_S3_ATTEMPTS"] = "2"
    output = lambda: ranks.output(folder)  # noqa: E731
    with FaultyS3(environment["AWS_ENDPOINT_URL"], 0, 0) as proxy:
        environment["AWS_ENDPOINT_URL"] = proxy.url
        options = Options(data=shards, out=out, log_every=1, checkpoint_every_s=1)
        away, back = tmp_path / "away", tmp_path / "back"
        acts = HoldAt(7, away), SlowFrom(8, back)
        processes = ranks.start(train_counting, 2, folder, recipe, options, *acts, **environment)
        wait_for(lambda: "step 6/" in output())
        proxy.begin("reset")
        away.touch()
        wait_for(lambda: "the last checkpoint was not saved, training continues" in output())
        before = output().count("step ")
        wait_for(lambda: output().count("step ") > before + 10)
        saved = Checkpoints(open_storage(out) / "checkpoints").newest()
        proxy.end()
        back.touch()
        assert ranks.finish(processes) == [0, 0], output()
    events = [event["event"] for event in read_lines(open_storage(out), "events.jsonl")]
    assert "checkpoint_failed" in events
    assert len(read_lines(open_storage(out), "metrics.jsonl")) == 150
    assert saved != Checkpoints(open_storage(out) / "checkpoints").newest() == "step-00000150"
