"""The network against the reference's recorded layout, and the facts about it that are easy to get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from pirl.config import ModelConfig
from pirl.heads import mlp
from pirl.model import PIRL, Trunk, build_model
from pirl.views.jigsaw import PatchHead

LAYOUT = json.loads((Path(__file__).parent / "data" / "reference_layout.json").read_text())
VARIANTS = {
    "r50_linear": ModelConfig(),
    "r50_mlp": ModelConfig(head="mlp"),
    "r50w2_linear": ModelConfig(width=2),
    "r50w2_mlp": ModelConfig(width=2, head="mlp", image_head_relu="none"),
}


def on_meta(config: ModelConfig) -> PIRL:
    """Shapes without memory."""
    with torch.device("meta"):
        return PIRL(config)


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_the_references(variant: str) -> None:
    recorded = LAYOUT["variants"][variant]
    model = on_meta(VARIANTS[variant])
    trunk = {
        name.removeprefix("_feature_blocks."): shape for name, shape in LAYOUT["trunks"][recorded["trunk"]].items()
    }
    assert shapes(model.trunk) == trunk
    assert len(trunk) == 318

    def renamed(name: str) -> str:
        """The reference's {head}.{part}.clf.{layer}: head 0 is that of the patches, its part 2 follows the concat."""
        head, part, _, layer, kind = name.split(".")
        if head == "1":
            return f"image_head.{layer}.{kind}"
        return f"patch_head.project.{layer}.{kind}" if part == "0" else f"patch_head.combine.{kind}"

    heads = {renamed(name): shape for name, shape in recorded["heads"].items()}
    assert {name: shape for name, shape in shapes(model).items() if not name.startswith("trunk.")} == heads


def test_trunk_is_torchvisions_resnet_without_classifier() -> None:
    with torch.device("meta"):
        known = shapes(resnet50())
        known18 = shapes(resnet18())
        basic = Trunk(ModelConfig(block="basic", layers=(2, 2, 2, 2)))
    assert shapes(on_meta(ModelConfig()).trunk) == {k: v for k, v in known.items() if not k.startswith("fc.")}
    assert shapes(basic) == {k: v for k, v in known18.items() if not k.startswith("fc.")}


def test_trunk_computes_what_torchvision_computes() -> None:
    config = ModelConfig(block="basic", layers=(2, 2, 2, 2))
    torch.manual_seed(0)
    trunk, other = Trunk(config).eval(), resnet18().eval()
    other.fc = nn.Identity()
    assert other.load_state_dict(trunk.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(trunk(x), other(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("width", "features", "parameters"), [(1, 2048, 23_508_032), (2, 4096, 93_907_072), (4, 8192, 375_378_176)]
)
def test_widths(width: int, features: int, parameters: int) -> None:
    trunk = on_meta(ModelConfig(width=width)).trunk
    assert trunk.features == features
    assert count(trunk) == parameters
    assert trunk.conv1.out_channels == 64 * width
    stages = [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    inner = [stage[0].conv2.out_channels for stage in stages]  # torchvision's wide_resnet50_2 would widen only these
    outer = [stage[0].conv3.out_channels for stage in stages]
    assert inner == [64 * width, 128 * width, 256 * width, 512 * width]
    assert outer == [256 * width, 512 * width, 1024 * width, 2048 * width]


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("r50_linear", 672_128), ("r50_mlp", 9_064_832), ("r50w2_linear", 1_196_416), ("r50w2_mlp", 34_759_040)],
)
def test_head_parameters(variant: str, parameters: int) -> None:
    model = on_meta(VARIANTS[variant])
    assert count(model) - count(model.trunk) == parameters


def test_every_weight_has_pytorchs_default_initialisation() -> None:
    model = PIRL(ModelConfig(block="basic", layers=(2, 2, 2, 2), head="mlp"))
    checked = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            bound = weight[0].numel() ** -0.5  # uniform in +-1/sqrt(fan_in)
            assert weight.abs().max() <= bound, name
            assert weight.abs().max() > 0.99 * bound, name
            error = bound / 3**0.5 * weight.numel() ** -0.5  # of a standard deviation's estimate, generously
            assert weight.std().item() == pytest.approx(bound / 3**0.5, abs=5 * error), name
            checked += 1
        if isinstance(module, nn.Linear):
            assert module.bias.abs().max() <= bound, name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name  # no zero-init of a block's last batch norm
            assert (module.bias == 0).all(), name
            assert (module.eps, module.momentum) == (1e-5, 0.1), name
    assert checked == 20 + 5


def test_running_statistics_mix_patches_and_images() -> None:
    recipe = tiny_recipe()
    model = build_model(recipe).train()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 16, 16, generator=generator) * 2 + 1
    patches = torch.randn(12, 3, 5, 5, generator=generator) - 1
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of elements in the pass
    model.trunk.conv1.register_forward_hook(
        lambda _, inputs, out: seen.update({len(out): (out.mean((0, 2, 3)), out.var((0, 2, 3), unbiased=True))})
    )
    with torch.no_grad():
        model.trunk.bn1.running_mean.fill_(0.7)
        model.trunk.bn1.running_var.fill_(3.0)
        model(images, patches)
    (patch_mean, patch_var), (image_mean, image_var) = seen[12], seen[3]
    # patches first, images second, momentum 0.1 each: r <- 0.9 (0.9 r + 0.1 patch) + 0.1 image
    bn = model.trunk.bn1
    torch.testing.assert_close(bn.running_mean, 0.81 * 0.7 + 0.09 * patch_mean + 0.10 * image_mean)
    torch.testing.assert_close(bn.running_var, 0.81 * 3.0 + 0.09 * patch_var + 0.10 * image_var)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked == 2


