"""State of a training as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

from torch import Tensor

from pirl.errors import CheckpointError


class SavedBank(TypedDict):
    """Rows of the memory bank, and Z of the loss."""

    memory: Tensor
    z: Tensor


class Imported(TypedDict):
    """Origin of a state that was imported."""

    file: str
    """Name of the file."""
    sha256: str
    lacks: list[str]
    """Parts that the file did not have."""


class SavedTraining(TypedDict):
    """State of a training. Optimizer and scaler have PyTorch's own layout."""

    model: dict[str, Tensor]
    bank: SavedBank
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    recipe: str
    """As TOML."""
    data_digest: str
    imported: NotRequired[Imported]


def saved_training(state: Mapping[str, Any], checkpoint: str) -> SavedTraining:
    """Return the state of a checkpoint as that of a training; raise `CheckpointError` where a part is missing."""
    missing = [name for name in ("model", "recipe") if name not in state]
    if missing:
        raise CheckpointError(
            f"{checkpoint} is not the state of a training: {', '.join(missing)} missing",
            "name a checkpoint of `pirl train`",
        )
    return cast(SavedTraining, state)
