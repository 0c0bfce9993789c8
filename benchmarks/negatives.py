"""Choice of the negatives on the demo: accuracy and time of several recipes, each with three seeds.

python -m benchmarks.negatives FOLDER [NAME ...] trains what FOLDER does not have yet, one run at a time on one core,
and prints the table. A seed decides the initial weights, the views, the order and the negatives.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from pirl.config import load_recipe
from pirl.evaluate import evaluate_trunk, load_trunk
from pirl.evaluate.probe import spread
from pirl.shards import open_source, write_shards
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World

SEEDS = (0, 1, 2)
CHOICES = {
    "1,024 drawn": [],
    "all": ['loss.negatives="all"', "loss.exclude_positive=false"],
    "visited": ['loss.negatives="visited"', "loss.exclude_positive=false"],
    "all after a forward pass": ['loss.negatives="all"', "loss.exclude_positive=false", "memory.init=forward"],
}
"""Overrides of the recipe `demo`."""
SCORES = ("linear", "linear_1pct", "knn")


def measure(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one choice with one seed; return its scores, in %, and seconds of processor time."""
    uri = folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    record = uri.with_suffix(".json")
    if record.exists():
        return dict(json.loads(record.read_text()))
    recipe = load_recipe("demo", [*CHOICES[name], f"train.seed={seed}"])
    shards = [str(folder / split) for split in ("train", "test")]
    begin, started = time.process_time(), time.perf_counter()
    train(recipe, Options(data=shards[0], out=str(uri), workers=0, checkpoint_every_s=10_000), World())
    seconds = {"cpu_s": time.process_time() - begin, "wall_s": time.perf_counter() - started}
    recipe, _, trunk = load_trunk(str(uri))
    scores = evaluate_trunk(trunk, recipe, *shards).pretrained
    values = {key: 100 * scores[key].top1.mean for key in SCORES} | seconds | {"load": machine()["load"]}
    record.write_text(json.dumps(values))
    print(name, seed, {key: round(value, 2) for key, value in values.items()}, flush=True)
    return values


def main(folder: Path, names: list[str]) -> None:
    """Measure the choices `names` in turns, seed by seed, and print a table of means and standard deviations."""
    torch.set_num_threads(1)
    for split in ("train", "test"):
        if not (folder / split).exists():
            write_shards(open_source(f"fashion-mnist:{split}"), open_storage(str(folder / split)))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in SEEDS:
        for name in names:
            runs[name].append(measure(folder, name, seed))
    columns = (*SCORES, "cpu_s")
    print("| negatives |", " | ".join(columns), "|")
    print("|---" * (1 + len(columns)) + "|")
    for name, values in runs.items():
        scores = [spread([value[column] for value in values]) for column in columns]
        print(f"| {name} |", " | ".join(f"{score.mean:.2f} ± {score.std:.2f}" for score in scores), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CHOICES))
