"""Sections of a recipe: settings with their bounds, and what must hold among those of one section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .errors import did_you_mean
from .settings import Settings

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=100)]
Pixels = Annotated[int, Field(ge=4, le=4096)]
Pair = tuple[float, float]
Blocks = Annotated[int, Field(ge=1, le=128)]
Mean = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(ge=0.001, le=100)]
PAIRS = {
    "image_scale": (1e-6, 1.0),
    "patch_scale": (1e-6, 1.0),
    "image_ratio": (0.01, 100.0),
    "patch_ratio": (0.01, 100.0),
    "blur_sigma": (0.01, 100.0),
}
"""Least and largest value of the pairs: shares of the image's area, width over height, pixels."""
PRETEXTS = {"jigsaw": "pirl.views.jigsaw:Jigsaw"}
"""Module and class of each pretext, imported by those who make views or heads."""
MOST_SCORE = 50.0  # of the NCE loss: exp(50) times a million negatives is far below the largest float32


class DataConfig(Settings):
    """Which images of the data set take part."""

    images: int = Field(0, ge=0, le=2**40)
    """Pretrain on at most this many images, evenly spaced over the ids (0: all). The memory bank has a row for each."""


class ViewsConfig(Settings):
    """The two views of an image: a crop of it, and what the pretext makes of a second, independent crop."""

    pretext: str = "jigsaw"
    """How the second view is made: jigsaw, the patches of a grid in random order."""
    image_size: Pixels = 224
    image_scale: Pair = (0.08, 1.0)
    image_ratio: Pair = (0.75, 4 / 3)
    patch_crop_size: Pixels = 255
    patch_scale: Pair = (0.6, 1.0)
    patch_ratio: Pair = (0.75, 4 / 3)
    grid: int = Field(3, ge=1, le=5)
    patch_size: int = Field(64, ge=2, le=4096)
    resampling: Literal["exact", "near"] = "exact"
    """exact: the crops' pixels are PIL's; near: within one level of them, in a third of the time."""
    photometric: Literal["base", "blur"] = "base"
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    jitter_probability: Probability = 1.0
    posterize_probability: Probability = 0.66
    """Chance of the group posterize, sharpness, solarize, autocontrast ("base" only)."""
    gray_probability: Probability = 0.2
    flip_probability: Probability = 0.5
    blur_probability: Probability = 0.5
    """Chance of a Gaussian blur ("blur" only)."""
    blur_sigma: Pair = (0.1, 2.0)
    mean: tuple[Mean, Mean, Mean] = (0.485, 0.456, 0.406)
    std: tuple[Spread, Spread, Spread] = (0.229, 0.224, 0.225)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of an image's crop: height, width, colours."""
        return self.image_size, self.image_size, 3

    @property
    def cell(self) -> int:
        """Side of one jigsaw cell in pixels of the patch crop."""
        return self.patch_crop_size // self.grid

    @model_validator(mode="after")
    def _check(self) -> ViewsConfig:
        if self.pretext not in PRETEXTS:
            raise ValueError(f"pretext {self.pretext!r} not found.{did_you_mean(self.pretext, PRETEXTS)}")
        if self.patch_size > self.cell:
            raise ValueError(
                f"patch_size {self.patch_size} is larger than a cell of the {self.grid}x{self.grid} grid over "
                f"patch_crop_size {self.patch_crop_size}, which is {self.cell} pixels"
            )
        for name, (least, most) in PAIRS.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(f"{name} must be a rising pair from {least:g} to {most:g}, not [{low:g}, {high:g}]")
        return self


class ModelConfig(Settings):
    """Trunk and projection heads."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    layers: tuple[Blocks, Blocks, Blocks, Blocks] = (3, 4, 6, 3)
    width: float = Field(1.0, ge=1 / 64, le=16)
    """Multiplies the stem and all planes, inner and outer (w2 of the zoo), unlike torchvision's wide_resnet50_2."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: 7x7 stride 2 and a max pool; small: 3x3 and no pool, for images of 32 pixels or so."""
    stem_stride: Literal[1, 2] = 2
    head: Literal["linear", "mlp"] = "linear"
    image_head_relu: Literal["every", "hidden", "none"] = "every"
    """MLP head of the images: ReLU after every layer (zoo, R50), after the hidden one only, or none (zoo, R50w2)."""
    embedding_dim: int = Field(128, ge=2, le=8192)


