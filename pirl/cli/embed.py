"""`pirl embed`, `neighbours`: features of images by a pretrained backbone."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import typer

from .. import logs
from ..shards.spec import SourceOptions
from ..text import count as counted
from .app import Json, app, console, progress, show_rows
from .options import options_of

Model = Annotated[str, typer.Argument(help="Run, checkpoint, registered version, or file of weights.")]
ImageSource = Annotated[str, typer.Argument(help="Folder, image, shards, or any source that `pirl shard` takes.")]
RecipeOption = Annotated[str | None, typer.Option(help="Recipe of a file of weights that does not name its own.")]
BatchSize = Annotated[int, typer.Option(help="Images that pass the backbone at a time.", min=1)]
Workers = Annotated[int | None, typer.Option(help="Threads that decode; one for each core.", min=1)]
SHOWN = 20  # broken images, and queries of a table


@app.command()
@options_of(SourceOptions)
def embed(
    model: Model,
    images: ImageSource,
    options: SourceOptions,
    out: Annotated[str, typer.Option(help="File to write, a path or an s3:// URI: .npz, .parquet or .csv.")],
    recipe: RecipeOption = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Write the features of images to a file.

    Images that cannot be read are left out and named.

    Example: pirl embed runs/mine photos/test --out features.npz
    """
    from ..embedding import load
    from ..embedding.output import embed_to

    encoder = load(model, recipe=recipe)
    with nullcontext(lambda done, total: None) if as_json else progress("embedding") as advance:
        result = embed_to(
            encoder, images, out, batch_size=batch_size, workers=workers, options=options, progress=advance
        )
    if as_json:
        logs.output(f"{json.dumps(asdict(result))}\n")
        return
    for _, reason in result.skipped[:SHOWN]:
        logs.warn(f"left out: {reason}")
    if len(result.skipped) > SHOWN:
        logs.warn(f"left out: {len(result.skipped) - SHOWN:,} more (--json names all)")
    size = f"{counted(result.images, 'image')}, {counted(result.features, 'feature')} each"
    console.print(f"{size}, {len(result.skipped):,} left out: {result.out}")


@app.command()
@options_of(SourceOptions)
def neighbours(
    model: Model,
    images: ImageSource,
    options: SourceOptions,
    query: Annotated[
        list[str] | None, typer.Option(help="Image or folder to find neighbours of (once for each); default: each.")
    ] = None,
    count: Annotated[int, typer.Option(help="Neighbours of each.", min=1, max=1000)] = 5,
    recipe: RecipeOption = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Print the nearest neighbours of images by the cosine similarity of their features.

    Without --query each image is compared with all others, and the table has the first 20.

    Example: pirl neighbours runs/mine photos/train --query photos/test/class0/000.jpg
    """
    from ..embedding import load, open_images
    from ..embedding.search import find_neighbours

    encoder = load(model, recipe=recipe)
    queries = [open_images(place, options) for place in query] if query else None
    opened = open_images(images, options)
    results = find_neighbours(encoder, opened, queries, count, batch_size=batch_size, workers=workers)
    if as_json:
        logs.output(f"{json.dumps([asdict(each) for each in results])}\n")
        return
    shown = results if query else results[:SHOWN]
    show_rows(
        [
            {
                "image": each.query,
                **{str(i): f"{name} ({value:.3f})" for i, (name, value) in enumerate(each.pairs, 1)},
            }
            for each in shown
        ],
        False,
    )
    if len(results) > len(shown):
        console.print(f"and {counted(len(results) - len(shown), 'more image')}: --json prints all")
