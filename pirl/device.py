"""A GPU as the host sees it: copies on a stream of their own, page-locked memory, and waiting with a deadline.

The host never waits in the driver, where a stalled rank would hold it for ever: it asks, and gives up in time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

POLL_S = 0.0002
ALIGNMENT = 16  # bytes; of each array in a message
_locked: list[Tensor] = []
"""Page-locked tensors of trainings that failed: their memory must not be given to others."""


class Event(Protocol):
    """A mark in the work that is queued on a device."""

    def query(self) -> bool:
        """Return whether the device has reached it."""


class DeviceTimeoutError(RuntimeError):
    """A device that has not reached a mark in time."""


def wait_for(event: Event, timeout_s: float) -> None:
    """Wait until the device has reached `event`; raise `DeviceTimeoutError` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > deadline:
            raise DeviceTimeoutError(f"Timed out waiting {timeout_s:g} s for the device")
        time.sleep(POLL_S)


def wait_for_device(device: torch.device, timeout_s: float) -> None:
    """Wait until a GPU has done all that is queued; raise `DeviceTimeoutError` after `timeout_s`."""
    if device.type == "cuda":
        event = torch.cuda.Event()
        event.record()
        wait_for(event, timeout_s)


class CopyStream:
    """The stream of a GPU on which batches are copied while a step runs."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Queue on this stream what is copied inside."""
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> Event:
        """Return the mark after the copies that are queued."""
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def hand_over(self, copied: Event, tensors: Iterable[Tensor]) -> None:
        """Let the stream of the steps use the tensors once they are copied; the host does not wait."""
        steps = torch.cuda.current_stream(self.stream.device)
        steps.wait_event(copied)  # type: ignore[arg-type]
        for tensor in tensors:
            tensor.record_stream(steps)


def page_locked(count: int, device: torch.device) -> Tensor:
    """Return (count,) uint8 of host memory that a device copies from while the host continues."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=device.type == "cuda")


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Return the arrays on the device, copied in one message without waiting for it."""
    starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
    message = page_locked(starts[-1], device)
    host = message.numpy()
    for start, array in zip(starts, arrays):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    words = message.to(device, non_blocking=True)
    return [
        words[start : start + array.nbytes].view(torch.from_numpy(array[:0].reshape(-1)).dtype).view(array.shape)
        for start, array in zip(starts, arrays)
    ]


def lock_pages(tensors: Sequence[Tensor]) -> None:
    """Keep shared tensors in physical memory, so that a GPU copies from them while the host continues."""
    for tensor in tensors:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))


def unlock_pages(tensors: Sequence[Tensor]) -> None:
    """Undo `lock_pages`, after the device has copied."""
    for tensor in tensors:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr()))


def abandon_pages(tensors: Sequence[Tensor]) -> None:
    """Keep page-locked tensors until the process ends: after an error, unlocking could wait for a stalled device."""
    _locked.extend(tensors)
