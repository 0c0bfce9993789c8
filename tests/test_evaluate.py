"""What an evaluation reports: probes with known answers, and the same treatment for both sides."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGES, pirl_train, shards_of, tiny_recipe, warned
from images import folder_of_classes, jpeg, picture
from torchvision import transforms

from pirl.checkpoint import Checkpoints
from pirl.errors import CheckpointError, ConfigError, DataError, UsageError
from pirl.evaluate import (
    Execution,
    Features,
    Progress,
    Protocol,
    centre_crop,
    embed,
    evaluate,
    evaluate_bank,
    evaluate_run,
    evaluate_trunk,
    extract,
    load_model,
    load_trunk,
    nearest,
    require_finite,
)
from pirl.evaluate.confusion import confusion
from pirl.evaluate.crops import LabelledCrops
from pirl.evaluate.features import Moments, fold_norms, moments
from pirl.evaluate.neighbours import vote
from pirl.evaluate.probe import Pair, as_json, bank_neighbours, few_labels, probe, score_probes, spread
from pirl.evaluate.sgd import Standardised, train_probes
from pirl.evaluate.spec import EvaluationOptions, EvaluationSpec
from pirl.gains import caveats, labels_text
from pirl.model import build_model, weights_digest
from pirl.results import PROBES, Evaluation, FewLabels, ProbeSettings, Score, Scores
from pirl.run import Run, split_checkpoint_uri
from pirl.shards import ShardReader
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World

QUICK = Protocol(seeds=(0, 1), epochs=2, min_steps=60, neighbours=5)


def blobs(n: int, classes: int = 6, dim: int = 12, noise: float = 0.1, seed: int = 0, wrong: float = 0.0) -> Features:
    """Features around one point for each class; a share `wrong` of the labels is that of the next class."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    y = np.arange(n) % classes
    x = centres[y] + noise * rng.normal(size=(n, dim))
    flip = np.arange(n) < wrong * n
    return Features(torch.from_numpy(x).float(), torch.from_numpy(np.where(flip, (y + 1) % classes, y)))


# ---- the linear probe


def linear_probe(train: Features, test: Features, classes: int, protocol: Protocol, seed: int) -> tuple[float, float]:
    """(top-1, top-5) of one probe on features as they are."""
    dim, protocol = train.x.shape[1], replace(protocol, seeds=(seed,))
    plain = Moments(torch.zeros(dim), torch.ones(dim), collapsed=False)
    sides = [Standardised(side, plain, torch.device("cpu")) for side in (train, test)]
    subsets = [torch.arange(len(train.y))]
    weights = train_probes(sides[:1], subsets, classes, protocol, World(), Progress(), "linear")
    return score_probes(sides[1:], weights, World())[0][0]


def by_autograd(train: Features, subset: torch.Tensor, classes: int, protocol: Protocol, seed: int) -> torch.Tensor:
    """The weights (D + 1, classes) of one probe by PyTorch's own layer, loss, optimiser and schedule."""
    generator = torch.Generator().manual_seed(seed)
    x, y = train.x[subset], train.y[subset]
    layer = torch.nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        layer.weight.uniform_(-(x.shape[1] ** -0.5), x.shape[1] ** -0.5, generator=generator)
        layer.bias.zero_()
    settings = {"momentum": protocol.momentum, "weight_decay": protocol.weight_decay, "nesterov": True}
    optimizer = torch.optim.SGD(layer.parameters(), protocol.lr, **settings)  # type: ignore[arg-type]
    batch = min(protocol.batch_size, len(y))
    steps = max(protocol.min_steps, protocol.epochs * len(y) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(y), generator=generator)
        index, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(x[index]), y[index]).backward()
        optimizer.step()
        schedule.step()
    return torch.cat([layer.weight.detach().T, layer.bias.detach()[None]])


