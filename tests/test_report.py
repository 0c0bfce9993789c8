"""The report of a run that was really trained, read back from its HTML; and the sheet of views."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shards_of, tiny_recipe, warned
from images import picture, truncated_jpeg
from PIL import Image

from pirl.checkpoint import Checkpoints
from pirl.cli.evaluate import show_scores
from pirl.config import Recipe
from pirl.errors import ConfigError, DataError, StorageNotFoundError, UsageError
from pirl.evaluate import Protocol, centre_crop, evaluate, extract, load_trunk
from pirl.evaluate import nearest as nearest_rows
from pirl.export import trunk_bytes
from pirl.gains import score_text
from pirl.model import build_model
from pirl.order import epoch_order
from pirl.report import gallery as gallery_module
from pirl.report import render_report, views_sheet, write_preview, write_report
from pirl.report.charts import MOST_POINTS, Line, line_chart, number, short, thinned, ticks
from pirl.report.gallery import read_gallery
from pirl.report.neighbours import choose_queries, find_neighbours
from pirl.report.sheet import draw_views
from pirl.results import Evaluation, Score
from pirl.run import Run
from pirl.shards import ShardReader, decode_image
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.views import draw_geometry
from pirl.world import World

CLASSES = ("<script>alert(1)", "b & c", '"quoted"')
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser makes of the page: every element with its attributes, and the text of each section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.chunks: list[str] = []
        self.sections: dict[str, list[str]] = {"": []}
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        self.elements.append((tag, attributes))
        if tag in ("h2", "section") and "id" in attributes:
            self.section = attributes["id"]
            self.sections[self.section] = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self.open}:
            self.sections[self.section].append(data)

    def text(self, section: str | None = None) -> str:
        parts = self.sections[section] if section is not None else [t for s in self.sections.values() for t in s]
        return " ".join(" ".join(parts).split())

    def find(self, tag: str, css: str = "") -> list[dict[str, str]]:
        return [a for name, a in self.elements if name == tag and (not css or css in a.get("class", "").split())]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return tiny_recipe(
        'name="<b>tiny<b>"', 'loss.kind="cross_entropy"', "views.grid=3", "views.patch_crop_size=15", "train.epochs=2"
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Shards of 42 and of 12 labelled images, in classes with names that HTML must not understand."""
    root = tmp_path_factory.mktemp("report-data")
    uris = []
    for split, count in (("train", 14), ("test", 4)):
        for c, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = picture(1000 * c + i + (500 if split == "test" else 0), 24, 20)
                image.save(root / split / name / f"<i>{i:02d}.png")
        uris.append(shards_of(root / split, root / f"{split}-shards"))
    return uris[0], uris[1]


