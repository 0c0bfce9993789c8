"""Views of an image file as the reference makes them, written from its description: the slow side of a comparison.

Every step is done on PIL images, one after another: two random crops, nine patches, then for each of the ten elements
colour jitter, posterize + sharpness + solarize + autocontrast, gray, flip, a float tensor, and normalisation.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision import transforms

from pirl.views import Photometrics

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRID, CELL, PATCH = 3, 85, 64


def random_photometric(image: Image.Image) -> Image.Image:
    image = ImageOps.posterize(image, int(np.random.randint(4, 9)))
    image = ImageEnhance.Sharpness(image).enhance(np.random.uniform(0.1, 1.9))
    image = ImageOps.solarize(image, int(np.random.randint(0, 257)))
    return ImageOps.autocontrast(image)


class ReferenceViews:
    """Transform of an encoded image into (3, 224, 224) and (9, 3, 64, 64) normalised float32 tensors."""

    def __init__(self) -> None:
        self.image_crop = transforms.RandomResizedCrop(224)
        self.patch_crop = transforms.RandomResizedCrop(255, scale=(0.6, 1.0))
        self.element = transforms.Compose(
            [
                transforms.ColorJitter(0.4, 0.4, 0.4, 0.2),
                transforms.RandomApply([random_photometric], p=0.66),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, data: bytes) -> tuple[Tensor, Tensor]:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
        elements = [self.image_crop(image), *self.patches(self.patch_crop(image))]
        first, *rest = [self.element(element) for element in elements]
        return first, torch.stack(rest)

    def patches(self, crop: Image.Image) -> list[Image.Image]:
        pixels = np.transpose(np.array(crop), (2, 0, 1))
        jitter = np.random.randint(0, CELL - PATCH, (2, GRID, GRID))
        patches = []
        for column in range(GRID):
            for row in range(GRID):
                top, left = CELL * row + jitter[1, column, row], CELL * column + jitter[0, column, row]
                patch = np.copy(pixels[:, top : top + PATCH, left : left + PATCH])
                patches.append(Image.fromarray(np.transpose(patch, (1, 2, 0))))
        return [patches[place] for place in np.random.permutation(GRID * GRID)]


def collate(views: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return (B, 3, 224, 224) images and (9 B, 3, 64, 64) patches."""
    images, patches = zip(*views)
    return torch.stack(images), torch.cat(patches)


def seed_worker(worker: int) -> None:
    torch.set_num_threads(1)
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)


def transformed(image: Image.Image, params: Photometrics, row: int) -> Image.Image:
    """Return the base chain with given parameters, to compare with."""
    for op in params.order[row] if params.jitter[row] else ():
        name = ("brightness", "contrast", "saturation", "hue")[op]
        image = getattr(F, f"adjust_{name}")(image, getattr(params, name)[row].item())
    if params.group[row]:
        image = ImageOps.posterize(image, int(params.bits[row]))
        image = ImageEnhance.Sharpness(image).enhance(params.sharpness[row].item())
        image = ImageOps.autocontrast(ImageOps.solarize(image, int(params.threshold[row])))
    image = F.to_grayscale(image, 3) if params.gray[row] else image
    return F.hflip(image) if params.flip[row] else image


def normalised(image: Image.Image) -> Tensor:
    return F.normalize(F.to_tensor(image), list(MEAN), list(STD))
