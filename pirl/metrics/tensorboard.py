"""Metrics as scalars of TensorBoard: `tensorboard --logdir RUN/sinks/tensorboard`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .background import Background


class TensorBoard(Background):
    """Event files; after a resume TensorBoard leaves out steps that are made again."""

    name = "tensorboard"

    def open(self, step: int) -> None:
        """Start an event file, and discard later steps of earlier ones."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events: Any = event_pb2
        self._summary: Any = summary_pb2.Summary
        self._writer: Any = EventFileWriter(str(self.folder), flush_secs=10)
        if step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, values: Mapping[str, float]) -> None:
        """Write the scalars of one step."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = self._summary(value=scalars)
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=int(values["step"]), summary=summary))

    def finish(self, state: str) -> None:
        """Close the event file."""
        self._writer.close()
