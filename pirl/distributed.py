"""Ranks: what `torchrun` sets, and the few collectives that PIRL needs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UsageError


@dataclass
class World:
    """The processes of one training. Without `torchrun` it is this process alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None
    """A gloo group for messages between hosts, so that none of them waits for a GPU."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """Concatenate the ranks' (n_r, ...) tensors in rank order, where rank r has `counts[r]` rows. No gradient."""
        if self.size == 1:
            return tensor
        most = max(counts)
        padded = tensor.new_zeros((most, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        everyone = padded.new_empty((self.size * most, *tensor.shape[1:]))
        dist.all_gather_into_tensor(everyone, padded)
        if all(count == most for count in counts):
            return everyone
        return torch.cat([everyone[rank * most : rank * most + count] for rank, count in enumerate(counts)])

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.control)
        return everyone

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)


def start_world(timeout_s: float = 600) -> World:
    """Join the process group that `torchrun` describes in the environment; gloo on CPU, NCCL on CUDA devices."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = []
    for name in names:
        text = os.environ.get(name, {"WORLD_SIZE": "1"}.get(name, "0"))
        if not text.isdigit():
            raise UsageError(
                f"environment variable {name} is {text!r}, not a number", "start training with `pirl train`"
            )
        values.append(int(text))
    rank, size, local_rank = values
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"this machine has {torch.cuda.device_count()} GPUs and local rank {local_rank} wants its own",
                "start at most one process per GPU",
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    world = World(rank, size, local_rank, device)
    if size > 1:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        world.control = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    return world


def stop_world(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
