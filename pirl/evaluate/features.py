"""Features of frozen backbones: one pass over the images for all of them, each rank its own share.

Rank r has the features of the ids `share_of(images, world)`, in a file without a name that is mapped into memory: pages
that the kernel can write back, and that vanish with the process. Small sets are kept in single precision; large ones in
half precision, scaled by a power of two that leaves every result as it is.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pirl.config import Recipe
from pirl.evaluate.crops import LabelledCrops
from pirl.evaluate.execution import default_device
from pirl.evaluate.load import COLLAPSED, not_finite
from pirl.evaluate.parts import Parts
from pirl.evaluate.progress import Progress
from pirl.model import Trunk, memory_format
from pirl.world import World

CHUNK = 256  # images that pass the backbones together
HALF_FROM_BYTES = 1 << 28  # of float32 features of one backbone, from which they are kept in half precision
ROWS = 8192  # of features that are in memory in double precision at a time


@dataclass
class Features:
    """Features of one data set by one backbone: this rank's rows, and the labels of all images."""

    x: Tensor
    """(n, D) float32 or float16 of the images from id `first` on."""
    y: Tensor
    """(N,) int64 labels of all images of the data set."""
    first: int = 0
    scale: float = 1.0
    """Power of two by which the backbone's output was multiplied."""


def share_of(images: int, world: World, rank: int | None = None) -> range:
    """Return the ids that a rank has, this one if not given: contiguous, and at most one more than another rank has."""
    rank = world.rank if rank is None else rank
    return range(images * rank // world.size, images * (rank + 1) // world.size)


def precision(images: int, dim: int) -> torch.dtype:
    """Return the type of the features of a data set of `images`, the same for every number of ranks."""
    return torch.float16 if 4 * images * dim >= HALF_FROM_BYTES else torch.float32


def fold_norms(trunk: nn.Module) -> nn.Module:
    """Return a copy for evaluation whose batch norms are folded into the convolutions before them.

    The same function but for rounding, with fewer passes over memory.
    """
    if not isinstance(trunk, Trunk):
        return trunk
    folded = copy.deepcopy(trunk).eval()
    for block in (folded, *folded.layer1, *folded.layer2, *folded.layer3, *folded.layer4):
        for number in range(1, 4):
            if hasattr(block, f"bn{number}"):
                fused = fuse_conv_bn_eval(getattr(block, f"conv{number}"), getattr(block, f"bn{number}"))
                setattr(block, f"conv{number}", fused)
                setattr(block, f"bn{number}", nn.Identity())
        if (shortcut := getattr(block, "downsample", None)) is not None:
            block.downsample = fuse_conv_bn_eval(shortcut[0], shortcut[1])
    return folded


class Extractor:
    """Pixels -> the features of each of several backbones in evaluation mode, on one device."""

    def __init__(self, trunks: Mapping[str, nn.Module], recipe: Recipe, device: torch.device) -> None:
        self.device, self.recipe = device, recipe
        self.trunks = {}
        for name, trunk in trunks.items():
            form = memory_format(trunk) if isinstance(trunk, Trunk) else torch.contiguous_format
            self.trunks[name] = fold_norms(trunk).to(device).to(memory_format=form)
        self.mean, self.std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (recipe.views.mean, recipe.views.std)
        )

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """(n, S, S, 3) uint8 -> (n, D) float32 by name, on the device."""
        x = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        x = x.div_(255).sub_(self.mean).div_(self.std)
        return {name: trunk(x).float() for name, trunk in self.trunks.items()}


def extract(trunk: nn.Module, batches: Callable[[], Iterable[Tensor]], recipe: Recipe) -> Tensor:
    """Return (n, D) float32 features of all batches by one backbone, on the CPU."""
    extractor = Extractor({"": trunk}, recipe, default_device())
    return torch.cat([extractor(pixels)[""].cpu() for pixels in batches()])


def extract_all(
    extractor: Extractor,
    crops: LabelledCrops,
    world: World,
    workers: int,
    parts: Parts,
    progress: Progress,
) -> dict[str, Features]:
    """Return this rank's features of a data set by each backbone.

    What an earlier process has left in `parts` is read. Raise `CheckpointError` on all ranks where features are not
    finite.
    """
    ids = share_of(len(crops), world)
    table = Table(extractor, crops, ids, world)
    names = list(extractor.trunks)
    gaps = parts.restore(ids, names, table.put)
    missing = sum(map(len, gaps))
    progress.begin(f"features of {parts.title}", len(crops), "images", done=world.size * (len(ids) - missing))
    for gap in gaps:
        saved = gap.start
        for chunk, rows in table.compute(gap, workers):
            table.put(chunk.start, rows, 1.0)
            progress.advance(len(chunk) * world.size)
            if parts.is_due():
                parts.save(range(saved, chunk.stop), table.read(range(saved, chunk.stop)), table.scale)
                saved = chunk.stop
    world.moment = f"the end of the features of {parts.title}"
    y = torch.from_numpy(crops.reader.labels())
    for name, x in table.x.items():
        require_all_finite(x, ids, crops, name, world)
    return {name: Features(x, y, ids.start, table.scale[name]) for name, x in table.x.items()}


