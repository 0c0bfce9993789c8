"""`pirl shard`: images -> shards."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ..shards.spec import ShardingOptions
from ..text import count
from .app import DRY_RUN_HELP, app, console, progress
from .options import options_of


@app.command()
@options_of(ShardingOptions)
def shard(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or s3://bucket/prefix (images, tar or parquet files), pattern of these, list of files (.txt)."
        ),
    ],
    out: Annotated[str, typer.Argument(help="Folder or s3:// prefix.")],
    options: ShardingOptions,
    processes: Annotated[int, typer.Option(help="Processes.", min=1)] = os.cpu_count() or 1,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Pack images into WebDataset shards with a manifest.

    Example: pirl shard photos/train shards/train
    """
    from ..outputs import check_shards_output
    from ..shards import Quarantine, decoding_notes, listed, open_source, summary, write_shards

    images = open_source(source, options)
    for line in summary(images):
        console.print(line)
    place = check_shards_output(out, images)
    if dry_run:
        console.print(f"{count(len(images), 'image')} would go to {out}")
        return
    with progress("sharding") as advance:
        manifest = write_shards(
            images,
            place,
            processes=processes,
            max_bad_share=options.max_bad_share,
            decoding=options.decoding,
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
