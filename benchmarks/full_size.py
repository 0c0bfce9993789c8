"""Each step of the DAG at growing numbers of images and ranks: time, and the memory of the largest process.

The images are small JPEGs in class folders, made here. The recipe is the demo's network (256 features) for one epoch.
Two tables:

    python -m benchmarks.full_size steps 20000 80000 320000     each step as its own command, on 1, 2 and 4 ranks
    python -m benchmarks.full_size run 1281167                  `pirl run` once, 1,000 classes, end to end

Read slopes, not single times: how a step grows with the images, and what more ranks do on the cores that there are.
Memory is anonymous memory (what a process holds), then resident memory (with the mapped pages that it shares).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import RESULTS, machine

SIZES, RANKS = [20_000, 80_000, 320_000], [1, 2, 4]
PIXELS, CLASSES, TEST_SHARE = 28, 1000, 25
RECIPE, BATCH = "demo", 256
SETTINGS = [  # without jitter and blur: the time of the steps around the network is to be seen
    "data.images=0",
    "views.jitter_probability=0",
    "views.blur_probability=0",
    "train.epochs=1",
    f"train.batch_size={BATCH}",
    "optim.warmup_epochs=0.1",
]
BEFORE_STOP = 20  # steps before the training is interrupted
SAMPLE_S = 0.5


def write_class(folder: Path, images: int, classes: int, label: int) -> None:
    """Write the images of one class: a grating of the class's direction and frequency, with noise."""
    place = folder / f"class-{label:04d}"
    place.mkdir(parents=True)
    rng = np.random.default_rng((label, images))
    y, x = np.mgrid[0:PIXELS, 0:PIXELS] / PIXELS
    angle, frequency = np.pi * (label % 25) / 25, 2 + (label // 25) % 8
    grating = np.sin(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)) + label)
    for number in range(label, images, classes):
        pixels = 127 + 60 * rng.choice([-1, 1]) * grating + rng.normal(0, 25, grating.shape)
        data = BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=85)
        (place / f"{number:07d}.jpg").write_bytes(data.getvalue())


def write_images(folder: Path, images: int, classes: int) -> Path:
    """Write `images` JPEGs of 28 pixels in `classes` folders; image i has class i modulo `classes`."""
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(write_class, folder, images, classes), range(classes), chunksize=4))
    return folder


