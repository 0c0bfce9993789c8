"""A training whose embeddings collapse says so, once."""

from __future__ import annotations

from pathlib import Path

from conftest import tiny_recipe, warned
from images import jpeg

from pirl.run import Run
from pirl.shards import open_source, write_shards
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World


def test_equal_images_collapse(tmp_path: Path) -> None:
    for label in ("day", "night"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(9):
            (tmp_path / "images" / label / f"{number}.jpg").write_bytes(jpeg())
    data = tmp_path / "shards"
    write_shards(open_source(str(tmp_path / "images")), open_storage(data))
    out = str(tmp_path / "run")

    recipe = tiny_recipe("train.epochs=12", "memory.momentum=0")
    with warned("the embeddings have collapsed") as printed:
        train(recipe, Options(data=str(data), out=out, log_every=2), World())

    assert printed.getvalue().count("have collapsed") == 1
    first, *_, last = Run.at(out).record().metrics
    assert first["neg_similarity"] < 0.85 < last["neg_similarity"]
