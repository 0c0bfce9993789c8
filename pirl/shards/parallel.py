"""Worker processes that hold one object and run its methods, or none of them for a single process."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pickle import PicklingError
from typing import Any

from pirl import logs
from pirl.errors import DataError, UsageError

_held: Any = None  # in a worker process: what its methods are called on


class Workers:
    """`run("method", tasks)` calls `held.method(task)` for each task in up to `processes` processes.

    The processes are spawned, not forked, since the caller may have threads; they end with their parent, even when
    that is killed. `held` is pickled to each of them once.
    """

    def __init__(self, held: Any, processes: int) -> None:
        self.held, self.processes = held, processes
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def run(self, method: str, tasks: Sequence[Any], *, alone: bool = False) -> Iterator[tuple[int, Any]]:
        """Yield (number of the task, result) as tasks complete; `alone`: in this process. The first error ends it."""
        if alone or self.processes == 1 or (len(tasks) <= 1 and self.pool is None):
            for number, task in enumerate(tasks):
                yield number, getattr(self.held, method)(task)
            return
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.processes, context, initializer=_start, initargs=(self.held,))
        yield from self._parallel(self.pool, method, tasks)

    def _parallel(self, pool: ProcessPoolExecutor, method: str, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        running: dict[Future[Any], int] = {}
        waiting = iter(enumerate(tasks))
        try:
            while True:
                while len(running) < 2 * self.processes and (task := next(waiting, None)):
                    running[self._submit(pool, method, task[1])] = task[0]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            # a process that was being started when another died is nobody's: the pool would wait for it for ever
            for process in list((pool._processes or {}).values()):
                process.kill()
            raise DataError(
                "a worker process died (killed, or out of memory)",
                "run the same command again with fewer processes; it continues where it was",
            ) from None

    @staticmethod
    def _submit(pool: ProcessPoolExecutor, method: str, task: Any) -> Future[Any]:
        try:
            return pool.submit(_call, method, task)  # the first ones start the processes, pickling what they hold
        except OSError:  # its pipes, closed by the thread that saw the death first
            raise BrokenProcessPool("a process died while it was started") from None
        except (PicklingError, AttributeError, TypeError) as error:
            raise UsageError(
                f"the data set cannot be handed to worker processes: {error}", "use 1 process, or one that pickles"
            ) from error


def _start(held: Any) -> None:
    global _held
    logs.configure()
    _held = held
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _call(method: str, task: Any) -> Any:
    return getattr(_held, method)(task)
