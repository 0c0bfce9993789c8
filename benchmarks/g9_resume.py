"""G9: from `kill -9` in the middle of an epoch to the first step on images that were not trained on before the kill.

The reference has a checkpoint of the epoch's start. It lists the folder of images, loads that checkpoint with
`torch.load`, and repeats the epoch up to the kill. `pirl.train` reads the manifest and the newest checkpoint, which
is a few steps old, and resumes there. Each side is one process, of the same recipe, images, order, decoder, views and
step, so the reference's time contains only its way to restart. A launcher, the same for both, is omitted.

How much the reference repeats depends on the kill: in this benchmark it comes after `STEPS` steps; half an epoch of
ImageNet has 625. The time without the repeated steps is among the facts.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import pirl.training.loop
from benchmarks.g8_checkpoint import file_system, random_state
from benchmarks.harness import Result, compare, finish
from pirl.checkpoint import Checkpoints
from pirl.config import Recipe, load_recipe
from pirl.data import Batch, epoch_shares
from pirl.loss import Contrast
from pirl.memory import MemoryBank
from pirl.model import build_model, memory_format
from pirl.optim import build_optimizer, set_learning_rate
from pirl.order import epoch_order
from pirl.shards import open_source, write_shards
from pirl.storage import open_storage
from pirl.training.feed import deliver
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.training.state import TrainState
from pirl.training.step import train_step
from pirl.views import crop_batch
from pirl.world import World

FILES, STEPS = 100_000, 60
RECIPE = (
    "r50-200ep-linear",
    [
        "model.embedding_dim=1280",  # for a state of 860 MB with as many images
        "train.batch_size=8",
        "loss.negatives=64",
        "views.image_size=64",
        "views.patch_crop_size=99",
        "views.patch_size=32",
    ],
)
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None
PICTURES = 200
LOST_STEPS = 4  # at least, from a checkpoint to the kill of pirl.train
SAVE_EVERY_S = 5.0
LONG_S = 900.0


# ---- the two programs that are killed


def train_ours(folder: Path, recipe: Recipe, save_every_s: float) -> None:
    note = Notes(folder / "ours.notes")
    step = pirl.training.loop.train_step

    def noting_step(*arguments: Any) -> Any:
        result = step(*arguments)
        note(torch.from_numpy(arguments[-1].ids))
        return result

    pirl.training.loop.train_step = noting_step
    options = Options(
        data=str(folder / "shards"), out=str(folder / "run"), log_every=10, checkpoint_every_s=save_every_s
    )
    train(recipe, options, World())


def train_reference(folder: Path, recipe: Recipe) -> None:
    note = Notes(folder / "reference.notes")
    images = ImageFolder(str(folder / "images"))
    model = build_model(recipe)
    model = model.to(memory_format=memory_format(model.trunk))
    bank = MemoryBank(len(images), recipe.model.embedding_dim, recipe.memory)
    criterion, scaler = Contrast(recipe.loss, World()), torch.amp.GradScaler(enabled=False)
    state = TrainState(model, bank, criterion, build_optimizer(model, recipe), scaler)
    state.load_dict(torch.load(folder / "reference.pt", weights_only=True))
    set_learning_rate(state.optimizer, recipe.learning_rate)
    model.train()
    for share in epoch_shares(recipe, len(images), 0, World()):
        pixels = [np.asarray(images[int(id)][0]) for id in share.rows]
        views = crop_batch(pixels, share.rows, recipe.train.seed, 0, recipe.views)
        ids = torch.from_numpy(share.rows.copy())
        batch = Batch(ids, ids, *(torch.from_numpy(view) for view in views))
        train_step(recipe, model, state, World(), 0, share, deliver(recipe, World(), 0, batch))
        note(ids)


class Notes:
    """Record of one line for each step, with the ids of its images, which survives a kill."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self.file, b"start\n")

    def __call__(self, ids: torch.Tensor) -> None:
        os.write(self.file, json.dumps(ids.tolist()).encode() + b"\n")


# ---- the process that kills them


