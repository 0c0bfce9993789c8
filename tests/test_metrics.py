"""Metrics of a real training, as Prometheus reads them; and of short tasks, as node-exporter reads them."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import tiny_recipe, training, warned
from prometheus_client.parser import text_string_to_metric_families

from pirl import metrics
from pirl.errors import UsageError
from pirl.metrics import Context, JsonLines, Log, Sink, Telemetry, task
from pirl.metrics.prometheus import mean_row_age
from pirl.metrics.table import LABELS, METRICS, TRAINING, markdown
from pirl.run import Run
from pirl.storage import open_storage
from pirl.training import loop
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.training.start import plan
from pirl.world import World

ROOT = Path(__file__).parent.parent
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@pytest.fixture(scope="module")
def scraped(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Metrics at the end of a training of two ranks, started again after a kill."""
    from conftest import TINY, TRAIN

    folder = tmp_path_factory.mktemp("metrics")
    (folder / "tiny.toml").write_text(TINY)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*TRAIN, str(folder / "tiny.toml"), "train.epochs=100000"]
    command += ["--data", shards, "--out", str(folder / "run"), "--processes", "2", "--log-every", "1"]
    command += ["--checkpoint-every-s", "0.2"]
    environment = {**os.environ, "PIRL_METRICS_PORT": str(port), "OMP_NUM_THREADS": "1"}

    def answer() -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
                return str(reply.read().decode())
        except OSError:
            return ""

    def run_until_saved() -> str:
        """Until it has published two checkpoints at least: how many more depends on the machine."""
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            saved = "pirl_checkpoints_total", frozenset({("run", "run")})
            while parsed(text := answer()).get(saved, 0) < 2:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, text
                time.sleep(0.1)
            time.sleep(0.5)
            return answer()
        finally:
            process.terminate()
            process.wait(60)

    run_until_saved()
    return parsed(run_until_saved())


def test_a_training_sets_every_metric_of_the_table(scraped: Samples) -> None:
    names = {name.removesuffix("_count").removesuffix("_sum").removesuffix("_bucket") for name, _ in scraped}
    absent = {"pirl_gpu_memory_bytes", "pirl_training_nonfinite_timestamp_seconds"}  # no GPU here, no bad loss
    assert names == {metric.name for metric in TRAINING} - absent


def test_the_numbers_are_those_of_the_training(scraped: Samples) -> None:
    def of(name: str, **labels: str) -> float:
        return value(scraped, name, run="run", **labels)

    assert of("pirl_training_target_steps") == 500000
    steps = of("pirl_training_steps_total")
    assert 0 < steps < of("pirl_training_step")  # this process began where the last had ended
    assert 8 * steps < of("pirl_training_images_total") <= 9 * steps  # epochs of 42 images, in batches of 9
    assert of("pirl_training_step_duration_seconds_count") == steps
    assert of("pirl_training_restarts_total") == 1
    assert of("pirl_checkpoint_failures_total") == 0
    assert of("pirl_checkpoint_size_bytes") > 1000
    assert abs(time.time() - of("pirl_checkpoint_last_success_timestamp_seconds")) < 60
    assert of("pirl_bank_norm") == pytest.approx(1, abs=1e-4)
    assert of("pirl_training_gradient_norm") > 0
    assert math.isfinite(of("pirl_training_loss", part="total"))


def test_one_endpoint_serves_every_rank_and_its_parts_fill_its_steps(scraped: Samples) -> None:
    spent = value(scraped, "pirl_training_step_duration_seconds_sum", run="run")
    for rank in "01":
        parts = {
            part: value(scraped, "pirl_training_step_seconds_total", run="run", rank=rank, part=part)
            for part in ("data", "forward", "backward", "other")
        }
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) == pytest.approx(spent, rel=0.2)
        assert value(scraped, "pirl_memory_resident_bytes", run="run", rank=rank) > 50e6


def test_few_series_and_known_labels(scraped: Samples) -> None:
    assert len(scraped) < 60
    assert {label for _, labels in scraped for label, _ in labels} <= {*LABELS, "le"}