@dataclass
class Peaks:
    """Largest memory in MB of the processes below this one, sampled with its time while commands run."""

    samples: list[tuple[float, float, float]] = field(default_factory=list)

    def sample(self) -> None:
        """Take the largest anonymous and resident memory of a process now."""
        parents, sizes = {}, {}
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            except OSError:
                continue  # it has ended
            if "RssAnon" in lines:
                pid = int(status.parent.name)
                parents[pid] = int(lines["PPid"])
                sizes[pid] = [int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS")]
        below = [pid for pid in sizes if pid != os.getpid() and self._is_below(pid, parents)]
        if below:
            anonymous, resident = (max(sizes[pid][column] for pid in below) for column in (0, 1))
            self.samples.append((time.time(), anonymous, resident))

    @staticmethod
    def _is_below(pid: int, parents: dict[int, int]) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == os.getpid():
                return True
        return False

    def between(self, start: float, end: float) -> dict[str, float]:
        inside = [sample for sample in self.samples if start <= sample[0] <= end]
        return {
            "anonymous_mb": round(max((sample[1] for sample in inside), default=0.0)),
            "resident_mb": round(max((sample[2] for sample in inside), default=0.0)),
        }


def watched(command: Sequence[str], peaks: Peaks, stop_at: int = 0) -> dict[str, Any]:
    """Run a `pirl` command; return its time, its peaks, and when it logged which step of a training.

    Send SIGTERM at step `stop_at`, if it is not 0.
    """
    started = time.time()
    process = subprocess.Popen(
        [sys.executable, "-c", "from pirl.cli import main; main()", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    steps: list[tuple[float, int]] = []

    def read() -> None:
        for line in process.stdout or []:
            lines.append(line)
            if match := re.search(r"step (\d+)/", line):
                steps.append((round(time.time() - started, 1), int(match[1])))

    reading = threading.Thread(target=read)
    reading.start()
    stopped = False
    while process.poll() is None:
        peaks.sample()
        if steps and not stopped and 0 < stop_at <= steps[-1][1]:
            process.send_signal(signal.SIGTERM)
            stopped = True
        time.sleep(SAMPLE_S)
    reading.join()
    if process.returncode and not stopped:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines)}")
    ended = time.time()
    return {"start": started, "s": round(ended - started, 1), "steps": steps, **peaks.between(started, ended)}


def measure_steps(images: int, ranks: Sequence[int], scratch: Path) -> list[dict[str, Any]]:
    """Shard once; train with an interruption, and evaluate, on each number of ranks."""
    peaks = Peaks()
    classes = min(CLASSES, images // 20)
    for split, count in (("train", images), ("test", max(classes, images // TEST_SHARE))):
        write_images(scratch / split, count, classes)
        shard = watched(["shard", str(scratch / split), str(scratch / f"{split}-shards")], peaks)
        if split == "train":
            sharding = shard
    rows = []
    for rank_count in ranks:
        run = scratch / f"run-{rank_count}"
        data, test = (str(scratch / f"{split}-shards") for split in ("train", "test"))
        processes = ["--processes", str(rank_count)]
        train = ["train", RECIPE, *SETTINGS, "--data", data, "--out", str(run), "--log-every", "10", *processes]
        first = watched(train, peaks, stop_at=BEFORE_STOP)
        second = watched(train, peaks)
        (begin_s, begin), (end_s, end) = second["steps"][0], second["steps"][-1]
        rows.append(
            {
                "images": images,
                "ranks": rank_count,
                "shard": sharding,
                "start": first,
                "resume": second,
                "epoch_s": round((end_s - begin_s) / (end - begin) * (images // BATCH), 1),
                "evaluation": watched(["eval", str(run), "--data", data, "--test", test, *processes], peaks),
            }
        )
        print(steps_line(rows[-1]), flush=True)
    return rows


STEPS_HEAD = """| images | ranks | shard | training: first log line | resume: first log line | epoch | largest process of the training | evaluation | its largest process |
|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def steps_line(row: dict[str, Any]) -> str:
    shard, resume, evaluation = row["shard"], row["resume"], row["evaluation"]
    cells = [
        f"{row['images']:,}",
        str(row["ranks"]),
        f"{shard['s']:.0f} s, {shard['anonymous_mb']:.0f} MB",
        f"{row['start']['steps'][0][0]:.0f} s",
        f"{resume['steps'][0][0]:.0f} s",
        f"{row['epoch_s']:.0f} s",
        f"{resume['anonymous_mb']:,.0f} MB, {resume['resident_mb']:,.0f} resident",
        f"{evaluation['s']:.0f} s",
        f"{evaluation['anonymous_mb']:,.0f} MB, {evaluation['resident_mb']:,.0f} resident",
    ]
    return f"| {' | '.join(cells)} |"


ENDS = {  # of the steps of `pirl run`: the file that each writes last
    "shard": "data/*/manifest.json",
    "train": "runs/*/DONE.json",
    "evaluate": "runs/*/eval.json",
    "register, report": "runs/*/report.html",
}


def measure_run(images: int, scratch: Path) -> dict[str, Any]:
    """Run the whole DAG by one command; a step ends with the last of its files."""
    sources = [
        write_images(scratch / split, count, CLASSES)
        for split, count in (("train", images), ("test", max(CLASSES, images // TEST_SHARE)))
    ]
    root, peaks = scratch / "root", Peaks()
    whole = watched(["run", *map(str, sources), "--recipe", RECIPE, *SETTINGS, "--root", str(root)], peaks)
    steps, start = {}, whole["start"]
    for name, pattern in ENDS.items():
        end = max(path.stat().st_mtime for path in root.glob(pattern))
        steps[name] = {"s": round(end - start, 1), **peaks.between(start, end)}
        start = end
    return {"images": images, "classes": CLASSES, "all_s": whole["s"], "steps": steps}


RUN_HEAD = "| step | time | largest process |\n|---|---|---|"


def main(kind: str, sizes: Sequence[int]) -> None:
    """Measure, print the table as Markdown, and write the figures to the results."""
    os.environ.setdefault("COLUMNS", "200")
    rows: list[dict[str, Any]] = []
    print(STEPS_HEAD if kind == "steps" else RUN_HEAD, flush=True)
    for images in sizes:
        with tempfile.TemporaryDirectory(prefix="pirl-full-size-") as scratch:
            os.environ["PIRL_CACHE"] = f"{scratch}/cache"
            if kind == "steps":
                rows += measure_steps(images, RANKS, Path(scratch))
            else:
                rows.append(measure_run(images, Path(scratch)))
                for name, step in rows[-1]["steps"].items():
                    memory = f"{step['anonymous_mb']:,.0f} MB, {step['resident_mb']:,.0f} resident"
                    print(f"| {name} | {step['s']:,.0f} s | {memory} |", flush=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"full-size-{kind}.json").write_text(json.dumps({**machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    kind, *sizes = sys.argv[1:] or ["steps"]
    if kind not in ("steps", "run"):
        sys.exit("python -m benchmarks.full_size steps|run [images ...]")
    main(kind, [int(images) for images in sizes] or (SIZES if kind == "steps" else [1_281_167]))
