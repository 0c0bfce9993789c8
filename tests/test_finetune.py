"""The protocol finetune: its arithmetic, its images, the same numbers on any number of ranks, and who shows it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from conftest import shards_of, tiny_recipe
from images import folder_of_classes
from test_evaluate_ranks import Stop, copy_of, flat, stop_after
from torch import Tensor, nn
from torch.nn import functional as F

from pirl import cli
from pirl.errors import ConfigError
from pirl.evaluate import Execution, FinetuneProtocol, Progress, evaluate_run, fine_tune
from pirl.evaluate.apply import apply_protocol, kept_result
from pirl.evaluate.finetune import USUAL, differences, labelled_subset, train_step
from pirl.evaluate.norms import whole_batch_norms
from pirl.evaluate.spec import EvaluationSpec
from pirl.gains import gains, row_title, tuned_lines
from pirl.registry import model_card
from pirl.registry.record import VersionRecord
from pirl.report import write_report
from pirl.report.summary import run_summary
from pirl.results import Evaluation
from pirl.run import Run
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World

QUICK = FinetuneProtocol(shares=(0.2, 0.5), epochs=2, batch_size=9)


@pytest.fixture(scope="module")
def test_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("test")
    return shards_of(folder_of_classes(root / "images", 3, 5, width=20, height=24, first=500), root / "s")


@pytest.fixture(scope="module")
def run(shards: str, test_shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with its evaluation by the protocol fast."""
    out = open_storage(tmp_path_factory.mktemp("run") / "run").uri
    train(tiny_recipe("train.epochs=1"), Options(data=shards, out=out, log_every=5), World())
    evaluate_run(out, shards, test_shards)
    return out


# ---- images with labels


def test_a_share_of_each_class_is_a_function_of_ids() -> None:
    labels = np.array([0] * 40 + [1] * 20 + [2] * 3 + [0] * 10)
    small, large = (labelled_subset(labels, share, 1) for share in (0.1, 0.5))
    assert np.bincount(labels[small]).tolist() == [5, 2, 1]
    assert np.bincount(labels[large]).tolist() == [25, 10, 2]
    assert set(small) <= set(large)
    assert (np.diff(large) > 0).all()
    assert small.tolist() == labelled_subset(labels, 0.1, 1).tolist() != labelled_subset(labels, 0.1, 2).tolist()
    others = labels.copy()
    others[40:60] = 3  # other names and neighbours of a class change none of the other classes' images
    assert labelled_subset(others, 0.1, 1).tolist() == small.tolist()
    assert len(labelled_subset(labels, 1.0, 1)) == len(labels)


# ---- arithmetic


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def steps_of(world: World) -> tuple[dict[str, Tensor], list[float]]:
    """Return the state after some steps on batches of 5 images, of which the last ranks have one or none."""
    network = whole_batch_norms(small_network(), world)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    generator, losses = torch.Generator().manual_seed(1), []
    for size in (5, 3, 2):
        x, y = torch.randn(size, 3, 9, 9, generator=generator) * 3 + 1, torch.arange(size) % 3
        own = slice(world.rank, None, world.size)
        losses.append(float(train_step(network, optimizer, x[own], y[own], size, world)))
    return network.state_dict(), losses


