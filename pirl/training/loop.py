"""The training loop: load, step, log, save, from the newest checkpoint to the end of the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from time import monotonic
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .. import __version__, logs
from ..checkpoint import Cursor, Lease
from ..config import Recipe
from ..data import Share
from ..errors import PirlError, PreemptedError
from ..loader import Loader
from ..logs import info
from ..loss import Contrast, StepLoss
from ..memory import MemoryBank, RowsBank
from ..metrics import ALWAYS, Context, open_log
from ..model import build_model, memory_format
from ..optim import build_optimizer, learning_rate, set_learning_rate
from ..results import Completion
from ..run import Run
from ..shards import Manifest
from ..storage import open_storage
from ..world import World, report_stragglers
from .control import Control, Decision
from .feed import Feed, Inputs
from .initial_rows import fill_bank
from .meter import Meter
from .placement import cuts_bank
from .saver import FINAL_SAVE_RETRY_S, Saver
from .spec import Options
from .state import TrainState, check_same_run, load_initial, resume
from .step import train_step, warm_up_ddp


def train(recipe: Recipe, options: Options, world: World) -> Completion:
    """Train to the end of the recipe, from the newest checkpoint of this run if there is one.

    Returns the run's completion marker. Raises `PreemptedError` after a stop signal, when the state is saved.
    """
    run = Run.at(open_storage(options.out).patient())  # a rank waits for a storage that its launcher has seen
    manifest = Manifest.load(open_storage(options.data).patient())
    recipe.check_data(manifest.images)
    check_same_run(run, recipe, manifest.digest)
    if completion := run.completion():
        if world.is_main:
            info("this run is complete: up to date")
            run.update_recipe(recipe)
        return completion
    # checks the shards before anything is written
    loader = Loader(options.data, recipe, world, max(0, options.workers))
    with (
        report_stragglers(world),
        claim_lease(run, world) as lease,
        Trainer(recipe, options, world, run, manifest.digest, loader, lease) as trainer,
    ):
        return trainer.fit()


@contextmanager
def claim_lease(run: Run, world: World) -> Iterator[Lease | None]:
    """Hold the lease of the run on rank 0; all ranks raise if another training holds it."""
    lease, refusal = None, None
    if world.is_main:
        try:
            lease = Lease.claim(run.storage)
        except PirlError as error:
            refusal = error
    if refusal := world.broadcast_object(refusal):
        raise refusal
    with lease or nullcontext():
        yield lease


class Trainer:
    """One training on one rank, while no other training writes to the run. `lease` is rank 0's."""

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        world: World,
        run: Run,
        data_digest: str,
        loader: Loader,
        lease: Lease | None,
    ) -> None:
        self.recipe, self.options, self.world, self.run, self.lease = recipe, options, world, run, lease
        self.data_digest, self.loader, self.rows = data_digest, loader, loader.dataset.rows
        torch.manual_seed(recipe.train.seed)
        logs.bind(run=run.name, rank=world.rank)
        cut, reason = cuts_bank(options.bank, recipe, self.rows, world)
        if world.is_main:
            info(reason)
        checkpoints = run.checkpoints(keep=options.keep, world=world, keep_best=options.keep_best, guard=self._guard)
        newest = world.broadcast_object(checkpoints.newest() if world.is_main else None)
        self.state = build_state(recipe, self.rows, world, cut=cut, blank=newest is not None)
        self.initial = load_initial(self.state.model, run, world) if options.init and not newest else None
        steps = recipe.train.epochs * recipe.steps_per_epoch(self.rows)
        context = Context(run.storage, world, steps, recipe.train.epochs, self.state.model, self.state.bank, recipe)
        self.log = open_log(context, [*ALWAYS, *options.sink_names])
        self.meter = Meter(recipe, loader, world, options, self.log)
        self.saver = Saver(checkpoints, self.state, recipe, data_digest, world, self.log, self.meter)
        self.resumed = resume(self.state, checkpoints, run, data_digest, world, newest)
        self.cursor = self.resumed or Cursor()
        self.loss: StepLoss | None = None
        """Of the last step on this rank."""
        self._record_start()
        self.network = wrap_ddp(recipe, self.state.model, world)
        self.network.register_forward_hook(lambda *_: self.meter.clock.forward_done())
        self.control = Control(world)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with ExitStack() as stack:  # in reverse order, each of them even if one fails
            stack.callback(self.log.close)
            if not (self.lease and self.lease.lost):
                stack.callback(self.log.flush)
            stack.callback(self.control.close)
            stack.callback(self.saver.checkpoints.close)

    def fit(self) -> Completion:
        """Train from the cursor to the end of the recipe."""
        if not self.resumed:
            if self.recipe.memory.init == "forward":
                with report_stragglers(self.world):
                    self._fill_bank()
            self.saver.save(self.cursor)
        self.control.restart()
        self.state.model.train()
        batches = Feed(self.loader, self.recipe, self.world).batches(self.cursor.epoch, self.cursor.samples)
        try:
            with report_stragglers(self.world):  # before the loading processes end, which takes time
                self._fit(batches)
                return self._complete()
        finally:
            batches.close()  # ends the loading processes, for which a process with a traceback would wait for ever

    def _fill_bank(self) -> None:
        """Set the bank's rows by a pass of the untrained network; raise `PreemptedError` if a signal stops it."""
        for _ in fill_bank(self.recipe, self.state.model, self.state.bank, self.loader, self.world):
            self.control.settle()
            if self.control.agree(math.inf) is Decision.STOP:
                self.world.barrier()
                raise PreemptedError(
                    f"stopped by a signal before the first step of {self.run.uri}",
                    "run the same command again: the pass over the images that sets the bank starts again",
                )
            if self.lease:
                self.lease.check()

    def _fit(self, batches: Iterable[tuple[int, int, Share, Inputs]]) -> None:
        """Make all steps, and save the last one's state."""
        self._await_batch()
        for epoch, seen, share, inputs in batches:
            self.meter.clock.batch_came()
            self.control.settle()
            self._step(epoch, seen, share, inputs)
            every_s = self.saver.interval_s(self.options.checkpoint_every_s)
            decision = self.control.agree(every_s, self.saver.is_busy)
            if decision is Decision.STOP:
                self._preempt()
            self._save_if_due(decision)
            self._await_batch()
        self.world.moment = "the end"
        self.saver.save_final(self.cursor, self._last_loss())

    def _step(self, epoch: int, seen: int, share: Share, inputs: Inputs) -> None:
        rate = learning_rate(self.recipe, epoch + seen / self.rows)
        set_learning_rate(self.state.optimizer, rate)
        self.meter.begin_step()
        self.loss = train_step(self.recipe, self.network, self.state, self.world, epoch, share, inputs)
        self.cursor = replace(
            self.cursor,
            epoch=epoch,
            samples=seen + share.size,
            step=self.cursor.step + 1,
            seconds=self.meter.seconds(),
        )
        self.meter.end_step(self.cursor, rate, self.loss, share)
        if self.lease:
            self.lease.check()

    def _await_batch(self) -> None:
        self.meter.clock.wait()
        self.world.moment = f"step {self.cursor.step + 1}"

    def _save_if_due(self, decision: Decision) -> None:
        milestone = self._ends_milestone()
        if not milestone and decision is not Decision.SAVE:
            return
        started = monotonic()
        self.saver.save(self.cursor, self._last_loss(), milestone)
        if decision is Decision.SAVE:
            self.control.postpone(monotonic() - started)
        else:
            self.control.restart()

    def _ends_milestone(self) -> bool:
        """Return whether this step ends an epoch whose checkpoint is kept for good."""
        every = self.options.keep_every_epochs
        at_end = self.cursor.step % self.recipe.steps_per_epoch(self.rows) == 0
        return every > 0 and at_end and (self.cursor.epoch + 1) % every == 0

    def _preempt(self) -> None:
        """Save the state and raise `PreemptedError` on all ranks."""
        self.saver.save_final(self.cursor, self._last_loss())
        self.world.barrier()  # no rank leaves before the state is saved: the launcher ends all when one ends
        self.log.event("preempted", step=self.cursor.step)
        raise PreemptedError(
            f"stopped by a signal at step {self.cursor.step}; the state is saved in {self.run.uri}",
            "run the same command again to continue",
        )

    def _complete(self) -> Completion:
        """Write the completion marker on rank 0 and return it on all ranks."""
        completion = None
        if self.world.is_main:
            checkpoints = self.saver.checkpoints
            completion = Completion(
                steps=self.cursor.step,
                epochs=self.recipe.train.epochs,
                images_seen=self.meter.images_seen,
                seconds=round(self.cursor.seconds, 1),
                checkpoint=f"{checkpoints.storage.uri}/{checkpoints.newest()}",
                recipe=self.recipe.name,
                recipe_digest=self.recipe.digest(),
                data_digest=self.data_digest,
                ranks=self.world.size,
                version=__version__,
            )
            self.log.event("done", step=self.cursor.step)
            self.log.flush(FINAL_SAVE_RETRY_S)
            self.run.complete(completion)
        return self.world.broadcast_object(completion)

    def _record_start(self) -> None:
        """Continue meter and record at the cursor, and log how the training has started."""
        self.meter.start_at(self.cursor)
        self.log.resume(self.cursor.step)
        if not self.world.is_main:
            return
        self.run.save_recipe(self.recipe)
        if skipped := self.saver.checkpoints.skipped:
            self.log.event("checkpoint_skipped", checkpoints=skipped)
        start = "resume" if self.resumed else "start"
        origin = {"init": self.initial.source, "init_digest": self.initial.digest} if self.initial else {}
        self.log.event(start, step=self.cursor.step, ranks=self.world.size, version=__version__, **origin)

    def _guard(self) -> None:
        """Confirm the lease and write the record up to here, before a checkpoint is published, in its thread."""
        if self.lease:
            self.lease.confirm()
        self.log.flush()

    def _last_loss(self) -> torch.Tensor | None:
        return self.loss.loss if self.loss else None


