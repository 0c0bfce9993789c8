"""Metrics of a real training, as Prometheus reads them; and of short tasks, as node-exporter reads them."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pirl.metrics import Telemetry, task
from pirl.metrics.table import LABELS, METRICS, TRAINING, markdown
from pirl.metrics.training import mean_row_age

ROOT = Path(__file__).parent.parent
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@pytest.fixture(scope="module")
def scraped(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """What a training of two ranks says at its end, started again after a kill."""
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


def test_a_training_tells_everything_that_the_table_promises(scraped: Samples) -> None:
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


def test_every_rank_speaks_through_one_endpoint_and_its_parts_fill_its_steps(scraped: Samples) -> None:
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
def test_a_port_that_is_none(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pirl.errors import UsageError

    monkeypatch.setenv("PIRL_METRICS_PORT", port)
    with pytest.raises(UsageError, match="PIRL_METRICS_PORT"):
        Telemetry("runs/x").serve()


def test_a_port_in_use_does_not_stop_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        monkeypatch.setenv("PIRL_METRICS_PORT", str(taken.getsockname()[1]))
        with pytest.warns(UserWarning, match="training goes on"):
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
