"""G3: from JPEG files of photographs to a batch for training, compared with the reference's chain of PIL calls.

G3a: uint8 crops; the device does the rest. G3b: all photometric transforms on the CPU. Both sides have the same
number of loading processes, which are started once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Result, compare, finish
from benchmarks.photographs import write_photographs
from benchmarks.reference_views import ReferenceViews, collate, normalised, seed_worker, transformed
from pirl.config import Recipe, load_recipe
from pirl.data import CropDataset
from pirl.loader import Loader
from pirl.shards import ShardReader, decode_image, open_source, write_shards
from pirl.storage import open_storage
from pirl.views import apply_photometrics, draw_geometry, draw_photometrics
from pirl.world import World

WORKERS = min(2, os.cpu_count() or 1)
BATCH, BATCHES, PHOTOGRAPHS = 32, 10, 160
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None


class Files(Dataset[Any]):
    """Side of the reference: one file, all of its views."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())
        self.views = ReferenceViews()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.views(self.files[index].read_bytes())


def reference_batches(folder: Path) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        Files(folder),
        batch_size=BATCH,
        sampler=(index % PHOTOGRAPHS for index in range(10**9)),
        collate_fn=collate,
        num_workers=WORKERS,
        worker_init_fn=seed_worker,
        multiprocessing_context="forkserver",
    )
    yield from loader


def our_batches(shards: Path, recipe: Recipe, photometric: bool) -> Iterator[Any]:
    views, seed = recipe.views, recipe.train.seed
    for epoch, _, _, batch in Loader(str(shards), recipe, World(), WORKERS).batches(0, 0):
        if not photometric:
            yield batch.images, batch.elements
            continue
        ids = batch.ids.numpy()
        yield tuple(
            apply_photometrics(pixels, draw_photometrics(views, seed, epoch, ids, elements), views)
            for pixels, elements in ((batch.images, [0]), (batch.elements, range(1, 1 + views.grid**2)))
        )


class Side:
    """One side, with `BATCHES` for each call.

    Its loading processes are stopped between two calls: work in advance would take time from the other side.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        others = set(multiprocessing.active_children())
        self.batches = batches
        next(batches)
        self.processes = set(multiprocessing.active_children()) - others
        self.signal(signal.SIGSTOP)

    def __call__(self) -> None:
        self.signal(signal.SIGCONT)
        for _ in range(BATCHES):
            images, patches = next(self.batches)
            assert images.numel() * 9 * 64 * 64 == patches.numel() * 224 * 224
            float(images.flatten()[0]) + float(patches.flatten()[-1])
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGCONT)


def check(shards: Path, recipe: Recipe) -> None:
    """Raise unless PIL gives the same pixels, crops and tensors for the same boxes, jitter, order and parameters."""
    reader, views, ids = ShardReader(shards), recipe.views, np.arange(4)
    batch = CropDataset(str(shards), recipe)[0, ids]
    images = [decode_image(reader.read(int(id)), "") for id in ids]
    sizes = np.array([(image.height, image.width) for image in images])
    geometry = draw_geometry(views, recipe.train.seed, 0, ids, sizes)
    crops = []
    for row, image in enumerate(images):
        crops.append(F.resized_crop(image, *geometry.image_box[row].tolist(), [224, 224]))
        assert np.array_equal(np.asarray(crops[-1]), batch.images[row].numpy())
        source = np.asarray(F.resized_crop(image, *geometry.places.box[row].tolist(), [255, 255]))
        for place, number in enumerate(geometry.places.permutation[row].tolist()):
            x, y = 85 * np.array(divmod(number, 3)) + geometry.places.jitter[row][:, number // 3, number % 3]
            assert np.array_equal(source[y : y + 64, x : x + 64], batch.elements[9 * row + place].numpy())
    params = draw_photometrics(views, recipe.train.seed, 0, ids, [0])
    ours = apply_photometrics(batch.images, params, views)
    for row, image in enumerate(crops):
        torch.testing.assert_close(ours[row], normalised(transformed(image, params, row)), rtol=1e-5, atol=1e-5)


def load(resampling: str) -> Recipe:
    endless = [f"train.batch_size={BATCH}", "loss.negatives=10", "train.epochs=100000"]
    return load_recipe("r50-200ep-linear", [*endless, f"views.resampling={resampling}"])


def main() -> list[Result]:
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch, ExitStack() as stack:
        files, shards = Path(scratch, "files"), Path(scratch, "shards")
        files.mkdir()
        count = write_photographs(files, PHOTOGRAPHS)
        facts = {
            "workers": WORKERS,
            "images": BATCH * BATCHES,
            "photographs": count,
            "mean_file_bytes": sum(path.stat().st_size for path in files.iterdir()) // count,
        }
        write_shards(open_source(str(files)), open_storage(str(shards)))
        theirs = stack.enter_context(Side(reference_batches(files)))
        for goal, title, required, resampling, photometric in (
            ("G3a", "uint8 crops, exact", 5.0, "exact", False),
            ("G3a-near", "uint8 crops, near (within 1 level)", 5.0, "near", False),
            ("G3b", "all photometrics on the CPU", 2.0, "exact", True),
        ):
            ours = stack.enter_context(Side(our_batches(shards, load(resampling), photometric)))
            results.append(
                compare(
                    goal=goal,
                    title=f"From photographs of 500x375: {title}",
                    sides={"reference": theirs, "ours": ours},
                    required=required,
                    repeats=5,
                    unit="s",
                    parity=lambda: check(shards, load("exact")),
                    facts=facts,
                )
            )
    return results


if __name__ == "__main__":
    finish(main())