@pytest.mark.parametrize("few", [False, True])
def test_probes_trained_together_are_those_of_autograd_one_by_one(few: bool) -> None:
    """Two backbones and three seeds at once, in closed form."""
    protocol = Protocol(seeds=(0, 1, 2), epochs=3, min_steps=40, batch_size=32)
    sets = [blobs(150, noise=1.0), blobs(150, noise=2.0, seed=5)]
    subsets = [few_labels(sets[0].y, 0.3, seed) if few else torch.arange(150) for seed in protocol.seeds]
    plain = Moments(torch.zeros(12), torch.ones(12), collapsed=False)
    train = [Standardised(side, plain, torch.device("cpu")) for side in sets]
    weights = train_probes(train, subsets, 6, protocol, World(), Progress(), "linear")
    expected = [by_autograd(side, subsets[seed], 6, protocol, seed) for side in sets for seed in protocol.seeds]
    torch.testing.assert_close(weights, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_separable_features_are_told_apart() -> None:
    assert linear_probe(blobs(120), blobs(60, seed=1), 6, QUICK, 0) == (1.0, 1.0)


def test_top5_counts_the_five_best() -> None:
    """The centres' own labels moved on by one: top-1 misses the wrong ones; with five classes top-5 has them all."""
    test = blobs(50, classes=5, seed=1, wrong=0.3)
    top1, top5 = linear_probe(blobs(100, classes=5), test, 5, QUICK, 0)
    assert top1 == pytest.approx(0.7)
    assert top5 == 1.0
    top1, top5 = linear_probe(blobs(30, classes=3), blobs(30, classes=3, seed=1, wrong=0.5), 3, QUICK, 0)
    assert (top1, top5) == (0.5, 1.0)  # fewer than five classes


def test_features_without_information_are_at_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (Features(torch.randn(n, 4, generator=generator), torch.arange(n) % 10) for n in (400, 2000))
    top1, top5 = linear_probe(train, test, 10, QUICK, 0)
    assert top1 == pytest.approx(0.1, abs=0.04)
    assert top5 == pytest.approx(0.5, abs=0.06)


def test_a_probe_is_a_function_of_its_seed() -> None:
    train, test = blobs(120, noise=2.0), blobs(600, noise=2.0, seed=1)
    torch.manual_seed(1)
    first = linear_probe(train, test, 6, QUICK, 0)
    torch.manual_seed(2)
    assert linear_probe(train, test, 6, QUICK, 0) == first
    others = {linear_probe(train, test, 6, replace(QUICK, min_steps=2, epochs=0), seed) for seed in range(4)}
    assert len(others) > 1


def test_probe_scales_features_by_the_training_set() -> None:
    """One feature a million times larger than the others, one that is constant: neither may spoil the probe."""
    train, test = blobs(120), blobs(60, seed=1)
    for features in (train, test):
        features.x[:, 0] *= 1e6
        features.x[:, 1] = 7.0
    scores, collapsed, errors = probe({"pretrained": Pair(train, test)}, 6, replace(QUICK, label_share=0.2))
    result = scores["pretrained"]
    assert collapsed == []
    assert result["linear"].top1.mean == 1.0
    assert result["linear_1pct"].top1.mean == 1.0
    assert len(result["linear"].top1.runs) == 2
    assert errors.counts == torch.diag(torch.full((6,), 10)).tolist()


@pytest.mark.parametrize("classes", [3, 20, 21, 1000])
def test_the_confusion_matrix_shows_the_classes_with_most_errors(classes: int) -> None:
    """Every test image of class 2 is taken for class 1, all others are right."""
    weights = torch.cat([torch.eye(classes), torch.zeros(1, classes)])
    y = torch.arange(classes).repeat(2)
    x = torch.nn.functional.one_hot(torch.where(y == 2, 1, y), classes).float()
    plain = Moments(torch.zeros(classes), torch.ones(classes), collapsed=False)
    test = Standardised(Features(x, y), plain, torch.device("cpu"))
    found = confusion(test, weights, classes, World())
    counts = np.array(found.counts)
    assert found.classes == list(range(min(classes, 20)))
    assert counts.shape == (min(classes, 21),) * 2
    assert counts.sum() == 2 * classes
    assert (counts[2, 1], counts[2, 2], counts[1, 1]) == (2, 0, 2)
    assert counts.trace() == 2 * classes - 2
    names = found.names([f"c{k}" for k in range(classes)])
    assert names[:3] == ["c0", "c1", "c2"]
    assert (names[-1] == "other classes") == (classes > 20)
    assert len(names) == len(counts)


def test_spread() -> None:
    assert spread([0.5, 0.7]).mean == pytest.approx(0.6)
    assert spread([0.5, 0.7]).std == pytest.approx(0.02**0.5)
    assert spread([0.5, 0.7]).runs == [0.5, 0.7]
    assert spread([0.5]).std == 0.0


# ---- few labels


def test_few_labels_takes_a_share_of_each_class_and_at_least_one() -> None:
    y = torch.cat([torch.zeros(200), torch.ones(60), torch.full((3,), 2)]).long()
    for seed in range(5):
        few = few_labels(y, 0.05, seed)
        assert torch.bincount(y[few]).tolist() == [10, 3, 1]
        assert len(set(few.tolist())) == 14
    drawn = [tuple(few_labels(y, 0.05, seed).tolist()) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


# ---- nearest neighbours


def brute_force(train: Features, test: Features, classes: int, k: int, temperature: float) -> float:
    def unit(x: torch.Tensor) -> np.ndarray:
        values = x.double().numpy()
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    hits = 0
    for query, label in zip(unit(test.x), test.y.tolist()):
        similarity = unit(train.x) @ query
        votes = np.zeros(classes)
        for index in np.argsort(-similarity)[:k]:
            votes[train.y[index]] += np.exp(similarity[index] / temperature)
        hits += int(votes.argmax()) == label
    return hits / len(test.y)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (200, 0.07)])
