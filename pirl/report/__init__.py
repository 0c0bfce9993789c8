"""`report.html`: all of a run on one page that needs nothing else, and the sheet of views for `pirl preview`.

    facts       what the run directory holds, and the verdict, the table and the curves that follow from it
    charts      line charts as inline SVG
    sheet       the views of real images, with the places that they come from
    gallery     features of training images, which the next two search
    neighbours  nearest training images of a few test images
    data_map    training images in two dimensions, likely duplicates and outliers

Missing parts are named on the page. Everything that comes from outside is escaped by the templates.
"""

from __future__ import annotations

from dataclasses import dataclass

from pirl.data import CropDataset
from pirl.errors import CheckpointError
from pirl.gains import caveats, gains
from pirl.order import epoch_order
from pirl.report.charts import MOST_POINTS
from pirl.report.data_map import DataMap, draw_map
from pirl.report.facts import RunFacts, curves, header, read_run, row_detail, row_titles, scale, verdict
from pirl.report.gallery import read_gallery
from pirl.report.neighbours import Neighbours, find_neighbours
from pirl.report.page import render, script
from pirl.report.sheet import Example, draw_views, views_sheet, write_preview
from pirl.run import REPORT, Run
from pirl.shards import Manifest, ShardReader
from pirl.text import count
from pirl.views import open_pretext

__all__ = ["render_report", "save_report", "views_sheet", "write_preview", "write_report"]

EXAMPLES = 8


@dataclass(frozen=True)
class DataSet:
    """One sharded data set on the page."""

    uri: str
    manifest: Manifest

    @property
    def name(self) -> str:
        """The source as the user named it: the manifest's line without the settings behind it."""
        return self.manifest.source.rpartition(", shards of ")[0] or self.manifest.source


def write_report(run: str, train_data: str, test_data: str | None = None) -> str:
    """Write `report.html` into the run; return its URI. `train_data` and `test_data` are URIs of shards.

    Neighbours need `test_data`. `StorageNotFoundError` if the run does not exist, `DataError` without shards.
    """
    Run.at(run).require_writable(REPORT)
    return save_report(run, render_report(run, train_data, test_data))


def save_report(run: str, page: str) -> str:
    """Write the page into the run as `report.html`; return its URI."""
    return Run.at(run).save_report(page)


def render_report(run: str, train_data: str, test_data: str | None = None) -> str:
    """Return the text of the page."""
    facts = read_run(Run.at(run))
    dataset = CropDataset(train_data, facts.recipe)
    train = dataset.reader
    test = ShardReader(test_data) if test_data else None
    nearest, data_map, why_not = search(run, facts, train, test)
    rows = gains(facts.evaluation) if facts.evaluation else []
    return render(
        "report.html.j2",
        run=facts,
        recipe=facts.recipe,
        verdict=verdict(facts),
        header=header(facts),
        train=DataSet(train.storage.uri, train.manifest),
        other_data=other_data(facts, train, test),
        rates=rows,
        titles=row_titles(facts.evaluation),
        detail=row_detail,
        caveats=caveats(facts.evaluation) if facts.evaluation else [],
        scale=scale(rows) if rows else None,
        most_points=MOST_POINTS,
        curves=curves(facts),
        examples=first_examples(dataset),
        pretext=open_pretext(facts.recipe.views),
        neighbours=nearest,
        map=data_map,
        map_script=script("map.js") if data_map else "",
        why_not=why_not or "No test images were given to this report: name their shards with --test.",
        why_no_map=why_not or f"{count(len(train), 'image')} make no map.",
        usage=usage(facts),
    )


def search(
    run: str, facts: RunFacts, train: ShardReader, test: ShardReader | None
) -> tuple[Neighbours | None, DataMap | None, str]:
    """Return the neighbours of test images, the map of the training images, and why both are missing."""
    if not facts.checkpoints:
        return None, None, "The run has no checkpoint yet."
    try:
        gallery = read_gallery(run, train, compared=test is not None)
    except CheckpointError as error:
        return None, None, f"No checkpoint can be read: {error.what}."
    return find_neighbours(gallery, test) if test else None, draw_map(gallery), ""


def other_data(run: RunFacts, train: ShardReader, test: ShardReader | None) -> list[str]:
    """Return the data sets of this report that are not those of the evaluation."""
    if not run.evaluation:
        return []
    pairs = {
        "training": (run.evaluation.train_data, train.manifest.digest),
        "test": (run.evaluation.test_data, test.manifest.digest if test else run.evaluation.test_data),
    }
    return [name for name, (measured, given) in pairs.items() if measured != given]


def first_examples(dataset: CropDataset) -> list[Example]:
    """Return the views of the first images of the first epoch, as training drew them (on the same data)."""
    recipe, reader = dataset.recipe, dataset.reader
    rows = epoch_order(recipe.train.seed, 0, dataset.rows)[:EXAMPLES]
    ids = [int(id) for id in dataset.image_ids(rows)]
    images = [reader.image(id) for id in ids]
    return draw_views(recipe, images, ids, names=[reader.name(id) for id in ids])


def usage(run: RunFacts) -> str | None:
    """Return Python that loads the registered trunk and computes features; None without a registered version."""
    if not run.registered:
        return None
    views = run.recipe.views
    size = run.recipe.eval
    model = run.recipe.model.model_dump(include={"block", "layers", "width", "stem", "stem_stride"})
    trunk = ", ".join(f"{key}={value!r}" for key, value in model.items())
    return f"""\
from pathlib import Path

import torch
from safetensors.torch import load
from torchvision import transforms

from pirl.config import ModelConfig
from pirl.model import Trunk
from pirl.shards import decode_image
from pirl.storage import open_storage

version = open_storage({run.registered.uri!r})
trunk = Trunk(ModelConfig({trunk}))
trunk.load_state_dict(load(version.read_bytes("trunk.safetensors")))
trunk.eval()

prepare = transforms.Compose([
    transforms.Resize({size.resize}),
    transforms.CenterCrop({size.crop}),
    transforms.ToTensor(),
    transforms.Normalize({list(views.mean)}, {list(views.std)}),
])
image = decode_image(Path("image.png").read_bytes(), "image.png")
with torch.no_grad():
    features = trunk(prepare(image)[None])  # (1, D)
"""
