"""The zoo's linear protocol: its numbers, its arithmetic, and that nothing but the heads learns."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shards_of, tiny_recipe
from images import folder_of_classes, picture
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.models import resnet18, resnet50
from torchvision.transforms import functional as vision

from pirl import cli
from pirl.checkpoint import Checkpoints, Cursor
from pirl.config import ModelConfig, Recipe, load_recipe
from pirl.errors import CheckpointError, DataError, TrainingError, UsageError
from pirl.evaluate import ZooProtocol, centre_crop, evaluate_layers
from pirl.evaluate.apply import zoo_protocol
from pirl.evaluate.crops import PROBE_STREAM, LabelledCrops, draw_crops, random_crops
from pirl.evaluate.execution import Execution
from pirl.evaluate.heads import HEADS, build_heads, head_optimizer, score_heads, top_hits, train_step
from pirl.evaluate.layers import ZOO_POOLS, FrozenLayers, adaptive_pool, choose_pools, layer_maps, zoo_shapes
from pirl.evaluate.progress import Progress
from pirl.evaluate.schedules import Schedule
from pirl.evaluate.spec import EvaluationOptions
from pirl.evaluate.zoo import describe, split_batches, train_heads
from pirl.model import Trunk, build_model
from pirl.optim import set_learning_rate
from pirl.order import epoch_order
from pirl.shards import ShardReader
from pirl.storage import open_storage

CPU, META = torch.device("cpu"), torch.device("meta")
# features of the heads as the reference's configs state them; w2's has no head on res5avg: twice R50's
DIMENSIONS = {
    "r50-200ep-linear": [9216, 9216, 8192, 9216, 8192, 2048, 2048],
    "r50w2-400ep-linear": [8192, 8192, 9216, 8192, 8192, 4096, 4096],
}
SIDES = {"r50-200ep-linear": [12, 6, 4, 3, 2], "r50w2-400ep-linear": [8, 4, 3, 2]}


def on_meta(recipe: Recipe) -> FrozenLayers:
    with META:
        return FrozenLayers(Trunk(recipe.model), recipe, META)


# --- layers and pooling --------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIMENSIONS)
def test_heads_of_the_zoos_trunks(name: str) -> None:
    layers = on_meta(load_recipe(name))
    assert layers.exact
    with META:
        heads = build_heads(layers.shapes, 1000, seed=1)
    assert list(heads) == ["conv1", "res2", "res3", "res4", "res5", "res5avg_bn", "res5avg"]
    assert [head.linear.in_features for head in heads.values()] == DIMENSIONS[name]
    assert [layers.shapes[layer][1:] for layer in list(HEADS.values())[: len(SIDES[name])]] == [
        (side, side) for side in SIDES[name]
    ]
    for head_name, head in heads.items():
        assert head.linear.weight.shape == (1000, head.linear.in_features)
        assert head.linear.bias.shape == (1000,)
        if head_name == "res5avg":
            assert not [module for module in head.modules() if isinstance(module, nn.BatchNorm2d)]
        else:
            assert head.norm.num_features == layers.shapes[HEADS[head_name]][0]
            assert (head.norm.eps, head.norm.momentum, head.norm.affine) == (1e-5, 0.1, True)


def test_every_recipe_of_the_zoo_has_the_zoos_windows_and_crops() -> None:
    for name in ("r50-200ep-mlp", "r50-800ep-linear", "r50-800ep-mlp", "r50w2-400ep-mlp"):
        recipe = load_recipe(name)
        layers = on_meta(recipe)
        applied, differences = describe(ZooProtocol(), recipe, layers, 1_281_167)
        assert (layers.exact, differences) == (True, [])
        assert (applied.resize, applied.crop, applied.batch_size, applied.epochs) == (256, 224, 256, 28)
        assert applied.lr_drops == [8, 16, 24]


def test_windows_by_hand() -> None:
    """Means of ramps, and of ones beside zero padding, have closed forms."""
    conv1, res2, res3, res4, res5 = ZOO_POOLS[1]
    edge = torch.tensor([0.6] + [1.0] * 10 + [0.6])  # 4 of the first window's 10 rows are padding, and of the last's
    torch.testing.assert_close(conv1(torch.ones(1, 1, 112, 112))[0, 0], torch.outer(edge, edge))
    edge = torch.tensor([0.8] + [1.0] * 6 + [1.0])  # 4 of 20; the last window begins at 7 * 13 - 4
    torch.testing.assert_close(ZOO_POOLS[2][0](torch.ones(1, 1, 112, 112))[0, 0], torch.outer(edge, edge))

    def columns(pool: nn.Module, side: int) -> list[float]:
        pooled = pool(torch.arange(float(side)).expand(1, 1, side, side))[0, 0]
        assert torch.equal(pooled, pooled[:1].expand_as(pooled))
        return pooled[0].tolist()

    assert columns(res2, 56) == [7.5 + 8 * i for i in range(6)]
    assert columns(res3, 28) == [6.0 + 5 * i for i in range(4)]
    assert columns(res4, 14) == [3.5 + 3 * i for i in range(3)]
    assert columns(res5, 7) == [2.5, 3.5]
    assert columns(ZOO_POOLS[2][1], 56) == [15.5 + 8 * i for i in range(4)]
    assert columns(ZOO_POOLS[2][2], 28) == [6.0 + 7 * i for i in range(3)]
    assert columns(ZOO_POOLS[2][3], 14) == [3.5, 9.5]
    rows = ZOO_POOLS[2][4](torch.arange(7.0).view(1, 1, 7, 1).expand(1, 1, 7, 7))
    assert rows.flatten().tolist() == [1.5, 4.5]  # two windows of 4 rows, one shared; all columns


def test_other_trunks_are_pooled_to_the_zoos_sizes() -> None:
    for width in ZOO_POOLS:
        for (channels, height, side), pool in zip(zoo_shapes(width).values(), ZOO_POOLS[width]):
            own = pool(torch.zeros(1, 1, height, side))
            assert adaptive_pool(channels, height, side)(torch.zeros(1, 1, height, side)).shape == own.shape
    assert adaptive_pool(64, 7, 5).output_size == (7, 5)  # never larger than the map
    assert adaptive_pool(4096, 1, 1).output_size == (1, 1)
    assert adaptive_pool(20_000, 9, 9).output_size == (1, 1)


@pytest.mark.parametrize(
    ("name", "features"),
    [("demo", [6272, 6272, 3136, 2048, 1024, 256, 256]), ("tiny", [1024, 1024, 512, 256, 128, 32, 32])],
)
def test_a_small_trunk(name: str, features: list[int]) -> None:
    recipe = load_recipe("demo") if name == "demo" else tiny_recipe()
    layers = FrozenLayers(build_model(recipe).trunk, recipe, CPU)
    assert not layers.exact
    assert [math.prod(layers.shapes[layer]) for layer in HEADS.values()] == features
    assert max(features) <= 9216
    side = recipe.eval.crop
    pooled = layers(torch.zeros(2, side, side, 3, dtype=torch.uint8))
    assert {layer: tuple(x.shape[1:]) for layer, x in pooled.items()} == layers.shapes


def test_a_resnet18_at_224_pixels() -> None:
    recipe = load_recipe("r50-200ep-linear", ["model.block=basic", "model.layers=[2,2,2,2]"])
    layers = on_meta(recipe)
    assert not layers.exact  # its maps have fewer channels than a bottleneck's
    assert [math.prod(layers.shapes[layer]) for layer in HEADS.values()] == [9216, 9216, 8192, 9216, 8192, 512, 512]
    assert not choose_pools({**zoo_shapes(1), "res5": (2048, 8, 8)})[0]


def test_maps_are_those_of_torchvision_after_relu() -> None:
    torch.manual_seed(0)
    trunk = Trunk(ModelConfig(block="basic", layers=(2, 2, 2, 2))).eval()
    other = resnet18().eval()
    other.load_state_dict(trunk.state_dict(), strict=False)
    seen: dict[str, Tensor] = {}
    stages = dict(zip(["res2", "res3", "res4", "res5"], [other.layer1, other.layer2, other.layer3, other.layer4]))
    for name, module in {"conv1": other.relu, **stages, "res5avg": other.avgpool}.items():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.clone()}))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        other(x)
        maps = layer_maps(trunk, x)
    assert list(maps) == ["conv1", "res2", "res3", "res4", "res5", "res5avg"]
    for name, map_ in maps.items():
        torch.testing.assert_close(map_, seen[name], rtol=0, atol=0)


def test_features_of_a_real_resnet50() -> None:
    """All of it at full size, beside torchvision's network and pooling by its functional form."""
    recipe = load_recipe("r50-200ep-linear")
    torch.manual_seed(0)
    trunk = Trunk(recipe.model)
    other = resnet50().eval()
    other.load_state_dict(trunk.state_dict(), strict=False)
    image = picture(5, 224, 224)
    pooled = FrozenLayers(trunk, recipe, CPU)(torch.from_numpy(np.array(image))[None])
    normal = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        x = other.relu(other.bn1(other.conv1(normal(transforms.ToTensor()(image))[None])))
        expected = [F.avg_pool2d(x, 10, 10, 4)]
        x = other.maxpool(x)
        for stage, window in (("layer1", (16, 8)), ("layer2", (13, 5)), ("layer3", (8, 3)), ("layer4", (6, 1))):
            x = getattr(other, stage)(x)
            expected.append(F.avg_pool2d(x, *window))
        expected.append(x.mean((2, 3), keepdim=True))
    assert [math.prod(value.shape) for value in pooled.values()] == DIMENSIONS["r50-200ep-linear"][:-1]
    for (name, value), other_value in zip(pooled.items(), expected):
        torch.testing.assert_close(value, other_value, rtol=1e-4, atol=1e-6, msg=name)


