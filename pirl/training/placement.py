"""Placement of the memory bank: whole on every rank, or cut by rows over the ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from ..config import Recipe
from ..world import World

BankPlacement = Literal["auto", "whole", "rows"]
WHOLE_SHARE = 0.25
"""Largest share of a rank's memory that a whole bank may take, if not given."""
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def cuts_bank(placement: BankPlacement, recipe: Recipe, rows: int, world: World) -> tuple[bool, str]:
    """Return whether the bank is cut over the ranks, the same on all of them, and why in one sentence."""
    size = bank_bytes(recipe, rows)
    memory = min(world.gather_objects(rank_memory_bytes(world)))
    text = f"{size / 2**20:,.1f} MiB, a rank has {memory / 2**30:,.1f} GiB of memory"
    if placement != "auto":
        return placement == "rows", f"memory bank: {placement}, as chosen ({text})"
    if world.size == 1:
        return False, f"memory bank: whole, there is one rank ({text})"
    cut = size > WHOLE_SHARE * memory
    chosen = "rows, more than" if cut else "whole, at most"
    return cut, f"memory bank: {chosen} {WHOLE_SHARE:.0%} of a rank's memory ({text})"


def bank_bytes(recipe: Recipe, rows: int) -> int:
    """Return the memory of `rows` rows of the bank."""
    return rows * recipe.model.embedding_dim * (2 if recipe.memory.precision == "bf16" else 4)


def rank_memory_bytes(world: World) -> int:
    """Return the memory that a rank may use: its GPU's, or its part of this machine's or container's."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUPS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdigit() else []
    return min(limits) // max(1, ranks)
