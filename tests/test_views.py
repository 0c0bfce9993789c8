"""Views against their law (torchvision's distributions) and their pixels (PIL's and torchvision's own operations)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import RandomResizedCrop

from pirl.config import ViewsConfig
from pirl.views import (
    Geometry,
    Photometrics,
    apply_photometrics,
    crop,
    crop_batch,
    denormalise,
    draw_geometry,
    draw_photometrics,
    operations,
    philox4x32,
    uniforms,
)
from pirl.views.photometric import JITTER_OPS

MANY = np.arange(20_000)
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
BLUR = ViewsConfig(photometric="blur", brightness=0.8, contrast=0.8, saturation=0.8, jitter_probability=0.8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def sample_image(height: int, width: int, kind: str, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 of noise, of smooth colours with a little noise, of gray noise, or of one colour."""
    rng = np.random.default_rng([seed, height, width])
    if kind == "flat":
        return np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (height, width, 3)).copy()
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "gray":
        return np.repeat(rng.integers(20, 230, (height, width, 1), dtype=np.uint8), 3, axis=2)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / (9 + 5 * c) + y / (17 - 4 * c) + rng.uniform(0, 6)) for c in range(3)]
    return (np.stack(waves, axis=-1) + rng.normal(0, 4, (height, width, 3))).clip(0, 255).astype(np.uint8)


