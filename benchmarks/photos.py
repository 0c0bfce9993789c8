"""The recipe `photos` against random weights, on tiles of large photographs.

    python -m benchmarks.photos FOLDER PHOTOGRAPH... [KEY=VALUE...]

Each photograph is a class. It is scaled to 1600 x 960 and cut into 60 tiles; those of its right 30 % are test images.
The figures of docs/guide.md are of the 12 photographs of nature in Debian's mate-backgrounds, and of 11 of its
plasma-workspace-wallpapers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

COLUMNS, ROWS, SIDE, TEST_COLUMNS = 10, 6, 160, 3


def main(arguments: list[str]) -> None:
    folder, *rest = arguments
    root = Path(folder)
    overrides = [text for text in rest if "=" in text]
    for number, path in enumerate(text for text in rest if "=" not in text):
        cut(Path(path), root / "photos", f"{number:02d}")
    for split in ("train", "test"):
        pirl("shard", root / "photos" / split, root / "shards" / split)
    data = ("--data", root / "shards" / "train")
    pirl("train", "photos", *data, "--out", root / "run", "--processes", 1, *overrides)
    pirl("eval", root / "run", *data, "--test", root / "shards" / "test")


def cut(photograph: Path, root: Path, name: str) -> None:
    image = Image.open(photograph).convert("RGB").resize((COLUMNS * SIDE, ROWS * SIDE), Image.Resampling.LANCZOS)
    for column in range(COLUMNS):
        place = root / ("test" if column >= COLUMNS - TEST_COLUMNS else "train") / name
        place.mkdir(parents=True, exist_ok=True)
        for row in range(ROWS):
            left, top = column * SIDE, row * SIDE
            image.crop((left, top, left + SIDE, top + SIDE)).save(place / f"{column}{row}.jpg", quality=90)


def pirl(*words: object) -> None:
    subprocess.run([Path(sys.executable).parent / "pirl", *map(str, words)], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
