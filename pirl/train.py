"""Pretraining: load, loop, step, log, save.

`python -m pirl.train SPEC.json` is the entry point everywhere. Alone it starts its processes as `torchrun` does, and
reads the same `PET_*` environment; started by `torchrun` it is one rank.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import __version__, logs
from .checkpoint import Checkpoints, Commit, Cursor, Lease
from .config import Recipe, parse_recipe
from .data import Batch, Loader, Share, negative_seeds
from .errors import (
    CheckpointError,
    PirlError,
    PreemptedError,
    StorageError,
    StorageNotFoundError,
    TrainingError,
    UsageError,
)
from .launch import STOP_SIGNALS, default_processes, report_outcome, run_ranks
from .logs import say
from .loss import StepLoss, contrast, draw_negatives
from .memory import MemoryBank, gather_updates
from .metrics import Log, TrainingMetrics
from .model import PIRL, build_model, memory_format
from .optim import build_optimizer, learning_rate, set_learning_rate
from .outputs import check_run_output
from .shards import Manifest
from .storage import Storage, open_storage
from .text import count, duration
from .training.spec import Options, TrainingSpec
from .training.workers import loading_processes
from .views import apply_photometrics, draw_photometrics
from .world import World, naming_who_hangs, start_world, stop_world

INCOMPLETE = ("trunk only", "no bank", "no optimizer")  # in place of the data's digest in an import that lacks the rest
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAST_SAVE_S = 150.0  # that a storage may be away when there is only one more save to come


def train(recipe: Recipe, options: Options, world: World) -> dict[str, Any]:
    """Train to the end of the recipe, from the newest checkpoint of this run where there is one.

    Returns the run's completion marker, `DONE.json`. Raises `PreemptedError` after a SIGTERM, when the state is saved.
    """
    run = open_storage(options.out).patient()  # a rank waits for a storage that its launcher has seen
    manifest = Manifest.load(open_storage(options.data).patient())
    recipe.check_data(manifest.images)
    if run.exists("DONE.json"):
        check_same_run(options.out, recipe, manifest.digest)
        say("this run is complete: nothing to do") if world.is_main else None
        return run.read_json("DONE.json")
    loader = Loader(
        options.data, recipe, world, max(0, options.workers)
    )  # looks at the shards before anything is written
    with naming_who_hangs(world), sole_writer(run, world) as lease:
        return train_alone(recipe, options, world, run, manifest.digest, loader, lease)


@contextmanager
def sole_writer(run: Storage, world: World) -> Iterator[Lease | None]:
    """Rank 0 holds the lease of the run; where it does not get it, all ranks end."""
    lease, refused = None, None
    if world.is_main:
        try:
            lease = Lease.claim(run)
        except PirlError as error:
            refused = error
    if refused := world.broadcast_object(refused):
        raise refused
    with lease or nullcontext():
        yield lease


def train_alone(
    recipe: Recipe,
    options: Options,
    world: World,
    run: Storage,
    data_digest: str,
    loader: Loader,
    lease: Lease | None,
) -> dict[str, Any]:
    """`train`, where no other training writes to the run; `lease` is rank 0's."""
    torch.manual_seed(recipe.train.seed)
    logs.about(run=run.uri.rpartition("/")[2], rank=world.rank)

    model = build_model(recipe).to(world.device)
    model = model.to(memory_format=memory_format(model.trunk))
    bank = MemoryBank(loader.dataset.rows, recipe.model.embedding_dim, recipe.memory, recipe.train.seed, world.size).to(
        world.device
    )
    optimizer = build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.train.precision == "fp16")
    state = TrainState(model, bank, optimizer, scaler)

    def guard() -> None:
        """Before a checkpoint is published, in its own thread: the record reaches as far as it does."""
        if lease:
            lease.confirm()
        log.flush()

    checkpoints = Checkpoints(run / "checkpoints", options.keep, world, keep_best=options.keep_best, guard=guard)
    resumed = resume(state, checkpoints, recipe, data_digest, options, world)
    cursor = resumed or Cursor()
    rows = loader.dataset.rows
    live = TrainingMetrics(run.uri, world, recipe.train.epochs * recipe.steps_per_epoch(rows), recipe.train.epochs)
    log = Log(run, live)
    log.resume_at(cursor.step)
    if world.is_main:
        run.write_bytes("config.toml", recipe.to_toml().encode())
        if checkpoints.skipped:
            log.event("checkpoint_skipped", checkpoints=checkpoints.skipped)
        log.event("resume" if resumed else "start", step=cursor.step, ranks=world.size, version=__version__)
    network = (
        model
        if world.size == 1
        else nn.parallel.DistributedDataParallel(
            model, device_ids=[world.local_rank] if world.device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    )
    if world.size > 1:
        settle_buckets(network, recipe, world)
    live.watch(network, bank)
    stop = StopSignal(world)
    meter = Meter(recipe, loader, cursor, world, options, log, live)
    result: StepLoss | None = None

    # batch statistics are each rank's own, and rank 0's are what counts
    buffers = {f"model/{name}" for name, _ in model.named_buffers()}

    def end_of_save() -> PirlError | None:
        """What ended the last save, on rank 0. Where the state was broken, all ranks end."""
        error = checkpoints.wait()
        if broken := world.broadcast_object(checkpoints.broken):
            raise meter.not_finite(where=broken)
        return error

    def save(milestone: bool = False) -> None:
        """All ranks come here, and each writes its share."""
        world.barrier()  # tells which rank hangs; the wait for its share of the last save would not
        if error := end_of_save():
            warnings.warn(f"the last checkpoint was not saved, training goes on: {error}", stacklevel=2)
            log.event("checkpoint_failed", error=error.what)
        loss = check_state(state, result.loss if result else None, world, meter)
        meter.saving()
        content = state.to_dict(recipe, data_digest), cursor, recipe.digest(), data_digest, meter.saved
        checkpoints.save(*content, loss=loss, milestone=milestone, of_main=buffers)

    def save_for_sure() -> None:
        """The last chance: a storage that was full is asked once more, one that is away for some minutes."""
        save()
        error, deadline = end_of_save(), time.monotonic() + LAST_SAVE_S
        again = error is not None
        while world.broadcast_object(again):
            time.sleep(5)
            save()
            error = end_of_save()
            again = isinstance(error, StorageError) and error.transient and time.monotonic() < deadline
        if error:
            raise error

    batches = loader.batches(cursor.epoch, cursor.samples)
    try:
        if resumed is None:
            save()
        saved_at = time.monotonic()
        model.train()
        live.clock.wait()
        world.moment = f"step {cursor.step + 1}"
        for epoch, seen, share, batch in batches:
            rate = learning_rate(recipe, epoch + seen / loader.dataset.rows)
            set_learning_rate(optimizer, rate)
            meter.begin_step()
            result, spread = train_step(recipe, network, state, world, epoch, share, batch)
            cursor = replace(
                cursor, epoch=epoch, samples=seen + share.size, step=cursor.step + 1, seconds=meter.seconds()
            )
            meter.end_step(cursor, rate, result, spread, share)
            if lease:
                lease.check()
            every_s = min(options.checkpoint_every_s, 30) if checkpoints.failed else options.checkpoint_every_s
            stopping, time_to_save = stop.agreed(time.monotonic() - saved_at > every_s)
            if stopping:
                save_for_sure()
                world.barrier()  # no rank leaves before the state is safe: the launcher ends all when one ends
                log.event("preempted", step=cursor.step)
                raise PreemptedError(
                    f"stopped by a signal at step {cursor.step}; the state is saved in {options.out}",
                    "run the same command again to go on",
                )
            milestone = ends_milestone(cursor, options.keep_every_epochs, recipe, loader.dataset.rows)
            if time_to_save or milestone:
                save(milestone)
                saved_at = time.monotonic()
            live.clock.wait()
            world.moment = f"step {cursor.step + 1}"
        world.moment = "the end"
        save_for_sure()
        done: dict[str, Any] = {}
        if world.is_main:
            done = {
                "steps": cursor.step,
                "epochs": recipe.train.epochs,
                "images_seen": meter.images_seen,
                "seconds": round(cursor.seconds, 1),
                "checkpoint": f"{checkpoints.storage.uri}/{checkpoints.newest()}",
                "recipe": recipe.name,
                "recipe_digest": recipe.digest(),
                "data_digest": data_digest,
                "ranks": world.size,
                "version": __version__,
            }
            log.event("done", step=cursor.step)
            log.flush(LAST_SAVE_S)
            run.write_json("DONE.json", done)
        done = world.broadcast_object(done)
        stop.release()
        return done
    finally:
        batches.close()  # or else a process with a traceback would wait for its workers for ever
        checkpoints.close()
        if world.is_main and not (lease and lease.lost):
            log.flush()


def settle_buckets(network: nn.Module, recipe: Recipe, world: World) -> None:
    """One backward pass on nothing, after which DDP lays out its buckets anew, once and for all.

    The layout decides in which order more than two ranks' gradients are summed. Without this, the first step after a
    restart would sum in another order than the same step of an uninterrupted run, and their bits would part.
    """
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    views, device = recipe.views, world.device
    images = torch.zeros(2, 3, views.image_size, views.image_size, device=device)
    patches = torch.zeros(2 * views.patches, 3, views.patch_size, views.patch_size, device=device)
    with torch.autocast(device.type, PRECISIONS.get(recipe.train.precision), recipe.train.precision != "fp32"):
        embeddings = network(images, patches)
    sum(embedding.float().sum() for embedding in embeddings).backward()
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])
    network.zero_grad(set_to_none=True)


