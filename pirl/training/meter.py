"""Measurement of a training: throughput, losses, ETA, and the batch that made a loss non-finite."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ..checkpoint import Commit, Cursor
from ..collapse import collapse
from ..config import Recipe
from ..data import Share
from ..errors import TrainingError
from ..lines import MetricsLine
from ..loader import Loader
from ..logs import info, warn
from ..loss import StepLoss
from ..metrics import Log
from ..metrics.clock import StepClock
from ..run import EVENTS
from ..text import duration
from ..world import World
from .spec import Options


class Meter:
    """Measurement of the steps, with a report of each interval's means; the device is read only then."""

    def __init__(
        self,
        recipe: Recipe,
        loader: Loader,
        world: World,
        options: Options,
        log: Log,
    ) -> None:
        self.recipe, self.world, self.options, self.log = recipe, world, options, log
        self.clock = StepClock(world.device)
        self.loader = loader
        self.rows = loader.dataset.rows
        self.total_steps = recipe.train.epochs * recipe.steps_per_epoch(self.rows)
        self._history: list[tuple[Cursor, int, Tensor]] = []
        """The interval's steps and the one before: cursor at the end, number of images, loss on this rank."""
        self._saving = self._history
        """The step whose state is being saved, or was last."""
        self.sums = torch.zeros(5, device=world.device)
        self._collapsed = False
        self.start_at(Cursor())

    def start_at(self, cursor: Cursor) -> None:
        """Start counting at `cursor`."""
        size = self.recipe.train.batch_size
        epoch = self.rows if self.recipe.train.last_batch == "keep" else self.rows - self.rows % size
        self.images_seen = cursor.epoch * epoch + cursor.samples
        self._before = cursor.seconds
        self._started = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._interval = time.perf_counter()
        self._steps = self._images = 0
        self._compute_s = 0.0
        self._history = self._history[-1:]

    def seconds(self) -> float:
        """Return the seconds of training, over all restarts."""
        return self._before + time.perf_counter() - self._started

    def begin_step(self) -> None:
        """Note that the batch of a step has come."""
        self._step_started = time.perf_counter()
        self.clock.begin()

    def end_step(self, cursor: Cursor, rate: float, result: StepLoss, share: Share) -> None:
        """Count a step that ends at `cursor`; report every `log_every` steps."""
        self._compute_s += time.perf_counter() - self._step_started
        self.sums += torch.stack(
            [result.loss.detach(), result.patches, result.images, result.positive, result.negative]
        )
        self._history.append((cursor, share.size, result.loss.detach()))
        self._steps += 1
        self._images += share.size
        self.images_seen += share.size
        self.log.tick(share.size, self.clock.end())
        if cursor.step % self.options.log_every == 0 or cursor.step == self.total_steps:
            self.report(cursor, rate, result.embeddings)

    def report(self, cursor: Cursor, rate: float, embeddings: Tensor) -> None:
        """Log the means of the interval over all ranks; raise `TrainingError` if the loss is not finite."""
        total = self.world.sum(self.sums.double())
        self.world.wait_for_device()
        means = (total / (self._steps * self.world.size)).tolist()
        self.sums.zero_()
        elapsed = time.perf_counter() - self._interval
        self.log.interval(self.clock.read())
        if not math.isfinite(means[0]):
            raise self.not_finite(means[0])
        if self.world.is_main:
            spread = float(embeddings.float().std(0).mean() * math.sqrt(embeddings.shape[1]))
            line = self._line(cursor, rate, means, spread, elapsed)
            self._print(line, elapsed)
            self._watch_collapse(line)
        self._reset()

    def _line(self, cursor: Cursor, rate: float, means: list[float], spread: float, elapsed: float) -> MetricsLine:
        """Return a line of `metrics.jsonl`."""
        return {
            "step": cursor.step,
            "epoch": cursor.epoch + cursor.samples / self.rows,
            "loss": means[0],
            "loss_patches": means[1],
            "loss_images": means[2],
            "lr": rate,
            "images_per_s": self._images / elapsed,
            "step_s": elapsed / self._steps,
            "data_wait_s": (elapsed - self._compute_s) / self._steps,
            "time_s": cursor.seconds,
            "pos_similarity": means[3],
            "neg_similarity": means[4],
            "embedding_std": spread,
        }

    def _print(self, line: MetricsLine, elapsed: float) -> None:
        self.log.step(**line)
        step = int(line["step"])
        eta = duration((self.total_steps - step) * line["step_s"])
        info(
            f"epoch {line['epoch']:6.2f}/{self.recipe.train.epochs}  step {step}/{self.total_steps}  "
            f"loss {line['loss']:.4f}  lr {line['lr']:.4g}  {line['images_per_s']:.0f} images/s  "
            f"waited {(1 - self._compute_s / elapsed) * 100:.0f}%  ETA {eta}",
            **line,
        )

    def _watch_collapse(self, line: MetricsLine) -> None:
        """Warn once when the embeddings collapse; a registered model would be refused by the gate."""
        reason = collapse(line)
        if reason and not self._collapsed:
            warn(f"step {int(line['step'])}: {reason}; look at the images with `pirl preview`, or lower optim.base_lr")
        self._collapsed = bool(reason)

    def not_finite(self, *losses: float, where: str = "") -> TrainingError:
        """Return the error for non-finite losses, or for a non-finite state that was to be saved (`where`).

        It names the batch of the first such step. All ranks call it together, as one of them alone may have seen it.
        """
        steps = self._saving if where else self._history
        finite = torch.stack([loss for _, _, loss in steps]).isfinite().tolist()
        first = min(self.world.gather_objects(finite.index(False) if False in finite else len(finite) - 1))
        cursor, images, _ = steps[first]
        ids = self.loader.batch_ids(cursor.epoch, cursor.samples - images, cursor.samples)
        self.log.event("not_finite", step=cursor.step, epoch=cursor.epoch, ids=ids, where=where or "loss")
        subject = where or f"the loss is no longer finite ({', '.join(f'{loss:g}' for loss in losses)})"
        named = ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        return TrainingError(
            f"{subject}{' is no longer finite' if where else ''}, first at step {cursor.step} (epoch {cursor.epoch}), "
            f"with the images {named}",
            f"the last checkpoint is from before, {EVENTS} has all ids; look at these images, lower optim.base_lr "
            "or use train.precision=fp32",
        )

    def saving(self) -> None:
        """Note that the state of the last step is about to be saved."""
        self._saving = self._history[-1:]

    def saved(self, commit: Commit, seconds: float) -> None:
        """Log a checkpoint that was published."""
        self.log.event("checkpoint", step=commit.cursor.step, bytes=commit.bytes, seconds=round(seconds, 3))