class Table:
    """Rows of features of one rank, by backbone, in files that are mapped into memory."""

    def __init__(self, extractor: Extractor, crops: LabelledCrops, ids: range, world: World) -> None:
        self.extractor, self.crops, self.ids = extractor, crops, ids
        first = self._pixels(range(min(len(crops), CHUNK)))
        probes = {name: x.cpu() for name, x in extractor(first).items()}
        self.dtype = precision(len(crops), next(iter(probes.values())).shape[1])
        self.scale = {}
        for name, x in probes.items():
            scale = torch.tensor([_power_of_two(x) if self.dtype == torch.float16 else 1.0], dtype=torch.float64)
            self.scale[name] = float(world.broadcast(scale.to(world.device)))
        self.x = {name: _mapped((len(ids), x.shape[1]), self.dtype) for name, x in probes.items()}

    def _pixels(self, ids: range) -> Tensor:
        return self.crops[None, np.arange(ids.start, ids.stop)][0]

    def compute(self, ids: range, workers: int) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """Yield the features of `ids` in chunks."""
        chunks = [range(start, min(start + CHUNK, ids.stop)) for start in range(ids.start, ids.stop, CHUNK)]
        tasks = [(None, np.arange(chunk.start, chunk.stop)) for chunk in chunks]
        for chunk, (pixels, _) in zip(chunks, self.crops.load(tasks, workers)):
            yield chunk, self.extractor(pixels)

    def put(self, first: int, rows: Mapping[str, Tensor], scale: float | Mapping[str, float]) -> None:
        """Write rows from id `first` on, which were multiplied by `scale`."""
        for name, x in rows.items():
            factor = self.scale[name] / (scale if isinstance(scale, float) else scale[name])
            place = first - self.ids.start
            self.x[name][place : place + len(x)] = (x * factor).to("cpu", self.dtype)

    def read(self, ids: range) -> dict[str, Tensor]:
        """Return the rows of `ids` as they are kept."""
        return {name: x[ids.start - self.ids.start : ids.stop - self.ids.start] for name, x in self.x.items()}


def _power_of_two(x: Tensor) -> float:
    """Return the factor that brings the largest value to between 1 and 2; half precision ends at 65,504."""
    most = float(x.abs().max())
    return 2.0 ** -math.floor(math.log2(most)) if math.isfinite(most) and most > 0 else 1.0


def _mapped(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return zeros in a file without a name, mapped into memory."""
    if not shape[0]:
        return torch.zeros(shape, dtype=dtype)
    kind = {torch.float16: np.float16, torch.float32: np.float32}[dtype]
    with tempfile.TemporaryFile(prefix="pirl-features-") as file:
        return torch.from_numpy(np.memmap(file, kind, "w+", shape=shape))


def require_all_finite(x: Tensor, ids: range, crops: LabelledCrops, trunk: str, world: World) -> None:
    """Raise the same `CheckpointError` on all ranks unless all features are finite."""
    finite = torch.cat([torch.isfinite(part).all(1) for part in x.split(ROWS)]) if len(x) else torch.ones(0).bool()
    bad = (~finite).nonzero().flatten()
    everyone = world.gather_objects((len(bad), ids.start + int(bad[0]) if len(bad) else -1))
    count = sum(each for each, _ in everyone)
    if count:
        first = min(id for each, id in everyone if each)
        raise not_finite(first, count, len(crops), crops.reader, trunk)


@dataclass
class Moments:
    """Mean and standard deviation of each feature over all images."""

    mean: Tensor
    """(D,) float32."""
    std: Tensor
    """(D,) float32, at least 1e-6."""
    collapsed: bool
    """The features are the same for all images, but for rounding."""


def moments(features: Features, world: World) -> Moments:
    """Return the moments over all ranks, from sums in double precision."""
    count, dim = len(features.y), features.x.shape[1]
    total, squares = (torch.zeros(dim, dtype=torch.float64) for _ in range(2))
    for part in features.x.split(ROWS):
        total += part.double().sum(0)
        squares += part.double().square().sum(0)
    total, squares = world.sum(torch.stack([total, squares]).to(world.device)).cpu()
    mean = total / count
    spread = torch.zeros(dim, dtype=torch.float64)
    for part in features.x.split(ROWS):
        spread += (part.double() - mean).square().sum(0)
    spread = world.sum(spread.to(world.device)).cpu()
    std = (spread / max(1, count - 1)).sqrt().clamp_min(1e-6)
    collapsed = count > 1 and bool((spread <= COLLAPSED * squares).all())
    return Moments(mean.float(), std.float(), collapsed)