@pytest.mark.parametrize("port", ["metrics", "70000", "0"])
def test_a_wrong_port_is_refused_before_any_process_starts(
    port: str, shards: str, tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIRL_METRICS_PORT", port)
    with pytest.raises(UsageError, match=f"PIRL_METRICS_PORT is '{port}', expected a number from 1 to 65535"):
        plan(training(tiny_toml, shards, tmp_path / "run"))


def test_a_port_in_use_does_not_stop_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        monkeypatch.setenv("PIRL_METRICS_PORT", str(taken.getsockname()[1]))
        with warned("metrics are not served, training continues"):
            Telemetry("runs/x").serve()


def test_a_task_leaves_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIRL_METRICS_FILE", str(tmp_path / "pirl-{task}.prom"))
    with task("shard", "s3://bucket/data/train") as telemetry:
        telemetry.set("pirl_shard_images", 42, state="sharded")
    samples = parsed((tmp_path / "pirl-shard.prom").read_text())
    assert value(samples, "pirl_shard_images", run="train", state="sharded") == 42
    assert value(samples, "pirl_task_last_success_timestamp_seconds", run="train", task="shard") > 1.7e9
    assert [path.name for path in tmp_path.iterdir()] == ["pirl-shard.prom"]


def test_a_task_that_fails_leaves_its_last_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIRL_METRICS_FILE", str(tmp_path / "x.prom"))
    with pytest.raises(ValueError), task("shard", "data"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("epoch", [0.5, 1.0, 1.25, 2.0, 7.75])
def test_age_of_the_banks_rows(epoch: float) -> None:
    """Against a count: every epoch renews 2000 rows in an order of its own."""
    import random

    rows, steps = 2000, int(epoch * 2000)
    renewed, order = [0] * rows, list(range(rows))
    draw = random.Random(0)
    for step in range(steps):
        if step % rows == 0:
            draw.shuffle(order)
        renewed[order[step % rows]] = step
    counted = sum(steps - at for at in renewed) / rows / rows
    assert mean_row_age(epoch) == pytest.approx(counted, rel=0.05)


def test_names_carry_base_units() -> None:
    for metric in METRICS.values():
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert metric.unit not in ("seconds", "bytes") or f"_{metric.unit}" in metric.name
        assert set(metric.labels) <= LABELS.keys()


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == markdown(), "python -m pirl.metrics > docs/metrics.md"


# ---- sinks


class Recorder(Sink):
    """A sink that keeps the names of its calls, and raises in one of them."""

    calls: list[str]
    fails_in = ""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.calls = []
        self.kept = self.calls

    def __getattribute__(self, name: str) -> object:
        if name in ("resume", "step", "event", "tick", "interval", "flush", "close"):
            self.calls.append(name)
            if name == type(self).fails_in:
                raise ConnectionError("unavailable")
        return super().__getattribute__(name)


@pytest.mark.parametrize("call", ["resume", "step", "event", "tick", "interval", "flush", "close"])
def test_a_sink_that_raises_is_reported_once_and_left_out(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    context = Context(open_storage(tmp_path))
    failing, last = type("Broken", (Recorder,), {"fails_in": call})(context), Recorder(context)
    log = Log(context.run, [failing, JsonLines(context), last])
    log.resume(0)
    for step in (1, 2):
        log.step(step=step)
        log.event("checkpoint", step=step)
        log.tick(9, 0.1)
        log.interval({"data": 0.1})
        log.flush()
    log.close()
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "metrics sink Broken failed and is left out, training continues: ConnectionError: unavailable" in error
    assert failing.calls.count(call) <= 2  # a sink that fails in `close` is closed no more than once again
    assert last.calls == ["resume", *["step", "event", "tick", "interval", "flush"] * 2, "close"]
    record = Run(context.run).record()
    assert [line["step"] for line in record.metrics] == [line["step"] for line in record.events] == [1, 2]


@pytest.mark.parametrize("fails_in", ["", "__init__", "step"])
def test_a_kind_of_sink_is_one_line_and_never_harms_a_training(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    made = []

    class Toy(Sink):
        def __init__(self, context: Context) -> None:
            if fails_in == "__init__":
                raise ImportError("no such package")
            self.losses: list[float] = []
            made.append(self)

        def step(self, values: Mapping[str, float]) -> None:
            if fails_in == "step":
                raise OSError(28, "full")
            self.losses.append(values["loss"])

    monkeypatch.setitem(metrics.SINKS, "toy", Toy)
    monkeypatch.setattr(loop, "ALWAYS", (*metrics.ALWAYS, "toy"))
    out = str(tmp_path / "run")
    with warned("metrics sink Toy failed and is left out") if fails_in else nullcontext():
        train(tiny_recipe("train.epochs=1"), Options(data=shards, out=out, log_every=1, workers=0), World())
    lines = Run.at(out).record().metrics
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    if not fails_in:
        assert made[0].losses == pytest.approx([line["loss"] for line in lines], rel=1e-6)