def ks_two(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov statistic over its critical value at a level of 1e-5 (> 1: laws differ)."""
    values = np.union1d(a, b)
    steps = [np.searchsorted(np.sort(s), values, side="right") / len(s) for s in (a, b)]
    return np.abs(steps[0] - steps[1]).max() / (2.47 * math.sqrt(1 / len(a) + 1 / len(b)))


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert values.min() >= low - 1e-6
    assert values.max() <= high + 1e-6
    rank = (np.arange(len(values)) + 0.5) / len(values)
    assert np.abs((np.sort(values) - low) / (high - low) - rank).max() < 2.47 / math.sqrt(len(values))


def assert_equally_likely(values: np.ndarray, classes: int) -> None:
    """Chi-square within six standard deviations of its mean; values are 0..classes - 1."""
    counts = np.bincount(values.ravel(), minlength=classes)
    assert len(counts) == classes
    assert counts.min() > 0
    expected = values.size / classes
    assert ((counts - expected) ** 2 / expected).sum() < classes - 1 + 6 * math.sqrt(2 * (classes - 1))


def assert_share(mask: np.ndarray, probability: float) -> None:
    assert abs(mask.mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / mask.size) + 1e-12


# ---------------------------------------------------------------------------------------------- random numbers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    words = [np.array([int(word, 16) for word in text.split()], np.uint32) for text in (counter, key, expected)]
    assert (philox4x32(words[0], words[1]) == words[2]).all()
    batch = philox4x32(np.stack([words[0] * 0, words[0]]), words[1])
    assert (batch[1] == words[2]).all()


def test_uniforms_take_53_bits_of_two_philox_words() -> None:
    got = uniforms(0, 0, np.array([0]), 0, 2)[0]
    assert got[0] == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    assert got[1] == ((0xBC57AC4C >> 5) * 2**26 + (0x9B00DBD8 >> 6)) / 2**53
    # seed 0x299f31d0a4093822 is the key and (id, epoch, view, block) the counter of the third known answer
    got = uniforms(0x299F31D0A4093822, 0x037013198A2E, np.array([0x85A308D3243F6A88], np.uint64), 0x73, 0x45 * 2)[0]
    assert got[0x44 * 2] == ((0xD16CFE09 >> 5) * 2**26 + (0x94FDCCEB >> 6)) / 2**53


def test_uniforms_law_and_independence_of_the_batch() -> None:
    draws = uniforms(3, 5, MANY, 7, 5)
    assert draws.dtype == np.float64
    for column in draws.T:
        assert_uniform(column, 0, 1)
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 5 / math.sqrt(len(MANY))
    some = np.array([77, 3, 19_999])
    assert (uniforms(3, 5, some, 7, 2) == draws[some, :2]).all()
    assert (uniforms(3, 5, some, np.array([7, 8, 9]), 2)[0] == draws[77, :2]).all()


def test_uniforms_of_64_bit_arguments_do_not_collide() -> None:
    wide = [0, 1, 1 << 31, 1 << 32, (1 << 32) + 1, 1 << 40]
    seen = {
        uniforms(seed, epoch, np.array([id], np.uint64), view, 1)[0, 0]
        for seed, epoch, id, view in itertools.product([*wide, 1 << 63, -1], wide, [*wide, 1 << 63], [0, 1, 255])
    }
    assert len(seen) == 8 * 6 * 7 * 3
    for bad in ({"epoch": 1 << 48}, {"epoch": -1}, {"view": 256}, {"n": 513}):
        with pytest.raises(ValueError, match="no such random numbers"):
            uniforms(**{"seed": 0, "epoch": 0, "ids": np.array([0]), "view": 0, "n": 1, **bad})


# ---------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (28, 28), (40, 300), (300, 40), (7, 5), (2, 3)])
def test_boxes_follow_random_resized_crop(size: tuple[int, int]) -> None:
    cfg = ViewsConfig()
    geometry = draw_geometry(cfg, 0, 0, MANY, np.tile(size, (len(MANY), 1)))
    torch.manual_seed(0)
    canvas = torch.empty(3, *size)
    for box, scale, ratio in (
        (geometry.image_box, cfg.image_scale, cfg.image_ratio),
        (geometry.places.box, cfg.patch_scale, cfg.patch_ratio),
    ):
        law = np.array([RandomResizedCrop.get_params(canvas, list(scale), list(ratio)) for _ in range(2500)])
        for column, name in enumerate(("top", "left", "height", "width")):
            assert ks_two(box[:, column], law[:, column]) < 1, name
        assert ks_two(box[:, 2] * box[:, 3], law[:, 2] * law[:, 3]) < 1
        assert ks_two(box[:, 2] / box[:, 3], law[:, 2] / law[:, 3]) < 1
        assert (box >= 0).all()
        assert (box[:, :2] + box[:, 2:] <= size).all()
        assert (box[:, 2:] >= 1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1), (4, 100), (100, 4), (3, 1000)])
def test_boxes_fall_back_to_the_centre(size: tuple[int, int]) -> None:
    cfg = ViewsConfig()  # at these shapes no try of 60 % of the area with a ratio up to 4/3 fits
    torch.manual_seed(0)
    law = {
        RandomResizedCrop.get_params(torch.empty(3, *size), list(cfg.patch_scale), list(cfg.patch_ratio))
        for _ in range(50)
    }
    box = draw_geometry(cfg, 0, 0, np.arange(200), np.tile(size, (200, 1))).places.box
    assert {tuple(row) for row in box.tolist()} == law
    assert len(law) == 1


def test_the_two_crops_are_independent() -> None:
    geometry = draw_geometry(ViewsConfig(patch_scale=(0.08, 1.0)), 0, 0, MANY, np.tile((375, 500), (len(MANY), 1)))
    image, patch = geometry.image_box, geometry.places.box
    assert ks_two(image[:, 2], patch[:, 2]) < 1
    assert np.abs(np.corrcoef(image.T, patch.T)[:4, 4:]).max() < 5 / math.sqrt(len(MANY))


def test_sizes_of_a_batch_may_differ() -> None:
    cfg, sizes = ViewsConfig(), np.array([[375, 500], [1, 1], [20, 900], [31, 17]])
    together = draw_geometry(cfg, 1, 2, np.arange(4), sizes)
    for row in range(4):
        alone = draw_geometry(cfg, 1, 2, np.array([row]), sizes[row : row + 1])
        assert (alone.image_box[0] == together.image_box[row]).all()
        assert all((one[0] == all_[row]).all() for one, all_ in zip(alone.places, together.places))


def test_jitter_and_permutation_are_uniform() -> None:
    sizes = np.tile((32, 32), (len(MANY), 1))
    geometry = draw_geometry(ViewsConfig(), 0, 0, MANY, sizes)
    jitter = geometry.places.jitter
    assert jitter.shape == (len(MANY), 2, 3, 3)
    assert_equally_likely(jitter, 21)  # 0..20: offset 85 - 64 = 21 never occurs
    assert np.abs(np.corrcoef(jitter.reshape(len(MANY), -1).T) - np.eye(18)).max() < 5 / math.sqrt(len(MANY))
    assert (np.sort(geometry.places.permutation, axis=1) == np.arange(9)).all()
    for place in range(9):
        assert_equally_likely(geometry.places.permutation[:, place], 9)

    small = draw_geometry(ViewsConfig(grid=2, patch_crop_size=20, patch_size=10), 0, 0, MANY, sizes)
    assert (small.places.jitter == 0).all()  # a patch that fills its cell cannot move
    number = small.places.permutation @ [64, 16, 4, 1]
    assert_equally_likely(np.unique(number, return_inverse=True)[1], 24)


@pytest.mark.parametrize("size", [(375, 500), (300, 128), (20, 30), (1, 1), (3, 90)])
def test_crops_are_bit_exact_with_torchvision_on_pil(size: tuple[int, int]) -> None:
    cfg = ViewsConfig(image_size=96, patch_crop_size=128, patch_size=32)
    picture = Image.fromarray(sample_image(*size, "smooth"))
    geometry = draw_geometry(cfg, 0, 0, np.arange(4), np.tile(size, (4, 1)))
    for row in range(4):
        image, patches = crop(np.asarray(picture), geometry, row, cfg)
        box, patch_box = geometry.image_box[row].tolist(), geometry.places.box[row].tolist()
        expected = F.resized_crop(picture, *box, [96, 96], F.InterpolationMode.BILINEAR)
        assert (image == np.asarray(expected)).all()
        source = np.asarray(F.resized_crop(picture, *patch_box, [128, 128], F.InterpolationMode.BILINEAR))
        jitter, grid = geometry.places.jitter[row], []
        for i in range(3):  # columns
            for j in range(3):  # rows
                y, x = 42 * j + jitter[1, i, j], 42 * i + jitter[0, i, j]
                grid.append(source[y : y + 32, x : x + 32])
        assert (patches == np.stack([grid[number] for number in geometry.places.permutation[row]])).all()


@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_crops_that_are_not_exact_are_near(kind: str) -> None:
    cfg, near_cfg = ViewsConfig(), ViewsConfig(resampling="near")
    pictures = [sample_image(375, 500, kind, seed) for seed in range(4)]
    geometry = draw_geometry(cfg, 0, 0, np.arange(4), np.tile((375, 500), (4, 1)))
    for row, pixels in enumerate(pictures):
        for exact, near in zip(crop(pixels, geometry, row, cfg), crop(pixels, geometry, row, near_cfg)):
            off = np.abs(exact.astype(int) - near)
            assert off.max() <= 1
            assert off.mean() < 0.02


def test_crop_batch_depends_on_seed_epoch_and_id_only() -> None:
    cfg = ViewsConfig(image_size=24, patch_crop_size=36, patch_size=8)
    pictures = [sample_image(40 + 3 * i, 50 - i, "noise", i) for i in range(6)]
    ids = np.array([5, 900, 2, 1 << 40, 7, 8])
    images, patches = crop_batch(pictures, ids, 11, 3, cfg)
    assert images.shape == (6, 24, 24, 3)
    assert patches.shape == (54, 8, 8, 3)
    assert images.dtype == patches.dtype == np.uint8
    order = [4, 0, 3]
    some_images, some_patches = crop_batch([pictures[k] for k in order], ids[order], 11, 3, cfg)
    assert (some_images == images[order]).all()
    assert (some_patches.reshape(3, 9, 8, 8, 3) == patches.reshape(6, 9, 8, 8, 3)[order]).all()
    for seed, epoch in ((12, 3), (11, 4)):
        assert (crop_batch(pictures, ids, seed, epoch, cfg)[0] != images).any(axis=(1, 2, 3)).all()


def test_a_single_pixel_is_an_image() -> None:
    cfg = ViewsConfig(image_size=32, patch_crop_size=48, patch_size=12, **RAW)
    images, patches = crop_batch([np.array([[[9, 80, 200]]], np.uint8)], np.array([0]), 0, 0, cfg)
    assert (images == (9, 80, 200)).all()
    assert (patches == (9, 80, 200)).all()
    views = apply_photometrics(torch.from_numpy(patches), draw_photometrics(cfg, 0, 0, [0], range(1, 10)), cfg)
    assert views.shape == (9, 3, 12, 12)
    assert torch.isfinite(views).all()


# ---------------------------------------------------------------------------------------------- operations and PIL


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(factor)


def blur(image: Image.Image, sigma: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma))


FACTORS = np.array([0, 0.1, 0.2, 0.437, 0.6, 0.8123, 0.999, 1, 1.001, 1.171, 1.4, 1.7, 1.8, 1.9, 2.0], np.float32)
CASES: dict[str, tuple[Callable[..., object], Callable[..., Image.Image], np.ndarray]] = {
    "brightness": (operations.brightness_, F.adjust_brightness, FACTORS),
    "contrast": (operations.contrast_, F.adjust_contrast, FACTORS),
    "saturation": (operations.saturation_, F.adjust_saturation, FACTORS),
    "hue": (operations.hue_, F.adjust_hue, np.linspace(-0.5, 0.5, 15, dtype=np.float32)),
    "posterize": (operations.posterize_, ImageOps.posterize, np.arange(1, 9)),
    "sharpness": (operations.sharpness_, sharpness, FACTORS),
    "solarize": (operations.solarize_, ImageOps.solarize, np.array([0, 1, 60, 127, 128, 200, 255, 256])),
    "blur": (operations.blur_, blur, np.array([0.1, 0.3, 0.7, 1, 1.3, 1.41, 1.42, 1.77, 2, 3.3, 6, 20], np.float32)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["noise", "smooth", "gray", "flat"])
@pytest.mark.parametrize("size", [(64, 64), (33, 47), (3, 3), (2, 9), (1, 1)])
def test_operations_give_pils_pixels(name: str, kind: str, size: tuple[int, int]) -> None:
    ours, pils, values = CASES[name]
    images = [sample_image(*size, kind, seed) for seed in range(len(values))]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous()
    ours(x, values)
    expected = np.stack([np.asarray(pils(Image.fromarray(i), v.item())) for i, v in zip(images, values)])
    assert (x.permute(0, 2, 3, 1).numpy() == expected).all()


@pytest.mark.parametrize("kind", ["noise", "smooth", "gray", "flat"])
@pytest.mark.parametrize("size", [(64, 64), (33, 47), (1, 1), (2, 1)])
def test_operations_without_parameter_give_pils_pixels(kind: str, size: tuple[int, int]) -> None:
    images = [sample_image(*size, kind, seed) for seed in range(40)]
    for k in range(1, 40):  # many ranges of values: autocontrast rounds differently for each
        images[k] = images[k] // (1 + k % 7) + k
    for ours, pils in (
        (operations.autocontrast_, ImageOps.autocontrast),
        (operations.gray_, lambda image: F.to_grayscale(image, 3)),
        (operations.flip_, F.hflip),
    ):
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous()
        ours(x)
        expected = np.stack([np.asarray(pils(Image.fromarray(image))) for image in images])
        assert (x.permute(0, 2, 3, 1).numpy() == expected).all()


def test_autocontrast_of_every_range_of_values() -> None:
    low, high = np.triu_indices(256)
    ramp = np.linspace(low, high, 64).round().astype(np.uint8)  # (64, ranges): all values or 64 of them
    x = torch.from_numpy(ramp.T.copy()).view(-1, 1, 8, 8).float()
    operations.autocontrast_(x)
    for k in range(0, len(low), 97):
        expected = ImageOps.autocontrast(Image.fromarray(ramp[:, k].reshape(8, 8)))
        assert (x[k, 0].numpy() == np.asarray(expected)).all(), (low[k], high[k])


@pytest.mark.parametrize("turn", [0.0, 0.2, -0.2, 0.0713, -0.5])
def test_hue_of_every_seventh_colour(turn: float) -> None:
    number = np.arange(0, 1 << 24, 7)[: 1548**2].reshape(1548, 1548)
    colours = np.stack([number >> 16, number >> 8 & 255, number & 255], axis=-1).astype(np.uint8)
    factor = np.float32(turn)
    x = torch.from_numpy(colours).permute(2, 0, 1)[None].float().contiguous()
    operations.hue_(x, np.array([factor]))
    assert (x[0].permute(1, 2, 0).numpy() == np.asarray(F.adjust_hue(Image.fromarray(colours), factor.item()))).all()


# ---------------------------------------------------------------------------------------------- chains


def pil_chain(image: Image.Image, p: Photometrics, k: int, cfg: ViewsConfig) -> Image.Image:
    """Element k through the chain of the specification, one PIL call after the other."""

    def jitter(image: Image.Image) -> Image.Image:
        for op in p.order[k]:
            adjust = getattr(F, f"adjust_{JITTER_OPS[op]}")
            if getattr(cfg, JITTER_OPS[op]) > 0:
                image = adjust(image, getattr(p, JITTER_OPS[op])[k].item())
        return image

    if cfg.photometric == "base":
        image = jitter(image) if p.jitter[k] else image
        if p.group[k]:
            image = ImageOps.posterize(image, int(p.bits[k]))
            image = sharpness(image, p.sharpness[k].item())
            image = ImageOps.solarize(image, int(p.threshold[k]))
            image = ImageOps.autocontrast(image)
        image = F.to_grayscale(image, 3) if p.gray[k] else image
        return F.hflip(image) if p.flip[k] else image
    image = F.hflip(image) if p.flip[k] else image
    image = jitter(image) if p.jitter[k] else image
    image = F.to_grayscale(image, 3) if p.gray[k] else image
    return blur(image, p.sigma[k].item()) if p.blur[k] else image


@pytest.mark.parametrize("changes", [{}, {"hue": 0}, {"hue": 0, "saturation": 0}, {"jitter_probability": 0}])
@pytest.mark.parametrize("base", [ViewsConfig(), BLUR], ids=["base", "blur"])
@pytest.mark.parametrize("kind", ["smooth", "noise", "gray"])
def test_chains_give_pils_views(base: ViewsConfig, changes: dict[str, float], kind: str) -> None:
    cfg = base.model_copy(update=changes)
    pixels = np.stack([sample_image(40, 40, kind, seed) for seed in range(90)])
    params = draw_photometrics(cfg, 0, 0, np.arange(10), range(1, 10))
    views = apply_photometrics(torch.from_numpy(pixels), params, cfg)
    assert views.dtype == torch.float32
    assert views.is_contiguous()
    for k in range(90):
        expected = pil_chain(Image.fromarray(pixels[k]), params, k, cfg)
        normalised = F.normalize(F.to_tensor(expected), cfg.mean, cfg.std)
        torch.testing.assert_close(views[k], normalised, rtol=0, atol=2e-6)  # half a level is 0.0085
        assert (denormalise(views[k : k + 1], cfg)[0].numpy() == np.asarray(expected)).all()


def test_jitter_applies_in_the_order_drawn() -> None:
    cfg = ViewsConfig(**RAW, gray_probability=0, flip_probability=0, posterize_probability=0)
    pixels = np.repeat(sample_image(24, 24, "smooth")[None], 24, axis=0)
    one = draw_photometrics(cfg, 0, 0, np.array([4]), [0])
    params = one[np.zeros(24, np.int64)]
    params.order[:] = list(itertools.permutations(range(4)))
    views = apply_photometrics(torch.from_numpy(pixels), params, cfg).mul(255).round()
    for k in range(24):
        expected = np.asarray(pil_chain(Image.fromarray(pixels[k]), params, k, cfg))
        assert (views[k].permute(1, 2, 0).numpy() == expected).all()
    assert len({view.numpy().tobytes() for view in views}) > 12  # the order matters


@pytest.mark.parametrize("cfg", [ViewsConfig(), BLUR], ids=["base", "blur"])
def test_views_do_not_depend_on_the_rest_of_the_batch(cfg: ViewsConfig) -> None:
    pixels = torch.from_numpy(np.stack([sample_image(12, 12, "gray" if k < 18 else "smooth", k) for k in range(36)]))
    ids = np.array([4, 1 << 33, 6, 9])
    views = apply_photometrics(pixels, draw_photometrics(cfg, 1, 2, ids, range(1, 10)), cfg).view(4, 9, 3, 12, 12)
    for order in ([2, 0], [1, 0]):  # the second has gray images only, for which one channel is worked on
        some = pixels.view(4, 9, 12, 12, 3)[order].flatten(0, 1)
        again = apply_photometrics(some, draw_photometrics(cfg, 1, 2, ids[order], range(1, 10)), cfg)
        assert torch.equal(again.view(2, 9, 3, 12, 12), views[order])
    one = draw_photometrics(cfg, 1, 2, ids[2:3], [5])
    assert torch.equal(apply_photometrics(pixels[22:23], one, cfg)[0], views[2, 4])
    assert apply_photometrics(pixels[:0], draw_photometrics(cfg, 1, 2, ids[:0], [0]), cfg).shape == (0, 3, 12, 12)


def test_large_batches_are_the_same_as_small_ones() -> None:
    cfg = ViewsConfig()
    pixels = torch.from_numpy(np.stack([sample_image(80, 80, "smooth", k) for k in range(60)]))
    params = draw_photometrics(cfg, 0, 0, np.arange(60), [0])
    views = apply_photometrics(pixels, params, cfg)  # 60 * 3 * 80 * 80 values: several chunks
    parts = [apply_photometrics(pixels[k : k + 1], params[np.array([k])], cfg) for k in range(60)]
    assert torch.equal(views, torch.cat(parts))


def test_parameters_follow_their_law() -> None:
    cfg = ViewsConfig()
    p = draw_photometrics(cfg, 0, 0, MANY, [0])
    for factors in (p.brightness, p.contrast, p.saturation):
        assert_uniform(factors, 0.6, 1.4)
    assert_uniform(p.hue, -0.2, 0.2)
    assert_uniform(p.sharpness, 0.1, 1.9)
    assert_equally_likely(p.bits - 4, 5)
    assert_equally_likely(p.threshold, 257)
    assert_equally_likely(np.unique(p.order @ [64, 16, 4, 1], return_inverse=True)[1], 24)
    assert p.jitter.all()
    for mask, probability in ((p.group, 0.66), (p.gray, 0.2), (p.flip, 0.5)):
        assert_share(mask, probability)

    p = draw_photometrics(BLUR, 0, 0, MANY, [0])
    for factors in (p.brightness, p.contrast, p.saturation):
        assert_uniform(factors, 0.2, 1.8)
    assert_uniform(p.sigma, 0.1, 2.0)
    for mask, probability in ((p.jitter, 0.8), (p.gray, 0.2), (p.flip, 0.5), (p.blur, 0.5)):
        assert_share(mask, probability)
    strong = draw_photometrics(ViewsConfig(brightness=1.5), 0, 0, MANY, [0])
    assert_uniform(strong.brightness, 0, 2.5)  # factors stop at 0, as in torchvision


def test_all_parameters_and_all_ten_elements_are_independent() -> None:
    ids, elements = MANY[:6000], range(10)
    p = draw_photometrics(BLUR, 0, 0, ids, elements)
    names = ("jitter", "brightness", "contrast", "saturation", "hue", "group", "bits", "sharpness", "threshold")
    columns = [getattr(p, name).reshape(6000, 10) for name in (*names, "gray", "flip", "blur", "sigma")]
    columns += [(p.order[:, k] == 0).reshape(6000, 10) for k in range(3)]
    table = np.concatenate(columns, axis=1).astype(np.float64)
    together = np.corrcoef(table.T)
    together[-30:, -30:] = 0  # one order's places exclude each other
    np.fill_diagonal(together, 0)
    assert np.abs(together).max() < 5.5 / math.sqrt(6000)
    boxes = draw_geometry(BLUR, 0, 0, ids, np.tile((375, 500), (6000, 1))).image_box
    assert np.abs(np.corrcoef(boxes.T, table.T)[:4, 4:]).max() < 5.5 / math.sqrt(6000)


def test_certain_and_impossible_operations() -> None:
    never = {f"{name}_probability": 0 for name in ("posterize", "gray", "flip", "blur", "jitter")}
    for photometric in ("base", "blur"):
        cfg = ViewsConfig(photometric=photometric, **never, **RAW)
        pixels = torch.from_numpy(np.stack([sample_image(16, 16, "noise", k) for k in range(8)]))
        params = draw_photometrics(cfg, 0, 0, np.arange(8), [0])
        assert torch.equal(denormalise(apply_photometrics(pixels, params, cfg), cfg), pixels)
        always = draw_photometrics(cfg.model_copy(update=dict.fromkeys(never, 1)), 0, 0, MANY, [0])
        for mask in (always.jitter, always.group, always.gray, always.flip, always.blur):
            assert mask.all()


def test_denormalise_undoes_the_normalisation_for_every_value() -> None:
    cfg = ViewsConfig()
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    views = torch.stack([F.normalize(F.to_tensor(image.numpy()), cfg.mean, cfg.std) for image in pixels])
    shown = denormalise(views, cfg)
    assert shown.dtype == torch.uint8
    assert torch.equal(shown, pixels)


def test_geometry_is_a_plain_batch_of_arrays() -> None:
    geometry = draw_geometry(
        ViewsConfig(grid=4, patch_crop_size=64, patch_size=10), 0, 0, np.arange(3), np.full((3, 2), 9)
    )
    assert isinstance(geometry, Geometry)
    assert geometry.places.jitter.shape == (3, 2, 4, 4)
    assert geometry.places.permutation.shape == (3, 16)
    assert geometry.places.jitter.max() < 6
