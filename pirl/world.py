"""Ranks from the environment of `torchrun`, and the few collectives that PIRL needs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .device import DeviceTimeoutError, wait_for_device
from .errors import PirlError, TrainingError, UsageError

T = TypeVar("T")

gather_single = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # the name changed in torch 2.14


@dataclass
class World:
    """The processes of one training. Without `torchrun` it is this process alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None
    """A gloo group for messages between hosts, so that none of them waits for a GPU."""
    store: Any = None
    """Key-value store of the ranks, kept by rank 0."""
    timeout_s: float = 600.0
    """Longest wait for another rank."""
    moment: str = "the start"
    """Step under way, for messages: "step 12"."""

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def all_gather(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """Concatenate the ranks' (n_r, ...) tensors in rank order, where rank r has `counts[r]` rows. No gradient."""
        if self.size == 1:
            return tensor
        most = max(counts)
        padded = tensor.new_zeros((most, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        everyone = padded.new_empty((self.size * most, *tensor.shape[1:]))
        gather_single(everyone, padded)
        if all(count == most for count in counts):
            return everyone
        return torch.cat([everyone[rank * most : rank * most + count] for rank, count in enumerate(counts)])

    def sum_scatter(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """Return the sum over ranks of this rank's rows of (sum of counts, C), of which rank r gets `counts[r]`.

        NCCL reduces and scatters. Elsewhere every rank adds up what it gets, always in rank order.
        """
        if self.size == 1:
            return tensor
        most = max(counts)
        padded = tensor.new_zeros((self.size, most, *tensor.shape[1:]))
        for part, rows in zip(padded, tensor.split(counts)):
            part[: len(rows)] = rows
        if tensor.is_cuda:
            total = torch.empty_like(padded[0])
            dist.reduce_scatter_tensor(total, padded)
        else:
            received = torch.empty_like(padded)
            dist.all_to_all_single(received, padded)
            total = received.sum(0)
        return total[: counts[self.rank]]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; return the tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Copy the values of rank `source` into the tensor of every rank; return it."""
        if self.size > 1:
            dist.broadcast(tensor, src=source)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's picklable value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def of_main(self, call: Callable[[], T]) -> T:
        """Return on every rank what `call` returns on rank 0; raise on every rank the `PirlError` that it raises."""
        answer, refusal = None, None
        if self.is_main:
            try:
                answer = call()
            except PirlError as error:
                refusal = error
        answer, refusal = self.broadcast_object((answer, refusal))
        if refusal:
            raise refusal
        return answer

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.control)
        return everyone

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def wait_for_device(self) -> None:
        """Wait until this rank's device has done all that is queued, no longer than for another rank."""
        wait_for_device(self.device, self.timeout_s)


def start_world(timeout_s: float = 600) -> World:
    """Join the process group that `torchrun` describes in the environment; gloo on CPU, NCCL on CUDA devices."""
    rank, size, local_rank = _placement()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"this machine has {torch.cuda.device_count()} GPUs and local rank {local_rank} needs its own",
                "start at most one process per GPU",
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    world = World(rank, size, local_rank, device, timeout_s=timeout_s)
    if size > 1:
        timeout = timedelta(seconds=timeout_s)
        if device.type == "cpu":
            dist.init_process_group("gloo", timeout=timeout)
            world.control = dist.group.WORLD
        else:  # NCCL's watchdog aborts the process, so the gloo group gets the shorter timeout and reports first
            dist.init_process_group("nccl", timeout=2 * timeout)
            world.control = dist.new_group(backend="gloo", timeout=timeout)
        world.store = _open_store(world, timeout)
    return world


def _placement() -> tuple[int, int, int]:
    """Return rank, number of ranks and local rank from the environment, or raise `UsageError` with every problem."""
    problems, values = [], {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    for name, default in values.items():
        text = os.environ.get(name, str(default))
        value = parse_number(text)
        if value is None:
            problems.append(f"{name} is {text!r}, not a number")
        values[name] = value or 0
    rank, size, local_rank = values.values()
    if not problems and not 0 <= rank < size:
        problems.append(f"RANK is {rank}, expected less than WORLD_SIZE={size}")
    if not problems and local_rank > rank:
        problems.append(f"LOCAL_RANK is {local_rank}, expected at most RANK={rank}")
    if not problems and size > 1:
        port = os.environ.get("MASTER_PORT", "")
        if not is_port(port):
            problems.append(f"MASTER_PORT is {port!r}, expected a number from 1 to 65535")
        if not os.environ.get("MASTER_ADDR"):
            problems.append("MASTER_ADDR is not set, expected the host of rank 0")
    if problems:
        raise UsageError(
            "environment variables are wrong: " + "; ".join(problems), "unset them and start training with `pirl train`"
        )
    return rank, size, local_rank


def parse_number(text: str) -> int | None:
    """Return the non-negative integer that `text` writes in decimal digits, or None."""
    return int(text) if text.isascii() and text.isdigit() else None


def is_port(text: str, least: int = 1) -> bool:
    """Return whether `text` is a port number of at least `least`."""
    value = parse_number(text)
    return value is not None and least <= value < 65536


def _open_store(world: World, timeout: timedelta) -> dist.Store:
    """Open a key-value store that rank 0 keeps.

    `torchrun` keeps that of the process group in the launcher, and a checkpoint must be published without it.
    """
    server = (
        dist.TCPStore("localhost", 0, is_master=True, timeout=timeout, wait_for_workers=False)
        if world.is_main
        else None
    )
    port = world.broadcast_object(server.port if server else None)
    return server or dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timeout)


def stop_world(world: World) -> None:
    """Leave the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined_world(timeout_s: float) -> Iterator[World]:
    """Be a rank of the world inside.

    After an error GPUs are left as they are: to leave their group could wait for a stalled one until the watchdog of
    NCCL aborts the process. The process ends.
    """
    world = start_world(timeout_s)
    try:
        yield world
    except BaseException:
        if world.device.type == "cpu":
            stop_world(world)
        raise
    stop_world(world)


LOST_PEER = ("onnection closed by peer", "onnection reset by peer", "roken pipe", "remote process exited")
TIMED_OUT = ("Timed out waiting", "Application timeout")  # gloo's words
REPORT_S = 10.0  # time for the other ranks to notice that a collective has failed


@contextmanager
def report_stragglers(world: World) -> Iterator[None]:
    """Raise a `TrainingError` with the stalled ranks where a collective times out.

    Each rank whose collective fails sets its key in the key-value store of the process group; a rank without a key has
    stalled.
    """
    try:
        yield
    except RuntimeError as error:
        timed_out = _mentions(error, TIMED_OUT)
        if not (timed_out or lost_peer(error)):
            raise
        missing = _missing(world, wait_s=REPORT_S if timed_out else 0) if world.size > 1 else []
        if isinstance(error, DeviceTimeoutError) and not missing:
            raise TrainingError(
                f"the device of rank {world.rank} has not finished its work within {world.timeout_s:g} s at "
                f"{world.moment}",
                "look at it (nvidia-smi, dmesg) and at the network between the GPUs, then run the same command again "
                "to continue; --timeout-s sets the time",
            ) from error
        if world.size == 1 or not timed_out:
            raise  # secondary failure: the peer reports the cause
        subject = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else "a rank"
        raise TrainingError(
            f"{subject} did not answer within {world.timeout_s:g} s at {world.moment}",
            "look at that process and its machine, then run the same command again to continue; --timeout-s sets the "
            "time",
        ) from error


def _missing(world: World, wait_s: float) -> list[int]:
    """Return the ranks that have not reported a failed collective within `wait_s`; [] where it cannot be known."""
    store = dist.distributed_c10d._get_default_store()
    keys = [f"pirl/failed/{rank}" for rank in range(world.size)]
    try:
        store.set_timeout(timedelta(seconds=REPORT_S))
        store.set(keys[world.rank], world.moment)
        deadline = time.monotonic() + wait_s
        while not (complete := store.check(keys)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [] if complete else [rank for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:  # the store has gone with the process that keeps it
        return []


def lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective has failed because another rank has ended."""
    return _mentions(error, LOST_PEER)


def _mentions(error: RuntimeError, words: Sequence[str]) -> bool:
    return any(part in str(error) for part in words)