# --- optimisation --------------------------------------------------------------------------------


def test_learning_rate_of_every_epoch() -> None:
    protocol = ZooProtocol()
    rates = [protocol.learning_rate(epoch, 256) for epoch in range(protocol.epochs)]
    assert rates == [0.01] * 8 + [0.001] * 8 + [0.0001] * 8 + [0.00001] * 4
    assert protocol.learning_rate(0, 32) == 0.01 / 8
    assert (protocol.momentum, protocol.weight_decay, protocol.seed) == (0.9, 5e-4, 1)


@pytest.mark.parametrize(("epochs", "drops"), [(7, [2, 4, 6]), (14, [4, 8, 12]), (100, [29, 58, 86]), (1, [1, 1, 1])])
def test_other_numbers_of_epochs_drop_in_proportion(epochs: int, drops: list[int]) -> None:
    protocol = ZooProtocol(epochs=epochs)
    assert protocol.drops() == drops
    assert protocol.learning_rate(epochs - 1, 256) == pytest.approx(0.01 / 10 ** sum(drop < epochs for drop in drops))


@pytest.mark.parametrize(
    ("schedule", "epochs", "drops"),
    [
        ("imagenet", 28, [8, 16, 24]),
        ("places205", 14, [4, 8, 12]),
        ("inat18", 84, [24, 48, 72]),
    ],
)
def test_the_schedules_of_the_papers_data_sets(schedule: Schedule, epochs: int, drops: list[int]) -> None:
    protocol = zoo_protocol(EvaluationOptions(protocol="zoo", schedule=schedule))
    assert (protocol.epochs, protocol.drops()) == (epochs, drops)
    recipe = load_recipe("r50-200ep-linear")
    assert describe(protocol, recipe, on_meta(recipe), 1_000_000)[1] == []


