"""What breaks in the middle of a training, done to real processes: it ends in time, says what and where, and goes on
from the last good checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from conftest import IMAGES, TRAIN, tiny_recipe, training
from test_data import in_session
from test_train import arguments, final, rank_pids, saved_step, wait_for

import pirl.training.loop
from pirl.checkpoint import Checkpoints
from pirl.config import Recipe
from pirl.metrics import read_lines
from pirl.order import epoch_order
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.training.state import TrainState
from pirl.world import World

EPOCHS = 8
STEPS_AN_EPOCH = 5  # 42 images in batches of 9
RECIPE = tiny_recipe(f"train.epochs={EPOCHS}")


def train_hooked(world: World, recipe: Recipe, options: Options, hook: Any, *details: Any) -> Any:
    """A training with `hook(number of the step, world, state, *details)` called before each step and, where it returns
    a function, that one after it."""
    step, number = pirl.training.loop.train_step, 0

    def hooked(*given: Any) -> Any:
        nonlocal number
        number += 1
        _, _, state, *_ = given
        after = hook(number, world, state, *details)
        result = step(*given)
        if after:
            after()
        return result

    pirl.training.loop.train_step = hooked
    return train(recipe, options, world)


def start(size: int, out: Path, shards: str, hook: Any, *details: Any, **how: Any) -> list[BaseProcess]:
    """What the ranks print is in `out`.ranks."""
    timeout_s = str(how.pop("timeout_s", 60))
    options = Options(data=shards, out=str(out), **{"log_every": 1, "checkpoint_every_s": 0.1, **how})
    folder = out.with_suffix(".ranks")
    return ranks.start(train_hooked, size, folder, RECIPE, options, hook, *details, TIMEOUT_S=timeout_s)


def printed(out: Path, rank: int = 0) -> str:
    return ranks.output(out.with_suffix(".ranks"), rank)


def assert_goes_on(out: Path, shards: str, size: int) -> None:
    """The same again comes to the end, from where it was saved."""
    assert ranks.finish(start(size, out, shards, nothing)) == [0] * size, printed(out)
    assert "resuming from step-" in printed(out)
    assert open_storage(out).read_json("DONE.json")["images_seen"] == EPOCHS * IMAGES


def nothing(number: int, world: World, state: TrainState) -> None:
    pass


# ---- what hangs


def freeze(number: int, world: World, state: TrainState) -> None:
    if number == 8 and world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_that_hangs_is_named_with_its_step(shards: str, tmp_path: Path) -> None:
    """The other two wait as long as they are told to, and do not hang themselves."""
    out = tmp_path / "run"
    processes = start(3, out, shards, freeze, timeout_s=8)
    for rank in (0, 2):
        processes[rank].join(60)
    told = [printed(out, rank) for rank in range(3)]
    processes[1].kill()
    codes = ranks.finish(processes)
    assert {codes[0], codes[2]} <= {1, ranks.CRASHED}, told  # a launcher tells a lost peer from a crash
    assert any("error: rank 1 did not answer within 8 s at step 8\n" in text for text in told), told
    assert saved_step(out) <= 7
    assert_goes_on(out, shards, 3)


@pytest.mark.slow
def test_a_launcher_ends_a_rank_that_hangs(shards: str, tiny_toml: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    argv = arguments(tiny_toml, shards, out, "--processes=2", "train.epochs=100", "--timeout-s=10")
    command = [*TRAIN, *argv, "--checkpoint-every-s=0.1"]
    with open(log, "w") as file:
        first = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    wait_for(lambda: "step 4/" in log.read_text(), 120)
    os.kill(rank_pids(first.pid)[1], signal.SIGSTOP)
    assert first.wait(120) == 1
    assert not in_session(first.pid)
    text = log.read_text()
    (step,) = re.findall(r"error: rank 1 did not answer within 10 s at step (\d+)\n", text)
    assert int(step) >= 4
    assert "Traceback" not in text
    second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert "resuming from step-" in second.stdout


def test_the_ranks_of_a_killed_launcher_save(shards: str, tiny_toml: Path, tmp_path: Path) -> None:
    """Without the key-value store that was in the launcher. Before: a hangup that `nohup` ignores changes nothing."""
    out, log = tmp_path / "run", tmp_path / "log"
    argv = arguments(tiny_toml, shards, out, "--processes=2", "train.epochs=100000", "--checkpoint-every-s=1000")
    command = ["nohup", *TRAIN, *argv]
    with open(log, "w") as file:
        launcher = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def step() -> int:
        return max((int(number) for number in re.findall(r"step (\d+)/", log.read_text())), default=0)

    wait_for(lambda: step() > 4, 120)
    os.kill(launcher.pid, signal.SIGHUP)
    for pid in rank_pids(launcher.pid).values():
        os.kill(pid, signal.SIGHUP)
    hung_up = step()
    wait_for(lambda: step() > hung_up + 10)
    pids = list(rank_pids(launcher.pid).values())
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    text = log.read_text()
    assert saved_step(out) == step(), text
    assert not re.search(r"frame #|Traceback|\[W\d", text), text


def signal_worker(number: int, world: World, state: TrainState, kind: signal.Signals) -> None:
    if number == 8 and world.rank == 1:
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        pytest.param(
            signal.SIGSTOP,
            r"the data loading processes of rank 1 have made no batch for 30 s at step (\d+)",
            marks=pytest.mark.slow,
        ),
        (signal.SIGKILL, r"a data loading process of rank 1 died"),
    ],
)
def test_a_loading_process_that_hangs_or_dies(shards: str, tmp_path: Path, kind: signal.Signals, said: str) -> None:
    """Its rank is the one to tell, and no process is left."""
    out = tmp_path / "run"
    processes = start(2, out, shards, signal_worker, kind, workers=1)
    codes = ranks.finish(processes)
    assert codes[1] == 1, (printed(out, 0), printed(out, 1))
    assert codes[0] in (1, ranks.CRASHED)
    found = re.search(f"error: {said}", printed(out, 1))
    assert found, printed(out, 1)
    assert all(8 <= int(step) <= 12 for step in found.groups())  # batches that were ready are still used
    assert_goes_on(out, shards, 2)


def test_a_bug_ends_a_training_with_loading_processes(shards: str, tiny_toml: Path, tmp_path: Path) -> None:
    """With its traceback, and at once: the workers do not listen to the signal by which Python would end them."""
    path = tmp_path / "training.json"
    path.write_text(training(tiny_toml, shards, tmp_path / "run", workers=2).to_json())
    broken = "import pirl.train, pirl.training.loop as loop; loop.train_step = lambda *_: 1 / 0"
    program = f"{broken}; pirl.launch.exit_process(lambda: pirl.training.start.start(['{path}']))"
    env = os.environ | {"RANK": "0", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stderr.count("ZeroDivisionError") == 1


def spoil_shards(number: int, world: World, state: TrainState, folder: Path) -> None:
    """After the first batch is read: other content, of the same size."""
    if number == 1 and world.is_main:
        for path in folder.glob("*.tar"):
            path.write_bytes(bytes(path.stat().st_size))
    world.barrier()


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_change_while_training(shards: str, tmp_path: Path, workers: int) -> None:
    """No image is learned that the manifest does not tell; restored, they are gone on with."""
    out, folder = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(shards.removeprefix("file://"), folder)
    processes = start(2, out, str(folder), spoil_shards, folder, workers=workers)
    codes = ranks.finish(processes)
    told = [printed(out, rank) for rank in range(2)]
    assert 1 in codes, told
    assert any(re.search(r"error: .*shard-\d+\.tar has other content .* \(image \d+\)\n", text) for text in told), told
    assert all("Traceback" not in text for code, text in zip(codes, told) if code == 1)
    shutil.copytree(shards.removeprefix("file://"), folder, dirs_exist_ok=True)
    assert_goes_on(out, str(folder), 2)


# ---- numbers that are none


def poison(number: int, world: World, state: TrainState, what: str) -> Any:
    """At step 7: the loss of one rank, a gradient of one rank, or the bank of all."""
    if number != 7:
        return None
    weight, nan = state.model.trunk.conv1.weight, float("nan")
    if what == "loss" and world.rank == 1:
        weight.data[0, 0, 0, 0] = nan
    if what == "gradient" and world.rank == 1:
        handle = weight.register_hook(lambda gradient: gradient * nan)
        return handle.remove
    if what == "bank":
        return lambda: state.bank.memory.fill_(nan)
    return None


@pytest.mark.parametrize("often", [True, False])
@pytest.mark.parametrize("what", ["loss", "gradient", "bank"])
def test_numbers_that_are_none_are_told_with_their_batch_and_never_saved(
    shards: str, tmp_path: Path, what: str, often: bool
) -> None:
    """With a checkpoint due at every step, or with none before the end; without a line of the log."""
    out = tmp_path / "run"
    every_s = 0 if often else 1000
    processes = start(2, out, shards, poison, what, keep=100, log_every=1000, checkpoint_every_s=every_s)
    assert ranks.finish(processes) == [1, 1], printed(out)
    assert not (out / "DONE.json").exists()

    step = 7 if often or what == "loss" else 8  # what is broken by a step shows in the loss of the next
    first = 9 * (step - 1 - STEPS_AN_EPOCH)
    ids = epoch_order(0, 1, IMAGES)[first : first + 9].tolist()
    (event,) = [event for event in read_lines(open_storage(out), "events.jsonl") if event["event"] == "not_finite"]
    assert (event["step"], event["epoch"], event["ids"]) == (step, 1, ids)
    broken = {"gradient": "(model/trunk.conv1.weight|optimizer/state/0/momentum_buffer)", "bank": "bank/memory"}
    named = broken[what] if often and what in broken else "the loss"
    said = rf"error: {named}.* is no longer finite.*first at step {step} \(epoch 1\), with the images {ids[0]}, "
    assert re.search(said, printed(out)), printed(out)

    checkpoints = Checkpoints(open_storage(out) / "checkpoints")
    assert checkpoints.names()[-1] == ("step-00000006" if often else "step-00000000")
    for name in checkpoints.names():
        found = checkpoints.load(name)
        assert found is not None
        assert all(tensor.isfinite().all() for part in ("model", "bank") for tensor in found[1][part].values())
    assert_goes_on(out, shards, 2)


# ---- a clock that jumps


def jump(number: int, world: World, state: TrainState) -> None:
    time.time = lambda: random.uniform(0, 4e9)


def test_a_clock_that_jumps(shards: str, tmp_path: Path) -> None:
    """Every look at the wall clock finds another year: nothing is due too early or never, and no bit changes."""
    jumping, steady = tmp_path / "jumping", tmp_path / "steady"
    for out, hook in ((jumping, jump), (steady, nothing)):
        assert ranks.finish(start(2, out, shards, hook)) == [0, 0], printed(out)
    events = [event["event"] for event in read_lines(open_storage(jumping), "events.jsonl")]
    assert (events[0], events[-1]) == ("start", "done")
    assert events.count("checkpoint") >= 2
    first, second = final(jumping), final(steady)
    for part in ("model", "bank"):
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in first[part].items())
