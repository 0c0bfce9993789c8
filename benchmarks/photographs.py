"""Photographs of ImageNet's size for benchmarks, cut from larger ones of this machine."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

from pirl.errors import UsageError

PACKAGES = "mate-backgrounds plasma-workspace-wallpapers gnome-backgrounds"
FOLDERS = (Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers"))
WIDTH, HEIGHT, QUALITY = 500, 375, 95
LEAST_BYTES = 30_000  # of a cut's file: a smaller one shows only sky
SOURCE_BYTES, SOURCE_WIDTH, SOURCE_HEIGHT = 100_000, 1500, 750  # of a photograph that is cut


def write_photographs(folder: Path, most: int) -> int:
    """Write up to `most` JPEGs of 500x375 into `folder`, and return how many.

    They are taken from `PIRL_PHOTOGRAPHS` (a folder of JPEGs, cut in the same way), else from Debian's wallpaper
    packages. Each photograph is reduced to a width of 1500 and cut into pieces that do not overlap.
    """
    given = os.environ.get("PIRL_PHOTOGRAPHS")
    roots = [Path(given)] if given else [root for root in FOLDERS if root.is_dir()]
    files = sorted(path for root in roots for path in root.rglob("*.jp*g") if path.is_file() and not path.is_symlink())
    written = 0
    for path in files:
        if path.stat().st_size < SOURCE_BYTES:
            continue
        with Image.open(path) as opened:
            if opened.width < SOURCE_WIDTH or opened.height < SOURCE_HEIGHT:
                continue
            opened.draft("RGB", (SOURCE_WIDTH, SOURCE_WIDTH * opened.height // opened.width))
            height = SOURCE_WIDTH * opened.height // opened.width
            photograph = opened.convert("RGB").resize((SOURCE_WIDTH, height), Image.Resampling.LANCZOS)
        for top in range(0, height - HEIGHT + 1, HEIGHT):
            for left in range(0, SOURCE_WIDTH - WIDTH + 1, WIDTH):
                piece = io.BytesIO()
                photograph.crop((left, top, left + WIDTH, top + HEIGHT)).save(piece, "JPEG", quality=QUALITY)
                if piece.tell() >= LEAST_BYTES and written < most:
                    (folder / f"{written:04}.jpg").write_bytes(piece.getvalue())
                    written += 1
    if written < 32:
        raise UsageError(
            f"{written} photographs in {', '.join(map(str, roots)) or 'no folder'}, at least 32 are needed",
            f"apt-get install --no-install-recommends {PACKAGES}, or set PIRL_PHOTOGRAPHS to a folder of large JPEGs",
        )
    return written
