"""Typed result of the zoo's linear protocol: top-1 and top-5 of each layer of a frozen backbone."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from pirl.results import Content, Versioned


class HeadSettings(Content):
    """One head of the zoo's linear protocol."""

    layer: str
    pooling: str
    features: int
    batch_norm: bool


class ZooSettings(Content):
    """The zoo's protocol as it was applied. Further settings are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "zoo"
    schedule: str = "imagenet"
    """Version 0.1 had one."""
    epochs: int
    batch_size: int
    lr_drops: list[int] = Field([])
    """Epochs from which the learning rate is a tenth of the one before."""
    resize: int
    crop: int
    heads: dict[str, HeadSettings]


class HeadRates(Content):
    """Top-1 and top-5 as shares of 1, by head."""

    top1: dict[str, float]
    top5: dict[str, float]


class LayersEpoch(HeadRates):
    """One epoch of the zoo's linear protocol."""

    epoch: int
    lr: float
    loss: dict[str, float]
    seconds: float = 0.0


class LayersHeader(Content):
    """Weights, data and protocol of an evaluation by the zoo's linear protocol."""

    checkpoint: str
    weights: str = ""
    train_data: str
    test_data: str
    """Digests of the shards."""
    train_images: int
    test_images: int
    classes: list[str]
    protocol: ZooSettings
    differences: list[str] = Field([])
    """Deviations from the zoo's protocol."""


class LayersEvaluation(Versioned, LayersHeader, HeadRates):
    """`eval_zoo.json`: the zoo's linear protocol, layer by layer; the rates are those after the last epoch."""

    made_by = "`pirl eval RUN --protocol zoo --data URI --test URI`"

    epochs: list[LayersEpoch]
    untested: list[str] = Field([])
    """Classes without a test image."""
    ranks: int = 1
    seconds: float = 0.0

    def measures(self, header: LayersHeader) -> bool:
        """Return whether it is of these weights and data, by this protocol."""
        return LayersHeader.model_validate(self.model_dump()) == header
