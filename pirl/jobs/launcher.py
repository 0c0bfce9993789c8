"""From a program to its completion on a cluster, by a small state machine.

    ABSENT --create--> PENDING --all pods run--> RUNNING --the operator's verdict-> SUCCEEDED --marker--> done
       |                  ^  |                    ^   |
       `-----adopt--------'  `---> SUSPENDED      |   v a pod ended, was deleted, or its node is gone
                              in a Kueue queue   RESTARTING

    PENDING, RESTARTING   -- longer than start_s, or pull_s with a permanent trouble --> failed, with the troubles
    RUNNING               -- progress_s without a new step --> failed, with the last step and lines
    any of them           -- run_s; the operator gave up; settings that cannot work --> failed, with the pods' ends
    any of them           -- the job is gone --> lost: somebody deleted it
    any of them           -- SIGTERM --> stopped: the job is deleted, unless `leave`

The state is read from the cluster at each turn and kept nowhere. So a launcher that was killed is started again, finds
the job by its name, and continues. While the API server is unavailable, all clocks stand still; while storage is, that
of `progress_s`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from ..errors import EXIT_USAGE, PirlError, PreemptedError, StorageError, TrainingError, UsageError
from ..logs import info, readable, relay
from ..programs import Program
from ..text import duration
from .cluster import Cluster, UnavailableError
from .diagnose import End, ends, is_running, troubles
from .kind import SPEC_HASH, Object, Phase
from .pod import build_job, differences, is_same
from .settings import JobSettings
from .state import Clocks, State, observe
from .watch import LogStream, Progress, queue_reason

REPORT_S = 60.0  # between two lines on a state that lasts

T = TypeVar("T")


class Stopped(BaseException):
    """A signal that stops the launcher."""


class Launcher:
    """One job, from its creation or adoption to its end."""

    poll_s = 2.0
    outage_s = 900.0
    """Longest that API server or storage may be unavailable before the launcher gives up; the job stays."""

    def __init__(
        self,
        program: Program,
        settings: JobSettings,
        cluster: Cluster,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.program, self.settings, self.cluster = program, settings, cluster
        self.kind = cluster.kind
        self.objects = build_job(self.kind, program, settings, labels)
        self.body = self.objects[-1]
        self.name: str = self.body["metadata"]["name"]
        self.full_name = f"{settings.namespace}/{self.name}"
        self.progress = Progress(program, every_s=2.5 * self.poll_s)
        self.log, self.clocks = LogStream(cluster), Clocks()
        self.ends: dict[tuple[str, int], End] = {}
        self.uid = ""

    def run(self) -> None:
        """Run the job to its completion.

        Raise `TrainingError` with the diagnosis, `UsageError` if nothing was started, `PreemptedError` after SIGTERM.
        """
        if self.program.is_complete():
            info("launcher: this run is complete: up to date")
            self.program.update()
            return
        try:
            with _stop_signals():
                for name in self._retry(self.cluster.expire):
                    info(f"launcher: deleted job {name}, which ended longer than its ttl_s ago")
                self.uid = self._create_or_adopt()
                self._follow()
        except Stopped:
            self._clean_up("stopped by a signal", self.uid)  # KFP kills a step that it terminates within a second
            raise PreemptedError(
                f"the launcher was stopped by a signal; job {self.name} "
                + ("keeps running" if self.settings.leave else "is deleted"),
                "run the same command again to resume from the last checkpoint",
            ) from None
        except TrainingError:
            self._clean_up("failed")
            raise

    def _create_or_adopt(self) -> str:
        """Return the uid of the job that now runs the program; replace one of an earlier attempt that has ended."""
        reported = ""
        while True:
            job = self._retry(lambda: self.cluster.job(self.name))
            if job is None:
                created = self._retry(lambda: self.cluster.create(self.objects))
                if created is not None:
                    info(f"launcher: created job {self.full_name}")
                    self._check_queue(created)
                    return self._own(created)
                news = "waiting for objects of an earlier job to be deleted"
            elif "deletionTimestamp" in job["metadata"]:
                news = "waiting for an earlier job of this name to be gone"
            elif self._has_ended(job):
                news = "replacing an earlier job of this run, which has ended"
                self._retry(partial(self.cluster.delete, self.name, job["metadata"]["uid"]))
            else:
                self._check_same(job)
                info(f"launcher: adopted job {self.full_name}, which exists already")
                return self._own(job)
            if news != reported:
                info(f"launcher: {news}")
                reported = news
            time.sleep(self.poll_s)

    def _check_queue(self, created: Object) -> None:
        """Delete the job and raise if nothing manages its queue: it would start past the quota.

        Kueue suspends a job of a queue as the job is created, by a webhook.
        """
        queue = self.settings.queue
        if queue and self.kind.verdict(created).phase is not Phase.SUSPENDED:
            self._retry(partial(self.cluster.delete, self.name, created["metadata"]["uid"]))
            raise UsageError(
                f"queue {queue} is not managed: job {self.full_name} was not suspended, and is deleted",
                f"enable {self.kind.title} in Kueue (`pirl doctor --cluster` checks it), or omit `queue`",
            )

    def _own(self, job: Object) -> str:
        """Return the job's uid, after it owns what it refers to."""
        self._retry(partial(self.cluster.own, job))
        return str(job["metadata"]["uid"])

    def _has_ended(self, job: Object) -> bool:
        return observe(self.kind.verdict(job), (), 1, False) in (State.SUCCEEDED, State.FAILED)

    def _check_same(self, job: Object) -> None:
        """Refuse to adopt a job of another specification."""
        if is_same(job, self.body):
            return
        *parts, _ = self.kind.resources
        existing = [*(self._retry(partial(self.cluster.get, part, self.name)) for part in parts), job]
        pairs = zip(self.objects, existing, strict=True)
        changes = [line for new, old in pairs for line in differences(new["spec"], (old or {}).get("spec"))]
        raise UsageError(
            f"job {self.full_name} trains this run already, with other settings:\n  "
            + "\n  ".join(changes or [f"it is not from this program (no matching {SPEC_HASH})"]),
            f"use the same settings to adopt it, or delete it first: {self._kubectl('delete')}",
        )

    def _follow(self) -> None:
        """Watch the job until it has succeeded, and raise on any other end."""
        self.clocks = clocks = Clocks()
        reported_at = clocks.read_at
        while True:
            job, pods = self._retry(self._read)
            verdict = self.kind.verdict(job) if job else None
            state = observe(verdict, pods, self.settings.nodes, clocks.ran)
            self._report_pods(pods, final=state in (State.SUCCEEDED, State.FAILED))
            if clocks.enter(state, self.progress.advanced(), self.progress.available):
                reported_at = float("-inf")
            if state is State.SUCCEEDED:
                self._require_completion()
                info(f"launcher: job {self.name} has succeeded")
                return
            if state is State.ABSENT:
                raise self._lost()
            if state is State.FAILED:
                raise self._failed(verdict.message if verdict else "")
            if clocks.read_at - reported_at > REPORT_S:
                info(f"launcher: {state.value}, {duration(clocks.in_state)}; {self._news(state)}")
                reported_at = clocks.read_at
            self._check_settings()
            self._check_start(clocks, pods)
            self._check_progress(clocks, pods)
            time.sleep(self.poll_s)

    def _news(self, state: State) -> Any:
        waits = state is State.SUSPENDED
        return self._retry(partial(queue_reason, self.cluster, self.name)) if waits else self.progress

    def _read(self) -> tuple[Object | None, list[Object]]:
        """Return the job, if it is still this launcher's, and its pods."""
        job = self.cluster.job(self.name)
        is_own = job is not None and job["metadata"]["uid"] == self.uid
        return (job, self.cluster.pods(job)) if job and is_own else (None, [])

    def _report_pods(self, pods: list[Object], final: bool = False) -> None:
        """Print new ends of containers, and new lines of rank 0's log."""
        for end in ends(pods):
            if (end.uid, end.number) not in self.ends:
                self.ends[end.uid, end.number] = end
                if end.exit_code:
                    info(f"launcher: {end}")
        for line in self.log.lines(pods[0], final) if pods and self.kind.index(pods[0]) == 0 else ():
            relay(line)

    def _check_settings(self) -> None:
        """Fail on settings that the program has refused: no restart fixes them."""
        wrong = [end for end in self.ends.values() if end.exit_code == EXIT_USAGE]
        if wrong:
            raise TrainingError(f"{wrong[0]}:\n{_indent(wrong[0].lines)}", wrong[0].hint)

    def _check_start(self, clocks: Clocks, pods: list[Object]) -> None:
        """Fail on pods that have not started for too long."""
        if clocks.state not in (State.PENDING, State.RESTARTING):
            return
        present = self._troubles(pods)
        permanent = [trouble for trouble in present if trouble.permanent]
        clocks.permanent = clocks.permanent + clocks.turn if permanent else 0.0
        if clocks.permanent > self.settings.pull_s or clocks.in_state > self.settings.start_s:
            waited = clocks.permanent if clocks.permanent > self.settings.pull_s else clocks.in_state
            what = f"job {self.name} is {clocks.state.value} for {duration(waited)}"
            hint = (permanent or present)[0].hint if present else self._kubectl("describe")
            raise TrainingError("\n  ".join([what, *map(str, permanent or present or self._last_ends())]), hint)

    def _check_progress(self, clocks: Clocks, pods: list[Object]) -> None:
        """Fail on a job that has made no step for too long, or has taken too long."""
        wait = self.settings
        if clocks.without_step > wait.progress_s:
            what = f"job {self.name} runs without a new step for {duration(clocks.without_step)} ({self.progress})"
            raise TrainingError(
                "\n  ".join([what, *map(str, self._troubles(pods)), *self._last_ends()]),
                "a rank or the network is stalled: check the node and the log above; run the same command again to "
                "resume from the last checkpoint, with a larger job setting `progress_s` if steps are this slow",
            )
        if wait.run_s is not None and clocks.total > wait.run_s:
            raise TrainingError(
                f"job {self.name} has taken {duration(clocks.total)}, more than run_s allows ({self.progress})",
                "run the same command again, with a larger run_s, to resume from the last checkpoint",
            )

    def _troubles(self, pods: list[Object]) -> list[Any]:
        names = [*self.kind.involved(self.name), *(pod["metadata"]["name"] for pod in pods if not is_running(pod))]
        events = [event for name in names for event in self._retry(partial(self.cluster.events, name))]
        return troubles(pods, events, self.kind.refusals)

    def _last_ends(self) -> list[str]:
        """Return the newest bad ends with their last lines; several pods with the same lines count once."""
        by_lines: dict[str, str] = {}
        for end in reversed(self.ends.values()):
            if end.exit_code:
                by_lines.setdefault(end.lines, f"{end}:\n{_indent(end.lines)}")
        return list(by_lines.values())[:4]

    def _failed(self, message: str) -> TrainingError:
        bad = (end.hint for end in reversed(self.ends.values()) if end.exit_code)
        what = f"job {self.name} has failed: {message} ({self.progress})"
        return TrainingError("\n  ".join([what, *self._last_ends()]), next(bad, self._kubectl("describe")))

    def _lost(self) -> TrainingError:
        if self._retry(self.program.is_complete):
            return TrainingError(f"job {self.name} is gone, the run is complete", "run the same command again")
        return TrainingError(
            f"job {self.name} was deleted by somebody else, at {self.progress}",
            "its checkpoints are kept: run the same command again to resume",
        )

    def _require_completion(self) -> None:
        """Raise without the completion marker: a job has succeeded as soon as any of its pods has."""
        if not self._retry(self.program.is_complete):
            raise TrainingError(
                f"job {self.name} has succeeded, but the completion marker in {self.program.out} is missing",
                f"do image and launcher have the same version, and the same storage? {self._kubectl('describe')}",
            )

    def _kubectl(self, verb: str) -> str:
        return f"kubectl {verb} {self.kind.command} {self.name} -n {self.settings.namespace}"

    def _clean_up(self, why: str, uid: str = "") -> None:
        """Delete the job if it is this launcher's and exists. With its `uid`, by one request and no other."""
        if self.settings.leave:
            return
        try:
            if not uid:
                job = self._retry(partial(self.cluster.job, self.name))
                if not job or not is_same(job, self.body) or self._has_ended(job):
                    return  # what the operator has ended stays for inspection
                uid = job["metadata"]["uid"]
            self.cluster.delete(self.name, uid)
            info(f"launcher: {why}: deleted job {self.name}")
        except PirlError as error:
            info(f"launcher: {why}, but job {self.name} could not be deleted ({error.what}): it keeps running")

    def _retry(self, call: Callable[[], T]) -> T:
        """Return what `call` does; repeat it while API server or storage is unavailable, up to `outage_s`.

        The job needs neither the API server nor this launcher.
        """
        since = None
        while True:
            try:
                answer = call()
                if since is not None:
                    self.clocks.resume()
                    info(f"launcher: answered again after {duration(time.monotonic() - since)}")
                return answer
            except (UnavailableError, StorageError) as error:
                if not error.transient:
                    raise
                now = time.monotonic()
                if since is None:
                    since = now
                    info(f"launcher: {error.what}; the job keeps running, trying again")
                elif now - since > self.outage_s:
                    raise PirlError(
                        f"{error.what}, for {duration(now - since)}; job {self.name} is left as it is",
                        "run the same command again when it answers: it adopts the job",
                    ) from None
                time.sleep(self.poll_s)


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM and SIGINT, once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]

    def stop(*_: Any) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # the job is deleted first
        raise Stopped

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in map(readable, text.splitlines()[-12:]) if line)
