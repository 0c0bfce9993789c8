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
import torch.nn.functional as F

from benchmarks.harness import machine
from pirl.config import load_recipe
from pirl.evaluate import evaluate_trunk, load_trunk
from pirl.evaluate.probe import spread
from pirl.model import memory_format
from pirl.results import Completion
from pirl.shards import open_source, write_shards
from pirl.storage import open_storage
from pirl.training import loop
from pirl.training.loop import Trainer
from pirl.training.spec import Options
from pirl.views import apply_photometrics, draw_photometrics
from pirl.world import World

SEEDS = (0, 1, 2)
CHOICES = {
    "1,024 drawn": [],
    "all": ['loss.negatives="all"', "loss.exclude_positive=false"],
    "visited": ['loss.negatives="visited"', "loss.exclude_positive=false"],
    "all after a forward pass": ['loss.negatives="all"', "loss.exclude_positive=false"],
}
"""Overrides of the recipe `demo`."""
SCORES = ("linear", "linear_1pct", "knn")


class ForwardStart(Trainer):
    """A training whose bank starts with the embeddings of the untrained network, from one pass over the first epoch."""

    def fit(self) -> Completion:
        if not self.resumed:
            self._embed_all()
        return super().fit()

    @torch.no_grad()
    def _embed_all(self) -> None:
        model, recipe = self.state.model.train(), self.recipe
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        batches = self.loader.batches(0, 0)
        for epoch, _, _, batch in batches:
            if epoch:
                break
            noise = draw_photometrics(recipe.views, recipe.train.seed, 0, batch.ids.numpy(), [0])
            with torch.autocast("cpu", torch.bfloat16):
                images = apply_photometrics(batch.images, noise, recipe.views)
                features = model.trunk(images.to(memory_format=memory_format(model.trunk)))
                embeddings = model.image_head(features)
            self.state.bank.memory[batch.rows] = F.normalize(embeddings.float())
        batches.close()
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def measure(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one choice with one seed; return its scores, in %, and seconds of processor time."""
    uri = folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    record = uri.with_suffix(".json")
    if record.exists():
        return dict(json.loads(record.read_text()))
    recipe = load_recipe("demo", [*CHOICES[name], f"train.seed={seed}"])
    shards = [str(folder / split) for split in ("train", "test")]
    loop.Trainer = ForwardStart if "forward" in name else Trainer  # type: ignore[misc]
    begin, started = time.process_time(), time.perf_counter()
    loop.train(recipe, Options(data=shards[0], out=str(uri), workers=0, checkpoint_every_s=10_000), World())
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