def test_patches_and_images_do_not_share_batch_statistics() -> None:
    model = build_model(tiny_recipe()).train()
    images, patches = torch.randn(3, 3, 16, 16), torch.randn(12, 3, 5, 5)
    with torch.no_grad():
        first, _ = model(images, patches)
        second, _ = model(images * 5 + 3, patches)
    assert torch.equal(first, second)


def layers_of(module: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in module]


def test_relus_of_the_heads() -> None:
    linear = PIRL(ModelConfig(block="basic", layers=(1, 1, 1, 1), width=0.0625))
    assert layers_of(linear.image_head) == layers_of(linear.patch_head.project) == ["Linear"]
    expected = {
        "every": ["Linear", "ReLU", "Linear", "ReLU"],  # the zoo's R50: its image embeddings are never negative
        "hidden": ["Linear", "ReLU", "Linear"],  # the reference today
        "none": ["Linear", "Linear"],  # the zoo's R50w2: its switch was never read
    }
    for relu, layers in expected.items():
        model = PIRL(
            ModelConfig(block="basic", layers=(1, 1, 1, 1), width=0.0625, head="mlp", image_head_relu=relu)  # type: ignore[arg-type]
        )
        assert layers_of(model.image_head) == layers
        # the patches' head has its ReLUs in every variant, before the concatenation, and none after it
        assert layers_of(model.patch_head.project) == ["Linear", "ReLU", "Linear", "ReLU"]
        assert isinstance(model.patch_head.combine, nn.Linear)
        patch, image = model.train()(torch.randn(8, 3, 16, 16), torch.randn(72, 3, 8, 8))
        assert patch.shape == image.shape == (8, 128)
        assert patch.min() < 0
        assert bool(image.min() >= 0) == (relu == "every")


def test_patch_head_concatenates_a_samples_patches_in_the_order_given() -> None:
    head = PatchHead(3, ModelConfig(embedding_dim=2), patches=4)
    with torch.no_grad():
        head.project[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        head.project[0].bias.zero_()
        head.combine.weight.copy_(torch.tensor([[1.0, 0, 10, 0, 100, 0, 1000, 0], [0, 1.0, 0, 10, 0, 100, 0, 1000]]))
        head.combine.bias.zero_()
        rows = torch.tensor([[1.0, 5, 9], [2, 6, 9], [3, 7, 9], [4, 8, 9], [5, 1, 9], [6, 1, 9], [7, 1, 9], [8, 1, 9]])
        # rows 0..3 are the first sample's patches, 4..7 the second's
        assert head(rows).tolist() == [[4321.0, 8765.0], [8765.0, 1111.0]]


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build_model(tiny_recipe())
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers are untouched
    torch.manual_seed(6)
    again, other = build_model(tiny_recipe()), build_model(tiny_recipe("train.seed=1"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.trunk.conv1.weight, other.trunk.conv1.weight)


def test_mlp_without_layers_in_between() -> None:
    assert layers_of(mlp([4, 2], relu="every")) == ["Linear", "ReLU"]


def test_embeddings_are_not_normalised_by_the_model() -> None:
    model = build_model(tiny_recipe()).train()
    patch, image = model(torch.randn(6, 3, 16, 16), torch.randn(24, 3, 5, 5))
    assert image.norm(dim=1).std() > 1e-3
    assert patch.norm(dim=1).std() > 1e-3