def build_state(recipe: Recipe, rows: int, world: World, *, cut: bool = False, blank: bool = False) -> TrainState:
    """Return the state before the first step, on the rank's device.

    `cut`: with this rank's rows of the bank alone. `blank`: with rows of zeros, for a checkpoint to be loaded.
    """
    model = build_model(recipe).to(world.device)
    model = model.to(memory_format=memory_format(model.trunk))
    dim, seed = recipe.model.embedding_dim, recipe.train.seed
    only_visited = recipe.loss.negatives == "visited"
    blank = blank or only_visited or recipe.memory.init == "forward"
    if cut:
        bank: MemoryBank = RowsBank(rows, dim, recipe.memory, seed, world, blank=blank)
    else:
        bank = MemoryBank(rows, dim, recipe.memory, seed, world.size, blank=blank)
    if only_visited:
        bank.count_visits()
    criterion = Contrast(recipe.loss, world)
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.train.precision == "fp16")
    return TrainState(model, bank.to(world.device), criterion, build_optimizer(model, recipe), scaler)


def wrap_ddp(recipe: Recipe, model: nn.Module, world: World) -> nn.Module:
    """Return the model, which averages its gradients over the ranks if there are several."""
    if world.size == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel
    # no step reads running statistics, and a checkpoint has those of rank 0; torch 2.13 renamed the argument
    name = next(each for each in ("forward_sync_buffers", "broadcast_buffers") if each in signature(ddp).parameters)
    devices = [world.local_rank] if world.device.type == "cuda" else None
    options: dict[str, Any] = {"device_ids": devices, "gradient_as_bucket_view": True, name: False}
    network = ddp(model, **options)
    warm_up_ddp(network, recipe, world)
    return network
