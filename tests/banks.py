"""Banks, samples and kinds of negatives for tests of the memory bank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pirl.config import LossConfig, MemoryConfig
from pirl.data import negative_seeds
from pirl.loss import Samples
from pirl.memory import MemoryBank, RowsBank
from pirl.storage.local import LocalStorage
from pirl.world import World

N, D = 157, 16
KINDS = ("nce", "cross_entropy")
NEGATIVES: dict[str, dict[str, Any]] = {
    "drawn": {"negatives": 40},
    "drawn, no positive": {"negatives": 40, "exclude_positive": True},
    "all": {"negatives": "all"},
    "visited": {"negatives": "visited"},
    "shared": {"negatives": 50, "shared_negatives": True},
    "shared, no positive": {"negatives": 50, "shared_negatives": True, "exclude_positive": True},
}


def config_of(kind: str, negatives: str) -> LossConfig:
    return LossConfig(kind=kind, temperature=0.2, **NEGATIVES[negatives])  # type: ignore[arg-type]


def cases() -> list[tuple[str, str]]:
    """Return the losses with the kinds of negatives that each takes."""
    return [(kind, negatives) for kind in KINDS for negatives in NEGATIVES if (kind, negatives) != ("nce", "visited")]


def bank_of(world: World, images: int, cut: bool, negatives: str = "all", precision: str = "fp32") -> MemoryBank:
    config, visits = MemoryConfig(precision=precision), negatives == "visited"  # type: ignore[arg-type]
    if cut:
        bank: MemoryBank = RowsBank(images, D, config, 5, world, blank=visits)
    else:
        bank = MemoryBank(images, D, config, 5, blank=visits)
    if visits:
        bank.count_visits()
    return bank


def samples_of(world: World, images: int, size: int, step: int) -> tuple[Samples, Tensor, Tensor, list[int]]:
    """Return this rank's samples of the global batch of a step, their raw embeddings, and their places in the batch."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randperm(images, generator=generator)[:size]
    raw = torch.randn(2, size, D, generator=generator)
    counts = [len(range(rank, size, world.size)) for rank in range(world.size)]
    places = list(range(world.rank, size, world.size))
    part = places or [0]  # a stand-in
    weights = torch.full((len(part),), world.size / size if places else 0.0)
    seeds = torch.stack([negative_seeds(0, step, ids[part].numpy(), view) for view in (0, 1)])
    return Samples(ids[part], seeds, weights, counts, step + 1), raw[0, part], raw[1, part], places


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the size of every range that is read from a local storage from now on."""
    sizes: list[int] = []
    read = LocalStorage.read_range

    def counted(self: LocalStorage, name: str, offset: int, length: int) -> bytes:
        data = read(self, name, offset, length)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(LocalStorage, "read_range", counted)
    return sizes