def test_steps_are_those_of_torch_on_the_whole_batch(tmp_path: Path) -> None:
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    generator, losses = torch.Generator().manual_seed(1), []
    for size in (5, 3, 2):
        x = torch.randn(size, 3, 9, 9, generator=generator) * 3 + 1
        loss = F.cross_entropy(network(x), torch.arange(size) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for result in [
        steps_of(World()),
        *(each for size in (2, 4) for each in ranks.run(steps_of, size, tmp_path / f"{size}")),
    ]:
        assert result[1] == pytest.approx(losses, abs=1e-6)
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(result[0][name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_the_schedule_is_that_of_the_paper() -> None:
    assert [USUAL.learning_rate(epoch, 256) for epoch in (0, 29, 30, 69)] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert (USUAL.shares, USUAL.epochs, USUAL.momentum, USUAL.weight_decay) == ((0.01, 0.1), 70, 0.9, 0)
    assert FinetuneProtocol(epochs=7).learning_rate(3, 64) == pytest.approx(0.01 / 4 / 10)
    recipe = tiny_recipe()
    assert [line.split(" ")[0] for line in differences(FinetuneProtocol(epochs=7, base_lr=1.0), recipe, 20)] == [
        "batch", "7", "base_lr", "batches", "crops",
    ]  # fmt: skip


# ---- the whole


def tuned(world: World, run: str, shards: str, test: str) -> dict[str, Any]:
    evaluation = Run.at(run).evaluation()
    assert evaluation
    result = fine_tune(run, shards, test, QUICK, evaluation, Execution(world))
    assert result.finetune
    return result.finetune.to_json()


def test_the_same_numbers_on_any_number_of_ranks(run: str, shards: str, test_shards: str, tmp_path: Path) -> None:
    alone = tuned(World(), copy_of(run, tmp_path / "1"), shards, test_shards)
    assert [(each["labels"]["labels"], each["labels"]["least"]) for each in alone["results"]] == [(9, 3), (21, 7)]
    for size in (2, 4):
        out = copy_of(run, tmp_path / str(size))
        for result in ranks.run(tuned, size, tmp_path / f"ranks-{size}", out, shards, test_shards):
            assert flat(result) == pytest.approx(flat(alone), abs=1e-5)
        saved = Run.at(out).evaluation()
        assert saved
        assert saved.pretrained
        assert saved.finetune
        assert saved.finetune.ranks == size


def test_it_resumes_after_an_epoch_of_any_of_its_trainings(
    run: str, shards: str, test_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pirl.evaluate.states"].EpochStates.__init__, "__defaults__", (World(), 0.0))
    expected = tuned(World(), copy_of(run, tmp_path / "whole"), shards, test_shards)
    out = copy_of(run, tmp_path / "out")
    evaluation = Run.at(out).evaluation()
    assert evaluation
    notes: list[str] = []
    for phase, images in (("20 % of the labels, pretrained", 10), ("50 % of the labels, random", 30)):
        progress = stop_after(phase, images)
        progress.note = notes.append  # type: ignore[method-assign]
        with pytest.raises(Stop):
            fine_tune(out, shards, test_shards, QUICK, evaluation, Execution(progress=progress))
    result = fine_tune(out, shards, test_shards, QUICK, evaluation, Execution(progress=Progress(notes.append)))
    assert [line for line in notes if "resumed" in line] == [
        "20 % of the labels, pretrained: resumed after epoch 1",
        "50 % of the labels, random: resumed after epoch 1",
    ]
    assert result.finetune
    assert flat(result.finetune.to_json()) == flat(expected)
    assert not list((open_storage(out) / "eval_parts").list())


def test_a_colour_that_tells_the_classes_apart_is_learned(tmp_path: Path, run: str) -> None:
    """From either start, with half of the labels: the whole chain learns."""
    from test_linear_protocol import two_colours

    data, test = two_colours(tmp_path / "train", 0), two_colours(tmp_path / "test", 1)
    out = copy_of(run, tmp_path / "run")
    evaluation = evaluate_run(out, data, test)
    protocol = FinetuneProtocol(shares=(0.5,), epochs=30, batch_size=6, base_lr=2.0)
    result = fine_tune(out, data, test, protocol, evaluation, Execution())
    scores = result.fine_tuned()["finetune_50pct"]
    assert scores.pretrained.top1.mean == scores.random.top1.mean == 1.0
    assert scores.labels.labels == 12


def test_the_command_and_all_that_shows_it(
    run: str,
    shards: str,
    test_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = copy_of(run, tmp_path / "run")
    before = Run.at(out).evaluation()
    options = ["--protocol", "finetune", "--epochs", "1", "--label-shares", "0.5", "--processes", "1"]

    def pirl_eval(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["pirl", "eval", out, "--data", shards, "--test", test_shards, *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, capfd.readouterr().out

    code, text = pirl_eval(*options)
    assert code == 0
    for line in (
        "fine-tuned, 7 labels per class (50 %)",
        "frozen and fine-tuned",
        "linear, all labels",
        "1 epochs for 70",
    ):
        assert line in text
    code, text = pirl_eval(*options, "--json")
    assert code == 0
    result = Evaluation.model_validate(json.loads(text))
    assert result == Run.at(out).evaluation()
    assert result.finetune
    assert before == result.model_copy(update={"finetune": None})
    probes = [gain.probe for gain in gains(result)]
    assert probes == ["linear", "linear_1pct", "knn", "finetune_50pct"]
    title = row_title("finetune_50pct", result)
    assert title in run_summary(out)
    assert title in model_card(VersionRecord(run_id="run", files={}, metrics=result))
    assert any(line.startswith(f"{title}: top-1 is ") for line in tuned_lines(result))
    report = open_storage(out).read_bytes("report.html") if write_report(out, shards, test_shards) else b""
    assert b"Fine-tuned network" in report
    assert b"7 labels per class (50 %)" in report
    spec = EvaluationSpec.parse(
        out, data=shards, test=test_shards, options="protocol=finetune epochs=1 label_shares=0.5"
    )
    assert kept_result(spec) == apply_protocol(spec) == result
    assert kept_result(EvaluationSpec(**{**dict(spec), "epochs": 2})) is None
    assert (
        kept_result(EvaluationSpec(**{**dict(spec), "protocol": "fast", "epochs": None, "label_shares": ""})) == result
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("protocol=finetune label_shares=[0]", "greater than 0"),
        ("protocol=finetune label_shares=0.1,0.1", "different numbers"),
        ("protocol=finetune label_shares=few", "could not convert"),
        ("protocol=finetune base_lr=0", "greater than 0"),
        ("protocol=fast label_shares=0.1", "label_shares is an option of the protocol finetune"),
        ("protocol=finetune schedule=places205", "schedule is an option of the protocol zoo"),
        ("protocol=zoo schedule=places", "places205"),
    ],
)
def test_options_that_cannot_be(options: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EvaluationSpec.parse("r", data="d", test="t", options=options)
    assert problem in caught.value.what