def train_step(
    recipe: Recipe, network: nn.Module, state: TrainState, world: World, epoch: int, share: Share, batch: Batch
) -> tuple[StepLoss, Tensor]:
    """One optimiser step on one global batch. Returns this rank's losses and all ranks' unit image embeddings."""
    seed, views, device = recipe.train.seed, recipe.views, world.device
    ids = batch.ids.numpy()
    images, patches = (
        apply_photometrics(
            pixels.to(device, non_blocking=True), draw_photometrics(views, seed, epoch, ids, elements), views
        )
        for pixels, elements in ((batch.images, [0]), (batch.patches, range(1, 1 + views.patches)))
    )
    rows = batch.rows.to(device, non_blocking=True)
    patch_negatives, image_negatives = (
        draw_negatives(recipe.loss, len(state.bank.memory), rows, negative_seeds(seed, epoch, ids, view))
        for view in (0, 1)
    )
    layout = memory_format(state.model.trunk)
    with torch.autocast(device.type, PRECISIONS.get(recipe.train.precision), recipe.train.precision != "fp32"):
        patch_embeddings, image_embeddings = network(images.to(memory_format=layout), patches.to(memory_format=layout))
    weights = torch.full((len(rows),), share.weight, device=device)
    result, embeddings = contrast(
        recipe.loss,
        state.bank,
        world,
        rows,
        patch_embeddings,
        image_embeddings,
        patch_negatives,
        image_negatives,
        weights,
    )
    mine = share.counts[world.rank]
    everywhere, everyone = gather_updates(world, rows[:mine], embeddings[:mine], share.counts)
    state.bank.update(everywhere, everyone)

    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(result.loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return result, everyone


@dataclass
class TrainState:
    """What a checkpoint holds besides the cursor: everything that a step changes."""

    model: PIRL
    bank: MemoryBank
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def to_dict(self, recipe: Recipe, data_digest: str) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "bank": self.bank.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "recipe": recipe.to_toml(),
            "data_digest": data_digest,
        }

    def load_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.bank.load_state_dict(saved["bank"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for parameter, values in self.optimizer.state.items():
            if (momentum := values.get("momentum_buffer")) is not None:
                # the fused step takes it to lie in memory as the parameter does (channels last), and would not notice
                values["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
        self.scaler.load_state_dict(saved["scaler"])


def resume(
    state: TrainState, checkpoints: Checkpoints, recipe: Recipe, data_digest: str, options: Options, world: World
) -> Cursor | None:
    """Load the newest checkpoint of this run into `state`; None where there is none."""
    check_same_run(options.out, recipe, data_digest)
    name = world.broadcast_object(checkpoints.newest() if world.is_main else None)
    found = checkpoints.load() if name else None
    commits = world.gather_objects(found[0].name if found else None)
    if len(set(commits)) > 1:
        raise CheckpointError(f"ranks found different checkpoints: {commits}", "check the storage of every node")
    if not found:
        return None
    commit, saved = found
    check_same_data(options.out, commit, data_digest)
    state.load_dict(saved)
    if world.is_main:
        say(f"resuming from {commit.name}: epoch {commit.cursor.epoch}, {commit.cursor.samples} samples into it")
    return commit.cursor


def check_same_run(out: str, recipe: Recipe, data_digest: str) -> None:
    """Refuse to go on with another recipe or other data than a run was started with."""
    run = open_storage(out)
    try:
        before = parse_recipe(run.read_bytes("config.toml").decode(), origin=f"{out}/config.toml")
    except StorageNotFoundError:
        return
    if before.digest() != recipe.digest():
        raise UsageError(
            f"{out} holds a run of another recipe:\n  " + "\n  ".join(before.differences(recipe)),
            "use the same settings to resume it, or another --out for a new run",
        )
    checkpoints = Checkpoints(run / "checkpoints")
    name = checkpoints.newest()
    with suppress(CheckpointError):  # a damaged one is for `resume` to tell, which may find an older one
        if name:
            check_same_data(out, checkpoints.commit(name), data_digest)


def check_same_data(out: str, commit: Commit, data_digest: str) -> None:
    if commit.data_digest in INCOMPLETE:
        raise UsageError(
            f"{out} was imported with {commit.data_digest}: training cannot go on from it",
            "evaluate or export it; to train, start a new run",
        )
    if commit.data_digest != data_digest:
        raise UsageError(
            f"{out} was trained on other data (digest {commit.data_digest[:12]}, these shards have {data_digest[:12]})",
            "use the same data to resume it, or another --out for a new run",
        )


def ends_milestone(cursor: Cursor, every_epochs: int, recipe: Recipe, rows: int) -> bool:
    """Whether this step ends an epoch whose checkpoint is kept for good."""
    at_end = cursor.step % recipe.steps_per_epoch(rows) == 0
    return every_epochs > 0 and at_end and (cursor.epoch + 1) % every_epochs == 0


def check_state(state: TrainState, loss: Tensor | None, world: World, meter: Meter) -> float | None:
    """Refuse to save a loss that is no number, or a bank that is not the same on every rank, as every rank applies the
    same updates. (Other numbers that are none are found in the copy that is saved.)

    Returns the loss of the global batch.
    """
    mine = 0.0 if loss is None else loss.item(), state.bank.checksum() if world.size > 1 else 0
    losses, sums = zip(*world.gather_objects(mine))
    if not all(map(math.isfinite, losses)):
        raise meter.not_finite(*losses)
    if len(set(sums)) > 1:
        raise TrainingError(f"the ranks' memory banks differ (sums {sums})", "this is a bug: please report it")
    return None if loss is None else sum(losses) / len(losses)


class StopSignal:
    """Stop signals, agreed on by all ranks at the same step, without making a step wait for it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked = False
        self._pending: tuple[Tensor, Any] | None = None
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._ask)

    def release(self) -> None:
        """Restore the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def agreed(self, save_due: bool) -> tuple[bool, bool]:
        """(stop, save): whether any rank was told to stop, and whether rank 0 finds a save due, a step ago."""
        mine = torch.tensor([int(self.asked), int(save_due and self.world.is_main)])
        if self.world.size == 1:
            return bool(mine[0]), bool(mine[1])
        before, self._pending = self._pending, (mine, dist.all_reduce(mine, group=self.world.control, async_op=True))
        if before is None:
            return False, False
        flags, work = before
        work.wait()
        return bool(flags[0]), bool(flags[1])


class Meter:
    """Measures steps, and reports the mean of each interval; values are read from the device only then."""

    def __init__(
        self,
        recipe: Recipe,
        loader: Loader,
        cursor: Cursor,
        world: World,
        options: Options,
        log: Log,
        live: TrainingMetrics,
    ) -> None:
        self.recipe, self.world, self.options, self.log, self.live = recipe, world, options, log, live
        self.loader = loader
        self.rows = rows = loader.dataset.rows
        self.total_steps = recipe.train.epochs * recipe.steps_per_epoch(rows)
        self.images_seen = cursor.epoch * (
            rows if recipe.train.last_batch == "keep" else rows - rows % recipe.train.batch_size
        )
        self.images_seen += cursor.samples
        self._before = cursor.seconds
        self._started = time.perf_counter()
        self._history: list[tuple[Cursor, int, Tensor]] = []
        """The interval's steps and the one before: where each ended, its images, its loss on this rank."""
        self._saving = self._history
        """The step whose state is being saved, or was last."""
        self._reset()
        self.sums = torch.zeros(5, device=world.device)

    def _reset(self) -> None:
        self._interval = time.perf_counter()
        self._steps = self._images = 0
        self._compute_s = 0.0
        self._history = self._history[-1:]

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def begin_step(self) -> None:
        self._step_started = time.perf_counter()
        self.live.clock.begin()

    def end_step(self, cursor: Cursor, rate: float, result: StepLoss, spread: Tensor, share: Share) -> None:
        self._compute_s += time.perf_counter() - self._step_started
        self.sums += torch.stack(
            [result.loss.detach(), result.patches, result.images, result.positive, result.negative]
        )
        self._history.append((cursor, share.size, result.loss.detach()))
        self._steps += 1
        self._images += share.size
        self.images_seen += share.size
        self.live.stepped(share.size)
        if cursor.step % self.options.log_every == 0 or cursor.step == self.total_steps:
            self.report(cursor, rate, spread)

    def report(self, cursor: Cursor, rate: float, embeddings: Tensor) -> None:
        means = (self.world.sum(self.sums.double()) / (self._steps * self.world.size)).tolist()
        self.sums.zero_()
        elapsed = time.perf_counter() - self._interval
        self.live.interval()
        if not math.isfinite(means[0]):
            raise self.not_finite(means[0])
        if self.world.is_main:
            position = cursor.epoch + cursor.samples / self.rows
            speed = self._images / elapsed
            left = (self.total_steps - cursor.step) * elapsed / self._steps
            line = {
                "step": cursor.step,
                "epoch": position,
                "loss": means[0],
                "loss_patches": means[1],
                "loss_images": means[2],
                "lr": rate,
                "images_per_s": speed,
                "step_s": elapsed / self._steps,
                "data_wait_s": (elapsed - self._compute_s) / self._steps,
                "time_s": cursor.seconds,
                "pos_similarity": means[3],
                "neg_similarity": means[4],
                "embedding_std": float(embeddings.float().std(0).mean() * math.sqrt(embeddings.shape[1])),
            }
            self.log.step(**line)
            say(
                f"epoch {position:6.2f}/{self.recipe.train.epochs}  step {cursor.step}/{self.total_steps}  "
                f"loss {means[0]:.4f}  lr {rate:.4g}  {speed:.0f} images/s  "
                f"waited {(1 - self._compute_s / elapsed) * 100:.0f}%  left {duration(left)}",
                **line,
            )
        self._reset()

    def not_finite(self, *losses: float, where: str = "") -> TrainingError:
        """The error for losses that are no numbers, or for such numbers in the state that was to be saved (`where`),
        with the batch that made them.

        All ranks come here together: the first step that went wrong may have done so on one of them only.
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
            "the last checkpoint is from before, events.jsonl has all ids; look at these images, lower optim.base_lr "
            "or use train.precision=fp32",
        )

    def saving(self) -> None:
        """The state of the last step is about to be saved."""
        self._saving = self._history[-1:]

    def saved(self, commit: Commit, seconds: float) -> None:
        self.log.event("checkpoint", step=commit.cursor.step, bytes=commit.bytes, seconds=round(seconds, 3))


def plan(spec: TrainingSpec) -> list[str]:
    """Check recipe, data and run, and return in a few lines what a training would do."""
    recipe = spec.recipe
    manifest = Manifest.load(open_storage(spec.data))
    recipe.check_data(manifest.images)
    check_run_output(spec.out, data=spec.data)
    check_same_run(spec.out, recipe, manifest.digest)
    newest = Checkpoints(open_storage(spec.out) / "checkpoints").newest()
    rows = recipe.rows(manifest.images)
    return [
        f"{recipe.name}: {count(recipe.train.epochs, 'epoch')} of {count(rows, 'image')}, "
        f"{count(recipe.steps_per_epoch(rows), 'step')} each, in batches of {recipe.train.batch_size}",
        f"learning rate {recipe.learning_rate:g}, {recipe.loss.negatives:,} negatives, "
        f"memory bank of {rows * recipe.model.embedding_dim * 4 / 2**20:.1f} MiB",
        f"in {count(spec.processes or default_processes(), 'process', 'processes')}, to {spec.out}, "
        f"from {newest or 'the start'}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the JSON file says: one rank under `torchrun`, else all ranks of this machine."""
    arguments = sys.argv[1:] if argv is None else argv

    def work() -> int:
        if len(arguments) != 1:
            raise UsageError(
                "python -m pirl.train takes one argument, the JSON file of a specification",
                "use `pirl train`; with --dry-run --json it prints such a file",
            )
        spec = TrainingSpec.read(arguments[0])
        if "RANK" not in os.environ:
            plan(spec)  # a mistake costs nothing as long as no process is started
            return run_ranks("pirl.train", arguments, spec.processes)
        logs.start()
        world = start_world(spec.timeout_s)
        try:
            train(spec.recipe, with_workers(spec, world), world)
        finally:
            stop_world(world)
        return 0

    return report_outcome(work)


def with_workers(spec: TrainingSpec, world: World) -> TrainingSpec:
    """Return the specification with a number of loading processes, which -1 leaves to this machine."""
    if spec.workers >= 0:
        return spec
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return spec.model_copy(update={"workers": loading_processes(spec.recipe, world.size, ranks_here)})


if __name__ == "__main__":
    sys.exit(main())
