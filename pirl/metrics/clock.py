"""Time of a step by part, measured without making the host wait for the device."""

from __future__ import annotations

import time

import torch

PARTS = ("data", "forward", "backward", "other")


class StepClock:
    """Sums of seconds by part, from `wait` over `batch_came`, `begin` and `forward_done` to `end`.

    On a GPU the parts between are marks in its stream. `read` evaluates them, after the host has waited anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._sums = dict.fromkeys(PARTS, 0.0)
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]] = []
        self._ended: float | None = None
        self._waited_from = self._came = self._started = self._half = time.perf_counter()
        self._gpu_started = self._gpu_half = self._mark()

    def wait(self) -> None:
        """Note that the loop waits for the next batch from now on; the time since the last step is `other`."""
        now = time.perf_counter()
        if self._ended is not None:
            self._sums["other"] += now - self._ended
        self._waited_from = now

    def batch_came(self) -> None:
        """Note that the batch has come; the time to the start of its step is `other`."""
        now = time.perf_counter()
        self._sums["data"] += now - self._waited_from
        self._came = now

    def begin(self) -> None:
        """Note the start of a step."""
        self._started = self._half = time.perf_counter()
        self._sums["other"] += self._started - self._came
        self._gpu_started = self._gpu_half = self._mark()

    def forward_done(self) -> None:
        """Note the end of the forward pass."""
        self._half = time.perf_counter()
        self._gpu_half = self._mark()

    def end(self) -> float:
        """Return the seconds since the last step's end; for the first step, since its batch was requested."""
        now = time.perf_counter()
        if self.on_gpu:
            self._marks.append((self._gpu_started, self._gpu_half, self._mark()))
        else:
            self._sums["forward"] += self._half - self._started
            self._sums["backward"] += now - self._half
        before = self._waited_from if self._ended is None else self._ended
        self._ended = now
        return now - before

    def read(self) -> dict[str, float]:
        """Return the seconds by part since the last call."""
        for start, half, end in self._marks:
            self._sums["forward"] += start.elapsed_time(half) / 1000
            self._sums["backward"] += half.elapsed_time(end) / 1000
        self._marks.clear()
        sums, self._sums = self._sums, dict.fromkeys(PARTS, 0.0)
        return sums

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True) if self.on_gpu else None
        if event is not None:
            event.record()
        return event  # type: ignore[return-value]  # None on CPU, where no mark is read
