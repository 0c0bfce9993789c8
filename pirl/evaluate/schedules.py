"""Settings of the protocols that train by epochs, as the paper and VISSL's configurations have them. Loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pirl.settings import Settings

Schedule = Literal["imagenet", "places205", "inat18"]

SCHEDULES: dict[Schedule, tuple[int, tuple[int, ...]]] = {
    "imagenet": (28, (8, 16, 24)),
    "places205": (14, (4, 8, 12)),
    "inat18": (84, (24, 48, 72)),
}
"""Epochs of the zoo's linear protocol on a data set, and those from which the learning rate is a tenth."""

SHARES = (0.01, 0.1)
"""Shares of the labels in the paper's table 3."""


def moved_drops(drops: tuple[int, ...], epochs: int, usual: int) -> list[int]:
    """Return the drops of a schedule of `usual` epochs, moved in proportion to `epochs`."""
    return [-(-drop * epochs // usual) for drop in drops]


class FinetuneProtocol(Settings):
    """Fine-tuning of the whole network with few labels.

    Sources: the paper's section 4.2 and table 3; VISSL's eval_resnet_8gpu_transfer_in1k_semi_sup_fulltune with the
    data sets pirl_in1k_per01 and per10, which set the learning rate to 0.01.
    """

    shares: tuple[float, ...] = SHARES
    """Shares of each class's labels, one fine-tuning for each."""
    epochs: int = Field(70, ge=1, le=10**6)
    """Epochs over the images with labels."""
    drop: int = Field(30, ge=0, le=10**6)
    """Epoch of 70 from which the learning rate is a tenth; it moves with the number of epochs."""
    batch_size: int = Field(256, ge=2, le=10**6)
    """Images of a step, of all ranks."""
    base_lr: float = Field(0.01, gt=0, le=1000)
    """Learning rate for a batch of 256; scaled linearly with the batch."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of Nesterov's SGD."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """On all parameters."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Of the images with labels, the classifier's initial weights, order and crops."""

    @field_validator("shares")
    @classmethod
    def _are_shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not shares or not all(0 < share <= 1 for share in shares) or len(set(shares)) < len(shares):
            raise ValueError("different numbers greater than 0 and at most 1 are expected")
        return tuple(sorted(shares))

    def learning_rate(self, epoch: int, batch: int) -> float:
        """Return that of the epoch number `epoch`, from 0, with `batch` images a step."""
        (drop,) = moved_drops((self.drop,), self.epochs, USUAL.epochs)
        return self.base_lr * batch / 256 * (0.1 if epoch >= drop else 1.0)


USUAL = FinetuneProtocol()