class MemoryConfig(Settings):
    """The memory bank: one L2-normalised embedding per image."""

    momentum: float = Field(0.5, ge=0, lt=1)
    """Weight of the old row in an update (the paper's m, section 3.2)."""
    init: Literal["shared", "rank_mean", "forward"] = "shared"
    """shared: random unit rows, the same on all ranks; rank_mean: the mean of one random bank per rank, rows of norm
    ~1/sqrt(W); forward: embeddings of the untrained network, from one forward pass over all images."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Storage of the rows; scores and updates are computed in float32."""


class LossConfig(Settings):
    """Noise contrastive estimation against the memory bank."""

    kind: Literal["nce", "cross_entropy"] = "nce"
    temperature: float = Field(0.07, ge=0.01, le=100)
    negatives: Annotated[int, Field(ge=1, lt=2**31)] | Literal["all", "visited"] = 32000
    """How many rows an image is contrasted with, drawn for each image and view; "all": every other row of the bank;
    "visited": every other row that an epoch has visited; the bank starts with rows of zeros."""
    shared_negatives: bool = False
    """One sample of the rows a step for all images, every (N/K)-th from a random start, instead of draws for each."""
    patch_weight: Probability = 0.5
    """Weight of the patches' term; the image's term has 1 - patch_weight (the paper's lambda)."""
    exclude_positive: bool = False
    """Never draw the image's own row as a negative: as in the paper; the reference draws it as any other row."""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.takes_all_rows and self.shared_negatives:
            raise ValueError(f'shared_negatives chooses a sample of the rows, and negatives is "{self.negatives}"')
        if self.negatives == "visited" and self.kind == "nce":
            raise ValueError(
                'negatives "visited" need the loss cross_entropy: the noise of nce has a fixed number of rows'
            )
        if self.kind == "nce" and self.temperature * MOST_SCORE < 1:
            raise ValueError(
                f"temperature must be at least {1 / MOST_SCORE:g} for the loss nce, not {self.temperature:g}"
            )
        return self

    def count(self, rows: int) -> int:
        """Return K, the negatives of an image, with a bank of `rows` rows."""
        return self.negatives if isinstance(self.negatives, int) else rows - 1

    def describe(self) -> str:
        """Return the negatives in words."""
        if not isinstance(self.negatives, int):
            return f"all other{' visited' * (self.negatives == 'visited')} rows as negatives"
        return f"{self.negatives:,} negatives{', one sample a step' if self.shared_negatives else ''}"

    @property
    def draws_per_image(self) -> bool:
        """True where negatives are drawn for each image and view, as in the paper."""
        return not self.takes_all_rows and not self.shared_negatives

    @property
    def takes_all_rows(self) -> bool:
        """True where every other row is a negative, at the latest after the first epoch."""
        return not isinstance(self.negatives, int)


class OptimConfig(Settings):
    """SGD with momentum on a cosine schedule."""

    base_lr: float = Field(0.03, gt=0, le=1000)
    """Learning rate for a global batch of 256; scaled linearly with the global batch."""
    end_lr_ratio: float = Field(0.001, ge=0, le=1)
    schedule: Literal["epoch", "step"] = "epoch"
    """Set the learning rate once an epoch, as the reference does, or at every step."""
    warmup_epochs: float = Field(0.0, ge=0, le=1_000_000)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(1e-4, ge=0, le=10)
    decay_norm_and_bias: bool = False

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class TrainConfig(Settings):
    """How long, in what batches, in what precision."""

    epochs: int = Field(ge=1, le=1_000_000)
    batch_size: int = Field(ge=1, le=2**20)
    """Global: over all ranks."""
    last_batch: Literal["keep", "drop"] = "keep"
    """The rest of an epoch after its full batches: a smaller batch, dealt evenly, or dropped."""
    order: Literal["sorted", "permutation"] = "sorted"
    """Order of an epoch's images. sorted: by random keys, as in version 0.1, which every rank draws and sorts;
    permutation: a keyed permutation, of which any part costs as much at any number of images (`pirl.order`)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = Field(0, ge=0, lt=2**63)


class EvalConfig(Settings):
    """How images are shown to a frozen trunk."""

    resize: Pixels = 256
    """The shorter side, in pixels."""
    crop: Pixels = 224
    """Side of the centre crop."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.crop > self.resize:
            raise ValueError(f"the crop of {self.crop} pixels does not fit into images resized to {self.resize}")
        return self
