"""The network: one ResNet trunk, a head for either view (paper, section 3.1 and figure 3)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from .config import ModelConfig, Recipe, ViewsConfig
from .heads import mlp
from .views import open_pretext

PLANES = (64, 128, 256, 512)


class Trunk(nn.Module):
    """ResNet without its classifier; parameter names are torchvision's, so are the shapes at width 1.

    Every weight has PyTorch's default initialisation, U(+-1/sqrt(fan_in)) for a convolution, as the reference does:
    it rebuilds the layers after torchvision's own initialisation ran, and loses that.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        block = BasicBlock if config.block == "basic" else Bottleneck
        planes = [round(config.width * plane) for plane in PLANES]
        self.channels = planes[0]
        if config.stem == "imagenet":
            self.conv1 = nn.Conv2d(3, planes[0], 7, stride=config.stem_stride, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, planes[0], 3, stride=config.stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if config.stem == "imagenet" else nn.Identity()
        self.layer1 = self._stage(block, planes[0], config.layers[0], stride=1)
        self.layer2 = self._stage(block, planes[1], config.layers[1], stride=2)
        self.layer3 = self._stage(block, planes[2], config.layers[2], stride=2)
        self.layer4 = self._stage(block, planes[3], config.layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.features = self.channels

    def _stage(self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int) -> nn.Sequential:
        out = planes * block.expansion
        downsample = None
        if stride != 1 or self.channels != out:
            downsample = nn.Sequential(nn.Conv2d(self.channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
        layers = [block(self.channels, planes, stride, downsample)]
        layers += [block(out, planes) for _ in range(1, blocks)]
        self.channels = out
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, features) float for (B, 3, H, W) images, averaged over the last map."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)


def memory_format(trunk: Trunk) -> torch.memory_format:
    """Return the layout in which the trunk is fastest: channels last.

    Not below 16 channels: there oneDNN's backward pass of a channels-last convolution corrupts memory when it runs on
    two threads (torch 2.14.1, seen with 4 channels on 16-pixel images).
    """
    return torch.channels_last if trunk.conv1.out_channels >= 16 else torch.contiguous_format


class PIRL(nn.Module):
    """Trunk and heads. Embeddings come out as the heads give them: the loss normalises."""

    def __init__(self, config: ModelConfig, views: ViewsConfig = ViewsConfig()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.trunk = Trunk(config)
        features = self.trunk.features
        self.patch_head = open_pretext(views).head(features, config)  # its name in every checkpoint
        if config.head == "linear":
            self.image_head = mlp([features, config.embedding_dim], relu="none")
        else:
            self.image_head = mlp([features, features, config.embedding_dim], relu=config.image_head_relu)

    def forward(self, images: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
        """Return two (B, dim) embeddings, of the second views and of the images.

        Takes (B, 3, S, S) images and (B * elements, 3, P, P) elements of their second views, sample-major. Two separate
        passes, the elements first: batch norm sees the two kinds apart, and its running statistics mix them.
        """
        second_embedding = self.patch_head(self.trunk(elements))
        image_embedding = self.image_head(self.trunk(images))
        return second_embedding, image_embedding


def build_model(recipe: Recipe) -> PIRL:
    """Return the recipe's network with the initial weights of its seed: the same on every rank and every machine.

    >>> trunk = build_model(load_recipe("r50-200ep-linear")).trunk  # doctest: +SKIP
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        return PIRL(recipe.model, recipe.views)


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a trunk's state: names, types, shapes and values, sorted by name.

    It identifies the weights wherever they lie: in a checkpoint of any number of parts, moved, copied, or registered.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
