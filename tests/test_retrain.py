"""Retraining: up to date unless something changed, and a warm start that keeps what belongs to an image."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_recipe, training
from images import folder_of_classes, jpeg

from pirl.backends import LocalBackend
from pirl.checkpoint import Checkpoints, Cursor
from pirl.config import Recipe
from pirl.errors import EXIT_PREEMPTED, PreemptedError, UsageError
from pirl.evaluate import apply
from pirl.gate import question
from pirl.initial.warm import WarmStart, only_added, same_images, warm_start
from pirl.memory import MemoryBank
from pirl.model import build_model
from pirl.programs import EvaluationProgram, Program, Training
from pirl.registry import Provenance, open_registry
from pirl.results import Evaluation, GateDecision, Lineage, Score, Scores
from pirl.retraining import Gating, data_uri, decide_retrain
from pirl.retraining.retrain import Retraining, keep_up_to_date
from pirl.run import Run
from pirl.shards import Manifest, ShardReader, SourceOptions, open_source, write_shards
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.world import World


def shard(source: Path, out: str) -> str:
    write_shards(open_source(str(source)), open_storage(out), shard_bytes=16 << 10)
    return out


def photos(root: Path, images: int = 10) -> Path:
    """Photographs in two classes; another number, other ones."""
    return folder_of_classes(root, classes=2, images=images, width=24, height=20, first=100 * images)


def launch(recipe: Path, data: str, out: Path, overrides: list[str]) -> int:
    """Train in one process."""
    return LocalBackend().run(Training(training(recipe, data, out, overrides, processes=1)))


def add_image(folder: Path) -> None:
    """A new image that comes first: the id of every other one moves."""
    (folder / "class0" / "00.jpg").write_bytes(jpeg(1000, 24, 20))


def champion(root: Path, data: str, recipe: Recipe, **lineage: str) -> str:
    """Register a version made of these; returns the registry's URI."""
    from pirl import __version__

    known = {
        "data_digest": Manifest.load(open_storage(data)).digest,
        "recipe_digest": recipe.digest(),
        "code_version": __version__,
        "checkpoint": f"{root}/runs/old/checkpoints/step-00000001",
    }
    registry = f"{root}/registry"
    number = len(open_registry(registry).versions("pirl")) if open_registry(registry).has("pirl") else 0
    open_registry(registry).register(
        "pirl",
        run_id=f"run-{number}",
        files={},
        provenance=Provenance(lineage=Lineage(**known | lineage)),
        promote=True,
    )
    return registry


def reject(run: Run, gating: Gating) -> None:
    """Leave what a run has after the gate rejected it: an evaluation and the decision about it."""
    digest = Manifest.load(open_storage(gating.test_data)).digest
    scores = dict.fromkeys(("linear", "linear_1pct", "knn"), Scores(top1=Score(mean=0.5, std=0)))
    evaluation = Evaluation(
        checkpoint="step-00000001", weights="w", train_data="d", test_data=digest, pretrained=scores, random=scores
    )
    run.save_evaluation(evaluation)
    asked = question(evaluation, gating.registry, gating.model, gating.metric, gating.min_gain, None)
    run.save_gate(GateDecision(promote=False, reasons=["no better"], **asked.model_dump()))


