"""G7: two ranks that train together, compared with two processes that train separately on the same two cores.

Both sides make the same step, on synthetic views, in processes of one thread. The ranks also sum their gradients and
gather the bank's new rows: that difference is measured. Before it, both ranks make 200 steps of a small network and
must then have the same bank, bit by bit.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks.harness import Result, compare, finish
from pirl import world as pirl_world
from pirl.config import Recipe, load_recipe
from pirl.data import Batch, Share
from pirl.loss import Contrast
from pirl.memory import MemoryBank
from pirl.model import build_model, memory_format
from pirl.optim import build_optimizer, set_learning_rate
from pirl.training.feed import deliver
from pirl.training.state import TrainState
from pirl.training.step import train_step, warm_up_ddp
from pirl.views import open_pretext
from pirl.world import World, start_world, stop_world

RANKS = 2
IMAGES = 10_000
MANY_STEPS = 200
MORE_THAN_GRADIENTS = 1.2e6  # bytes a step may send besides them
R50 = ("r50-200ep-linear", ["train.batch_size=16", "loss.negatives=1000"], 0.95)
R18 = (
    "r50-200ep-linear",
    [
        "train.batch_size=32",
        "loss.negatives=1000",
        "model.block=basic",
        "model.layers=[2,2,2,2]",
        "views.image_size=64",
        "views.patch_crop_size=99",
        "views.patch_size=32",
    ],
    0.85,
)


class Training:
    """Training of one process: a rank in a group of `world.size`, or alone on as many images."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe, self.world = recipe, world
        model = build_model(recipe)
        model = model.to(memory_format=memory_format(model.trunk))
        bank = MemoryBank(IMAGES, recipe.model.embedding_dim, recipe.memory)
        criterion, scaler = Contrast(recipe.loss, self.world), torch.amp.GradScaler(enabled=False)
        self.state = TrainState(model, bank, criterion, build_optimizer(model, recipe), scaler)
        set_learning_rate(self.state.optimizer, 0.003)
        self.network: nn.Module = model
        if world.size > 1:
            self.network = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            warm_up_ddp(self.network, recipe, world)
        self.mine = recipe.train.batch_size // RANKS
        generator = torch.Generator().manual_seed(world.rank)
        views, elements = recipe.views, open_pretext(recipe.views).shape
        self.pixels = [
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            for shape in ((self.mine, *views.image_shape), (self.mine * elements[0], *elements[1:]))
        ]
        self.number = 0

    def step(self) -> None:
        order = np.random.default_rng(self.number).permutation(IMAGES)[: self.recipe.train.batch_size]
        rows = order[self.world.rank :: RANKS]
        self.number += 1
        counts = [self.mine] * self.world.size
        share = Share(rows, 1 / self.mine, counts, self.mine * self.world.size, 0)
        ids = torch.from_numpy(rows)
        inputs = deliver(self.recipe, self.world, 0, Batch(ids, ids, *self.pixels))
        train_step(self.recipe, self.network, self.state, self.world, 0, share, inputs)

    def count_bytes(self) -> dict[str, int]:
        """Return the bytes of one step's collectives: this rank's gradients, and the bank's new rows of all ranks."""
        sent, gather = {"gradients": 0, "rows": 0}, pirl_world.gather_single

        def gather_counted(out: Any, mine: Any) -> Any:
            sent["rows"] += out.nbytes
            return gather(out, mine)

        def sum_counted(group, bucket):  # no annotations: DDP compares them with types
            sent["gradients"] += bucket.buffer().nbytes
            return allreduce_hook(group, bucket)

        self.network.register_comm_hook(None, sum_counted)
        pirl_world.gather_single = gather_counted
        try:
            self.step()
        finally:
            pirl_world.gather_single = gather
        return sent

    def bank_hash(self) -> str:
        return hashlib.sha256(self.state.bank.memory.numpy().tobytes()).hexdigest()


def serve(pipe: Connection, setting: tuple[str, list[str]], rank: int, port: int) -> None:
    """Serve the requests of the pipe, as one process of a side; port 0 means alone."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if port:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    world = start_world(timeout_s=300) if port else World(rank=0)
    training = Training(load_recipe(*setting), world)
    while (asked := pipe.recv()) is not None:
        name, arguments = asked
        pipe.send(getattr(training, name)(*arguments))
    stop_world(world)


class Side:
    """Two processes that train together or alone."""

    def __init__(self, setting: tuple[str, list[str]], together: bool) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1] if together else 0
        self.pipes, self.processes = [], []
        for rank in range(RANKS):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, setting, rank, port), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        """Send one request to both processes at once, and return their answers."""
        for pipe in self.pipes:
            pipe.send((name, arguments))
        return [pipe.recv() for pipe in self.pipes]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def efficiency(goal: str, title: str, recipe: str, overrides: list[str], required: float, repeats: int) -> Result:
    counting = Side((recipe, overrides), together=True)  # in processes of its own, because counting is slow
    sent = counting.ask("count_bytes")[0]
    counting.end()
    together, alone = (Side((recipe, overrides), both) for both in (True, False))
    try:
        parameters = sum(parameter.numel() for parameter in build_model(load_recipe(recipe, overrides)).parameters())

        def check() -> None:
            assert sent["gradients"] == 4 * parameters, sent
            assert sent["rows"] < MORE_THAN_GRADIENTS, sent
            assert len(set(together.ask("bank_hash"))) == 1

        # the ratio of times is the throughput of the two ranks as a share of that of the two separate processes
        result = compare(
            goal=goal,
            title=title,
            sides={"reference": lambda: alone.ask("step"), "ours": lambda: together.ask("step")},
            required=required,
            parity=check,
            repeats=repeats,
            facts={"gradient_bytes": sent["gradients"], "gathered_bytes": sent["rows"], "ranks": RANKS},
        )
        check()
        return result
    finally:
        together.end()
        alone.end()


def same_bank_after_many_steps() -> None:
    """Raise unless both ranks have the same bank, by hash, after 200 steps of a small network."""
    side = Side(("demo", ["train.batch_size=8", "loss.negatives=64", "train.precision=fp32"]), together=True)
    started = time.perf_counter()
    for _ in range(MANY_STEPS):
        side.ask("step")
    first, second = side.ask("bank_hash")
    side.end()
    assert first == second, "the ranks' banks differ"
    print(f"banks of both ranks after {MANY_STEPS} steps: the same ({time.perf_counter() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    same_bank_after_many_steps()
    finish(
        [
            efficiency("G7", "ResNet-50, 8 images a process: two ranks and two separate processes", *R50, repeats=5),
            efficiency("G7-r18", "ResNet-18 on 64 pixels, 16 images a process, the same", *R18, repeats=7),
        ]
    )
