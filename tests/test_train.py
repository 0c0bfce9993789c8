"""Whole trainings of a tiny model: killed, stopped, repeated, starved of disk, and always exact."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from conftest import IMAGES, TRAIN, pirl_train, tiny_recipe, warned
from paced import HoldAt, SignalAt, train_paced
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401

import pirl.training.control
import pirl.training.loop
from pirl.checkpoint import Checkpoints
from pirl.config import Recipe
from pirl.errors import CheckpointError, ConfigError, PirlError, StorageError, TrainingError, UsageError
from pirl.memory import MemoryBank
from pirl.metrics import read_lines
from pirl.model import build_model
from pirl.order import epoch_order
from pirl.results import Completion
from pirl.storage import LocalStorage, open_storage
from pirl.training.control import Control, Decision
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World

STEPS_AN_EPOCH = 5  # 42 images in batches of 9
EPOCHS = 8
CHANGES = ("jitter", "posterize", "gray", "flip")
RECIPE = tiny_recipe(f"train.epochs={EPOCHS}")


def final(out: Path | str) -> dict[str, Any]:
    """Everything that the newest checkpoint of a run holds."""
    found = Checkpoints(open_storage(out) / "checkpoints").load()
    assert found is not None
    return found[1]


def assert_same_bits(first: dict[str, Any], second: dict[str, Any]) -> None:
    for part in ("model", "bank"):
        assert first[part].keys() == second[part].keys()
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), name
    momenta = [
        [state["momentum_buffer"] for _, state in sorted(each["optimizer"]["state"].items())]
        for each in (first, second)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*momenta))


def train_here(out: Path, shards: str, recipe: Recipe = RECIPE, **options: Any) -> Completion:
    return train(recipe, Options(data=shards, out=str(out), **{"log_every": 1, **options}), World())


def start(
    size: int, out: Path, shards: str, recipe: Recipe = RECIPE, *acts: HoldAt | SignalAt, **options: Any
) -> list[BaseProcess]:
    """Start a training on real ranks without a launcher; what they print is in `out`.ranks."""
    values = {"log_every": 1, "checkpoint_every_s": 0.1, **options}
    return ranks.start(
        train_paced, size, out.with_suffix(".ranks"), recipe, Options(data=shards, out=str(out), **values), *acts
    )


def printed(out: Path, rank: int = 0) -> str:
    return ranks.output(out.with_suffix(".ranks"), rank)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def saved_step(out: Path) -> int:
    checkpoints = Checkpoints(open_storage(out / "checkpoints"))
    newest = checkpoints.newest()
    return checkpoints.commit(newest).cursor.step if newest else -1


# ---- what a training is


@pytest.fixture(scope="module")
def uninterrupted(shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run on one, two and three ranks, to the end."""
    runs = {}
    for size in (1, 2, 3):
        runs[size] = tmp_path_factory.mktemp("uninterrupted") / f"ranks{size}"
        processes = start(size, runs[size], shards, checkpoint_every_s=1000)
        assert ranks.finish(processes) == [0] * size, printed(runs[size])
    return runs


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_finished_run_leaves(uninterrupted: dict[int, Path], size: int) -> None:
    run = open_storage(uninterrupted[size])
    done = run.read_json("DONE.json")
    assert done["steps"] == EPOCHS * STEPS_AN_EPOCH
    assert done["images_seen"] == EPOCHS * IMAGES
    assert done["ranks"] == size
    assert done["checkpoint"] == f"{run.uri}/checkpoints/step-00000040"
    assert done["recipe_digest"] == RECIPE.digest()
    lines = read_lines(run, "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["epoch"] == EPOCHS
    assert lines[0]["loss"] == pytest.approx(0.5 * lines[0]["loss_patches"] + 0.5 * lines[0]["loss_images"], rel=1e-5)
    assert [event["event"] for event in read_lines(run, "events.jsonl")] == [
        "start",
        "checkpoint",
        "checkpoint",
        "done",
    ]
    assert (uninterrupted[size] / "config.toml").read_text() == RECIPE.to_toml()


def test_it_learns(shards: str, tmp_path: Path) -> None:
    """Views that are easy to match: images find their own rows among others, and the loss falls below chance."""
    calm = ("image_scale=[0.9,1]", "patch_scale=[0.9,1]", *(f"{p}_probability=0" for p in CHANGES))
    more = ("loss.kind=cross_entropy", "loss.temperature=0.1", "loss.exclude_positive=true", "optim.base_lr=0.3")
    train_here(
        tmp_path / "run",
        shards,
        tiny_recipe("train.epochs=30", *more, *(f"views.{item}" for item in calm)),
        log_every=10,
    )
    first, *_, last = read_lines(open_storage(tmp_path / "run"), "metrics.jsonl")
    assert last["loss"] < math.log(1 + 16) - 0.3 < first["loss"]
    assert first["pos_similarity"] < 0.5 < 0.9 < last["pos_similarity"]
    assert last["neg_similarity"] < last["pos_similarity"] - 0.25


def test_every_row_was_updated_in_the_first_epoch_and_z_was_set(shards: str, tmp_path: Path) -> None:
    recipe = tiny_recipe("train.epochs=1")
    train_here(tmp_path / "run", shards, recipe)
    bank = final(tmp_path / "run")["bank"]
    start = MemoryBank(IMAGES, 8, recipe.memory, recipe.train.seed).memory
    assert (bank["memory"] != start).any(dim=1).all()
    torch.testing.assert_close(bank["memory"].norm(dim=1), torch.ones(IMAGES))
    assert bank["z"] > 0
    found = Checkpoints(open_storage(tmp_path / "run" / "checkpoints")).load("step-00000000")
    assert found is not None
    assert torch.equal(found[1]["bank"]["memory"], start)
    assert_is_initial(found[1]["model"], recipe)


def assert_is_initial(saved: dict[str, torch.Tensor], recipe: Recipe) -> None:
    assert all(torch.equal(saved[name], value) for name, value in build_model(recipe).state_dict().items())


def test_one_step_touches_the_rows_of_its_batch_alone(shards: str, tmp_path: Path) -> None:
    recipe = tiny_recipe("train.epochs=1", "train.batch_size=40", "train.last_batch=drop")
    train_here(tmp_path / "run", shards, recipe)
    start = MemoryBank(IMAGES, 8, recipe.memory, recipe.train.seed).memory
    changed = (final(tmp_path / "run")["bank"]["memory"] != start).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == sorted(epoch_order(0, 0, IMAGES)[:40].tolist())


def test_workers_and_precision_of_logging_change_nothing(
    uninterrupted: dict[int, Path], shards: str, tmp_path: Path
) -> None:
    processes = start(1, tmp_path / "run", shards, workers=1, log_every=7)
    assert ranks.finish(processes) == [0], printed(tmp_path / "run")
    assert_same_bits(final(tmp_path / "run"), final(uninterrupted[1]))


@pytest.mark.parametrize("overrides", [["train.precision=bf16"], ["loss.kind=cross_entropy", "model.head=linear"]])
def test_other_settings_run(shards: str, tmp_path: Path, overrides: list[str]) -> None:
    done = train_here(tmp_path / "run", shards, tiny_recipe("train.epochs=1", *overrides))
    assert done.steps == STEPS_AN_EPOCH


# ---- kills


@pytest.mark.parametrize("size", [1, 3])
def test_killed_and_restarted_is_bit_identical(
    uninterrupted: dict[int, Path], shards: str, tmp_path: Path, size: int
) -> None:
    """kill -9 of a rank at random steps, twice; the rest of the ranks end by themselves.

    Three ranks, since the sum of two gradients has no order that could change.
    """
    out, rng = tmp_path / "run", random.Random(size)
    for first, last in ((2, 12), (16, 30)):
        victim = rng.randrange(size)
        processes = start(size, out, shards, RECIPE, SignalAt(rng.randint(first, last), victim, signal.SIGKILL))
        codes = ranks.finish(processes)
        assert codes[victim] == -signal.SIGKILL
        assert None not in codes  # nobody hangs
        assert not (out / "DONE.json").exists()
    processes = start(size, out, shards)
    assert ranks.finish(processes) == [0] * size, printed(out)
    assert "resuming from step-" in printed(out)
    assert_same_bits(final(out), final(uninterrupted[size]))
    run = open_storage(out)
    assert run.read_json("DONE.json")["images_seen"] == EPOCHS * IMAGES
    steps = [line["step"] for line in read_lines(run, "metrics.jsonl")]
    assert steps == sorted(set(steps))  # what was made again is there once
    assert steps[-1] == EPOCHS * STEPS_AN_EPOCH


def test_resuming_on_another_number_of_ranks(shards: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = start(2, out, shards, RECIPE, HoldAt(20), checkpoint_every_s=0)
    wait_for(lambda: saved_step(out) > 6)
    for process in processes:
        process.kill()
    ranks.finish(processes)
    before = saved_step(out)
    assert ranks.finish(start(1, out, shards)) == [0], printed(out)
    events = read_lines(open_storage(out), "events.jsonl")
    resumed = [event for event in events if event["event"] == "resume"]
    assert [(event["step"], event["ranks"]) for event in resumed] == [(before, 1)]
    done = open_storage(out).read_json("DONE.json")
    assert (done["steps"], done["images_seen"]) == (EPOCHS * STEPS_AN_EPOCH, EPOCHS * IMAGES)
    # every tensor of batch norm counts the steps: two updates each, none lost, none made twice
    assert final(out)["model"]["trunk.bn1.num_batches_tracked"] == 2 * EPOCHS * STEPS_AN_EPOCH


# ---- stops


@pytest.mark.parametrize("size", [1, 2])
def test_sigterm_saves_and_the_next_start_goes_on(
    uninterrupted: dict[int, Path], shards: str, tmp_path: Path, size: int
) -> None:
    """Three times; the last rank gets the signal, and all stop at the same step."""
    out = tmp_path / "run"
    for step, number in ((3, signal.SIGTERM), (15, signal.SIGHUP), (26, signal.SIGQUIT)):
        processes = start(size, out, shards, RECIPE, SignalAt(step, size - 1, number), checkpoint_every_s=1000)
        assert ranks.finish(processes) == [75] * size, printed(out)
        stopped = step + (size > 1)  # the agreement of several ranks takes a step
        assert all(f"error: stopped by a signal at step {stopped};" in printed(out, rank) for rank in range(size))
        assert "run the same command again" in printed(out)
        assert saved_step(out) == stopped  # all of the work is saved
    assert ranks.finish(start(size, out, shards)) == [0] * size
    assert_same_bits(final(out), final(uninterrupted[size]))


def train_on_slow_storage(world: World, recipe: Recipe, options: Options) -> Completion:
    write = LocalStorage.write_bytes

    def slow(self: LocalStorage, name: str, data: bytes) -> None:
        time.sleep(0.7 if name.endswith(".safetensors") else 0)
        write(self, name, data)

    LocalStorage.write_bytes = slow  # type: ignore[method-assign]
    return train_paced(world, recipe, options, SignalAt(3, 1, signal.SIGTERM))


def test_no_rank_leaves_before_the_state_is_safe(shards: str, tmp_path: Path) -> None:
    """When one rank ends the launcher ends all of them, soon by force."""
    out = tmp_path / "run"
    options = Options(data=shards, out=str(out), log_every=1, checkpoint_every_s=1000)
    processes = ranks.start(train_on_slow_storage, 2, out.with_suffix(".ranks"), RECIPE, options)
    processes[1].join(60)
    assert saved_step(out) == 4
    assert ranks.finish(processes) == [75, 75]


def launched(world: World, argv: list[str]) -> int:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return pirl_train(*argv)


def arguments(recipe: Path, data: str, out: Path, *more: str) -> list[str]:
    return [str(recipe), "--data", data, "--out", str(out), "--log-every", "1", *more]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_with_worker_processes(shards: str, tiny_toml: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The launcher passes a signal on to whole process groups: loading must go on until the state is saved."""
    out = tmp_path / "run"
    argv = arguments(tiny_toml, shards, out, "--processes", "1", "--workers", "2", "train.epochs=2000")
    (launcher,) = ranks.start(launched, 1, out.with_suffix(".ranks"), argv)
    wait_for(lambda: "step 4/" in printed(out), 120)
    assert launcher.pid is not None
    os.kill(launcher.pid, number)
    assert ranks.finish([launcher]) == [0]
    assert torch.load(out.with_suffix(".ranks") / "result-0.pt") == 75, printed(out)
    assert printed(out).count("error: stopped by a signal at step") == 1
    assert "Traceback" not in printed(out)
    assert saved_step(out) >= 4


def test_the_entry_point(uninterrupted: dict[int, Path], shards: str, tiny_toml: Path, tmp_path: Path) -> None:
    """`pirl train` on two processes: a killed rank ends it with 1, the same command again finishes it."""
    out = tmp_path / "run"
    argv = arguments(tiny_toml, shards, out, "--processes", "2", f"train.epochs={EPOCHS}")
    command = [*TRAIN, *argv, "--checkpoint-every-s", "0.1"]
    with open(tmp_path / "run.log", "w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        wait_for(lambda: 1 in rank_pids(first.pid), 120)
        victim = rank_pids(first.pid)[1]
        wait_for(lambda: "step 2/" in (tmp_path / "run.log").read_text(), 120)
        os.kill(victim, signal.SIGKILL)
        assert first.wait(60) == 1
    text = (tmp_path / "run.log").read_text()
    assert "error: rank 1 ended with signal 9" in text
    assert "Traceback" not in text
    assert not (out / "DONE.json").exists()
    second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert "resuming from step-" in second.stdout
    assert_same_bits(final(out), final(uninterrupted[2]))


def rank_pids(launcher: int) -> dict[int, int]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == launcher:
                environment = (path.parent / "environ").read_bytes().decode()
                found[int(environment.split("\0RANK=")[1].split("\0")[0])] = int(path.parent.name)
        except (OSError, IndexError):
            continue
    return found


def test_a_signal_is_agreed_on_by_all_ranks(tmp_path: Path) -> None:
    """Whatever rank hears it, and when: every rank stops after the same number of steps."""
    stopped = ranks.run(steps_until_stopped, 3, tmp_path)
    assert len(set(stopped)) == 1
    assert 20 <= stopped[0] <= 22


def steps_until_stopped(world: World) -> int:
    control = Control(world)
    for step in range(1000):
        if step == 20 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if control.agree(1000) is Decision.STOP:
            return step
    return -1


# ---- what is refused


def content(out: Path) -> dict[str, bytes]:
    """All of a run but its lease, which tells who was the last to try."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.parent.name != "lease"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture
def stopped_run(uninterrupted: dict[int, Path], tmp_path: Path) -> Path:
    """A run of RECIPE that has not come to its end."""
    out = tmp_path / "stopped"
    shutil.copytree(uninterrupted[1], out)
    (out / "DONE.json").unlink()
    return out


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """What `pirl train` says; it must end with 2 before it starts a process, and change nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        patch.setattr("pirl.launch.run_ranks", lambda *_: pytest.fail("a process was started"))
        assert pirl_train(*argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert "  -> " in text
    return text


@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_in_the_same_out(
    stopped_run: Path, shards: str, tiny_toml: Path, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    if finished:
        (stopped_run / "DONE.json").write_text("{}")
    before = content(stopped_run)
    argv = arguments(tiny_toml, shards, stopped_run, f"train.epochs={EPOCHS}", "loss.temperature=0.2", "train.seed=4")
    text = refused(capsys, argv)
    assert "loss.temperature: 0.07 -> 0.2" in text
    assert "train.seed: 0 -> 4" in text
    with pytest.raises(UsageError, match="another recipe"):
        train_here(stopped_run, shards, tiny_recipe(f"train.epochs={EPOCHS}", "train.seed=4"))
    assert content(stopped_run) == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_data_in_the_same_out(
    stopped_run: Path, other_shards: str, tiny_toml: Path, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    if finished:
        (stopped_run / "DONE.json").write_text("{}")
    before = content(stopped_run)
    text = refused(capsys, arguments(tiny_toml, other_shards, stopped_run, f"train.epochs={EPOCHS}"))
    assert "other data" in text
    with pytest.raises(UsageError, match="other data"):
        train_here(stopped_run, other_shards)
    assert content(stopped_run) == before


def test_renaming_a_recipe_does_not_make_it_another(stopped_run: Path, shards: str) -> None:
    done = train_here(stopped_run, shards, tiny_recipe(f"train.epochs={EPOCHS}", "name=other"))
    assert done.steps == EPOCHS * STEPS_AN_EPOCH


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["train.batch_size=43"], "batch_size is 43"),
        (["loss.negatives=43"], "negatives is 43"),
        (["train.epoch=3"], "Did you mean 'train.epochs'"),
        (["--log-every", "0", "--keep", "0"], "--keep: input should be greater than or equal to 1 (got 0)"),
        (["--checkpoint-every-s", "nan"], "--checkpoint-every-s"),
        (["--checkpoint-every-s", "inf"], "--checkpoint-every-s"),
    ],
)
def test_mistakes_cost_nothing(
    shards: str, tiny_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], part: str
) -> None:
    assert part in refused(capsys, arguments(tiny_toml, shards, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there(tiny_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        assert pirl_train(*arguments(tiny_toml, str(tmp_path / "absent"), tmp_path / "run")) == 1
    assert "pirl shard" in capsys.readouterr().err


def test_a_finished_run_repeats_as_nothing(
    uninterrupted: dict[int, Path], shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(uninterrupted[1])
    done = train_here(uninterrupted[1], shards)
    assert done.to_json() == json.loads(before["DONE.json"])
    assert "up to date" in capsys.readouterr().out
    assert content(uninterrupted[1]) == before


# ---- what breaks on the way


def diverging_recipe() -> Recipe:
    """A learning rate that recipes do not accept."""
    recipe = tiny_recipe("train.epochs=20")
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"base_lr": 1e30})})


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_last_good_state(shards: str, tmp_path: Path) -> None:
    """Also with a checkpoint due at every step, and with no line of the log in between."""
    for every in (1, 1000):
        out = tmp_path / f"run{every}"
        processes = start(1, out, shards, diverging_recipe(), log_every=every, checkpoint_every_s=0)
        assert ranks.finish(processes) == [1], printed(out)
        assert re.search(r"error: the loss is no longer finite \((nan|inf)", printed(out)), printed(out)
        assert "optim.base_lr" in printed(out)
        assert "Traceback" not in printed(out)
        assert not (out / "DONE.json").exists()
        saved = final(out)
        for part in ("model", "bank"):
            for name, tensor in saved[part].items():
                assert tensor.isfinite().all(), (every, saved_step(out), name)


def test_a_loss_that_is_no_number_on_two_ranks(shards: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = start(2, out, shards, diverging_recipe())
    assert ranks.finish(processes) == [1, 1], (printed(out), printed(out, 1))


def test_a_damaged_newest_checkpoint(stopped_run: Path, uninterrupted: dict[int, Path], shards: str) -> None:
    """State or commit object: the older one is taken, with a warning, and the run ends as it would have."""
    folder = stopped_run / "checkpoints" / "step-00000040"
    for name, data in (("*.safetensors", b"cut"), ("COMMIT.json", b"{")):
        (path,) = folder.glob(name)
        path.write_bytes(data)
        with warned("resuming from the older step-00000000"):
            done = train_here(stopped_run, shards)
        assert done.steps == EPOCHS * STEPS_AN_EPOCH
        assert_same_bits(final(stopped_run), final(uninterrupted[1]))
        events = read_lines(open_storage(stopped_run), "events.jsonl")
        assert [event["checkpoints"] for event in events if event["event"] == "checkpoint_skipped"][-1] == [folder.name]
        (stopped_run / "DONE.json").unlink()


def test_only_damaged_checkpoints_are_an_error_and_no_fresh_start(stopped_run: Path, shards: str) -> None:
    for path in stopped_run.rglob("*.safetensors"):
        path.write_bytes(b"cut")
    before = content(stopped_run)
    with pytest.raises(CheckpointError, match="damaged"):
        train_here(stopped_run, shards)
    assert content(stopped_run) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where mounting is permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


def test_a_disk_that_is_full_for_a_while(
    uninterrupted: dict[int, Path], shards: str, tmp_path: Path, small_disk: Path
) -> None:
    """Training says so, goes on, keeps the last good checkpoint, and saves again when there is space."""
    out = small_disk / "run"
    processes = ranks.start(
        train_paced,
        2,
        tmp_path / "ranks",
        tiny_recipe("train.epochs=20000"),
        Options(data=shards, out=str(out), log_every=1, checkpoint_every_s=0.3),
    )
    output = lambda: ranks.output(tmp_path / "ranks")  # noqa: E731
    wait_for(lambda: saved_step(out) > 0)
    fill(small_disk)
    wait_for(lambda: "training continues" in output())
    assert "disk is full" in output()
    good = saved_step(out)
    assert final(out)["model"]
    full_at = int(re.findall(r"step (\d+)/", output())[-1])
    wait_for(lambda: f"step {full_at + 5}/" in output())
    assert saved_step(out) == good
    (small_disk / "filler").unlink()
    wait_for(lambda: saved_step(out) > good)
    assert processes[0].pid is not None
    os.kill(processes[0].pid, signal.SIGTERM)
    assert ranks.finish(processes) == [75, 75], output()
    assert "checkpoint_failed" in [event["event"] for event in read_lines(open_storage(out), "events.jsonl")]


def test_a_disk_that_stays_full_is_an_error_at_the_end(shards: str, tmp_path: Path, small_disk: Path) -> None:
    """The ranks end together, with one message, and what was saved before is whole."""
    out = small_disk / "run"
    argv = [RECIPE, Options(data=shards, out=str(out), log_every=1, checkpoint_every_s=1000)]
    processes = ranks.start(train_paced, 2, tmp_path / "ranks", *argv, HoldAt(1, until=tmp_path / "full"))
    wait_for(lambda: saved_step(out) == 0)
    fill(small_disk)
    (tmp_path / "full").touch()
    codes = ranks.finish(processes)
    text = [ranks.output(tmp_path / "ranks", rank) for rank in range(2)]
    assert codes[0] == 1, text
    assert "error: Cannot write" in text[0]
    assert "disk is full" in text[0]
    assert codes[1] in (1, ranks.CRASHED)  # its launcher knows a lost peer from a crash: test_distributed
    assert saved_step(out) == 0
    assert final(out)["model"]


def test_an_out_that_cannot_be_written(shards: str, tiny_toml: Path, tmp_path: Path) -> None:
    """A file stands in the way: one message on two processes, exit code 1."""
    (tmp_path / "file").write_text("in the way")
    argv = arguments(tiny_toml, shards, tmp_path / "file" / "run", "--processes", "2")
    (code,) = ranks.run(launched, 1, tmp_path / "ranks", argv)
    text = ranks.output(tmp_path / "ranks")
    assert code == 1
    assert text.count("error: Cannot") == 1
    assert "Move it away" in text
    assert "Traceback" not in text


def test_on_s3(bucket: str, shards: str) -> None:  # noqa: F811
    """A run in an object store, stopped in the middle by an exception and taken up again."""
    out = f"{bucket}/runs/a"
    recipe = tiny_recipe("train.epochs=2")
    options = Options(data=shards, out=out, log_every=1, checkpoint_every_s=0)
    stopping = options.model_copy(update={"log_every": 4})

    class Stop(Exception):
        pass

    def stop_at_7(text: str, **fields: Any) -> None:
        if "step 8/" in text:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pirl.training.meter.info", stop_at_7)
        with pytest.raises(Stop):
            train(recipe, stopping, World())
    done = train(recipe, options, World())
    assert done.checkpoint == f"{out}/checkpoints/step-00000010"
    events = [event["event"] for event in read_lines(open_storage(out), "events.jsonl")]
    assert events[0] == "start"
    assert "resume" in events
    assert Checkpoints(open_storage(out) / "checkpoints").names() == ["step-00000009", "step-00000010"]


@pytest.mark.parametrize("fails", [False, True])
def test_signals_are_restored(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """A program that calls `train` can be interrupted afterwards as before, also after a failure."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    if fails:
        monkeypatch.setattr("pirl.training.loop.train_step", raising(TrainingError("no step")))
    with pytest.raises(TrainingError) if fails else nullcontext():
        train_here(tmp_path / "run", shards, tiny_recipe("train.epochs=1"))
    assert [signal.getsignal(number) for number in numbers] == before


def raising(error: PirlError) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise error

    return function


def test_an_ignored_hangup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        control = Control(World())
        os.kill(os.getpid(), signal.SIGHUP)
        assert control.agree(1000) is Decision.CONTINUE
        control.close()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- when checkpoints are saved


def train_by_clock(world: World, recipe: Recipe, options: Options) -> Completion:
    """A training whose control reads a clock that moves by 10 s a step."""
    step, clock = pirl.training.loop.train_step, [0.0]

    def ticking(*arguments: Any) -> Any:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":  # else it might be put off by steps that depend on the machine
                thread.join()
        clock[0] += 10
        return step(*arguments)

    pirl.training.loop.train_step = ticking
    pirl.training.control.monotonic = lambda: clock[0]
    pirl.training.loop.monotonic = lambda: clock[0]
    return train(recipe, options, world)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_due_time_makes_one_checkpoint(shards: str, tmp_path: Path, size: int) -> None:
    """On several ranks a step later, as their agreement takes a step. Milestones count as a due time."""
    out = tmp_path / "run"
    options = Options(data=shards, out=str(out), checkpoint_every_s=65, keep=100, keep_every_epochs=4)
    assert ranks.finish(ranks.start(train_by_clock, size, out.with_suffix(".ranks"), RECIPE, options)) == [0] * size
    late = int(size > 1)
    due = [7 + late, 14 + late, 20, 27 + late, 34 + late, 40]  # every 7th step, and from the milestone on again
    events = read_lines(open_storage(out), "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [0, *due]
    checkpoints = Checkpoints(open_storage(out / "checkpoints"))
    kept = [commit.cursor.step for commit in map(checkpoints.commit, checkpoints.names()) if commit.milestone]
    assert kept == [20, 40]


@pytest.mark.parametrize("size", [1, 2])
def test_a_request_under_way_is_served_by_a_milestone(shards: str, tmp_path: Path, size: int) -> None:
    out = tmp_path / "run"
    options = Options(data=shards, out=str(out), checkpoint_every_s=195, keep=100, keep_every_epochs=4)
    assert ranks.finish(ranks.start(train_by_clock, size, out.with_suffix(".ranks"), RECIPE, options)) == [0] * size
    events = read_lines(open_storage(out), "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [0, 20, 40]


def train_with_slow_save(world: World, recipe: Recipe, options: Options) -> Completion:
    """A training whose first checkpoint is written only after 20 steps, as the last rank's storage is slow."""
    step, made, reached = pirl.training.loop.train_step, [0], threading.Event()

    def counting(*arguments: Any) -> Any:
        made[0] += 1
        if made[0] == 20:
            reached.set()
        return step(*arguments)

    class SlowStorage(LocalStorage):
        def write_bytes(self, name: str, data: bytes | memoryview) -> None:
            if world.rank == world.size - 1 and self.uri.endswith("step-00000000") and name.startswith("part-"):
                assert reached.wait(120), "training waits for a save"
            super().write_bytes(name, data)

        def __truediv__(self, part: str) -> LocalStorage:
            return SlowStorage(self.path / part)

    pirl.training.loop.train_step = counting
    pirl.training.loop.open_storage = lambda uri: SlowStorage(Path(uri)) if uri == options.out else open_storage(uri)
    return train(recipe, options, world)


@pytest.mark.parametrize("size", [1, 2])
def test_steps_do_not_wait_for_a_slow_save(shards: str, tmp_path: Path, size: int) -> None:
    """Saves that are due meanwhile are put off, with one warning; the last one is waited for."""
    out = tmp_path / "run"
    options = Options(data=shards, out=str(out), checkpoint_every_s=0.001, keep=100)
    started = ranks.start(train_with_slow_save, size, out.with_suffix(".ranks"), RECIPE, options)
    assert ranks.finish(started) == [0] * size, printed(out)
    events = read_lines(open_storage(out), "events.jsonl")
    saved = [event["step"] for event in events if event["event"] == "checkpoint"]
    assert saved[0] == 0
    assert saved[1] >= 20
    assert saved[-1] == saved_step(out) == 40
    assert printed(out).count("the checkpoint of step 0 is still being written after") == 1


@pytest.mark.parametrize(("transient", "failures"), [(True, 4), (False, 1), (False, 2)])
def test_the_final_save_is_retried(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transient: bool, failures: int
) -> None:
    """While storage is unavailable; any other error once, as space may have been freed."""
    write, left = LocalStorage.write_bytes, [failures]

    def failing(self: LocalStorage, name: str, data: bytes) -> None:
        if "step-00000005" in self.uri and name.endswith(".safetensors") and left[0]:
            left[0] -= 1
            raise StorageError("no answer", transient=transient)
        write(self, name, data)

    monkeypatch.setattr(LocalStorage, "write_bytes", failing)
    monkeypatch.setattr("pirl.training.saver.FINAL_SAVE_PAUSE_S", 0)
    given_up = not transient and failures > 1
    with warned("no answer"), pytest.raises(StorageError) if given_up else nullcontext():
        train_here(tmp_path / "run", shards, tiny_recipe("train.epochs=1"))
    assert saved_step(tmp_path / "run") == (0 if given_up else STEPS_AN_EPOCH)


def test_too_small_maps_are_refused_before_a_batch_of_one_breaks() -> None:
    """The last map of an image view of one pixel leaves batch norm nothing to normalise over a single image."""
    with pytest.raises(ConfigError, match="image_size"):
        tiny_recipe("views.image_size=8")