@pytest.fixture(scope="module")
def trained(recipe: Recipe, data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and nothing else."""
    run = tmp_path_factory.mktemp("report-run") / "run"
    train(recipe, Options(data=data[0], out=str(run), log_every=1), World())
    return run


@pytest.fixture(scope="module")
def evaluated(trained: Path, data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with its evaluation, gate, registration and steps."""
    run = tmp_path_factory.mktemp("report-evaluated") / "run"
    shutil.copytree(trained, run)
    storage = open_storage(run)
    result = evaluate(str(run), *data, Protocol(epochs=1, min_steps=20, neighbours=5))
    classes = [*result.classes, "d", "e", "f"]  # so that top-5 says something
    Run(storage).save_evaluation(result.model_copy(update={"classes": classes}))
    storage.write_json("gate.json", {"promote": True, "reasons": ["it was good <enough>"]})
    root = open_storage(run.parent / "registry" / "v0007")
    found, _, trunk = load_trunk(str(run))
    root.write_bytes("trunk.safetensors", trunk_bytes(trunk, found))
    storage.write_json("registered.json", {"model": "m & m", "version": "v0007", "uri": root.uri})
    for name, started, seconds, memory in (("pretrain", 1e9, 75.2, 1_310_000_000), ("gate", 1e9 + 99, 0.4, 9e7)):
        record = {"step": name, "started": started, "seconds": seconds, "peak_rss_bytes": int(memory)}
        storage.write_json(f"steps/{name}.json", {**record, "last_started": started})
    return run


@pytest.fixture(scope="module")
def page(evaluated: Path, data: tuple[str, str]) -> Page:
    uri = write_report(str(evaluated), *data)
    assert uri == f"{open_storage(evaluated).uri}/report.html"
    return Page((evaluated / "report.html").read_text())


def changed(run: Path, out: Path, **files: Any) -> Path:
    """A copy of a run in which the JSON files named are replaced, or removed where None."""
    shutil.copytree(run, out)
    for name, value in files.items():
        path = out / f"{name}.json"
        path.unlink(missing_ok=True)
        if value is not None:
            path.write_text(json.dumps(value))
    return out


def fake_evaluation(run: Path, gains: dict[str, float], std: float = 0.005) -> dict[str, Any]:
    """The run's eval.json with other rates: 50 % at random, and that much more pretrained."""
    result = json.loads((run / "eval.json").read_text()) | {"test_images": 10_000}
    for probe, gain in gains.items():
        result["random"][probe]["top1"] = {"mean": 0.5, "std": std, "runs": []}
        result["pretrained"][probe]["top1"] = {"mean": 0.5 + gain, "std": std, "runs": []}
    return result


# -- the whole page


def test_the_page_needs_nothing_else(page: Page, evaluated: Path) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base")
        assert tag != "script" or "src" not in attributes  # the map's own
        for key in ("src", "href", "srcset", "action", "poster"):
            assert attributes.get(key, "#").startswith(("data:image/", "#")), (tag, key, attributes[key][:60])
        assert not any(key.startswith("on") for key in attributes)
    text = (evaluated / "report.html").read_text()
    assert "@import" not in text
    assert "url(" not in text
    anchors = {a["href"][1:] for a in page.find("a")}
    assert anchors <= {a["id"] for _, a in page.elements if "id" in a}
    assert anchors >= {"results", "training", "views", "neighbours", "map", "steps", "use", "details"}
    assert "prefers-color-scheme: dark" in text


def test_text_from_outside_is_escaped(page: Page) -> None:
    for text in (*CLASSES, "<b>tiny<b>", "<i>", "it was good <enough>", "m & m"):
        assert text in page.text()
    assert len(page.find("script")) == 2  # the map's data and its program
    assert not page.find("enough")
    assert all(attributes.get("class") for attributes in page.find("i"))  # the table's dots, and no file name


def test_header_and_verdict(page: Page, evaluated: Path, data: tuple[str, str]) -> None:
    done = json.loads((evaluated / "DONE.json").read_text())
    told = page.text()
    manifest = ShardReader(data[0]).manifest
    assert "Registered as m & m v0007" in page.text("verdict")
    assert "it was good <enough>" in page.text("verdict")
    assert "in points over random weights: linear, all labels" in page.text("verdict")
    assert "only 12 test images" in page.text("results").lower()
    assert f"2 epochs, {done['steps']} steps, {done['images_seen']} images seen" in told
    assert manifest.digest[:12] in told
    assert f"pirl-pipeline {done['version']}" in told
    assert "Images 42 " in told


def test_the_table_is_eval_json(page: Page, evaluated: Path) -> None:
    result = json.loads((evaluated / "eval.json").read_text())
    told = page.text("results")
    rows = [(probe, rate) for probe, scores in result["pretrained"].items() for rate in scores]
    assert rows == [
        ("linear", "top1"),
        ("linear", "top5"),
        ("linear_1pct", "top1"),
        ("linear_1pct", "top5"),
        ("knn", "top1"),
    ]
    at = 0
    for probe, rate in rows:
        sides = [result[side][probe][rate] for side in ("pretrained", "random")]
        gain = 100 * (sides[0]["mean"] - sides[1]["mean"])
        cells = [score_text(Score.model_validate(side), result["test_images"]) for side in sides]
        cells.append(f"{gain:+.2f}".replace("-", "\N{MINUS SIGN}"))
        at = told.index(f"{rate.replace('top', 'top-')} {' '.join(cells)}", at)  # in this order
    assert "all 42 labels" in told
    assert "5 neighbours vote" in told


def test_what_the_memory_bank_finds_is_told_where_there_is_one(
    page: Page, evaluated: Path, data: tuple[str, str], tmp_path: Path
) -> None:
    result = json.loads((evaluated / "eval.json").read_text())
    top1 = result["bank"]["top1"]
    told = f"nearest of its 42 rows, which training left behind, find the class of {100 * top1['mean']:.2f} ±"
    assert told in page.text("results")
    del result["bank"]
    other = Page(render_report(str(changed(evaluated, tmp_path / "run", eval=result)), data[0]))
    assert "memory bank alone" not in other.text("results")


def test_the_curves_are_metrics_jsonl(page: Page, evaluated: Path) -> None:
    lines = [json.loads(line) for line in (evaluated / "metrics.jsonl").read_text().splitlines()]
    told = page.text("training")
    assert len(page.find("svg", "chart")) == 6
    assert len(lines) == 10
    for name, key in (("total", "loss"), ("patches", "loss_patches"), ("own row", "pos_similarity")):
        assert f"{name} {short(lines[-1][key])}" in told
        assert f"{name} {short(lines[3][key])}" in told  # of its tooltip
    assert f"chance: ln(K+1) = {math.log(17):.2f}" in told
    assert "images per second" in told
    assert "resumed" not in told
    curve = page.find("path", "line")
    assert all("nan" not in a["d"] for a in curve)
    assert max(a["d"].count("L") for a in curve) == len(lines) - 1


def test_the_views_are_those_of_training(page: Page, recipe: Recipe, data: tuple[str, str]) -> None:
    reader = ShardReader(data[0])
    cells = [int(a["alt"].removeprefix("element ")) for a in page.find("img") if a["alt"].startswith("element ")]
    ids = epoch_order(recipe.train.seed, 0, len(reader))[:8].tolist()
    sizes = np.array([(20, 24)] * len(ids))
    geometry = draw_geometry(recipe.views, recipe.train.seed, 0, np.array(ids), sizes)
    assert cells == geometry.places.permutation.ravel().tolist()
    for id, order in zip(ids, geometry.places.permutation):
        assert reader.name(id) in page.text("views")
        assert " ".join(str(cell) for cell in order) in page.text("views")
    boxes = page.find("rect", "view-box")
    assert [[float(a[k]) for k in ("y", "x", "height", "width")] for a in boxes] == geometry.image_box.tolist()


def test_the_neighbours_are_the_nearest(page: Page, evaluated: Path, data: tuple[str, str]) -> None:
    train_reader, test_reader = (ShardReader(uri) for uri in data)
    recipe, _, trunk = load_trunk(str(evaluated))

    def features(trunk: torch.nn.Module, reader: ShardReader, ids: Sequence[int]) -> torch.Tensor:
        pixels = np.stack([centre_crop(decode_image(reader.read(id), ""), recipe) for id in ids])
        return extract(trunk, lambda: iter([torch.from_numpy(pixels)]), recipe)

    alts = [a["alt"] for a in page.find("img") if "data-point" not in a]
    queries = [int(alt.split()[-1]) for alt in alts if alt.startswith("test image")]
    assert queries == choose_queries(test_reader, recipe.train.seed)
    assert len(queries) == 10
    expected = []
    nearest = []
    for candidate in (trunk, build_model(recipe).trunk.eval()):
        everything = features(candidate, train_reader, range(len(train_reader)))
        nearest.append(nearest_rows(everything, features(candidate, test_reader, queries), 6)[0].tolist())
    for row, query in enumerate(queries):
        for found in (nearest[0][row], nearest[1][row]):
            for id in found:
                wrong = train_reader.label(id) != test_reader.label(query)
                expected.append(f"training image {id}" + (", another class" if wrong else ""))
    assert [alt for alt in alts if alt.startswith("training image")] == expected
    assert len(page.find("figure", "wrong")) == sum("another" in alt for alt in expected) > 0
    right = sum(
        train_reader.label(id) == test_reader.label(query) for query, row in zip(queries, nearest[0]) for id in row
    )
    assert f": {right} of 60 of the same class" in page.text("neighbours")
    assert "among 42." in page.text("neighbours")


def test_details(page: Page, evaluated: Path, recipe: Recipe) -> None:
    told = page.text("details")
    for line in ("patch_crop_size = 15", "image_scale = [0.08, 1.0]", "layers = [1, 1, 1, 1]", "epochs = 2"):
        assert line in told
    for name in Checkpoints(open_storage(evaluated) / "checkpoints").names():
        assert name in told
    for event in ("start", "checkpoint", "done"):
        assert f"UTC {event} " in told
    assert "min_steps 20 " in told
    assert "seeds 0, 1, 2 " in told
    steps = page.text("steps")
    assert "pretrain 2001-09-09 01:46:40 UTC 1:15 1.31 GB" in steps
    assert "gate 2001-09-09 01:48:19 UTC 0.4 s 90 MB" in steps


def test_the_code_that_it_shows_runs(
    page: Page, evaluated: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "".join(page.sections["use"])
    monkeypatch.chdir(tmp_path)
    picture(3, 40, 30).save("image.png")
    names: dict[str, Any] = {}
    exec(code[code.index("from pathlib") :], names)
    assert names["features"].shape == (1, load_trunk(str(evaluated))[2].features)
    torch.testing.assert_close(names["trunk"].state_dict(), load_trunk(str(evaluated))[2].state_dict())


def test_the_same_run_gives_the_same_page(page: Page, evaluated: Path, data: tuple[str, str]) -> None:
    assert render_report(str(evaluated), *data) == (evaluated / "report.html").read_text()


# -- what is not there is said


def test_before_the_evaluation(trained: Path, data: tuple[str, str]) -> None:
    page = Page(render_report(str(trained), data[0]))
    assert "Not registered: the gate has not decided yet" in page.text("verdict")
    assert "Not evaluated yet" in page.text("verdict")
    assert "Training is finished" in page.text("verdict")
    assert "has not been evaluated yet" in page.text("results")
    assert "--test" in page.text("neighbours")
    assert "No step of the pipeline" in page.text("steps")
    assert "use" not in page.sections
    assert len(page.find("svg", "chart")) == 6


def test_before_the_first_step(trained: Path, data: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes((trained / "config.toml").read_bytes())
    page = Page(render_report(str(tmp_path), *data))
    assert "Training is not finished" in page.text("verdict")
    assert "No step has been logged yet" in page.text("training")
    assert "no checkpoint yet" in page.text("neighbours")
    assert "no complete checkpoint" in page.text("details")
    assert len(page.find("article", "example")) == 8


def test_in_the_middle_and_after_a_resume(evaluated: Path, data: tuple[str, str], tmp_path: Path) -> None:
    run = changed(evaluated, tmp_path / "run", DONE=None, registered=None)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    events.insert(1, {"time": 1.0, "event": "resume", "step": 4, "ranks": 3, "version": "9.9"})
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = render_report(str(run), data[0])
    page = Page(text)
    assert "not finished: epoch 2.00 of 2" in page.text()
    assert "3, resumed once" in page.text()
    assert "Passed the gate, not registered yet" in page.text("verdict")
    assert len(page.find("path", "mark")) == 6


def test_damaged_checkpoints_are_named(evaluated: Path, data: tuple[str, str], tmp_path: Path) -> None:
    run = changed(evaluated, tmp_path / "run")
    for path in run.glob("checkpoints/*/*.safetensors"):
        path.write_bytes(b"no")
    sorted(run.glob("checkpoints/*/COMMIT.json"))[0].write_text("{}")
    page = Page(render_report(str(run), *data))
    assert "No checkpoint can be read" in page.text("neighbours")
    assert "COMMIT.json" in page.text("details")


def test_another_checkpoint_than_was_evaluated(evaluated: Path, data: tuple[str, str], tmp_path: Path) -> None:
    result = json.loads((evaluated / "eval.json").read_text())
    result["checkpoint"] = "file:///elsewhere/checkpoints/step-00000003"
    page = Page(render_report(str(changed(evaluated, tmp_path / "run", eval=result)), data[0]))
    told = page.text("results")
    assert "Measured on step-00000003 , not on the weights of this run" in told
    assert "its evaluation is of step-00000003, its checkpoint is step-00000010" in told


def test_an_evaluation_of_other_weights_says_so(
    page: Page, evaluated: Path, data: tuple[str, str], tmp_path: Path
) -> None:
    """Another training at the place of the one that was evaluated, at the same step."""
    assert "Measured on" not in page.text("results")
    result = json.loads((evaluated / "eval.json").read_text())
    other = changed(evaluated, tmp_path / "run", eval={**result, "commit": "another training's"})
    assert "other weights than those of its checkpoint" in Page(render_report(str(other), data[0])).text("results")


def test_a_report_on_other_images_than_the_evaluation_says_so(
    page: Page, evaluated: Path, data: tuple[str, str]
) -> None:
    assert "measured on other" not in page.text("results")
    other = Page(render_report(str(evaluated), data[0], data[0]))
    assert "These rates were measured on other test images" in other.text("results")


def test_collapsed_features_are_in_the_verdict_and_the_results(
    evaluated: Path, data: tuple[str, str], tmp_path: Path
) -> None:
    result = json.loads((evaluated / "eval.json").read_text())
    run = changed(evaluated, tmp_path / "run", eval={**result, "collapsed": ["pretrained"]}, registered=None)
    page = Page(render_report(str(run), data[0]))
    assert "The features have collapsed" in page.text("verdict")
    assert "features of the pretrained trunk have collapsed" in page.text("results")
    assert "bad" in page.find("p", "helped")[0]["class"].split()


@pytest.mark.parametrize("name", ["DONE.json", "eval.json", "gate.json", "registered.json", "steps/gate.json"])
def test_a_damaged_file_does_not_hide_the_rest(
    evaluated: Path, data: tuple[str, str], tmp_path: Path, name: str
) -> None:
    run = changed(evaluated, tmp_path / "run")
    (run / name).write_text('{"half')
    page = Page(render_report(str(run), data[0]))
    assert f"Left out: {open_storage(run).uri}/{name} is not valid JSON" in page.text()
    assert len(page.find("svg", "chart")) == 6


def test_a_log_that_is_cut_off_shows_its_whole_lines(evaluated: Path, data: tuple[str, str], tmp_path: Path) -> None:
    run = changed(evaluated, tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 11, "lo')
    with warned("1 line that cannot be read"):
        page = Page(render_report(str(run), data[0]))
    assert "10 logged intervals" in page.text("training")


def test_other_data_is_said(trained: Path, other_shards: str) -> None:
    page = Page(render_report(str(trained), other_shards, other_shards))
    assert "trained on other images" in page.text()
    assert not page.find("figure", "wrong")  # no labels, nothing to be wrong
    assert "of the same class" not in page.text("neighbours")


@pytest.mark.parametrize(
    ("gains", "sentence", "tone"),
    [
        ({"linear": 0.02, "linear_1pct": 0.05, "knn": 0.03}, "Pretraining helped, in points", "good"),
        ({"linear": 0.004, "linear_1pct": 0.05, "knn": 0.03}, "Pretraining helped in part", "open"),
        ({"linear": -0.05, "linear_1pct": 0.05, "knn": 0.03}, "Pretraining helped in part and hurt in part", "bad"),
        ({"linear": 0.004, "linear_1pct": 0.0, "knn": -0.003}, "No difference is shown by 10,000 test images", "open"),
        ({"linear": -0.02, "linear_1pct": -0.05, "knn": -0.03}, "Pretraining hurt", "bad"),
    ],
)
def test_verdicts(
    evaluated: Path, data: tuple[str, str], tmp_path: Path, gains: dict[str, float], sentence: str, tone: str
) -> None:
    gate = {"promote": False, "reasons": ["too weak"]}
    run = changed(
        evaluated, tmp_path / "run", eval=fake_evaluation(evaluated, gains), gate=gate, registered=None, DONE=None
    )
    page = Page(render_report(str(run), data[0]))
    assert "Not registered: it did not pass the gate too weak" in page.text("verdict")
    assert sentence in page.text("verdict")
    assert tone in page.find("p", "helped")[0]["class"].split()
    for gain in gains.values():
        text = f"{100 * gain:+.2f}".replace("-", "\N{MINUS SIGN}")
        decision = "no difference shown" if abs(gain) <= 0.01 else "helped" if gain > 0 else "hurt"
        assert f"{text} ({decision})" in page.text("verdict")


def test_top5_of_few_classes_is_left_out(evaluated: Path, data: tuple[str, str], tmp_path: Path) -> None:
    result = json.loads((evaluated / "eval.json").read_text())
    result["classes"] = result["classes"][:3]
    page = Page(render_report(str(changed(evaluated, tmp_path / "run", eval=result)), data[0]))
    assert "top-1" in page.text("results")
    assert "top-5" not in page.text("results")


def test_classes_without_a_test_image_are_shown(
    evaluated: Path, data: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((evaluated / "eval.json").read_text()) | {"untested": ["no <b>test</b>"]}
    page = Page(render_report(str(changed(evaluated, tmp_path / "run", eval=result)), data[0]))
    assert "classes without a test image no <b>test</b>" in " ".join(page.text().split())
    show_scores(Evaluation.model_validate(result))
    assert "1 class without a test image: no <b>test</b>" in capsys.readouterr().out


def test_nce_has_no_chance_level(trained: Path, data: tuple[str, str], tmp_path: Path) -> None:
    run = changed(trained, tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('"cross_entropy"', '"nce"'))
    assert "chance" not in Page(render_report(str(run), data[0])).text("training")


def test_mistakes(trained: Path, data: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(StorageNotFoundError, match="does not hold a run") as caught:
        write_report(str(tmp_path / "none"), *data)
    assert "pirl runs" in caught.value.hint
    assert not (tmp_path / "none").exists()
    with pytest.raises(DataError, match=r"manifest\.json"):
        write_report(str(trained), str(tmp_path))
    assert not (trained / "report.html").exists()


# -- neighbours


def test_one_query_of_each_class(data: tuple[str, str]) -> None:
    reader = ShardReader(data[0])
    chosen = choose_queries(reader, 0)
    assert len(set(chosen)) == 10
    assert {reader.label(id) for id in chosen} == {0, 1, 2}
    labels = [reader.label(id) for id in chosen]
    assert labels == sorted(labels)
    assert chosen != choose_queries(reader, 1)


def test_a_slow_trunk_searches_fewer_images(
    trained: Path, data: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_module, "BATCH", 8)
    monkeypatch.setattr(gallery_module, "BUDGET_S", 0.0)
    train, test = (ShardReader(uri) for uri in data)
    found = find_neighbours(read_gallery(str(trained), train, compared=True), test)
    assert (found.searched, found.images) == (8, 42)
    assert [len(row) for row in found.pretrained] == [6] * 10
    page = Page(render_report(str(trained), *data))
    assert "among 8 of 42, taken at random." in page.text("neighbours")


# -- charts


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0), (3, 3), (-0.2, 0.93), (1e-6, 3e-6), (0, 123456), (6.931, 6.9315), (-5, -4)]
)
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - abs(high) * 1e-9
    assert 2 <= len(found) <= 8
    labels = [number(tick, found) for tick in found]
    assert len(set(labels)) == len(labels)
    assert all(float(label.replace(",", "").replace("\N{MINUS SIGN}", "-")) == pytest.approx(t) for label, t in
               zip(labels, found) if abs(t) > 1e-12)  # fmt: skip


def test_short_numbers() -> None:
    assert [short(value) for value in (0, 4.6249, 242.3, 12345.6, 0.001361, -0.25)] == [
        "0", "4.62", "242", "12,346", "0.00136", "\N{MINUS SIGN}0.250",
    ]  # fmt: skip


def test_long_curves_are_averaged() -> None:
    points = [(float(x), float(x % 2)) for x in range(10 * MOST_POINTS)]
    found = thinned(points)
    assert len(found) == MOST_POINTS
    assert {y for _, y in found} == {0.5}
    assert found[0][0] == 4.5
    assert thinned(points[:3]) == points[:3]
    assert thinned([]) == []


def test_a_chart_survives_what_training_logs() -> None:
    lines = [Line("a<b", [(0, 1), (1, float("nan")), (2, float("inf")), (3, 2)]), Line("empty", [], 1)]
    chart = line_chart("t", "u<v", lines, marks=[(1.5, "<mark>")], levels=[(5, "<level>")])
    page = Page(str(chart.svg))
    assert [a["d"].count("L") for a in page.find("path", "line")] == [1]
    assert chart.legend == [("a<b", 0, "2.00")]
    for text in ("u<v", "<mark>", "<level>", "a<b 1.00"):
        assert text in page.text()
    assert not line_chart("t", "u", []).svg
    assert len(Page(str(line_chart("t", "u", [Line("a", [(0, 7)])]).svg)).find("circle", "dot")) == 1


# -- the sheet of views


def test_views_sheet_is_a_picture() -> None:
    recipe = tiny_recipe()
    images = [picture(1, 40, 30), picture(2, 20, 60)]
    data = views_sheet(recipe, images, [5, 6], names=["a.jpg", "x" * 200])
    one, two = (Image.open(io.BytesIO(views_sheet(recipe, images[:n], [5, 6][:n]))) for n in (1, 2))
    assert data.startswith(b"\x89PNG")
    assert one.width == two.width
    assert one.height < two.height
    assert views_sheet(recipe, images, [5, 6]) != views_sheet(recipe, images, [5, 6], epoch=1)
    assert views_sheet(recipe, images, [5, 6]) != views_sheet(recipe, images, [5, 6], seed=1)


def test_patches_lie_where_the_sheet_draws_them() -> None:
    """An image whose colours tell the place, without photometrics: a patch's mean is that of its box."""
    recipe = tiny_recipe(
        "views.jitter_probability=0", "views.posterize_probability=0", "views.gray_probability=0",
        "views.flip_probability=0", "views.image_size=64", "views.patch_crop_size=90", "views.patch_size=30",
    )  # fmt: skip
    y, x = np.mgrid[0:120, 0:200]
    pixels = np.stack([x * 255 // 200, y * 255 // 120, 0 * x], axis=2).astype(np.uint8)
    (example,) = draw_views(recipe, [Image.fromarray(pixels)], [3])
    assert sorted(element.label for element in example.elements) == [0, 1, 2, 3]
    places = [(patch.box, patch.pixels) for patch in example.elements] + [(example.view_box, example.view)]
    for (left, top, width, height), shown in places:
        centre = (left + width / 2) * 255 / 200, (top + height / 2) * 255 / 120
        np.testing.assert_allclose(shown.reshape(-1, 3).mean(0)[:2], centre, atol=2.5)
    left, top, width, height = example.crop_box
    for box, _ in places[:4]:
        assert left <= box[0]
        assert top <= box[1]
        assert box[0] + box[2] <= left + width
        assert box[1] + box[3] <= top + height


def test_preview_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "photos & <b>"
    folder.mkdir()
    for i in range(5):
        picture(i, 300 if i == 1 else 40, 30).save(folder / f"<{i}>.png")
    (folder / os.fsdecode(b"z\xff.jpg")).write_bytes(truncated_jpeg())
    picture(9, 20, 20).save(folder / os.fsdecode(b"y\xff.jpg"))
    out = write_preview(tiny_recipe(), str(folder), tmp_path / "sheet.html", count=99)
    assert out == str(tmp_path / "sheet.html")
    page = Page(Path(out).read_text())
    assert len(page.find("article", "example")) == 6  # the truncated one is passed over
    assert "<3>.png" in page.text()
    assert "y\\udcff.jpg" in page.text()
    assert not [a for a in page.find("image") if not a["href"].startswith("data:image/")]
    png = Path(write_preview("demo", str(folder), tmp_path / "new" / "sheet.png", count=2))
    assert png.read_bytes()[:4] == b"\x89PNG"
    few = Page(Path(write_preview(tiny_recipe(), str(folder), tmp_path / "few.html", count=2)).read_text())
    assert len(few.find("article", "example")) == 2


def test_preview_mistakes(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(truncated_jpeg())
    with pytest.raises(UsageError, match="neither"):
        write_preview("demo", str(tmp_path), tmp_path / "sheet.pdf")
    with pytest.raises(UsageError, match="recipe 'demmo' not found"):
        write_preview("demmo", str(tmp_path), tmp_path / "sheet.html")
    with pytest.raises(UsageError, match="0 images"):
        write_preview("demo", str(tmp_path), tmp_path / "sheet.html", count=0)
    with pytest.raises(UsageError, match="does not exist"):
        write_preview("demo", str(tmp_path / "none"), tmp_path / "sheet.html")
    with pytest.raises(DataError, match=r"could be read: a\.jpg"):
        write_preview("demo", str(tmp_path / "broken"), tmp_path / "sheet.html")
    with pytest.raises(ConfigError):
        write_preview(tiny_recipe("views.grid=9"), str(tmp_path / "broken"), tmp_path / "sheet.html")
    assert not (tmp_path / "sheet.html").exists()