class TestDecision:
    @pytest.fixture
    def data(self, tmp_path: Path) -> str:
        return shard(photos(tmp_path / "photos"), f"{tmp_path}/data/train-1")

    def test_the_first_of_all(self, tmp_path: Path, data: str, tiny: Recipe) -> None:
        decision = decide_retrain(str(tmp_path), Gating(f"{tmp_path}/registry", "pirl"), tiny, data)
        assert decision.retrain
        assert decision.reasons == ["pirl has no champion yet"]

    def test_the_same_again(self, tmp_path: Path, data: str, tiny: Recipe) -> None:
        registry = champion(tmp_path, data, tiny)
        decision = decide_retrain(str(tmp_path), Gating(registry, "pirl"), tiny, data)
        assert not decision.retrain
        assert "pirl v0001 was made of the same data, recipe and code" in decision.reasons[0]

    def test_a_champion_of_version_0_1_is_recognised(self, tmp_path: Path, data: str, tiny: Recipe) -> None:
        (older,) = tiny.digests() - {tiny.digest()}
        registry = champion(tmp_path, data, tiny, recipe_digest=older)
        assert not decide_retrain(str(tmp_path), Gating(registry, "pirl"), tiny, data).retrain

    @pytest.mark.parametrize("what", ["data", "recipe", "code"])
    def test_each_change_alone(self, tmp_path: Path, data: str, tiny: Recipe, what: str) -> None:
        field = {"data": "data_digest", "recipe": "recipe_digest", "code": "code_version"}[what]
        registry = champion(tmp_path, data, tiny, **{field: "other"})
        decision = decide_retrain(str(tmp_path), Gating(registry, "pirl"), tiny, data)
        assert decision.retrain
        assert len(decision.reasons) == 1
        assert decision.reasons[0].startswith(f"champion v0001: {what} changed (other -> ")

    def test_a_rolled_back_champion_stays(self, tmp_path: Path, data: str, tiny: Recipe) -> None:
        champion(tmp_path, data, tiny, data_digest="before")
        registry = champion(tmp_path, data, tiny)
        open_registry(registry).promote("pirl", "v0001")
        decision = decide_retrain(str(tmp_path), Gating(registry, "pirl"), tiny, data)
        assert not decision.retrain
        assert "v0002 was made of the same" in decision.reasons[0]
        assert "the champion is v0001" in decision.reasons[0]

    def test_a_run_that_did_not_pass_is_not_repeated_until_something_changes(
        self, tmp_path: Path, data: str, tiny: Recipe
    ) -> None:
        gating = Gating(f"{tmp_path}/registry", "pirl", test_data=data)
        run = Run.at(decide_retrain(str(tmp_path), gating, tiny, data).run)
        reject(run, gating)
        decision = decide_retrain(str(tmp_path), gating, tiny, data)
        assert not decision.retrain
        assert "did not pass the gate: no better" in decision.reasons[-1]
        assert decide_retrain(str(tmp_path), gating, tiny_recipe("train.seed=5"), data).retrain

    @pytest.mark.parametrize(
        "change",
        [
            {"metric": "knn"},
            {"min_gain": 0.001},
            {"model": "other"},
            {"registry": "elsewhere"},
            {"test_data": "others"},
        ],
    )
    def test_a_rejection_counts_for_its_question_only(
        self, tmp_path: Path, data: str, tiny: Recipe, change: dict[str, Any]
    ) -> None:
        """A lower threshold, another metric, model, registry or test set: the gate decides again, on the same run."""
        gating = Gating(f"{tmp_path}/registry", "pirl", test_data=data)
        first = decide_retrain(str(tmp_path), gating, tiny, data)
        reject(Run.at(first.run), gating)
        if "registry" in change:
            change = {"registry": f"{tmp_path}/elsewhere"}
        if "test_data" in change:
            change = {"test_data": shard(photos(tmp_path / "others", 3), f"{tmp_path}/data/test-2")}
        decision = decide_retrain(str(tmp_path), replace(gating, **change), tiny, data)
        assert (decision.retrain, decision.run) == (True, first.run)
        assert "decides again" in decision.reasons[-1]
        assert not decide_retrain(str(tmp_path), gating, tiny, data).retrain

    def test_a_rejection_does_not_count_once_the_champion_is_another(
        self, tmp_path: Path, data: str, tiny: Recipe
    ) -> None:
        gating = Gating(f"{tmp_path}/registry", "pirl", test_data=data)
        reject(Run.at(decide_retrain(str(tmp_path), gating, tiny, data).run), gating)
        champion(tmp_path, data, tiny, data_digest="other")
        assert decide_retrain(str(tmp_path), gating, tiny, data).retrain

    def test_a_rejection_of_version_0_1_is_made_again(self, tmp_path: Path, data: str, tiny: Recipe) -> None:
        gating = Gating(f"{tmp_path}/registry", "pirl", test_data=data)
        run = Run.at(decide_retrain(str(tmp_path), gating, tiny, data).run)
        reject(run, gating)
        run.storage.write_json("gate.json", {"promote": False, "metric": "knn", "min_gain": 0.01, "reasons": ["no"]})
        assert decide_retrain(str(tmp_path), gating, tiny, data).retrain

    def test_one_that_broke_off_before_the_registry_goes_on_with_the_same_run(
        self, tmp_path: Path, data: str, tiny: Recipe
    ) -> None:
        registry = f"{tmp_path}/registry"
        first = decide_retrain(str(tmp_path), Gating(registry, "pirl"), tiny, data)
        Run.at(first.run).save_gate(GateDecision(promote=True, reasons=[]))
        assert decide_retrain(str(tmp_path), Gating(registry, "pirl"), tiny, data) == first

    @pytest.mark.parametrize(("setting", "value"), [("min_gain", math.nan), ("min_gain", math.inf), ("metric", "kn")])
    def test_what_the_gate_would_refuse_is_refused_before_the_training(
        self, tmp_path: Path, tiny_toml: Path, setting: str, value: Any
    ) -> None:
        wanted = Retraining("nowhere", "nowhere", str(tmp_path), f"{tmp_path}/registry", "m", str(tiny_toml))
        with pytest.raises(UsageError, match=r"not a finite number|Did you mean 'knn'"):
            keep_up_to_date(replace(wanted, **{setting: value}))

    def test_another_state_of_a_source_has_another_place(self, tmp_path: Path) -> None:
        folder = photos(tmp_path / "photos")
        before = data_uri("r", "train", open_source(str(folder)))
        assert before == data_uri("r", "train", open_source(str(folder)), SourceOptions().decoding)
        assert before != data_uri("r", "train", open_source(str(folder)), SourceOptions(exif="ignore").decoding)
        add_image(folder)
        assert before != data_uri("r", "train", open_source(str(folder)))