def test_nearest_neighbours_by_brute_force(k: int, temperature: float) -> None:
    train, test = blobs(130, noise=1.5), blobs(75, noise=1.5, seed=1)
    found = vote(train, test, 6, k, temperature)
    assert found == pytest.approx(brute_force(train, test, 6, k, temperature))
    assert 0.3 < found < 1


def test_neighbours_come_nearest_first_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = blobs(50, noise=1.0), blobs(23, noise=1.0, seed=1)
    index, similarity = nearest(train.x, test.x, 4)
    assert (similarity.diff(dim=1) <= 0).all()
    monkeypatch.setattr(sys.modules["pirl.evaluate.neighbours"], "BLOCK", 3)
    assert torch.equal(nearest(train.x, test.x, 4)[0], index)
    assert torch.equal(nearest(train.x, test.x, 4, first=100)[0], index + 100)
    assert nearest(train.x, train.x, 1)[0][:, 0].tolist() == list(range(50))


# ---- pixels and features


@pytest.mark.parametrize("size", [(24, 20), (20, 28), (49, 49), (98, 300), (500, 375), (16, 16), (7, 5)])
def test_images_are_shown_as_torchvision_shows_them(size: tuple[int, int]) -> None:
    recipe = tiny_recipe("eval.resize=64", "eval.crop=56")
    image = picture(3, *size)
    expected = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])(image)
    assert np.array_equal(centre_crop(image, recipe), np.asarray(expected))


def test_an_image_that_fits_is_not_resampled() -> None:
    image = picture(1, 24, 16)
    assert np.array_equal(centre_crop(image, tiny_recipe()), np.asarray(image)[:, 4:20])


def pixels_of(shards: str) -> torch.Tensor:
    reader = ShardReader(shards)
    return LabelledCrops(reader, tiny_recipe(), seed=0)[None, np.arange(len(reader))][0]


