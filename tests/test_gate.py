"""The gate between an evaluation and the registry: a number counts for the weights it was measured on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shards_of, tiny_recipe
from images import folder_of_classes
from torch import Tensor

from pirl import gate
from pirl.checkpoint import Cursor
from pirl.config import Recipe
from pirl.errors import EXIT_USAGE, CheckpointError, RegistryError, UsageError
from pirl.evaluate import load_trunk
from pirl.evaluate.fast import applied
from pirl.evaluate.probe import FAST
from pirl.gains import score_text
from pirl.gate import RejectedError, decide, register_run
from pirl.memory import MemoryBank
from pirl.model import build_model, weights_digest
from pirl.registry import FolderCatalogue, Provenance, Version, open_registry
from pirl.results import PROBES, Completion, Evaluation, Score, Scores
from pirl.run import Run
from pirl.shards import Manifest
from pirl.storage import open_storage


def scores(top1: float, std: float = 0.0) -> dict[str, Scores]:
    return dict.fromkeys(PROBES, Scores(top1=Score(mean=top1, std=std, runs=[top1])))


def save(run: Run, step: int, seed: int, recipe: Recipe) -> None:
    """A checkpoint with the weights of `seed`, as a training writes it."""
    model = build_model(tiny_recipe(f"train.seed={seed}"))
    bank = MemoryBank(4, recipe.model.embedding_dim, recipe.memory, seed)
    state = {"model": model.state_dict(), "bank": bank.state_dict(), "recipe": recipe.to_toml()}
    checkpoints = run.checkpoints()
    checkpoints.save(state, Cursor(step=step), recipe.digest(), "data")
    assert checkpoints.wait() is None


def evaluate(run: Run, pretrained: float, random: float = 0.1, std: float = 0.0, **changes: Any) -> Evaluation:
    """Write the evaluation that `pirl eval` would write, with a top-1 of `pretrained` in every probe."""
    _, commit, trunk = load_trunk(run)
    evaluation = Evaluation(
        checkpoint=commit.name,
        commit=commit.sha256,
        weights=weights_digest(trunk.state_dict()),
        train_data="images",
        test_data="test images",
        protocol=applied(FAST, tiny_recipe()),
        pretrained=scores(pretrained, std),
        random=scores(random, std),
    ).model_copy(update=changes)
    run.save_evaluation(evaluation)
    return evaluation


def complete(run: Run, step: int = 5) -> None:
    recipe = run.recipe()
    run.complete(
        Completion(
            steps=step,
            epochs=3,
            images_seen=42,
            seconds=1.0,
            checkpoint=run.checkpoint_uri(f"step-{step:08d}"),
            recipe=recipe.name,
            recipe_digest=recipe.digest(),
            data_digest="images",
            ranks=1,
            version="0",
        )
    )


def finished(folder: Path, pretrained: float, random: float = 0.1, std: float = 0.0, seed: int = 0, **more: Any) -> Run:
    """A finished and evaluated run with the weights of `seed`."""
    run, recipe = Run.at(str(folder)), tiny_recipe()
    run.save_recipe(recipe)
    save(run, 5, seed, recipe)
    complete(run)
    evaluate(run, pretrained, random, std, **more)
    return run


@pytest.fixture
def registry(tmp_path: Path) -> str:
    return open_storage(tmp_path / "registry").uri


def champion(registry: str, pretrained: float, seed: int = 1, **more: Any) -> Version:
    """The registered champion, from a run of its own."""
    run = finished(Path(registry.removeprefix("file://")).parent / f"champion-{seed}", pretrained, seed=seed, **more)
    assert decide(run, registry, "m").promote
    return register_run(run.uri, registry, "m")


def registered_weights(version: Version) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(open_storage(version.uri).read_bytes("trunk.safetensors"))


# ---- the decision


@pytest.mark.parametrize(
    ("pretrained", "random", "std", "min_gain", "promoted"),
    [
        (0.70, 0.60, 0.01, 0.01, True),
        (0.60, 0.60, 0.00, 0.00, False),  # nothing was learned
        (0.605, 0.60, 0.0, 0.01, False),  # less than was asked for
        (0.62, 0.60, 0.02, 0.01, False),  # within the spread of the two
        (0.59, 0.60, 0.02, -0.5, True),  # a negative gain asks for no more than that
    ],
)
def test_the_gain_over_random_weights_decides(
    tmp_path: Path, registry: str, pretrained: float, random: float, std: float, min_gain: float, promoted: bool
) -> None:
    run = finished(tmp_path / "run", pretrained, random, std)
    decision = decide(run, registry, "m", "knn", min_gain)
    assert decision.promote is promoted
    assert run.gate() == decision
    assert f"{100 * (pretrained - random):+.2f} points" in decision.reasons[0]


@pytest.mark.parametrize(
    ("before", "promoted", "reason"),
    [
        (0.65, True, "v0001 has 65.00"),
        (0.75, False, "v0001 has 75.00 ± 0.00 %, more"),
        (0.70, False, "v0001 has 70.00 ± 0.00 %, as many"),  # a tie keeps the champion
    ],
)
def test_a_better_champion_on_the_same_images_stays(
    tmp_path: Path, registry: str, before: float, promoted: bool, reason: str
) -> None:
    champion(registry, before)
    decision = decide(finished(tmp_path / "run", 0.70), registry, "m")
    assert decision.promote is promoted
    assert reason in decision.reasons[1]
    assert decision.champion == "v0001"


def test_collapsed_features_do_not_pass(tmp_path: Path, registry: str) -> None:
    run = finished(tmp_path / "run", 0.70, collapsed=["pretrained"])
    decision = decide(run, registry, "m", min_gain=-1)
    assert not decision.promote
    assert any("collapsed" in reason for reason in decision.reasons)


@pytest.mark.parametrize(
    ("own", "drawn", "collapsed"),
    [(0.947, 0.928, True), (0.80, 0.05, False), (0.01, 0.0, False), (0.70, 0.65, False)],
)
def test_a_collapsed_training_does_not_pass(
    tmp_path: Path, registry: str, own: float, drawn: float, collapsed: bool
) -> None:
    run = finished(tmp_path / "run", 0.70)
    line = {"step": 5, "pos_similarity": own, "neg_similarity": drawn, "embedding_std": 0.262}
    run.storage.write_bytes("metrics.jsonl", json.dumps(line).encode())
    decision = decide(run, registry, "m", min_gain=-1)
    assert decision.promote is not collapsed
    assert any("spread 0.262" in reason for reason in decision.reasons) is collapsed


def test_the_sampling_error_of_the_test_images_counts(tmp_path: Path, registry: str) -> None:
    """39 and 34 of 46 images: five more, which 46 images cannot show."""
    few = decide(finished(tmp_path / "few", 39 / 46, 34 / 46, test_images=46), registry, "m")
    assert not few.promote
    assert "+10.87 points, not more than" in few.reasons[0]
    assert any("only 46 test images" in reason for reason in few.reasons)
    assert decide(finished(tmp_path / "many", 39 / 46, 34 / 46, test_images=4600), registry, "m").promote


@pytest.mark.parametrize(
    ("changes", "promoted", "reason"),
    [
        ({"test_data": "images"}, False, "training and test images of the evaluation are the same"),
        ({"shared_images": 12, "test_images": 400}, True, "12 of 400 test images are training images too (3.00 %)"),
        ({"unfinished": "epoch 7.00 of 20"}, True, "before the end of the training: epoch 7.00 of 20"),
    ],
)
def test_doubts_about_an_evaluation_are_reasons(
    tmp_path: Path, registry: str, changes: dict[str, Any], promoted: bool, reason: str
) -> None:
    decision = decide(finished(tmp_path / "run", 0.9, **changes), registry, "m")
    assert decision.promote is promoted
    assert any(reason in each for each in decision.reasons)


@pytest.mark.parametrize("min_gain", [math.nan, math.inf, -math.inf])
def test_a_threshold_that_is_not_finite_is_refused(tmp_path: Path, registry: str, min_gain: float) -> None:
    run = finished(tmp_path / "run", 0.70)
    with pytest.raises(UsageError, match="not a finite number"):
        decide(run, registry, "m", min_gain=min_gain)
    assert run.gate() is None


def test_an_unknown_metric_is_a_mistake_with_a_suggestion(tmp_path: Path, registry: str) -> None:
    run = finished(tmp_path / "run", 0.70)
    with pytest.raises(UsageError, match="Did you mean 'linear_1pct'") as error:
        decide(run, registry, "m", "linear_1pc")
    assert error.value.exit_code == EXIT_USAGE


def test_without_an_evaluation_there_is_nothing_to_decide(tmp_path: Path, registry: str) -> None:
    with pytest.raises(RegistryError, match="has no evaluation"):
        decide(str(tmp_path / "run"), registry, "m")


def test_a_dry_run_writes_nothing(tmp_path: Path, registry: str) -> None:
    champion(registry, 0.5)
    run = finished(tmp_path / "run", 0.70)
    before = {name: run.storage.read_bytes(name) for name in run.storage.list()}
    assert decide(run, registry, "m", dry_run=True).promote
    assert {name: run.storage.read_bytes(name) for name in run.storage.list()} == before


# ---- a champion that was measured on other images


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("gate-data")
    folders = (
        folder_of_classes(root / split, classes=3, images=n, width=24, height=20, first=99 * n)
        for split, n in SPLITS.items()
    )
    train, test = (shards_of(folder, root / f"shards-{split}") for folder, split in zip(folders, SPLITS))
    return train, test


SPLITS = {"train": 8, "test": 4}


def measured_on(data: tuple[str, str]) -> dict[str, str]:
    digests = [Manifest.load(open_storage(uri)).digest for uri in data]
    return {"train_data": digests[0], "test_data": digests[1], "train_uri": data[0], "test_uri": data[1]}


def test_a_champion_of_other_images_is_evaluated_on_those_of_the_run(
    tmp_path: Path, registry: str, data: tuple[str, str]
) -> None:
    """It had 41 % on its images. On the new ones it has what its weights have there, above or below the run."""
    champion(registry, 0.41)
    lines: list[str] = []
    worse = finished(tmp_path / "worse", 0.0, random=0.0, **measured_on(data))
    decision = decide(worse, registry, "m", min_gain=-1, dry_run=True, progress=lines.append)
    assert worse.champion_evaluation() is None
    assert lines == ["evaluating the champion m v0001 on the same images"]
    assert not decision.promote
    assert decide(worse, registry, "m", min_gain=-1) == decision
    kept = worse.champion_evaluation()
    assert kept
    assert kept.weights == open_registry(registry).get("m").lineage.weights
    assert kept.pretrained["linear_1pct"].top1.mean > 0
    expected = score_text(kept.pretrained["linear_1pct"].top1, kept.test_images)
    assert decision.reasons[-1] == f"the champion v0001 has {expected} %, measured on the same images now, more"
    assert decide(worse, registry, "m", min_gain=-1, progress=lines.append) == decision
    assert len(lines) == 1  # it is measured once
    better = finished(tmp_path / "better", 1.0, random=0.0, seed=2, **measured_on(data))
    shutil.copyfile(tmp_path / "worse" / "eval_champion.json", tmp_path / "better" / "eval_champion.json")
    assert decide(better, registry, "m").promote
    assert register_run(better.uri, registry, "m").version == "v0002"


@pytest.mark.parametrize("where", ["", "file:///nowhere"])
def test_without_the_images_the_comparison_is_refused(tmp_path: Path, registry: str, where: str) -> None:
    champion(registry, 0.41)
    run = finished(tmp_path / "run", 0.7, test_data="others", train_uri=where, test_uri=where)
    with pytest.raises(RegistryError, match="cannot be compared with the champion") as caught:
        decide(run, registry, "m")
    assert "pirl eval" in caught.value.hint
    assert run.gate() is None


# ---- weights and numbers belong together


def test_a_moved_run_is_registered_with_its_own_weights(tmp_path: Path, registry: str) -> None:
    """`mv r/old r/keep`, another training at r/old: the registry got the weights of the second."""
    run = finished(tmp_path / "old", 0.7, seed=1)
    (tmp_path / "old").rename(tmp_path / "keep")
    finished(tmp_path / "old", 0.2, seed=2)
    keep = str(tmp_path / "keep")
    assert decide(keep, registry, "m").promote
    version = register_run(keep, registry, "m")
    weights = registered_weights(version)
    assert weights_digest(weights) == version.lineage.weights
    assert torch.equal(weights["conv1.weight"], build_model(tiny_recipe("train.seed=1")).trunk.conv1.weight)
    assert version.lineage.checkpoint == Run.at(keep).checkpoint_uri("step-00000005")
    assert run.uri != version.record.run_id


def test_the_name_of_the_run_and_the_working_folder_do_not_matter(
    tmp_path: Path, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tmp_path / "a" / "run", 0.7, seed=1)
    finished(tmp_path / "b" / "run", 0.8, seed=2)
    versions = []
    for folder in ("a", "b"):
        monkeypatch.chdir(tmp_path / folder)
        assert decide("run/checkpoints", registry, "m").promote
        versions.append(register_run("run", registry, "m"))
    assert [version.version for version in versions] == ["v0001", "v0002"]
    for version, seed in zip(versions, (1, 2)):
        expected = build_model(tiny_recipe(f"train.seed={seed}")).trunk.conv1.weight
        assert torch.equal(registered_weights(version)["conv1.weight"], expected)


def test_the_same_weights_are_one_version_wherever_they_lie(tmp_path: Path, registry: str) -> None:
    version = champion(registry, 0.7)
    (tmp_path / "champion-1").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    for folder in ("moved", "copied"):
        assert decide(str(tmp_path / folder), registry, "m").promote
        again = register_run(str(tmp_path / folder), registry, "m")
        assert (again.version, again.record) == (version.version, version.record)
        registered = Run.at(str(tmp_path / folder)).registered()
        assert registered
        assert registered.version == version.version
    assert [version.version for version in open_registry(registry).versions("m")] == ["v0001"]


def test_a_run_that_was_evaluated_early_and_finished_later_is_refused(tmp_path: Path, registry: str) -> None:
    """It was registered with the weights of the early step and the epochs of the end."""
    run = finished(tmp_path / "run", 0.7)
    save(run, 9, 3, tiny_recipe())
    complete(run, 9)
    for call in (lambda: decide(run, registry, "m"), lambda: register_run(run.uri, registry, "m")):
        with pytest.raises(
            RegistryError, match="its evaluation is of step-00000005, its checkpoint is step-00000009"
        ) as e:
            call()
        assert "pirl eval RUN" in e.value.hint
    evaluate(run, 0.7)
    assert decide(run, registry, "m").promote
    assert register_run(run.uri, registry, "m").lineage.checkpoint.endswith("step-00000009")


def test_another_training_at_the_place_of_the_evaluation_is_refused(tmp_path: Path, registry: str) -> None:
    run = finished(tmp_path / "run", 0.7, seed=1)
    assert decide(run, registry, "m").promote
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    save(run, 5, 2, tiny_recipe())
    for call in (lambda: decide(run, registry, "m"), lambda: register_run(run.uri, registry, "m")):
        with pytest.raises(RegistryError, match="other weights than those of its checkpoint step-00000005"):
            call()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        register_run(run.uri, registry, "m")
    assert open_registry(registry).models() == []


def test_another_training_at_the_place_of_a_registered_one_is_refused(tmp_path: Path, registry: str) -> None:
    """The command of the hint fixes it: moved, it is registered."""
    champion(registry, 0.5, seed=1)
    place = tmp_path / "champion-1"
    shutil.rmtree(place)
    run = finished(place, 0.7, seed=2)
    assert decide(run, registry, "m").promote
    with pytest.raises(RegistryError, match="with other files") as caught:
        register_run(run.uri, registry, "m")
    assert "mv" in caught.value.hint
    place.rename(tmp_path / "its-own")
    assert register_run(str(tmp_path / "its-own"), registry, "m").version == "v0002"


def test_an_evaluation_of_version_0_1_is_taken_by_the_name_of_its_checkpoint(tmp_path: Path, registry: str) -> None:
    run = finished(tmp_path / "run", 0.7)
    evaluate(run, 0.7, weights="", commit="", checkpoint="file:///gone/run/checkpoints/step-00000005")
    assert decide(run, registry, "m").promote
    assert register_run(run.uri, registry, "m").lineage.weights == weights_digest(load_trunk(run)[2].state_dict())


def test_a_run_that_version_0_1_registered_stays_that_version(tmp_path: Path, registry: str) -> None:
    """It recorded no digest of the weights, and wrote its files without today's metadata."""
    from safetensors.torch import save

    new = champion(registry, 0.7)
    weights = registered_weights(new)
    lineage = new.lineage.model_copy(update={"weights": "", "commit": ""})
    provenance = Provenance(lineage=lineage, config=new.record.config, metrics=new.record.metrics, gate=new.record.gate)
    shutil.rmtree(tmp_path / "registry")
    run = Run.at(str(tmp_path / "champion-1"))
    first = open_registry(registry).register(
        "m", run_id=run.uri, files={"trunk.safetensors": save(weights)}, provenance=provenance, promote=True
    )
    assert register_run(run.uri, registry, "m") == first
    other = finished(tmp_path / "other", 0.8, seed=2)
    assert decide(other, registry, "m").promote
    assert register_run(other.uri, registry, "m").version == "v0002"


