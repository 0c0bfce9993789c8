"""Number of data loading processes that this machine, or this pod, can feed a rank with."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ..config import Recipe
from ..loader import PREFETCH
from ..views import open_pretext
from ..world import World
from .spec import TrainingSpec

MOST = 8
"""Of each rank, if not given: one process decodes some 320 images/s, and a GPU takes at most 2,600."""
CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")


def loading_processes(recipe: Recipe, ranks: int, local_ranks: int) -> int:
    """Return the cores left by the ranks of this machine, divided by them: 0 to 8, as far as /dev/shm has room.

    `ranks` are those of the whole training, which share its batch. A loading process needs two slots of a rank's crops.
    """
    share = -(-recipe.train.batch_size // ranks)
    views = recipe.views
    slot = share * (math.prod(views.image_shape) + math.prod(open_pretext(views).shape))
    return max(0, min(cores_for_loading(local_ranks), (_free_shared_memory() // local_ranks // slot - 2) // PREFETCH))


def cores_for_loading(local_ranks: int) -> int:
    """Return the cores left by the ranks of this machine, divided by them: 0 to 8."""
    return min(MOST, max(0, available_cores() - local_ranks) // local_ranks)


def with_workers(spec: TrainingSpec, world: World) -> TrainingSpec:
    """Return the specification with a number of loading processes in place of -1."""
    if spec.workers >= 0:
        return spec
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return spec.model_copy(update={"workers": loading_processes(spec.recipe, world.size, local_ranks)})


def available_cores(cgroup: Path = CGROUP) -> int:
    """Return the cores that this process may use: those of its affinity, and no more than its cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota, period in (_version_2(cgroup), _version_1(cgroup)):
        if quota > 0 and period > 0:
            allowed = min(allowed, quota // period)
    return max(1, allowed)


def _version_2(cgroup: Path) -> tuple[int, int]:
    words = _read(cgroup / "cpu.max").split()
    return (int(words[0]), int(words[1])) if len(words) == 2 and words[0].isdigit() else (0, 0)


def _version_1(cgroup: Path) -> tuple[int, int]:
    words = [_read(cgroup / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    return (int(words[0]), int(words[1])) if all(word.isdigit() for word in words) else (0, 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _free_shared_memory() -> int:
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:  # macOS has none, and no bound of its own
        return 2**62
    return state.f_bavail * state.f_frsize