class Side:
    """Training that is stopped except while it is measured or prepared."""

    def __init__(self, name: str, folder: Path, recipe: tuple[str, list[str]], save_every_s: float) -> None:
        self.name, self.folder = name, folder
        self.arguments = [name, str(folder), json.dumps(recipe), str(save_every_s)]
        self.notes = folder / f"{name}.notes"
        self.redone: list[int] = []
        """Steps of each restart before the first new one."""
        self.first_step_s: list[float] = []
        """From each kill to the first step of any kind."""
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.g9_resume", *self.arguments]
        with (self.folder / f"{self.name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def starts(self) -> list[list[list[int]]]:
        """Return the ids of each step, for each start; an incomplete line does not count."""
        text = self.notes.read_text() if self.notes.exists() else ""
        blocks = text[: text.rfind("\n") + 1].split("start\n")[1:]
        return [[json.loads(line) for line in block.splitlines()] for block in blocks]

    def wait(self, reached: Callable[[list[list[list[int]]]], bool]) -> None:
        deadline = time.monotonic() + LONG_S
        while not reached(self.starts()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / f"{self.name}.log").read_text())
            time.sleep(0.01)

    def go_on_until(self, reached: Callable[[list[list[list[int]]]], bool]) -> None:
        self.signal(signal.SIGCONT)
        self.wait(reached)
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()

    def resume(self) -> None:
        """Kill, restart, and wait for the first new step; this is what is measured."""
        before = self.starts()
        seen = {tuple(ids) for steps in before for ids in steps}
        killed = time.perf_counter()
        self.kill()
        self.process = self.start()
        self.wait(lambda starts: len(starts) > len(before) and bool(starts[-1]))
        self.first_step_s.append(round(time.perf_counter() - killed, 2))
        self.wait(lambda starts: tuple(starts[-1][-1]) not in seen)
        self.signal(signal.SIGSTOP)
        self.redone.append(sum(tuple(ids) in seen for ids in self.starts()[-1]))

    def check(self, order: np.ndarray) -> int:
        """Return the number of ids that the epoch has seen.

        Raise unless every start resumes within what was done, and continues in order: no id left out, none twice.
        """
        place = {int(id): at for at, id in enumerate(order)}
        reached = 0
        for steps in self.starts():
            at = place[steps[0][0]] if steps else 0
            assert at <= reached, f"{self.name} left out {at - reached} images"
            for ids in steps:
                assert ids == order[at : at + len(ids)].tolist(), f"{self.name} is out of order at image {at}"
                at += len(ids)
            reached = at
        return reached


class Saved:
    """Condition that a checkpoint is complete since the last restart, and `LOST_STEPS` more steps are made."""

    def __init__(self, folder: Path) -> None:
        self.checkpoints = Checkpoints(open_storage(folder / "run") / "checkpoints")
        self.before = self.checkpoints.newest()
        self.steps: int | None = None

    def __call__(self, starts: list[list[list[int]]]) -> bool:
        done = len(starts[-1]) if starts else 0
        if self.steps is None and self.checkpoints.newest() not in (self.before, "step-00000000", None):
            self.steps = done
        return self.steps is not None and done >= self.steps + LOST_STEPS


def write_data(folder: Path, files: int) -> None:
    """Write a folder of `files` small images, `PICTURES` different ones, and shards of it."""
    images = folder / "images" / "all"
    images.mkdir(parents=True)
    draws = np.random.default_rng(0).integers(0, 256, (PICTURES, 9, 12, 3), np.uint8)
    pictures = []
    for pixels in draws:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((96, 72)).save(file, "JPEG")
        pictures.append(file.getvalue())
    for number in range(files):
        (images / f"{number:07}.jpg").write_bytes(pictures[number % PICTURES])
    write_shards(open_source(str(folder / "images")), open_storage(str(folder / "shards")))


def measure(
    recipe: tuple[str, list[str]],
    files: int,
    steps: int,
    repeats: int,
    save_every_s: float = SAVE_EVERY_S,
    **options: Any,
) -> Result:
    """Kill each side `repeats` times, and once more before that: all within the first epoch."""
    loaded = load_recipe(*recipe)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        folder = Path(scratch)
        write_data(folder, files)
        torch.save(random_state(loaded, files).to_dict(loaded, "data"), folder / "reference.pt")
        theirs, ours = (Side(name, folder, recipe, save_every_s) for name in ("reference", "ours"))
        try:
            theirs.wait(lambda starts: bool(starts))
            theirs.signal(signal.SIGSTOP)
            ours.go_on_until(Saved(folder))
            theirs.go_on_until(lambda starts: len(starts[-1]) >= steps)
            order = epoch_order(loaded.train.seed, 0, files)

            def check() -> None:
                for side in (theirs, ours):
                    assert side.check(order) > 0

            result = compare(
                goal="G9",
                title=f"from kill -9 after {steps} steps of an epoch to the first new step, {files} images",
                sides={"reference": theirs.resume, "ours": ours.resume},
                required=3.0,
                parity=check,
                repeats=repeats,
                unit="s",
                between=lambda: ours.go_on_until(Saved(folder)),
                facts={
                    "files": files,
                    "checkpoint_bytes": {
                        "reference": (folder / "reference.pt").stat().st_size,
                        "ours": newest_bytes(folder),
                    },
                    # filled while it is measured, the first time included
                    "redone_steps": {side.name: side.redone for side in (theirs, ours)},
                    "first_step_s": {side.name: side.first_step_s for side in (theirs, ours)},
                    "file_system": file_system(scratch),
                },
                **options,
            )
            check()
            return result
        finally:
            for side in (theirs, ours):
                side.kill()


def newest_bytes(folder: Path) -> int:
    checkpoints = Checkpoints(open_storage(folder / "run") / "checkpoints")
    name = checkpoints.newest()
    assert name is not None
    return checkpoints.commit(name).bytes


if __name__ == "__main__":
    if len(sys.argv) > 1:
        side, where, recipe, every_s = sys.argv[1:]
        arguments = Path(where), load_recipe(*json.loads(recipe))
        train_ours(*arguments, float(every_s)) if side == "ours" else train_reference(*arguments)
    else:
        finish([measure(RECIPE, FILES, STEPS, repeats=3)])
