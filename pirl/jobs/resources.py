"""Resources of a pod that follow from its GPUs, for settings that are not given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pirl.text import count

WORKERS = 8
"""Loading processes for each GPU: `loading_processes` starts as many where there are cores."""
RANK_GIB, WORKER_GIB, SLOTS_GIB = 7, 1, 1
"""Memory of a rank and of a loading process, and /dev/shm of a rank: 17 slots of up to 230 images of 224 pixels."""


def derived(gpus: int, processes: int = 0) -> dict[str, str]:
    """Return cpu, memory and shared_memory of a pod with GPUs, as Kubernetes writes them; {} without GPUs."""
    ranks = processes or gpus
    if not gpus:
        return {}
    return {
        "cpu": str(ranks * (1 + WORKERS)),
        "memory": f"{ranks * (RANK_GIB + WORKERS * WORKER_GIB + SLOTS_GIB)}Gi",
        "shared_memory": f"{ranks * SLOTS_GIB}Gi",
    }


def formulas(settings: Mapping[str, Any], ranks: int) -> list[str]:
    """Return a line for each derived value that `settings` have, with its formula."""
    words = {
        "cpu": f"{count(ranks, 'rank')} x (1 + {WORKERS} loading processes)",
        "memory": f"{count(ranks, 'rank')} x ({RANK_GIB} + {WORKERS} loading processes x {WORKER_GIB} + "
        f"{SLOTS_GIB} of shared memory) GiB",
        "shared_memory": f"{count(ranks, 'rank')} x {SLOTS_GIB} GiB",
    }
    values = derived(int(settings["gpus"]), int(settings["processes"]))
    return [f"{name} {value}: {words[name]}" for name, value in values.items() if settings[name] == value]