# ---- a decision counts for what was asked


def test_what_did_not_pass_cannot_be_registered(tmp_path: Path, registry: str) -> None:
    run = finished(tmp_path / "run", 0.60, 0.60)
    decide(run, registry, "m")
    with pytest.raises(RejectedError, match=r"did not pass the gate: .* not more than"):
        register_run(run.uri, registry, "m")
    assert open_registry(registry).models() == []


def test_without_a_decision_or_an_end_nothing_is_registered(tmp_path: Path, registry: str) -> None:
    run = finished(tmp_path / "run", 0.7)
    with pytest.raises(RegistryError, match="the gate has not decided yet"):
        register_run(run.uri, registry, "m")
    decide(run, registry, "m")
    run.storage.delete("DONE.json")
    with pytest.raises(RegistryError, match="its training is not finished"):
        register_run(run.uri, registry, "m")


def test_a_decision_for_another_model_or_champion_is_made_again(tmp_path: Path, registry: str) -> None:
    """Two runs pass against no champion; the worse one comes second and must not replace the better one."""
    better, worse = finished(tmp_path / "better", 0.7, seed=1), finished(tmp_path / "worse", 0.6, seed=2)
    assert decide(better, registry, "m").promote
    assert decide(worse, registry, "m").promote
    register_run(better.uri, registry, "m")
    with pytest.raises(RejectedError, match=r"v0001 has 70.00 ± 0.00 %, more"):
        register_run(worse.uri, registry, "m")
    decision = worse.gate()
    assert decision
    assert (decision.promote, decision.champion) == (False, "v0001")
    assert register_run(worse.uri, registry, "other").version == "v0001"  # there it is alone, and asked again
    assert open_registry(registry).get("m").version == "v0001"
    assert len(open_registry(registry).versions("m")) == 1