def small_heads(classes: int = 3, seed: int = 1) -> nn.ModuleDict:
    shapes = {name: (4, 2, 2) for name in list(HEADS)[:5]} | {"res5avg": (6, 1, 1)}
    return build_heads(shapes, classes, seed)


def test_which_tensors_decay() -> None:
    heads = small_heads()
    linear, norm = head_optimizer(heads, ZooProtocol()).param_groups
    names = {id(parameter): name for name, parameter in heads.named_parameters()}
    assert [names[id(p)] for p in linear["params"]] == [f"{h}.linear.{p}" for h in HEADS for p in ("weight", "bias")]
    assert [names[id(p)] for p in norm["params"]] == [
        f"{h}.norm.{p}" for h in HEADS if h != "res5avg" for p in ("weight", "bias")
    ]
    assert (linear["weight_decay"], norm["weight_decay"]) == (5e-4, 0.0)
    assert len(linear["params"]) + len(norm["params"]) == len(names) == 14 + 12
    for group in (linear, norm):
        assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, True, 0)


def test_initial_weights_are_pytorchs_and_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    heads, again, other = small_heads(), small_heads(), small_heads(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    for name, value in heads.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if "linear" in name:
            assert not torch.equal(value, other.state_dict()[name])
            bound = 6**-0.5 if "avg" in name else 16**-0.5
            assert value.abs().max() <= bound
            assert value.abs().max() > (0.8 if "weight" in name else 0.1) * bound


def softmax_regression(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the mean cross entropy, in closed form."""
    error = (torch.softmax(x @ weight.T + bias, 1) - F.one_hot(y, len(bias))) / len(y)
    return error.T @ x, error.sum(0)


def test_two_steps_by_hand() -> None:
    """The head without batch norm against Nesterov's rule written out: weights and biases decay."""
    heads = nn.ModuleDict({"res5avg": small_heads()["res5avg"]}).double()
    optimizer = head_optimizer(heads, ZooProtocol())
    torch.manual_seed(0)
    x, y = torch.randn(5, 6, 1, 1, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    values = [p.detach().clone() for p in heads.parameters()]
    buffers = [torch.zeros_like(value) for value in values]
    for rate in (0.5, 0.05):
        set_learning_rate(optimizer, rate)
        loss = train_step(heads, optimizer, {"res5avg": x}, y)
        chances = torch.log_softmax(x[:, :, 0, 0] @ values[0].T + values[1], 1)
        torch.testing.assert_close(loss, -chances[torch.arange(5), y].mean()[None], rtol=1e-12, atol=0)
        for at, gradient in enumerate(softmax_regression(values[0], values[1], x[:, :, 0, 0], y)):
            slope = gradient + 5e-4 * values[at]
            buffers[at] = 0.9 * buffers[at] + slope
            values[at] = values[at] - rate * (slope + 0.9 * buffers[at])
        for mine, value in zip(heads.parameters(), values):
            torch.testing.assert_close(mine.detach(), value, rtol=1e-12, atol=1e-15)


def test_batch_norm_of_a_head_does_not_decay() -> None:
    """A constant map is normalised to zero: no gradient for the gain and the weights, which then only decay."""
    heads = nn.ModuleDict({"res5": small_heads()["res5"]}).double()
    head = heads["res5"]
    weight, bias = head.linear.weight.detach().clone(), head.linear.bias.detach().clone()
    optimizer = head_optimizer(heads, ZooProtocol())
    set_learning_rate(optimizer, 0.1)
    train_step(
        heads, optimizer, {"res5": torch.full((6, 4, 2, 2), 3.0, dtype=torch.float64)}, torch.tensor([0, 1, 2, 0, 1, 0])
    )
    assert torch.equal(head.norm.weight.float(), torch.ones(4))
    torch.testing.assert_close(head.linear.weight.detach(), weight * (1 - 0.1 * 1.9 * 5e-4), rtol=1e-9, atol=1e-12)
    assert not torch.equal(head.linear.bias, bias)
    torch.testing.assert_close(head.norm.running_mean, torch.full((4,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(head.norm.running_var, torch.full((4,), 0.9, dtype=torch.float64))


def test_statistics_are_over_all_images_and_places_of_the_batch() -> None:
    heads = small_heads()
    x = {
        layer: torch.randn(8, 6 if layer == "res5avg" else 4, *(1, 1) if layer == "res5avg" else (2, 2))
        for layer in ("conv1", "res2", "res3", "res4", "res5", "res5avg")
    }
    train_step(heads, head_optimizer(heads, ZooProtocol()), x, torch.arange(8) % 3)
    for name, head in heads.items():
        if name != "res5avg":
            mine = x[HEADS[name]]
            torch.testing.assert_close(head.norm.running_mean, 0.1 * mine.mean((0, 2, 3)))
            torch.testing.assert_close(head.norm.running_var, 0.9 + 0.1 * mine.transpose(0, 1).flatten(1).var(1))


@pytest.mark.parametrize("images", [2, 7, 8, 9, 16, 17, 18])
def test_every_image_is_in_one_batch_and_none_is_alone(images: int) -> None:
    order = epoch_order(1, 0, images)
    batches = split_batches(order, 8)
    assert np.array_equal(np.concatenate(batches), order)
    assert all(len(batch) >= 2 for batch in batches)
    assert all(len(batch) == 8 for batch in batches[:-1])
    assert len(batches[-1]) <= 9


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_top_k_against_brute_force(classes: int) -> None:
    rng = np.random.default_rng(classes)
    scores, labels = rng.normal(size=(200, classes)).astype(np.float32), rng.integers(0, classes, 200)
    ranks = [(row > row[label]).sum() for row, label in zip(scores, labels)]
    expected = [sum(rank < 1 for rank in ranks), sum(rank < 5 for rank in ranks)]
    assert top_hits(torch.from_numpy(scores), torch.from_numpy(labels)).tolist() == expected


def test_scores_are_shares_of_all_parts_in_evaluation_mode() -> None:
    heads = small_heads(classes=7)
    torch.manual_seed(0)
    parts = []
    for n in (5, 2):
        features = {layer: torch.randn(n, 4, 2, 2) for layer in ("conv1", "res2", "res3", "res4", "res5")}
        parts.append((features | {"res5avg": torch.randn(n, 6, 1, 1)}, torch.randint(0, 7, (n,))))
    before = copy.deepcopy(heads.state_dict())
    scores = score_heads(heads, parts, 7)
    assert heads.training
    assert all(torch.equal(value, before[name]) for name, value in heads.state_dict().items())
    for name, head in heads.eval().items():
        ranks = [
            int((row > row[label]).sum())
            for features, labels in parts
            for row, label in zip(head(features[HEADS[name]]), labels)
        ]
        assert scores.top1[name] == sum(rank < 1 for rank in ranks) / 7
        assert scores.top5[name] == sum(rank < 5 for rank in ranks) / 7


# --- crops ---------------------------------------------------------------------------------------


def test_crops_are_a_function_of_seed_epoch_and_id() -> None:
    images = [picture(seed, 40 + seed, 30) for seed in range(6)]
    ids = np.array([3, 1000, 7, 12, 99, 5])
    together = random_crops(images, ids, seed=1, epoch=2, side=24)
    assert together.shape == (6, 24, 24, 3)
    order = [4, 0, 2]
    assert np.array_equal(random_crops([images[i] for i in order], ids[order], 1, 2, 24), together[order])
    for change in ({"seed": 2}, {"epoch": 3}):
        other = random_crops(images, ids, **{"seed": 1, "epoch": 2, "side": 24, **change})
        assert all((a != b).any() for a, b in zip(other, together))


def test_crops_are_pils_of_the_drawn_boxes() -> None:
    images = [picture(seed, 60, 45) for seed in range(40)]
    ids = np.arange(40)
    boxes, flips = draw_crops(1, 0, ids, np.tile([45, 60], (40, 1)))
    assert 5 < flips.sum() < 35
    for got, image, box, flip in zip(random_crops(images, ids, 1, 0, 32), images, boxes.tolist(), flips):
        expected = vision.resized_crop(image, *box, [32, 32], vision.InterpolationMode.BILINEAR)
        assert np.array_equal(got, np.asarray(vision.hflip(expected) if flip else expected))


def test_crops_follow_the_law() -> None:
    ids = np.arange(20_000)
    boxes, flips = draw_crops(1, 5, ids, np.tile([200, 200], (len(ids), 1)))
    share = boxes[:, 2] * boxes[:, 3] / 40_000
    assert 0.07 < share.min() < 0.09
    assert share.max() > 0.99
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / math.sqrt(len(ids))
    ratio = boxes[:, 3] / boxes[:, 2]
    assert ratio.min() > 0.72
    assert ratio.max() < 1.39
    assert abs(np.log(ratio).mean()) < 5 * 0.17 / math.sqrt(len(ids))
    assert PROBE_STREAM not in range(0, 27)  # streams of the views: geometry, image, at most 25 patches


@pytest.mark.parametrize(("width", "height"), [(49, 98), (98, 131), (500, 375), (107, 320), (256, 256), (333, 257)])
def test_centre_crops_are_torchvisions(width: int, height: int) -> None:
    image = picture(1, width, height)
    recipe = load_recipe("r50-200ep-linear")
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(image)
    assert np.array_equal(centre_crop(image, recipe), np.asarray(expected))


def test_workers_give_the_same_crops(shards: str) -> None:
    crops = LabelledCrops(ShardReader(shards), tiny_recipe(), seed=1)
    chunks = [(0, np.array([3, 1])), (None, np.array([40])), (1, np.array([3]))]
    here, there = ([*crops.load(chunks, workers)] for workers in (0, 1))
    assert len(here) == len(there) == 3
    for (pixels, labels), (others, other_labels), (_, ids) in zip(here, there, chunks):
        assert torch.equal(pixels, others)
        assert labels.tolist() == other_labels.tolist() == [crops.reader.label(int(id)) for id in ids]


# --- training ------------------------------------------------------------------------------------


class Set:
    """A tiny trunk and the crops of tiny shards."""

    def __init__(self, shards: str) -> None:
        self.recipe = tiny_recipe()
        torch.manual_seed(3)
        self.trunk = build_model(self.recipe).trunk
        for module in self.trunk.modules():  # as after training: statistics that are not the initial ones
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        self.layers = FrozenLayers(self.trunk, self.recipe, CPU)
        self.crops = LabelledCrops(ShardReader(shards), self.recipe, seed=1)

    def train(self, heads: nn.ModuleDict, protocol: ZooProtocol) -> list[dict[str, Any]]:
        return train_heads(heads, self.layers, self.crops, self.crops, protocol)


@pytest.fixture
def tiny_set(shards: str) -> Set:
    return Set(shards)


QUICK = ZooProtocol(epochs=3, batch_size=16)


def test_heads_learn_what_they_would_learn_alone(tiny_set: Set) -> None:
    together = build_heads(tiny_set.layers.shapes, 3, seed=1)
    alone = {name: nn.ModuleDict({name: copy.deepcopy(head)}) for name, head in together.items()}
    first = copy.deepcopy(together.state_dict())
    records = tiny_set.train(together, QUICK)
    for name, head in alone.items():
        own = tiny_set.train(head, QUICK)
        assert [record.top1[name] for record in own] == [record.top1[name] for record in records]
        for key, value in head.state_dict().items():
            assert torch.equal(value, together.state_dict()[key]), key
    changed = {key for key, value in together.state_dict().items() if not torch.equal(value, first[key])}
    assert changed == set(first)


def test_the_trunk_stays_bit_for_bit(tiny_set: Set) -> None:
    before = {name: value.clone() for name, value in tiny_set.trunk.state_dict().items()}
    tiny_set.train(build_heads(tiny_set.layers.shapes, 3, seed=1), QUICK)
    after = tiny_set.trunk.state_dict()
    assert any("running_var" in name for name in after)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not any(module.training for module in tiny_set.trunk.modules())
    assert not any(parameter.requires_grad for parameter in tiny_set.trunk.parameters())


def test_epochs_are_exact_and_repeatable(tiny_set: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int | None, list[int]]] = []
    load = LabelledCrops.load

    def spy(self: LabelledCrops, chunks: Any, workers: int) -> Any:
        asked.extend((epoch, ids.tolist()) for epoch, ids in chunks)
        return load(self, chunks, workers)

    monkeypatch.setattr(LabelledCrops, "load", spy)
    runs = []
    for _ in range(2):
        heads = build_heads(tiny_set.layers.shapes, 3, seed=1)
        records = tiny_set.train(heads, QUICK)
        runs.append(([record.model_copy(update={"seconds": 0}) for record in records], heads.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    half = asked[: len(asked) // 2]
    for epoch in range(3):
        ids = [id for at, part in half if at == epoch for id in part]
        assert ids == epoch_order(1, epoch, 42).tolist()
        assert sorted(ids) == list(range(42))
    assert [id for at, part in half if at is None for id in part] == list(range(42))  # once: they are kept
    assert [record.lr for record in runs[0][0]] == [QUICK.learning_rate(epoch, 16) for epoch in range(3)]


def test_features_do_not_depend_on_the_chunk(tiny_set: Set) -> None:
    pixels, _ = tiny_set.crops[0, np.arange(6)]
    whole = tiny_set.layers(pixels)
    x = (pixels.permute(0, 3, 1, 2).float() / 255 - tiny_set.layers.mean) / tiny_set.layers.std
    maps = layer_maps(tiny_set.trunk, x)
    for layer, value in whole.items():
        parts = torch.cat([tiny_set.layers(part)[layer] for part in pixels.split(2)])
        torch.testing.assert_close(value, parts, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value, tiny_set.layers.pools[layer](maps[layer]), rtol=1e-5, atol=1e-6)
        assert not value.requires_grad


# --- the whole, from files -----------------------------------------------------------------------


def save_run(folder: Path, recipe: Recipe, **changes: float) -> str:
    """A run with one checkpoint of the recipe's initial weights."""
    model = build_model(recipe)
    state = model.state_dict()
    for name, value in changes.items():
        state[name.replace("__", ".")].fill_(value)
    run = open_storage(folder)
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(
        {"model": state, "recipe": recipe.to_toml(), "data_digest": "none"}, Cursor(), recipe.digest(), "none"
    )
    assert checkpoints.wait() is None
    return run.uri


def two_colours(root: Path, seed: int) -> str:
    """URI of 24 images of two colours, which any layer can tell apart."""
    rng = np.random.default_rng(seed)
    for name, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
        (root / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(rng.normal(colour, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    return shards_of(root / "images", root / "shards")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """URIs of training and of test images."""
    root = tmp_path_factory.mktemp("colours")
    return two_colours(root / "train", 0), two_colours(root / "test", 1)


def test_a_separable_set_is_learned(colours: tuple[str, str], tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", tiny_recipe())
    said: list[str] = []
    protocol = ZooProtocol(epochs=8, batch_size=8, base_lr=1.0)
    result = evaluate_layers(run, *colours, protocol, Execution(progress=Progress(said.append)))
    assert list(result.top1) == list(HEADS)
    assert {name for name, share in result.top1.items() if share < 1} <= {"res5avg"}  # nothing scales its features
    assert set(result.top5.values()) == {1.0}  # of two classes
    losses = [epoch.loss for epoch in result.epochs]
    assert all(losses[-1][name] < (1 if name == "res5avg" else 0.5) * losses[0][name] for name in HEADS)
    assert sum("epoch 8/8" in line for line in said) == 1
    assert sum("8 epochs for 28" in line for line in said) == 1

    path = tmp_path / "run" / "eval_zoo.json"
    assert json.loads(path.read_text()) == result.to_json()
    assert result.checkpoint == "step-00000000"
    assert [result.train_data, result.test_data] == [ShardReader(uri).manifest.digest for uri in colours]
    assert (result.train_images, result.classes) == (24, ["blue", "red"])
    assert result.protocol.batch_size == 8
    assert result.protocol.heads["res5avg"].to_json() == {
        "layer": "res5avg",
        "pooling": "Identity()",
        "features": 32,
        "batch_norm": False,
    }
    assert [line.split(";")[0].split(":")[0] for line in result.differences] == [
        "8 epochs for 28",
        "a learning rate of 1 for 0.01",
        "batches of 8 for 256",
        "crops of 16 pixels for 224, cut for the test from images resized to 16 for 256, by the recipe's [eval]",
        "adaptive pooling to at most 9,216 features",
    ]

    before = path.stat().st_mtime_ns
    assert evaluate_layers(f"{run}/checkpoints/step-00000000", *colours, protocol) == result
    assert path.stat().st_mtime_ns == before  # the same for the same is kept
    other = evaluate_layers(run, *colours, ZooProtocol(epochs=1))
    assert len(other.epochs) == 1
    assert path.stat().st_mtime_ns != before


def test_what_cannot_be_evaluated(colours: tuple[str, str], shards: str, other_shards: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", tiny_recipe())
    one, two = (
        shards_of(folder_of_classes(tmp_path / f"of-{count}", classes=1, images=count), tmp_path / f"shards-{count}")
        for count in (1, 2)
    )
    cases: list[tuple[type[Exception], str, tuple[str, str, str]]] = [
        (UsageError, "has no labels", (run, other_shards, shards)),
        (UsageError, "has no labels", (run, shards, other_shards)),
        (DataError, "2 classes that training does not have: blue, red", (run, shards, colours[0])),
        (DataError, "batch norm needs two", (run, one, two)),
        (UsageError, "training and test images are the same", (run, shards, shards)),
        (CheckpointError, "no checkpoint", (str(tmp_path / "nothing"), shards, colours[0])),
    ]
    for kind, what, arguments in cases:
        with pytest.raises(kind, match=what):
            evaluate_layers(*arguments)
    with pytest.raises(UsageError, match="0 epochs"):
        ZooProtocol(epochs=0)
    broken = save_run(tmp_path / "broken", tiny_recipe(), trunk__layer3__0__bn2__running_var=-1.0)
    with pytest.raises(TrainingError, match=r"loss of res4, res5, res5avg_bn, res5avg is not finite in epoch 1"):
        evaluate_layers(broken, *colours, ZooProtocol(epochs=1))
    assert not (tmp_path / "broken" / "eval_zoo.json").exists()
    assert not (tmp_path / "run" / "eval_zoo.json").exists()


def test_the_command(
    colours: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", tiny_recipe())

    def pirl_eval(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["pirl", "eval", run, "--data", colours[0], "--test", colours[1], *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capfd.readouterr()

    code, out, _ = pirl_eval("--protocol", "zoo", "--epochs", "2")
    assert code == 0
    for name, features in zip(HEADS, (1024, 1024, 512, 256, 128, 32, 32)):
        assert re.search(rf"│ {name} +│ \w+\(.*\) +│ +{features} │ +[\d.]+ │ +100.00 │ +[\d.]+ \(epoch [12]\) │", out)
    assert "not as in the zoo: 2 epochs for 28; the learning rate drops in proportion, to a tenth before" in out
    assert "by the recipe's [eval]" in out
    code, out, _ = pirl_eval("--protocol", "zoo", "--epochs", "2", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "eval_zoo.json").read_text())
    for arguments, what in (
        (("--protocol", "zo"), "Did you mean 'zoo'?"),
        (("--epochs", "2"), "choose that protocol"),
        (("--protocol", "zoo", "--epochs", "0"), "--epochs"),
    ):
        code, _, err = pirl_eval(*arguments)
        assert code == 2
        assert what in err