def checkpoint_of(run: Run, recipe: Recipe) -> str:
    """Save a checkpoint with the initial weights of a recipe; return its commit's digest."""
    checkpoints = run.checkpoints()
    state = {"model": build_model(recipe).state_dict(), "recipe": recipe.to_toml()}
    checkpoints.save(state, Cursor(step=1), recipe.digest(), "data")
    assert checkpoints.wait() is None
    return run.commit().sha256


class TestWarmStart:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return photos(tmp_path / "photos")

    def test_images_are_known_again_wherever_their_ids_went(self, tmp_path: Path, folder: Path) -> None:
        old = ShardReader(shard(folder, f"{tmp_path}/old"))
        add_image(folder)
        new = ShardReader(shard(folder, f"{tmp_path}/new"))
        mapped = same_images(old, new)
        assert len(new) == len(old) + 1
        assert [new.name(id) for id in range(len(new)) if mapped[id] < 0] == [new.name(0)]
        for id in range(1, len(new)):
            assert old.read(int(mapped[id])) == new.read(id)
        assert only_added(old, new)
        assert not only_added(new, old)
        assert not only_added(old, old)

    def test_a_changed_image_is_another(self, tmp_path: Path, folder: Path) -> None:
        old = ShardReader(shard(folder, f"{tmp_path}/old"))
        add_image(folder)
        changed = folder / "class1" / "003.jpg"
        changed.write_bytes(changed.read_bytes() + b"\0\0")
        new = ShardReader(shard(folder, f"{tmp_path}/new"))
        assert (same_images(old, new) < 0).sum() == 2
        assert not only_added(old, new)

    def test_rows_go_with_their_images(self, tmp_path: Path, folder: Path, tiny: Recipe, tiny_toml: Path) -> None:
        """Kept rows, Z and weights are bit-exact, new rows are unit vectors, and training goes on from there."""
        old_data = shard(folder, f"{tmp_path}/old")
        assert launch(tiny_toml, old_data, tmp_path / "run", ["train.epochs=1"]) == 0
        add_image(folder)
        data = shard(folder, f"{tmp_path}/new")
        recipe = tiny_recipe("train.epochs=2")
        newest = Checkpoints(open_storage(f"{tmp_path}/run") / "checkpoints").newest()
        assert newest
        start = WarmStart(f"{tmp_path}/run", newest, old_data)
        assert warm_start(start, data, f"{tmp_path}/warm", recipe) == (20, 1)

        (_, before), (commit, after) = (
            Checkpoints(open_storage(f"{tmp_path}/{run}") / "checkpoints").load() for run in ("run", "warm")
        )
        mapped = same_images(ShardReader(old_data), ShardReader(data))
        kept = np.flatnonzero(mapped >= 0)
        assert torch.equal(after["bank"]["memory"][kept], before["bank"]["memory"][mapped[kept]])
        fresh = MemoryBank(21, 8, recipe.memory, recipe.train.seed).memory
        assert torch.equal(after["bank"]["memory"][mapped < 0], fresh[mapped < 0])
        assert torch.equal(after["bank"]["z"], before["bank"]["z"])
        assert all(torch.equal(value, before["model"][name]) for name, value in after["model"].items())
        assert (commit.cursor.epoch, commit.cursor.samples, commit.cursor.step) == (0, 0, 0)

        assert launch(tiny_toml, data, tmp_path / "warm", ["train.epochs=2"]) == 0
        completion = Run.at(f"{tmp_path}/warm").completion()
        assert completion
        assert completion.images_seen == 2 * 21

    def test_only_where_images_were_added_and_nothing_else(self, tmp_path: Path, folder: Path, tiny: Recipe) -> None:
        root = str(tmp_path)
        data = shard(folder, f"{root}/data/train-1")
        checkpoint = f"file://{root}/runs/old/checkpoints/step-00000001"
        commit = checkpoint_of(Run.at(f"{root}/runs/old"), tiny)
        registry = champion(tmp_path, data, tiny, checkpoint=checkpoint, commit=commit)
        add_image(folder)
        more = shard(folder, f"{root}/data/train-2")
        decision = decide_retrain(root, Gating(registry, "pirl"), tiny, more, warm_epochs=1)
        assert decision.warm == WarmStart(f"file://{root}/runs/old", "step-00000001", data)
        assert decision.recipe.train.epochs == 1
        assert decide_retrain(root, Gating(registry, "pirl"), tiny, more).warm is None
        other = tiny_recipe("train.seed=5")
        assert decide_retrain(root, Gating(registry, "pirl"), other, more, warm_epochs=1).warm is None
        shutil.rmtree(f"{root}/runs/old")
        decision = decide_retrain(root, Gating(registry, "pirl"), tiny, more, warm_epochs=1)
        assert decision.warm is None
        assert "a cold start: complete checkpoint not found" in decision.reasons[-1]
        checkpoint_of(Run.at(f"{root}/runs/old"), tiny_recipe("train.seed=3"))
        decision = decide_retrain(root, Gating(registry, "pirl"), tiny, more, warm_epochs=1)
        assert decision.warm is None
        assert "holds other weights than the champion's" in decision.reasons[-1]
        (folder / "class1" / "003.jpg").unlink()
        less = shard(folder, f"{root}/data/train-3")
        decision = decide_retrain(root, Gating(registry, "pirl"), tiny, less, warm_epochs=1)
        assert decision.warm is None
        assert "removed or changed" in decision.reasons[-1]
        shutil.rmtree(f"{root}/data/train-1")
        decision = decide_retrain(root, Gating(registry, "pirl"), tiny, more, warm_epochs=1)
        assert decision.warm is None
        assert "the champion's shards are gone" in decision.reasons[-1]

    def test_a_champion_made_by_a_warm_start_is_up_to_date(self, tmp_path: Path, folder: Path, tiny: Recipe) -> None:
        data = shard(folder, f"{tmp_path}/data/train-1")
        registry = champion(tmp_path, data, tiny_recipe("train.epochs=1"))
        assert not decide_retrain(str(tmp_path), Gating(registry, "pirl"), tiny, data, warm_epochs=1).retrain
        assert decide_retrain(str(tmp_path), Gating(registry, "pirl"), tiny, data).retrain


