"""An encoder: a frozen backbone with the preprocessing that it was evaluated with, from images to features."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pirl import logs
from pirl.config import Recipe
from pirl.embedding.images import Given, Images, Loader, open_images
from pirl.errors import CheckpointError, DataError, UsageError
from pirl.evaluate import centre_crop
from pirl.model import Trunk, memory_format, weights_digest
from pirl.text import count

AHEAD = 4  # batches that are decoded before they are needed
Errors = Literal["raise", "skip"]


class Embeddings(NamedTuple):
    """Features of images, in their order."""

    names: list[str]
    features: np.ndarray
    """(n, D) float32."""


@dataclass(frozen=True)
class Batch:
    """Features of some images, and the images of the same stretch that could not be read."""

    names: list[str]
    labels: np.ndarray
    """(n,) int64; -1: no label."""
    features: np.ndarray
    """(n, D) float32."""
    skipped: list[tuple[str, str]]
    """Name and reason."""


class Encoder:
    """A backbone in evaluation mode with its preprocessing.

    Images are resized, centre-cropped and normalised as in the evaluation of the run, so that features are the same.
    """

    def __init__(
        self, trunk: Trunk, recipe: Recipe, origin: str = "", device: str | torch.device | None = None
    ) -> None:
        self.recipe, self.origin = recipe, origin
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.trunk = trunk.eval().requires_grad_(False).to(self.device).to(memory_format=memory_format(trunk))
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (recipe.views.mean, recipe.views.std)
        )

    @property
    def features(self) -> int:
        """Length D of a feature vector."""
        return self.trunk.features

    @cached_property
    def weights(self) -> str:
        """SHA-256 of the backbone's weights, as evaluations and the registry name them."""
        return weights_digest(self.trunk.state_dict())

    def __repr__(self) -> str:
        crop = self.recipe.eval.crop
        return f"Encoder({self.origin!r}: {self.recipe.name}, {self.features} features of {crop} pixels, {self.device})"

    def embed(
        self, images: Given, *, batch_size: int = 64, workers: int | None = None, errors: Errors = "raise"
    ) -> Embeddings:
        """Return names and features of images: a folder, files, shards, PIL images or arrays.

        batch_size: images that pass the backbone at a time. workers: threads that decode, by default one for each core.
        errors: "skip" leaves out images that cannot be read, with a warning; "raise" raises `DataError` at the first.

            names, features = pirl.load("runs/mine").embed("photos/test")
        """
        names: list[str] = []
        parts: list[np.ndarray] = []
        skipped: list[tuple[str, str]] = []
        for batch in self.batches(images, batch_size=batch_size, workers=workers, errors=errors):
            names += batch.names
            parts.append(batch.features)
            skipped += batch.skipped
        report_skipped(skipped)
        return Embeddings(names, np.concatenate(parts) if parts else np.empty((0, self.features), np.float32))

    def batches(
        self, images: Given, *, batch_size: int = 64, workers: int | None = None, errors: Errors = "raise"
    ) -> Iterator[Batch]:
        """Yield the features of images batch by batch, as `embed`; memory does not grow with their number."""
        if batch_size < 1 or (workers is not None and workers < 1):
            raise UsageError(f"batch_size is {batch_size}, workers {workers}, expected 1 or more", "give larger ones")
        opened = open_images(images)
        pixels = self._pixels(opened, workers or os.cpu_count() or 1, batch_size)
        with closing(pixels):
            position = 0
            while chunk := list(islice(pixels, batch_size)):
                yield self._batch(opened, position, chunk, errors)
                position += len(chunk)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return (n, D) float32 features on the CPU for (n, S, S, 3) uint8 pixels that are resized and cropped."""
        x = pixels.to(self.device).permute(0, 3, 1, 2).float().div_(255).sub_(self._mean).div_(self._std)
        with torch.inference_mode():
            return self.trunk(x).float().cpu()

    def _batch(self, images: Images, first: int, chunk: list[np.ndarray | DataError], errors: Errors) -> Batch:
        good = [first + i for i, item in enumerate(chunk) if not isinstance(item, DataError)]
        skipped = []
        for i, item in enumerate(chunk, first):
            if isinstance(item, DataError):
                if errors == "raise":
                    raise DataError(item.what, item.hint or 'give errors="skip" to leave such images out') from item
                skipped.append((images.name(i), item.what))
        crops = [item for item in chunk if not isinstance(item, DataError)]
        features = np.empty((0, self.features), np.float32)
        if crops:
            features = self(torch.from_numpy(np.stack(crops))).numpy()
            self._require_finite(features, images, good)
        labels = np.array([images.label(i) for i in good], np.int64)
        return Batch([images.name(i) for i in good], labels, features, skipped)

    def _require_finite(self, features: np.ndarray, images: Images, positions: list[int]) -> None:
        bad = np.flatnonzero(~np.isfinite(features).all(1))
        if len(bad):
            raise CheckpointError(
                f"features of {images.name(positions[bad[0]])} are NaN or infinite: the weights are damaged",
                "load an older checkpoint of the run",
            )

    def _pixels(self, images: Images, workers: int, batch_size: int) -> Generator[np.ndarray | DataError, None, None]:
        """Yield the crop of each image in order, or the error that it cannot be read; a few batches are made ahead."""
        waiting: deque[Future[Any]] = deque()
        with ThreadPoolExecutor(workers, "pirl-embed") as pool:
            try:
                for loader in images.loaders():
                    waiting.append(pool.submit(self._crop, loader))
                    if len(waiting) >= AHEAD * batch_size:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _crop(self, load: Loader) -> np.ndarray | DataError:
        try:
            image: Image.Image = load()
        except DataError as error:
            return error
        return centre_crop(image, self.recipe)


def report_skipped(skipped: list[tuple[str, str]]) -> None:
    """Warn of images that were left out, by name and reason."""
    if skipped:
        shown = "; ".join(reason for _, reason in skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
        logs.warn(f"{count(len(skipped), 'image')} could not be read and {_is(len(skipped))} left out: {shown}")


def _is(number: int) -> str:
    return "is" if number == 1 else "are"
