"""Trainings that are killed again and again: every epoch sees each image once, and the bits are those of no kill."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
from conftest import IMAGES, tiny_recipe
from test_train import assert_same_bits, final, wait_for

import pirl.training.loop
from pirl.config import Recipe
from pirl.metrics import read_lines
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World

STEPS_AN_EPOCH = 5


def train_noting(world: World, recipe: Recipe, options: Options, notes: Path, most_steps: int) -> dict[str, Any]:
    """Train, and note where it starts and the images of each step, where a kill cannot take them away.

    Its step `most_steps`, if not 0, waits for the kill.
    """
    file = os.open(f"{notes}-{world.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    resume, step = pirl.training.loop.resume, pirl.training.loop.train_step

    def noting_resume(*arguments: Any) -> Any:
        cursor = resume(*arguments)
        os.write(file, b"%d\n" % (cursor.step if cursor else 0))
        return cursor

    made = itertools.count(1)

    def noting_step(*arguments: Any) -> Any:
        *_, world, epoch, share, _ = arguments
        os.write(file, json.dumps([epoch, share.rows[: share.counts[world.rank]].tolist()]).encode() + b"\n")
        if next(made) == most_steps:
            wait_for(Path(f"{notes}-killed").exists, 240)
        return step(*arguments)

    pirl.training.loop.resume, pirl.training.loop.train_step = noting_resume, noting_step
    return train(recipe, options, world)


class Killed:
    """A training and what was done to it."""

    def __init__(self, folder: Path, shards: str, epochs: int, seed: int) -> None:
        self.folder, self.shards = folder, shards
        self.out = folder / "run"
        self.recipe = tiny_recipe(f"train.epochs={epochs}")
        self.rng = random.Random(seed)
        self.attempts: list[int] = []
        """Ranks of each."""
        self.kills: Counter[str] = Counter()

    def start(self, size: int, most_steps: int = 0) -> list[Any]:
        notes = self.folder / f"notes-{len(self.attempts)}"
        self.attempts.append(size)
        options = Options(data=self.shards, out=str(self.out), log_every=1, checkpoint_every_s=0.05)
        return ranks.start(train_noting, size, self.folder / "ranks", self.recipe, options, notes, most_steps)

    def noted(self, attempt: int, rank: int = 0) -> list[Any]:
        path = self.folder / f"notes-{attempt}-{rank}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def kill(self, size: int, most_steps: int) -> None:
        """Start on `size` ranks; at a random point, at the latest after `most_steps`, kill -9 one of them or all."""
        processes = self.start(size, most_steps)
        how, reached = self.moment(most_steps)
        while not reached() and len(self.noted(len(self.attempts) - 1)) <= most_steps:  # where it starts, and steps
            assert all(process.is_alive() for process in processes), ranks.output(self.folder / "ranks")
            time.sleep(0.002)
        victims = self.rng.choice([processes, *([process] for process in processes)])
        for process in victims:
            process.kill()
        (self.folder / f"notes-{len(self.attempts) - 1}-killed").touch()
        self.kills[f"{how}, {'all ranks' if victims is processes else 'one rank'}"] += 1
        if not self.noted(len(self.attempts) - 1):  # they had not found each other yet, and may wait for a minute
            for process in processes:
                process.kill()
        codes = ranks.finish(processes)
        assert None not in codes, "a rank hangs"
        assert not (self.out / "DONE.json").exists()

    def moment(self, most_steps: int) -> tuple[str, Any]:
        """What to wait for."""
        how = self.rng.choice(("at any time", "after a step", "in a save"))
        steps, due = self.rng.randint(1, most_steps), time.monotonic() + self.rng.uniform(0, 4)
        attempt = len(self.attempts) - 1
        return how, {
            "at any time": lambda: time.monotonic() > due,
            "after a step": lambda: len(self.noted(attempt)) > steps,
            "in a save": lambda: self.noted(attempt) and self.half_saved(),
        }[how]

    def half_saved(self) -> bool:
        """Whether there is a checkpoint with parts, and without a commit object."""
        return any(
            any(path.glob("part-*")) and not (path / "COMMIT.json").exists()
            for path in self.out.glob("checkpoints/step-*")
        )

    def finish(self, size: int) -> None:
        codes = ranks.finish(self.start(size), 500)
        assert codes == [0] * size, ranks.output(self.folder / "ranks")

    def images_that_count(self) -> Iterator[tuple[int, int]]:
        """(epoch, image) of every step that is part of the final state: an attempt's, up to where the next began."""
        started = [(attempt, size) for attempt, size in enumerate(self.attempts) if self.noted(attempt)]
        starts = [self.noted(attempt)[0] for attempt, _ in started]
        ends = [*starts[1:], self.recipe.train.epochs * STEPS_AN_EPOCH]
        for (attempt, size), start, end in zip(started, starts, ends):
            assert start <= end, "a checkpoint was lost"
            for rank in range(size):
                steps = self.noted(attempt, rank)[1 : 1 + end - start]
                assert len(steps) == end - start
                for epoch, images in steps:
                    yield from ((epoch, image) for image in images)

    def check_images(self) -> None:
        seen = Counter(self.images_that_count())
        assert seen == {(epoch, image): 1 for epoch in range(self.recipe.train.epochs) for image in range(IMAGES)}


@pytest.mark.parametrize(
    ("kills", "epochs", "same"),
    [(3, 16, False), *(pytest.param(50, 120, same, marks=pytest.mark.slow) for same in (True, False))],
)
def test_killed_at_random(shards: str, tmp_path: Path, kills: int, epochs: int, same: bool) -> None:
    """Resumed on as many ranks as before, or on any other number of them."""
    training = Killed(tmp_path, shards, epochs, seed=kills + same)
    size, began = 3, time.monotonic()
    for _ in range(kills):
        training.kill(size, most_steps=epochs * STEPS_AN_EPOCH // (kills + 1))
        if not same:
            size = training.rng.choice([ranks for ranks in (1, 2, 3, 4) if ranks != size])
    training.finish(size)
    seconds = time.monotonic() - began
    training.check_images()
    lines = read_lines(open_storage(training.out), "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 1 + epochs * STEPS_AN_EPOCH))
    print(
        f"{sum(training.kills.values())} kills in {seconds:.0f} s: {dict(training.kills)}; "
        f"starts on ranks: {dict(Counter(training.attempts))}; steps {lines[-1]['step']}"
    )
    if same:
        whole = Killed(tmp_path / "whole", shards, epochs, seed=0)
        whole.folder.mkdir()
        whole.finish(size)
        assert_same_bits(final(training.out), final(whole.out))
        expected = read_lines(open_storage(whole.out), "metrics.jsonl")
        assert [(line["step"], line["loss"]) for line in lines] == [(line["step"], line["loss"]) for line in expected]