def retraining(tmp_path: Path, tiny_toml: Path, **settings: Any) -> Retraining:
    for split, count in (("train", 24), ("test", 8)):
        if not (tmp_path / split).exists():
            photos(tmp_path / split, count)
    root = str(tmp_path / "root")
    wanted = Retraining(
        str(tmp_path / "train"), str(tmp_path / "test"), root, f"{root}/registry", "pirl", str(tiny_toml)
    )
    return replace(wanted, backend=ThisProcess(), overrides=("train.epochs=1",), **settings)


class ThisProcess(LocalBackend):
    """Trains in this process: starting ranks takes seconds, and is not what is tested."""

    def run(self, program: Program, labels: Mapping[str, str] | None = None) -> int:
        if isinstance(program, EvaluationProgram):
            apply.apply_protocol(program.spec)
            return 0
        assert isinstance(program, Training)
        train(program.spec.recipe, program.spec, World())
        return 0


def test_spoiled_images_do_not_replace_a_better_champion(
    tmp_path: Path, tiny_toml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images change, the new network is worse on them: the champion stays. A lower threshold decides again."""
    assert keep_up_to_date(retraining(tmp_path, tiny_toml, min_gain=-1.0)) == 0
    registry = open_registry(f"{tmp_path}/root/registry")
    first = registry.get("pirl")
    assert "linear_1pct (1 label per class" in capsys.readouterr().out  # the reasons are printed on promotion, too
    add_image(tmp_path / "train")
    wanted = retraining(tmp_path, tiny_toml, min_gain=-1.0)
    with pytest.MonkeyPatch.context() as patch:  # the new network finds no class, by any probe
        patch.setattr("pirl.evaluate.fast.probe_trunks", spoiled(sys.modules["pirl.evaluate.fast"].probe_trunks))
        assert keep_up_to_date(wanted) == 0
        shown = capsys.readouterr().out
        assert "evaluating the champion pirl v0001 on the same images" in shown
        assert "measured on the same images now, more" in shown
        assert "not registered" in shown
        assert registry.get("pirl") == first
        assert keep_up_to_date(wanted) == 0
        assert capsys.readouterr().out.endswith("up to date\n")
        lower = replace(wanted, min_gain=-2.0)
        assert keep_up_to_date(lower) == 0
        assert "decides again" in capsys.readouterr().out
    assert [version.version for version in registry.versions("pirl")] == ["v0001"]


@pytest.mark.parametrize("copied", [False, True])
def test_equal_training_and_test_images_are_refused_before_the_training(
    tmp_path: Path, tiny_toml: Path, copied: bool
) -> None:
    wanted = retraining(tmp_path, tiny_toml, min_gain=-1.0)
    test = wanted.train_source
    if copied:  # with other times of the files
        test = str(tmp_path / "copy")
        shutil.copytree(wanted.train_source, test, copy_function=shutil.copyfile)
    with pytest.raises(UsageError, match="training and test images are the same"):
        keep_up_to_date(replace(wanted, test_source=test))
    assert not list(tmp_path.glob("root/runs/*"))
    assert copied or not list(tmp_path.glob("root/data/*"))


def spoiled(probe_trunks: Any) -> Any:
    """Make every score of a run's own evaluation 0, and leave that of the champion as it is."""

    def changed(trunks: dict[str, Any], *arguments: Any) -> Any:
        result, pairs = probe_trunks(trunks, *arguments)
        if "random" in trunks:
            zero = Scores(top1=Score(mean=0.0, std=0.0))
            scores = {"pretrained": result.pretrained, "random": result.random}
            result = result.model_copy(update={name: dict.fromkeys(found, zero) for name, found in scores.items()})
        return result, pairs

    return changed


def test_a_sigterm_during_the_evaluation_ends_cleanly_and_is_resumed(
    tmp_path: Path, tiny_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the training before has left as a handler, the message is one of ours, and nothing is done twice."""

    def stopped(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(30)
        raise AssertionError("the signal was swallowed")

    before = signal.getsignal(signal.SIGTERM)
    wanted = retraining(tmp_path, tiny_toml, min_gain=-1.0)
    with monkeypatch.context() as patch:
        patch.setattr(apply, "apply_protocol", stopped)
        with pytest.raises(PreemptedError, match="the training is saved in") as caught:
            keep_up_to_date(wanted)
    assert caught.value.exit_code == EXIT_PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is before
    assert keep_up_to_date(wanted) == 0
    assert open_registry(f"{tmp_path}/root/registry").get("pirl").version == "v0001"


@pytest.mark.slow
def test_the_command(tmp_path: Path, tiny_toml: Path) -> None:
    """First trains, again nothing to do, images added: warm start, a rejected one is no failure; then back."""
    photos(tmp_path / "train", 24)
    photos(tmp_path / "test", 8)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PIRL_TRAIN_SOURCE": "train",
        "PIRL_TEST_SOURCE": "test",
        "PIRL_RECIPE": str(tiny_toml),
        "PIRL_ROOT": str(tmp_path / "root"),
        "PIRL_WARM_EPOCHS": "1",
        "PIRL_MIN_GAIN": "-1",
    }

    def pirl(*arguments: str) -> str:
        command = [str(Path(sys.executable).parent / "pirl"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    settings = ["--processes", "1", "train.epochs=2"]
    assert "48 images would be sharded" in pirl("retrain", *settings, "--dry-run")
    first = pirl("retrain", *settings)
    assert "pirl has no champion yet" in first
    assert "pirl v0001: " in first
    runs = sorted((tmp_path / "root/runs").iterdir())
    assert pirl("retrain", *settings).endswith("up to date\n")
    assert sorted((tmp_path / "root/runs").iterdir()) == runs
    add_image(tmp_path / "train")
    third = pirl("retrain", *settings)
    assert "a warm start: images were only added" in third
    assert "48 rows of the bank kept, 1 new" in third
    assert "pirl v0002: " in third
    registry = str(tmp_path / "root/registry")
    assert pirl("promote", "pirl", "v0001", "--registry", registry) == "pirl: champion v0002 -> v0001\n"
    assert pirl("retrain", *settings).endswith("up to date\n")


def test_settings_of_a_job_need_the_backend_that_has_jobs(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    command = [str(Path(sys.executable).parent / "pirl"), "retrain", "--train-source", "photos"]
    command += ["--test-source", "photos", "--nodes", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--backend cluster" in done.stderr
    done = subprocess.run(
        [*command, "--backend", "pytorchjob"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "is on this machine, where pods cannot see it" in done.stderr
    assert not list(tmp_path.glob("runs/runs/*"))
