"""`pirl shard`: images -> shards."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ..text import count
from .app import DRY_RUN_HELP, app, console, progress

Background = Annotated[str, typer.Option(help="Colour below transparent pixels: a name, #rrggbb, or none: drop alpha.")]
Exif = Annotated[str, typer.Option(help="EXIF orientation: apply (as viewers do), or ignore.")]
MaxPixels = Annotated[
    int | None, typer.Option(help="Of one image (100 million); larger JPEGs are read at a reduced size.", min=1)
]


@app.command()
def shard(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or s3://bucket/prefix (images or tars), list of files (.txt), or fashion-mnist:train|test."
        ),
    ],
    out: Annotated[str, typer.Argument(help="Folder or s3:// prefix.")],
    processes: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    max_bad_share: Annotated[float, typer.Option(help="Stop if a larger share of images is unreadable.")] = 0.01,
    background: Background = "white",
    exif: Exif = "apply",
    max_pixels: MaxPixels = None,
    image: Annotated[
        str, typer.Option(metavar="PART", help="Of samples in tar files, the part that is the image (jpg); each: all.")
    ] = "",
    label: Annotated[
        str, typer.Option(metavar="PART", help="Of samples in tar files, the part with the label: cls, json:KEY.")
    ] = "",
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Pack images into WebDataset shards with a manifest.

    Example: pirl shard photos/train shards/train
    """
    from ..shards import Quarantine, decoding_notes, decoding_settings, listed, open_source, summary, write_shards
    from ..storage import open_storage

    decoding = decoding_settings(background, exif, max_pixels)
    images = open_source(source, image, label)
    for line in summary(images):
        console.print(line)
    if dry_run:
        console.print(f"{count(len(images), 'image')} would go to {out}")
        return
    place = open_storage(out)
    with progress("sharding") as advance:
        manifest = write_shards(
            images,
            place,
            processes=processes,
            max_bad_share=max_bad_share,
            decoding=decoding,
            progress=advance,
        )
    for note in decoding_notes(manifest.decoding, manifest.pictures):
        console.print(note)
    if manifest.quarantined and (empty := Quarantine.load(place).empty_classes):
        console.print(f"{count(len(empty), 'class', 'classes')} without a readable image: {listed(empty)}")
    console.print(
        f"{count(manifest.images, 'image')} in {count(len(manifest.shards), 'shard')}, "
        f"{manifest.quarantined:,} quarantined, digest {manifest.digest[:12]}: {out}"
    )
