"""G8: the stall of training for a checkpoint, compared with `torch.save` of the same state to the same location.

The state is that of a ResNet-50 on ImageNet: the bank, the network, its momentum. It has random numbers, because
zeros are faster. `pirl train` copies the state to a staging buffer and continues. The check for NaN and infinity,
hashes and the write follow in the background, unmeasured. The throughput of training meanwhile is printed too, with
all cores and with one core less; 0.97 of that without a save is the target.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.g7_ddp import Training
from benchmarks.harness import Result, compare, finish
from pirl.checkpoint import Checkpoints, Cursor
from pirl.config import Recipe, load_recipe
from pirl.loss import Contrast
from pirl.memory import MemoryBank
from pirl.model import build_model, memory_format
from pirl.optim import build_optimizer
from pirl.storage import open_storage
from pirl.training.meter import Meter
from pirl.training.state import TrainState, check_state
from pirl.world import World

IMAGES = 1_281_167
MEANWHILE = (
    "r50-200ep-linear",
    [
        "train.batch_size=4",
        "loss.negatives=100",
        "model.block=basic",
        "model.layers=[2,2,2,2]",
        "views.image_size=64",
        "views.patch_crop_size=99",
        "views.patch_size=32",
    ],
)
"""Steps of a tenth of a second or so: several of them pass while a checkpoint is written."""
TIMES = 5


def random_state(recipe: Recipe, images: int) -> TrainState:
    """Return a state as after some training: with momentum for every parameter."""
    model = build_model(recipe)
    model = model.to(memory_format=memory_format(model.trunk))
    optimizer = build_optimizer(model, recipe)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
    bank = MemoryBank(images, recipe.model.embedding_dim, recipe.memory)
    criterion = Contrast(recipe.loss, World())
    return TrainState(model, bank, criterion, optimizer, torch.amp.GradScaler(enabled=False))


class Sides:
    """Two ways to save `state` into `folder`."""

    def __init__(self, folder: Path, recipe: Recipe, images: int) -> None:
        self.recipe, self.state = recipe, random_state(recipe, images)
        self.file = folder / "reference.pt"
        self.checkpoints = Checkpoints(open_storage(folder) / "checkpoints", keep=1)
        self.step = 0
        self.written = threading.Event()

    def content(self) -> dict[str, Any]:
        return self.state.to_dict(self.recipe, "data")

    def reference(self) -> None:
        torch.save(self.content(), self.file)

    def ours(self) -> None:
        self.step += 1
        self.written.clear()
        check_state(self.state, None, World(), cast(Meter, None))  # which only a non-finite loss needs
        self.checkpoints.save(
            self.content(), Cursor(step=self.step), "recipe", "data", done=lambda commit, seconds: self.written.set()
        )

    def settle(self) -> None:
        """Wait until nothing is written in the background."""
        error = self.checkpoints.wait()
        assert error is None, error

    def check(self) -> None:
        """Raise unless both sides have written the same state, the one to save."""
        self.reference()
        self.ours()
        self.settle()
        found = self.checkpoints.load()
        assert found is not None
        same(torch.load(self.file, weights_only=True), found[1])
        same(found[1], self.content())


def same(expected: Any, found: Any) -> None:
    """Return whether two trees of plain values and tensors are equal, bit by bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found)
    elif isinstance(expected, dict):
        assert expected.keys() == found.keys()
        for key in expected:
            same(expected[key], found[key])
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(found)
        for one, other in zip(expected, found):
            same(one, other)
    else:
        assert expected == found


def speed_while_saving(sides: Sides, step: Callable[[], object], threads: int, times: int) -> float:
    """Return the throughput from the stall until the checkpoint is complete, as a share of that without a save."""
    torch.set_num_threads(threads)
    ratios = []
    step()
    for _ in range(times):
        sides.ours()
        started, steps = time.perf_counter(), 0
        while steps == 0 or not sides.written.is_set():
            step()
            steps += 1
        meanwhile = time.perf_counter() - started
        sides.settle()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        ratios.append((time.perf_counter() - started) / meanwhile)
    return round(statistics.median(ratios), 3)


def stall(goal: str, folder: str | None, recipe: Recipe, images: int, repeats: int, **options: Any) -> Result:
    """Measure the stall; `folder` is where a temporary folder is made, None the system's default."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        sides = Sides(Path(scratch), recipe, images)
        sides.check()
        training = Training(load_recipe(*MEANWHILE), World())
        speed = {
            f"{threads}_threads": speed_while_saving(sides, training.step, threads, min(repeats, TIMES))
            for threads in sorted({max(1, cores - 1), cores})
        }
        torch.set_num_threads(cores)
        size = sides.file.stat().st_size
        result = compare(
            goal=goal,
            title=f"stall of training for a checkpoint of {size / 1e6:.0f} MB to {file_system(scratch)}",
            sides={"reference": sides.reference, "ours": sides.ours},
            required=8.0,
            parity=sides.check,
            repeats=repeats,
            between=sides.settle,
            facts={"bytes": size, "speed_while_saving": speed, "file_system": file_system(scratch)},
            **options,
        )
        sides.settle()
        return result


def file_system(folder: str) -> str:
    """Return the type of the file system of a folder."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return max((mount for mount in mounts if Path(mount[0]) in Path(folder).parents), key=lambda each: len(each[0]))[1]


def main() -> list[Result]:
    recipe = load_recipe("r50-200ep-linear")
    results = [stall("G8", None, recipe, IMAGES, repeats=15)]
    if Path("/dev/shm").is_dir():
        results.append(stall("G8-tmpfs", "/dev/shm", recipe, IMAGES, repeats=15))
    return results


if __name__ == "__main__":
    finish(main())
