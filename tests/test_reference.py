"""docs/configuration.md: every setting and every variable, as they are."""

from __future__ import annotations

import re
from pathlib import Path

from pirl.config import Recipe
from pirl.reference import ENVIRONMENT, bounds_of, default_of, fields, kind_of, markdown
from pirl.shards.spec import ShardingOptions
from pirl.training.spec import TrainingOptions

ROOT = Path(__file__).parent.parent
SOURCES = [path for room in ("pirl", "components", "pipelines") for path in (ROOT / room).rglob("*.py")]


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == markdown(), "python -m pirl.reference > docs/configuration.md"


def test_every_variable_that_the_code_reads_is_listed() -> None:
    texts = [path.read_text() for path in SOURCES if path.name != "reference.py"]
    names = {name for text in texts for name in re.findall(r'"(PIRL_[A-Z0-9_]*[A-Z0-9])"', text)}
    assert names
    assert names <= ENVIRONMENT.keys()


def test_no_variable_is_listed_that_nothing_reads() -> None:
    paths = [
        *SOURCES,
        *(path for room in ("docker", "manifests") for path in (ROOT / room).rglob("*") if path.is_file()),
    ]
    text = "".join(path.read_text(errors="replace") for path in paths if path.name != "reference.py")
    assert [name for name in ENVIRONMENT if name not in text] == []


def test_a_setting_is_described_by_its_field() -> None:
    settings = dict(fields(Recipe))
    layers, grid = settings["model.layers"], settings["views.grid"]
    assert (kind_of(layers.annotation), default_of(layers)) == ("4 of integer", "`[3, 4, 6, 3]`")
    assert (kind_of(grid.annotation), default_of(grid), bounds_of(grid)) == ("integer", "`3`", ">= 1, <= 5")
    assert kind_of(settings["loss.kind"].annotation) == "`nce` or `cross_entropy`"
    options = [*TrainingOptions.model_fields.values(), *ShardingOptions.model_fields.values()]
    assert all(field.description for field in options)
