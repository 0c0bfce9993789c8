"""Storage that is unavailable for a while, in each way that it can be, in each phase: nothing is lost or done twice.

The server is real (moto, over HTTP). Most outages are a proxy's; one is a SIGSTOP of the server's own process.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import certificates
import pytest
from conftest import TINY, shards_of, tiny_recipe, training
from faulty_s3 import OUTAGES, FaultyS3
from images import folder_of_classes
from paced import SignalAt, train_paced
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401
from test_lease import holder, holders, told  # noqa: F401
from test_train import assert_same_bits, final

from pirl import cli
from pirl.checkpoint import Lease
from pirl.errors import PreemptedError, StorageError, TrainingError, UsageError
from pirl.jobs import watch
from pirl.loader import Loader
from pirl.metrics import Context, JsonLines, Log, read_lines
from pirl.registry import open_registry
from pirl.shards import ShardReader
from pirl.storage import LocalStorage, open_storage
from pirl.training.loop import Trainer, train
from pirl.training.spec import Options
from pirl.training.start import rank_timeout_s
from pirl.world import World

BEAT_S = 0.6


@pytest.fixture
def quick(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:  # noqa: F811
    """Timeouts of a second, and half a minute of patience."""
    for name, value in {
        "PIRL_S3_ATTEMPTS": "1",
        "PIRL_S3_CONNECT_TIMEOUT_S": "1",
        "PIRL_S3_READ_TIMEOUT_S": "1",
        "PIRL_STORAGE_PATIENCE_S": "30",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return bucket


@pytest.fixture(params=OUTAGES)
def proxy(
    request: pytest.FixtureRequest, quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FaultyS3, str]]:
    """A proxy to reach the bucket through, and a kind of outage."""
    pair = None
    if request.param == "certificate":
        bundle, pair = certificates.contexts(tmp_path)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # the proxy reads no chunks
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"], certificates=pair) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy, request.param


@contextmanager
def outage(proxy: FaultyS3, kind: str, seconds: float) -> Iterator[None]:
    """An outage that begins now and ends meanwhile."""
    proxy.begin(kind)
    timer = threading.Timer(seconds, proxy.end)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_every_request_is_repeated_until_storage_answers(
    proxy: tuple[FaultyS3, str], quick: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server, kind = proxy
    storage = open_storage(quick)
    (tmp_path / "big").write_bytes(bytes(1000))
    storage.write_bytes("x", b"old")
    calls: list[Callable[[], object]] = [
        lambda: storage.read_bytes("x"),
        lambda: storage.write_bytes("y", b"new"),
        lambda: storage.create("once", b"mine"),
        lambda: storage.upload(tmp_path / "big", "big"),
        lambda: storage.download("x", tmp_path / "copy"),
        lambda: storage.size("x"),
        lambda: storage.list("x"),
        lambda: storage.delete("absent"),
    ]
    answers: dict[int, object] = {}
    threads = [
        threading.Thread(target=lambda k=k, call=call: answers.update({k: call()})) for k, call in enumerate(calls)
    ]
    with outage(server, kind, 6 if kind == "hang" else 1.5):  # a request that hangs fails after a second at the soonest
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert [answers.get(k) for k in (0, 2, 5, 6)] == [b"old", True, 3, ["x"]]
    assert storage.read_bytes("y") == b"new"
    assert storage.size("big") == 1000
    assert (tmp_path / "copy").read_bytes() == b"old"
    printed = capfd.readouterr()
    assert printed.err.count("storage is unavailable, asking again for 30 s") == 1
    assert printed.out.count("answers again, after") == 1


def test_without_patience_it_is_one_short_message(proxy: tuple[FaultyS3, str], quick: str) -> None:
    """Also at the first contact, where the address may be wrong."""
    server, kind = proxy
    server.begin(kind)
    with pytest.raises(StorageError) as caught:
        open_storage(quick).read_bytes("x")
    server.end()
    assert caught.value.transient
    assert len(str(caught.value).splitlines()) == 2
    if kind == "certificate":
        assert "AWS_CA_BUNDLE" in caught.value.hint


def test_a_server_that_is_stopped(quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is stopped by SIGSTOP: it accepts, and answers when it continues."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 60
        while True:
            try:
                boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="stopped")
                break
            except Exception:
                assert time.monotonic() < deadline
        storage = open_storage("s3://stopped")
        storage.write_bytes("x", b"old")
        os.kill(server.pid, signal.SIGSTOP)
        threading.Timer(2.5, os.kill, (server.pid, signal.SIGCONT)).start()
        storage.write_bytes("x", b"new")
        assert storage.read_bytes("x") == b"new"
    finally:
        server.kill()
        server.wait()


# ---- threads that must live


def test_a_holder_keeps_its_lease_through_an_outage_that_all_see(
    proxy: tuple[FaultyS3, str],
    quick: str,
    holders: list[BaseProcess],  # noqa: F811
) -> None:
    server, kind = proxy
    process, pipe = holder(holders, f"{quick}/run", machine="another", beat_s=BEAT_S)
    assert told(pipe) == "held"
    with outage(server, kind, 3), pytest.raises(UsageError, match=f"process {process.pid} on"):
        Lease.claim(open_storage(f"{quick}/run"), BEAT_S)
    assert not pipe.poll(3 * BEAT_S)


def test_a_holder_that_alone_saw_an_outage_ends_when_it_sees_its_successor(
    quick: str,
    holders: list[BaseProcess],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    direct = os.environ["AWS_ENDPOINT_URL"]
    with FaultyS3(direct) as own:
        monkeypatch.setenv("AWS_ENDPOINT_URL", own.url)
        _, pipe = holder(holders, f"{quick}/run", machine="another", beat_s=BEAT_S)
        assert told(pipe) == "held"
        monkeypatch.setenv("AWS_ENDPOINT_URL", direct)
        own.begin("drop")
        with Lease.claim(open_storage(f"{quick}/run"), BEAT_S) as successor:
            assert not pipe.poll(), "the holder trains on while it sees nothing"
            own.end()
            error = told(pipe)
            assert isinstance(error, TrainingError)
            assert "another training has taken over" in str(error)
            successor.confirm()


class Moody(LocalStorage):
    """Fails with `error` while it is set."""

    error: Exception | None = None

    def list(self, prefix: str = "") -> list[str]:
        if Moody.error:
            raise Moody.error
        return super().list(prefix)

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        if Moody.error:
            raise Moody.error
        super().write_bytes(name, data)

    def __truediv__(self, part: str) -> Moody:
        return Moody(self.path / part)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(5, "x"), MemoryError(), StorageError("x")])
def test_heartbeat_and_record_survive_any_error(
    tmp_path: Path, error: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Moody(tmp_path)
    log = Log(run, [JsonLines(Context(run), flush_s=0)])
    with Lease.claim(run, 0.05) as lease:
        Moody.error = error
        for step in range(5):
            log.step(step=step)
            log.flush()
            time.sleep(0.05)
        before = (run / "lease").read_json(lease._name)["beat"]
        Moody.error = None
        log.flush()
        deadline = time.monotonic() + 20
        while (run / "lease").read_json(lease._name)["beat"] < before + 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lease.confirm()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    printed = capfd.readouterr()
    assert printed.err.count("cannot be renewed, training continues") == 1
    assert printed.err.count("the record of the run cannot be written") == 1
    assert printed.out.count("renewed again") == printed.out.count("is written again") == 1


def test_a_launcher_does_not_wait_for_progress(quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "TIMEOUT_S", 0.5)
    open_storage(f"{quick}/run").write_bytes("metrics.jsonl", b'{"step": 3}\n')
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        program: Any = SimpleNamespace(out=f"{quick}/run", record="metrics.jsonl")
        progress = watch.Progress(program, every_s=0)
        assert progress.advanced()
        server.begin("drop")
        started = time.monotonic()
        assert not progress.advanced()
        assert not progress.available
        assert time.monotonic() - started < 15
        server.end()
        assert not progress.advanced()
        assert progress.available


# ---- commands


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `pirl` in this process and return its exit code; a traceback is an exception."""
    monkeypatch.setattr(sys, "argv", ["pirl", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return int(exit.value.code or 0)


def scores(run: str) -> Any:
    result = open_storage(run).read_json("eval.json")
    return result["pretrained"], result["random"]


PHASES = {
    "shard": ("drop", "PUT .*/data/shard-000000.tar"),
    "manifest": ("reset", "PUT .*/data/manifest.json"),
    "lease": ("503", "PUT .*/run/lease/00000001.json"),
    "save": ("hang", "PUT .*/step-0000000[06]/part-"),
    "read": ("refused", "GET .*/data/shard-000000.tar"),
    "log": ("drop", "PUT .*/run/metrics.jsonl"),
    "resume": ("drop", "GET .*/step-00000006/part-"),
    "final save": ("503", "PUT .*/step-00000010/COMMIT.json"),
    "completion": ("hang", "PUT .*/run/DONE.json"),
    "evaluation": ("reset", "GET .*/step-00000010/part-"),
    "features": ("drop", "GET .*/data/shard-000000.tar"),
    "scores": ("refused", "PUT .*/run/eval.json"),
    "registration": ("503", "GET .*/step-00000010/part-"),
    "version": ("hang", "PUT .*/versions/v0001/COMMIT.json"),
    "champion": ("drop", "PUT .*/champion/00000001.json"),
}
"""Kind of outage and the request that it begins with, in the order of a pipeline."""
STAGES = {"shard": 2, "train": 4, "resumed": 3, "eval": 3, "register": 3}
"""Commands of a pipeline, and how many phases of PHASES each has."""


def run_pipeline(
    place: str, images: Path, test: str, patch: pytest.MonkeyPatch, before: Callable[[str], None]
) -> dict[str, float]:
    """Run each command, after `before`; the training is stopped at step 6 and resumed. Return their seconds."""
    recipe, data, out = tiny_recipe("train.epochs=2"), f"{place}/data", f"{place}/run"
    options, seconds = Options(data=data, out=out), {}

    def stopped() -> None:
        with pytest.MonkeyPatch.context() as steps:
            steps.setattr(Trainer, "_step", Trainer._step)  # restored at the end
            with pytest.raises(PreemptedError):
                train_paced(World(), recipe, options, SignalAt(6, 0, signal.SIGTERM))

    commands: dict[str, Callable[[], object]] = {
        "shard": lambda: command(patch, "shard", images, data, "--processes", 1),
        "train": stopped,
        "resumed": lambda: train(recipe, options, World()),
        "eval": lambda: command(patch, "eval", out, "--data", data, "--test", test),
        "register": lambda: command(patch, "register", out, "--registry", f"{place}/registry", "--min-gain", -1),
    }
    for name, run in commands.items():
        before(name)
        started = time.monotonic()
        assert run() in (0, None) or name == "resumed"
        seconds[name] = time.monotonic() - started
    return seconds


@pytest.mark.parametrize("away_s", [1.2, pytest.param(15, marks=pytest.mark.slow)])
def test_an_outage_in_every_phase_of_the_pipeline_changes_nothing(
    quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away_s: float
) -> None:
    """Each outage begins with a request of its phase. With 15 s the time that was lost is printed."""
    images = folder_of_classes(tmp_path / "images", classes=3, images=14, width=24, height=20)
    test = shards_of(folder_of_classes(tmp_path / "test", classes=3, images=4, first=900), tmp_path / "test-shards")
    monkeypatch.setenv("PIRL_CACHE_GB", "0")
    monkeypatch.setattr("pirl.training.saver.FINAL_SAVE_PAUSE_S", 0.3)
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        phases, counts = list(PHASES.values()), dict(STAGES)

        def fail(stage: str) -> None:
            assert not server.armed, "an outage of the command before did not happen"
            for _ in range(counts.pop(stage)):
                kind, request = phases.pop(0)
                server.fail_on(request, kind, away_s)

        quiet = run_pipeline(f"{quick}/quiet", images, test, monkeypatch, lambda _: None)
        disturbed = run_pipeline(f"{quick}/away", images, test, monkeypatch, fail)
        assert not server.armed
        assert not phases
    for name, seconds in disturbed.items():
        print(f"{name}: {STAGES[name]} outages of {away_s:g} s, lost {seconds - quiet[name]:.1f} s")
    runs = [f"{quick}/{name}/run" for name in ("quiet", "away")]
    digests = [ShardReader(f"{quick}/{name}/data").manifest.digest for name in ("quiet", "away")]
    assert digests[0] == digests[1]
    assert_same_bits(*map(final, runs))
    assert scores(runs[0]) == scores(runs[1])
    quiet_run, away_run = (open_storage(run) for run in runs)
    for name in ("steps", "images_seen"):
        assert quiet_run.read_json("DONE.json")[name] == away_run.read_json("DONE.json")[name]
    assert [line["step"] for line in read_lines(away_run, "metrics.jsonl")] == [10]
    champions = [open_registry(f"{quick}/{name}/registry").get("pirl").version for name in ("quiet", "away")]
    assert champions == ["v0001", "v0001"]


def test_a_command_without_patience_ends_shortly_and_continues_when_it_is_repeated(
    quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIRL_STORAGE_PATIENCE_S", "0")
    images = folder_of_classes(tmp_path / "images", classes=3, images=14, width=24, height=20)
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.fail_at(8, "reset", 0.5)
        assert command(monkeypatch, "shard", images, f"{quick}/data", "--processes", 1) == 1
        error = capfd.readouterr().err
        assert "Traceback" not in error
        assert "is unavailable or breaks off" in error
        time.sleep(0.6)
        before = server.requests["PUT"]
        assert command(monkeypatch, "shard", images, f"{quick}/data", "--processes", 1) == 0
        assert server.requests["PUT"] > before
    assert command(monkeypatch, "shard", images, tmp_path / "shards", "--processes", 1) == 0
    assert ShardReader(f"{quick}/data").manifest.digest == ShardReader(tmp_path / "shards").manifest.digest


@pytest.mark.parametrize(
    ("data", "patience_s", "timeout_s", "ranks_s", "loading_s"),
    [
        ("s3", "", 60, 466, 436),  # 180 s of patience, 4 tries of 60 s and the pauses between them
        ("s3", "", 1000, 1000, 500),
        ("s3", "20", 60, 306, 276),
        ("file", "", 60, 60, 30),
    ],
)
def test_ranks_wait_for_each_other_longer_than_for_storage(
    bucket: str,  # noqa: F811
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    data: str,
    patience_s: str,
    timeout_s: float,
    ranks_s: float,
    loading_s: float,
) -> None:
    """No rank and no loading process counts as stalled while it waits for a storage that is unavailable."""
    for name in ("PIRL_S3_ATTEMPTS", "PIRL_S3_CONNECT_TIMEOUT_S", "PIRL_S3_READ_TIMEOUT_S"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIRL_STORAGE_PATIENCE_S", patience_s)
    monkeypatch.setenv("RANK", "0")
    if data == "s3":
        for name in open_storage(shards).list():
            open_storage(f"{bucket}/data").write_bytes(name, open_storage(shards).read_bytes(name))
    uri = f"{bucket}/data" if data == "s3" else shards
    (tmp_path / "tiny.toml").write_text(TINY)
    spec = training(tmp_path / "tiny.toml", uri, tmp_path / "run", timeout_s=timeout_s)
    assert rank_timeout_s(spec) == ranks_s
    assert (f"longer than --timeout-s {timeout_s:g}" in capfd.readouterr().out) == (ranks_s > timeout_s)
    assert Loader(uri, tiny_recipe(), World(timeout_s=timeout_s), 1).limit_s == loading_s


# ---- settings


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_line_breaks_around_settings_are_ignored_with_a_warning(
    quick: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], end: str
) -> None:
    """As of a Secret that `kubectl create secret --from-file` has made."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.setenv(name, os.environ[name] + end)
    open_storage(quick).write_bytes("x", b"")
    error = capfd.readouterr().err
    assert error.count("AWS_SECRET_ACCESS_KEY has blanks or a line break around it") == 1
    assert "test-secret-value" not in error


def test_a_line_break_within_a_key_is_refused_without_repeating_it(quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush\nAWS_REGION=x")
    with pytest.raises(UsageError, match="AWS_SECRET_ACCESS_KEY holds a line break") as caught:
        open_storage(quick).list()
    assert "hush" not in str(caught.value)


def test_a_ca_bundle_that_is_no_file_is_named(quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nonexistent/ca.pem")
    with pytest.raises(UsageError, match="AWS_CA_BUNDLE"):
        open_storage(quick).list()