def test_features_of_a_batch_are_those_of_one(shards: str) -> None:
    recipe, pixels = tiny_recipe(), pixels_of(shards)
    assert pixels.shape == (IMAGES, 16, 16, 3)
    trunk = build_model(recipe).trunk.eval()
    together = extract(trunk, lambda: pixels.split(20), recipe)
    assert together.shape == (IMAGES, 32)
    mean, std = (torch.tensor(each) for each in (recipe.views.mean, recipe.views.std))
    with torch.no_grad():
        one = trunk(((pixels[7:8] / 255.0 - mean) / std).permute(0, 3, 1, 2))
    torch.testing.assert_close(together[7:8], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_folded_norms_are_the_same_function_of_a_copy(block: str) -> None:
    torch.manual_seed(0)
    trunk = build_model(tiny_recipe(f"model.block={block}")).trunk.eval()
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    before = weights_digest(trunk.state_dict())
    folded, x = fold_norms(trunk), torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), trunk(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert weights_digest(trunk.state_dict()) == before


def test_features_in_half_precision_give_the_same_result(
    run: str, shards: str, test_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled by a power of two: random weights of a deep network give features below the least half number."""
    whole = evaluate(run, shards, test_shards, QUICK)
    monkeypatch.setattr(sys.modules["pirl.evaluate.features"], "HALF_FROM_BYTES", 0)
    half = evaluate(run, shards, test_shards, QUICK)
    assert half.differences == ["features in half precision"]
    assert (half.pretrained, half.random, half.bank) == (whole.pretrained, whole.random, whole.bank)
    recipe, _, trunk = load_trunk(run)
    trunk.layer4[-1].bn2.weight.data.mul_(1e-9)
    trunk.layer4[-1].bn2.bias.data.mul_(1e-9)
    for module in trunk.layer4[-1].downsample[1:]:
        module.weight.data.mul_(1e-9)
        module.bias.data.mul_(1e-9)
    small = evaluate_trunk(trunk, recipe, shards, test_shards, QUICK)
    assert small.pretrained["knn"] == whole.pretrained["knn"]
    assert small.collapsed == []


def test_steps_are_bounded_and_the_bound_is_recorded(
    run: str, shards: str, test_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Protocol().steps(60_000) == Protocol().unbounded_steps(60_000) == 4687  # the demo's
    assert Protocol().steps(1_281_167) == 20_000
    monkeypatch.setattr(sys.modules["pirl.evaluate.probe"], "MOST_STEPS", 50)
    result = evaluate(run, shards, test_shards, QUICK)
    assert result.steps == {"linear": 50, "linear_1pct": 50}
    assert result.differences[0] == "linear: 50 steps for 60, which 2 epochs would take"


# ---- a run


@pytest.fixture(scope="module")
def run(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    train(tiny_recipe("train.epochs=2"), Options(data=shards, out=str(out), log_every=5), World())
    return open_storage(out).uri


@pytest.fixture(scope="module")
def test_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("test")
    return shards_of(
        folder_of_classes(root / "images", classes=3, images=5, width=20, height=24, first=500), root / "s"
    )


def test_leaked_test_images_are_counted_or_refused(run: str, shards: str, test_shards: str, tmp_path: Path) -> None:
    """Equal sets, a copy in other folders, and three training images among others."""
    with pytest.raises(UsageError, match="training and test images are the same"):
        evaluate(run, shards, shards, QUICK)
    folder = folder_of_classes(tmp_path / "leak", classes=3, images=IMAGES // 3, width=24, height=20)
    for path in sorted(folder.rglob("*.jpg"))[1::2]:
        path.unlink()
    with pytest.raises(UsageError, match="all 21 test images"):
        evaluate(run, shards, shards_of(folder, tmp_path / "copies"), QUICK)
    for index, path in enumerate(sorted(folder.rglob("*.jpg"))[3:]):
        path.write_bytes(jpeg(9000 + index, 24, 20))
    leaked = evaluate(run, shards, shards_of(folder, tmp_path / "some"), QUICK)
    assert (leaked.shared_images, leaked.test_images) == (3, 21)
    assert "3 of 21 test images are training images too (14.29 %)" in " ".join(caveats(leaked))
    clean = evaluate(run, shards, test_shards, QUICK)
    assert clean.shared_images == 0
    assert clean.few_labels == FewLabels(labels=3, least=1, most=1)
    assert labels_text(clean) == "1 label per class (7.14 %)"
    assert clean.unfinished == ""


def test_an_evaluation_before_the_end_of_a_training_names_its_progress(run: str, shards: str, test_shards: str) -> None:
    early = evaluate(f"{run}/checkpoints/step-00000000", shards, test_shards, QUICK)
    assert early.unfinished == "epoch 0.00 of 2"
    assert any("epoch 0.00 of 2" in line for line in caveats(early))


@pytest.mark.parametrize(
    ("score", "images", "error"),
    [
        (Score(mean=0.5, std=0.0, runs=[0.5, 0.5, 0.5]), 100, 0.0495),  # no spread of the seeds: the sampling error
        (Score(mean=0.5, std=0.03, runs=[0.5, 0.47, 0.53]), 100, 0.0579),
        (Score(mean=0.5, std=0.05, runs=[0.5]), 100, 0.05),  # of one run, `std` is the sampling error
        (Score(mean=1.0, std=0.0, runs=[1.0]), 46, 0.0206),  # all of 46 are not all of everything
        (Score(mean=0.5, std=0.01), 0, 0.01),  # version 0.1 did not record the number
    ],
)
def test_an_error_has_the_sampling_error_of_the_test_images(score: Score, images: int, error: float) -> None:
    assert score.error(images) == pytest.approx(error, abs=1e-4)


def without_seconds(result: Evaluation) -> Evaluation:
    return result.model_copy(update={"seconds": 0.0})


def test_an_evaluation_names_what_it_saw(run: str, shards: str, test_shards: str) -> None:
    result = evaluate(run, shards, test_shards, QUICK)
    assert (result.checkpoint, result.commit) == ("step-00000010", Run.at(run).commit().sha256)
    assert result.weights == weights_digest(load_trunk(run)[2].state_dict())
    assert result.train_data == ShardReader(shards).manifest.digest
    assert result.test_data == ShardReader(test_shards).manifest.digest
    assert (result.train_uri, result.test_uri) == (shards, test_shards)
    assert (result.train_images, result.test_images) == (IMAGES, 15)
    assert result.classes == ["class0", "class1", "class2"]
    assert result.to_json()["protocol"]["resize"] == 16
    for scores in (result.pretrained, result.random):
        assert all(0 <= scores[name].top1.mean <= 1 for name in PROBES)
        assert len(scores["linear"].top1.runs) == 2
        assert scores["linear"].top5
        assert scores["linear"].top5.mean == 1.0  # of three classes
    assert result.collapsed == []
    assert Evaluation.parse(json.loads(json.dumps(result.to_json())), "itself") == result
    assert without_seconds(evaluate(run, shards, test_shards, QUICK)) == without_seconds(result)


def test_a_digest_is_that_of_the_weights_wherever_they_lie(run: str, tmp_path: Path) -> None:
    """A copied folder has the same, another value or name or shape another."""
    state = load_trunk(run)[2].state_dict()
    shutil.copytree(open_storage(run).path, tmp_path / "copy")  # type: ignore[attr-defined]
    assert weights_digest(load_trunk(str(tmp_path / "copy" / "checkpoints"))[2].state_dict()) == weights_digest(state)
    assert weights_digest(dict(reversed(state.items()))) == weights_digest(state)
    value = state["conv1.weight"].clone()
    value[0, 0, 0, 0] += 1e-6
    changes = [{"conv1.weight": value}, {"more": value}, {"bn1.weight": state["bn1.weight"][None]}]
    assert weights_digest(state) not in {weights_digest({**state, **change}) for change in changes}
    strided = state["conv1.weight"].contiguous(memory_format=torch.channels_last)
    assert weights_digest({**state, "conv1.weight": strided}) == weights_digest(state)


def test_features_that_are_not_finite_name_the_image(run: str, shards: str, test_shards: str) -> None:
    """They would count as the first class: its share, with a spread of 0."""
    recipe, _, trunk = load_trunk(run)
    trunk.bn1.running_var.fill_(-1.0)
    name = ShardReader(shards).name(0)
    with pytest.raises(CheckpointError) as caught:
        evaluate_trunk(trunk, recipe, shards, test_shards, QUICK)
    assert f"image 0 ({name}) of {shards}, {IMAGES} of {IMAGES} images" in str(caught.value)
    features = torch.ones(4, 3)
    features[2, 1] = float("inf")
    with pytest.raises(CheckpointError, match=r"random trunk .* image 7 .* 1 of 4 images"):
        require_finite(features, [3, 5, 7, 9], ShardReader(shards), "random")


def test_collapsed_features_are_reported(run: str, shards: str, test_shards: str) -> None:
    recipe, _, trunk = load_trunk(run)
    lines: list[str] = []
    with torch.no_grad():
        for parameter in trunk.layer4.parameters():
            parameter.zero_()
    execution = Execution(progress=Progress(lines.append))
    result = evaluate_trunk(trunk, recipe, shards, test_shards, QUICK, execution)
    assert result.collapsed == ["pretrained"]
    assert any("have collapsed" in line for line in lines)


@pytest.mark.parametrize(
    ("features", "collapsed"),
    [
        (torch.zeros(8, 3), True),
        (torch.full((8, 3), 0.1) * (1 + 1e-7 * torch.arange(8.0)[:, None]), True),  # rounding
        (torch.cat([torch.full((8, 1), 1e6), torch.arange(8.0)[:, None]], 1), False),  # a large constant one
        (torch.arange(8.0)[:, None].expand(8, 3), False),
        (torch.ones(1, 3), False),  # one image shows nothing
    ],
)
def test_what_counts_as_collapsed(features: torch.Tensor, collapsed: bool) -> None:
    assert moments(Features(features, torch.zeros(len(features))), World()).collapsed is collapsed


def test_the_memory_bank_finds_what_brute_force_finds(run: str, shards: str, test_shards: str) -> None:
    """By its rows with the labels of their ids, and the image head's embeddings of the test images; nothing else."""
    recipe, _, model, memory = load_model(run)
    train, test = ShardReader(shards), ShardReader(test_shards)
    assert memory.shape == (IMAGES, recipe.model.embedding_dim)
    pixels = pixels_of(test_shards)
    mean, std = (torch.tensor(each) for each in (recipe.views.mean, recipe.views.std))
    with torch.no_grad():
        embeddings = model.image_head(model.trunk(((pixels / 255.0 - mean) / std).permute(0, 3, 1, 2)))
    rows = Features(memory, torch.tensor([train.label(id) for id in range(IMAGES)]))
    asked = Features(embeddings, torch.tensor([test.label(id) for id in range(15)]))
    expected = brute_force(rows, asked, 3, QUICK.neighbours, QUICK.knn_temperature)
    bank = evaluate_bank(run, shards, test_shards, QUICK).bank
    assert bank
    assert bank.top1.mean == pytest.approx(expected)
    assert (bank.rows, bank.dim) == (IMAGES, 8)
    assert evaluate(run, shards, test_shards, QUICK).bank == bank


def test_the_memory_bank_of_fewer_images_has_their_labels(shards: str, tmp_path: Path) -> None:
    """Rows that are the embeddings of the images themselves find each image's own class."""
    recipe = tiny_recipe("data.images=20", "train.epochs=1")
    train(recipe, Options(data=shards, out=str(tmp_path / "run")), World())
    _, _, model, memory = load_model(str(tmp_path / "run"))
    reader = ShardReader(shards)
    chosen = [row * IMAGES // 20 for row in range(20)]
    labels = torch.from_numpy(reader.labels())
    embedded = embed(model, Features(extract(model.trunk, lambda: [pixels_of(shards)], recipe), labels)).x
    one = replace(QUICK, neighbours=1)
    itself = bank_neighbours(embedded[chosen], shards, recipe, Features(embedded[chosen], labels[chosen]), 3, one)
    assert itself.top1.mean == 1.0
    assert len(memory) == itself.rows == 20


def test_a_bank_of_other_images_is_not_asked(run: str, shards: str, test_shards: str) -> None:
    assert evaluate(run, test_shards, shards, QUICK).bank is None
    with pytest.raises(UsageError, match="no memory bank of the images"):
        evaluate_bank(run, test_shards, shards, QUICK)


def test_random_is_the_trunk_before_its_first_step(run: str, shards: str, test_shards: str) -> None:
    """The checkpoint of step 0 must score as its own baseline does, in every number."""
    result = evaluate(f"{run}/checkpoints/step-00000000", shards, test_shards, QUICK)
    assert result.pretrained == result.random
    _, commit, trunk = load_trunk(f"{run}/checkpoints/step-00000000")
    assert commit.cursor.step == 0
    initial = build_model(tiny_recipe()).trunk.state_dict()
    assert all(torch.equal(value, initial[name]) for name, value in trunk.state_dict().items())
    trained = load_trunk(run)[2].state_dict()
    assert not torch.equal(trained["conv1.weight"], initial["conv1.weight"])


def test_loading_a_trunk(run: str) -> None:
    recipe, commit, trunk = load_trunk(run)
    assert recipe.digest() == tiny_recipe("train.epochs=2").digest()
    assert commit.name == "step-00000010"
    assert not trunk.training
    found = Checkpoints(open_storage(run) / "checkpoints").load()
    assert found is not None
    assert all(torch.equal(value, found[1]["model"][f"trunk.{name}"]) for name, value in trunk.state_dict().items())


def test_a_missing_checkpoint(run: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load_trunk(str(tmp_path / "empty"))
    with pytest.raises(CheckpointError) as caught:
        load_trunk(f"{run}/checkpoints/step-00000003")
    assert "step-00000000, step-00000010" in caught.value.hint


@pytest.mark.parametrize(
    ("uri", "run", "name"),
    [
        ("s3://b/runs/a", "s3://b/runs/a", None),
        ("s3://b/runs/a/", "s3://b/runs/a", None),
        ("s3://b/runs/a/checkpoints", "s3://b/runs/a", None),
        ("s3://b/runs/a/checkpoints/", "s3://b/runs/a", None),
        ("s3://b/runs/a/checkpoints/step-00000120", "s3://b/runs/a", "step-00000120"),
        ("/mnt/checkpoints/runs/a", "/mnt/checkpoints/runs/a", None),
        ("/mnt/checkpoints/a/checkpoints/step-00000120/", "/mnt/checkpoints/a", "step-00000120"),
        ("/mnt/checkpoints-old/a", "/mnt/checkpoints-old/a", None),
        ("s3://checkpoints", "s3://checkpoints", None),
        ("s3://checkpoints/a", "s3://checkpoints/a", None),
        ("/runs/a/checkpoints/step-7", "/runs/a", "step-7"),
    ],
)
def test_the_uri_of_a_checkpoint(uri: str, run: str, name: str | None) -> None:
    assert split_checkpoint_uri(uri) == (run, name)


def test_data_that_cannot_be_evaluated(
    run: str, shards: str, other_shards: str, test_shards: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="has no labels"):
        evaluate(run, other_shards, test_shards, QUICK)
    with pytest.raises(UsageError, match="has no labels"):
        evaluate(run, shards, other_shards, QUICK)
    four = shards_of(folder_of_classes(tmp_path / "images", classes=4, images=3), tmp_path / "s")
    with pytest.raises(DataError, match="has 1 class that training does not have: class3"):
        evaluate(run, shards, four, QUICK)


def test_a_test_set_without_some_classes_is_matched_by_name(
    run: str, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same test images give the same numbers, whether the class without an image has a folder or not."""
    images = folder_of_classes(tmp_path / "images", classes=3, images=4)
    for path in (images / "class1").iterdir():
        path.unlink()
    with_folder = evaluate(run, shards, shards_of(images, tmp_path / "with"), QUICK)
    (images / "class1").rmdir()
    without = evaluate(run, shards, shards_of(images, tmp_path / "without"), QUICK)
    assert "has no image of class1" in caplog.messages[-1]
    assert without.test_data != with_folder.test_data
    assert (without.pretrained, without.random) == (with_folder.pretrained, with_folder.random)
    assert without.classes == ["class0", "class1", "class2"]
    assert (without.untested, with_folder.untested) == (["class1"], ["class1"])


def test_a_run_is_evaluated_once(
    run: str, shards: str, test_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time its `eval.json` is the answer, unless the weights or the data are others."""
    calls: list[tuple[Any, ...]] = []

    def counted(*arguments: Any, execution: Any) -> Evaluation:
        calls.append(arguments)
        result = evaluate(*arguments, QUICK)
        return result.model_copy(update={"protocol": ProbeSettings(**{**dict(result.protocol), **as_json(Protocol())})})

    monkeypatch.setattr(sys.modules["pirl.evaluate.fast"], "evaluate", counted)
    folder = tmp_path / "run"
    shutil.copytree(open_storage(run).path, folder)  # type: ignore[attr-defined]
    first = evaluate_run(str(folder), shards, test_shards)
    assert Run.at(str(folder)).evaluation() == first
    assert evaluate_run(f"{folder}/checkpoints", shards, test_shards) == first
    assert len(calls) == 1
    folder = folder.rename(tmp_path / "moved")
    assert evaluate_run(str(folder), shards, test_shards) == first
    moved = tmp_path / "moved-shards"
    shutil.copytree(open_storage(test_shards).path, moved)  # type: ignore[attr-defined]
    again = evaluate_run(str(folder), shards, str(moved))
    assert again == first.model_copy(update={"test_uri": open_storage(moved).uri})
    assert Run.at(str(folder)).evaluation() == again
    assert len(calls) == 1
    evaluate_run(str(folder), test_shards, shards)
    assert len(calls) == 2
    evaluation = Run.at(str(folder)).evaluation()
    assert evaluation
    assert evaluation.test_data == ShardReader(shards).manifest.digest
    Run.at(str(folder)).save_evaluation(evaluation.model_copy(update={"commit": "another training's"}))
    evaluate_run(str(folder), test_shards, shards)
    assert len(calls) == 3
    (folder / "eval.json").write_text("{")
    with warned("evaluated again"):
        evaluate_run(str(folder), test_shards, shards)
    named = evaluate_run(f"{folder}/checkpoints/step-00000000", test_shards, shards)
    assert named.checkpoint == "step-00000000"
    assert Run.at(str(folder)).evaluation() == named
    assert not list((folder / "checkpoints").rglob("eval.json"))


def no_probe(pairs: dict[str, Pair], *_: Any) -> tuple[dict[str, Any], list[str], None]:
    return {name: {"linear": Scores(top1=spread([0.5]))} for name in pairs}, [], None


def test_another_eval_section_is_applied_to_a_finished_run(
    tiny_toml: Path, shards: str, test_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is saved without training again, evaluated by both protocols, and the same section is evaluated once."""
    run = Run.at(str(tmp_path / "run"))
    place = ["--data", shards, "--out", run.uri, "--processes", 1, "train.epochs=1"]
    assert pirl_train(tiny_toml, *place) == 0
    completion, weights = run.completion(), weights_digest(load_trunk(run)[2].state_dict())
    monkeypatch.setattr(sys.modules["pirl.evaluate.fast"], "probe", no_probe)
    first = evaluate_run(run.uri, shards, test_shards)
    assert pirl_train(tiny_toml, *place, "eval.resize=20", "eval.crop=12") == 0
    assert run.completion() == completion
    assert (run.recipe().eval.resize, run.recipe().eval.crop) == (20, 12)
    second = evaluate_run(run.uri, shards, test_shards)
    settings = [result.to_json()["protocol"] for result in (first, second)]
    assert [(each["resize"], each["crop"]) for each in settings] == [(16, 16), (20, 12)]
    assert first.weights == second.weights == weights
    assert load_model(run)[0].eval == load_trunk(run)[0].eval == run.recipe().eval
    assert evaluate_run(run.uri, shards, test_shards) == second


# ---- the specification


def test_texts_items_options_and_json_give_the_same_specification(tmp_path: Path) -> None:
    options = ["protocol=zoo", "epochs=3"]
    ways = [options, " ".join(options), EvaluationOptions(protocol="zoo", epochs=3)]
    specs = [EvaluationSpec.parse("r", data="d", test="t", options=way) for way in ways]
    (tmp_path / "spec.json").write_text(specs[0].to_json())
    specs.append(EvaluationSpec.read(str(tmp_path / "spec.json")))
    assert specs == [EvaluationSpec(run="r", data="d", test="t", protocol="zoo", epochs=3)] * 4


def test_every_problem_of_a_specification_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        EvaluationSpec.parse("ftp://r", data="d", test="s3:/t", options="protocol=zo workers=-2 run=x epoch=2")
    for problem in ("--run", "--test", "Did you mean 'zoo'?", "workers", "'run'", "Did you mean 'epochs'?"):
        assert problem in caught.value.what, problem