@pytest.fixture
def rivals(tmp_path: Path, registry: str) -> tuple[Run, Run]:
    """A better and a worse run, both of which have passed the gate."""
    better, worse = finished(tmp_path / "better", 0.7, seed=1), finished(tmp_path / "worse", 0.6, seed=2)
    for run in (better, worse):
        assert decide(run, registry, "m").promote
    return better, worse


def overtake(monkeypatch: pytest.MonkeyPatch, registry: str, run: Run) -> list[str]:
    """Have `run` registered just before the next move of the pointer; return the versions that move it, as they do."""
    advance = FolderCatalogue.move_champion
    calls: list[str] = []

    def overtaken(self: FolderCatalogue, model: str, version: str, moves: Any) -> bool:
        calls.append(version)
        if len(calls) == 1:
            register_run(run.uri, registry, "m")
        return advance(self, model, version, moves)

    monkeypatch.setattr(FolderCatalogue, "move_champion", overtaken)
    return calls


def test_scores_are_compared_again_when_the_pointer_is_moved(
    rivals: tuple[Run, Run], registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The better one becomes champion after the worse one has looked for the last time, before it moves the pointer."""
    better, worse = rivals
    calls = overtake(monkeypatch, registry, better)
    with pytest.raises(RejectedError, match="more"):
        register_run(worse.uri, registry, "m")
    assert open_registry(registry).get("m").record.run_id == better.uri
    assert calls == ["v0001", "v0002"]


def test_the_better_of_two_that_register_at_once_becomes_the_champion(
    rivals: tuple[Run, Run], registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worse one is quicker and has the newer number: the better one moves the pointer after it."""
    better, worse = rivals
    calls = overtake(monkeypatch, registry, worse)
    assert register_run(better.uri, registry, "m").version == "v0001"
    assert open_registry(registry).get("m").version == "v0001"
    assert calls == ["v0001", "v0002", "v0001"]


def test_a_repeated_registration_does_not_undo_a_rollback(tmp_path: Path, registry: str) -> None:
    champion(registry, 0.5, seed=1)
    run = finished(tmp_path / "run", 0.7, seed=2)
    assert decide(run, registry, "m").promote
    version = register_run(run.uri, registry, "m")
    open_registry(registry).promote("m", "v0001")
    assert register_run(run.uri, registry, "m") == version
    assert open_registry(registry).get("m").version == "v0001"


def test_the_defaults_are_those_of_the_commands() -> None:
    from pirl.cli.models import register

    parameters = register.__defaults__
    assert {gate.METRIC, gate.MIN_GAIN} <= set(parameters)
