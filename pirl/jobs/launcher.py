"""From a recipe to a finished training on a cluster, by a small state machine.

    ABSENT --create--> PENDING --all pods run--> RUNNING --the operator says so--> SUCCEEDED --DONE.json--> done
       |                  ^  |                    ^   |
       `-----adopt--------'  `---> SUSPENDED      |   v a pod ended, was deleted, or its node is gone
                              in a Kueue queue   RESTARTING

    PENDING, RESTARTING   -- longer than start_s, or pull_s without hope --> failed, with what keeps the pods
    RUNNING               -- progress_s without a new step ---------------> failed, with the last step and lines
    any of them           -- run_s; the operator gave up; settings that cannot work --> failed, with the pods' ends
    any of them           -- the job is gone ------------------------------> lost: somebody deleted it
    any of them           -- SIGTERM --------------------------------------> stopped: the job is deleted, unless `leave`

The state is read from the cluster at each turn and kept nowhere, so a launcher that was killed is started again, finds
the job by its name, and goes on. While the API server does not answer, all clocks stand still.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

from ..config import Recipe, load_recipe
from ..errors import (
    EXIT_USAGE,
    PirlError,
    PreemptedError,
    StorageError,
    StorageNotFoundError,
    TrainingError,
    UsageError,
)
from ..logs import readable, say, write
from ..shards import Manifest
from ..storage import S3Storage, open_storage
from ..text import duration
from ..train import plan
from ..training.spec import Options
from .cluster import Cluster, ClusterError, UnreachableError, pod_index
from .diagnose import End, conditions, ends, is_running, is_well, troubles
from .pod import SPEC_HASH, Object
from .pytorchjob import build_job
from .settings import JobSettings
from .watch import LogStream, Progress

POLL_S = 2.0
OUTAGE_S = 900.0
"""Longest that the API server, or storage at the end, may not answer before the launcher gives up. The job goes on."""


class State(Enum):
    ABSENT = "absent"
    SUSPENDED = "suspended"
    PENDING = "pending"
    RUNNING = "running"
    RESTARTING = "restarting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


def observe(job: Object | None, pods: Sequence[Object], nodes: int, ran: bool) -> State:
    """The state that the cluster's objects show. `ran`: whether all pods have been seen running before."""
    if job is None:
        return State.ABSENT
    true = {item["type"] for item in conditions(job) if item["status"] == "True"}  # in no order that could be trusted
    if "Failed" in true:
        return State.FAILED
    if "Succeeded" in true:
        return State.SUCCEEDED
    if "Suspended" in true or job["spec"].get("runPolicy", {}).get("suspend"):
        return State.SUSPENDED
    if sum(map(is_well, pods)) >= nodes:
        return State.RUNNING
    return State.RESTARTING if ran else State.PENDING


@dataclass
class Clocks:
    """Seconds, counted only while the cluster answers."""

    state: float = 0.0
    """In this state."""
    hopeless: float = 0.0
    """With something in the way that waiting does not mend."""
    still: float = 0.0
    """Running without a new step."""
    all: float = 0.0
    """Not suspended."""


class Stopped(BaseException):
    """A signal told the launcher to stop."""


def launch_job(
    recipe: str,
    options: Options,
    settings: JobSettings,
    overrides: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
) -> None:
    """Train on the cluster to the end of the recipe, as a new job or with the one that is there.

    Returns when the job has succeeded and the run's completion marker is in storage. Raises `TrainingError` with the
    diagnosis, `UsageError` where nothing was started, `PreemptedError` after a SIGTERM.
    """
    resolved, body = prepare(recipe, options, settings, overrides, labels)
    Launcher(resolved, options, settings, body, Cluster(settings.namespace)).run()


def prepare(
    recipe: str,
    options: Options,
    settings: JobSettings,
    overrides: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
) -> tuple[Recipe, Object]:
    """Check recipe, data and run as a training on this machine does; returns the recipe and the job to create."""
    for name, uri in (("data", options.data), ("out", options.out)):
        if not isinstance(open_storage(uri), S3Storage):
            raise UsageError(f"--{name} {uri} is on this machine, where pods cannot see it", "use s3://bucket/prefix")
    plan(recipe, options, overrides)
    resolved = load_recipe(recipe, overrides)
    return resolved, build_job(resolved, options, settings, labels)


@dataclass
class Launcher:
    """One job, from its creation or adoption to its end."""

    recipe: Recipe
    options: Options
    settings: JobSettings
    body: Object
    cluster: Cluster
    poll_s: float = POLL_S
    outage_s: float = OUTAGE_S
    seen_ends: dict[tuple[str, int], End] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name: str = self.body["metadata"]["name"]
        self.storage = open_storage(self.options.out)
        self.progress = Progress(self.storage, every_s=max(5.0, self.poll_s))
        self.log = LogStream(self.cluster)

    def run(self) -> None:
        """To the end, whatever it is."""
        if self._done():
            say("launcher: this run is complete: nothing to do")
            return
        self.uid = ""
        try:
            with _stop_signals():
                self.uid = self._create_or_adopt()
                self._follow()
        except Stopped:
            self._clean_up("told to stop", self.uid)  # KFP kills a step that it terminates within a second
            raise PreemptedError(
                f"the launcher was told to stop; job {self.name} "
                + ("goes on" if self.settings.leave else "is deleted"),
                "run the same command again to go on from the last checkpoint",
            ) from None
        except TrainingError:
            self._clean_up("failed")
            raise

    def _create_or_adopt(self) -> str:
        """The uid of the job that now trains this run. One of an earlier attempt that has ended makes room for it."""
        told = ""
        while True:
            job = self._ask(lambda: self.cluster.job(self.name))
            if job is None:
                created = self._ask(lambda: self.cluster.create(self.body))
                if created is not None:
                    say(f"launcher: created job {self.settings.namespace}/{self.name}")
                    return str(created["metadata"]["uid"])
                continue
            ended = observe(job, (), 1, False) in (State.SUCCEEDED, State.FAILED)
            if "deletionTimestamp" in job["metadata"]:
                news = "waiting for an earlier job of this name to be gone"
            elif ended:
                news = "replacing an earlier job of this run, which has ended"
                uid = job["metadata"]["uid"]
                self._ask(partial(self.cluster.delete, self.name, uid))
            else:
                self._check_same(job)
                say(f"launcher: adopted job {self.settings.namespace}/{self.name}, which is there already")
                return str(job["metadata"]["uid"])
            if news != told:
                say(f"launcher: {news}")
                told = news
            time.sleep(self.poll_s)

    def _check_same(self, job: Object) -> None:
        """Refuse to adopt a job that does something else than was asked for."""
        if self._is_same(job):
            return
        differences = _differences(self.body["spec"], job.get("spec"), "spec")
        raise UsageError(
            f"job {self.settings.namespace}/{self.name} trains this run already, with other settings:\n  "
            + "\n  ".join(differences or [f"it is not from this program (no matching {SPEC_HASH})"]),
            "use the same settings to adopt it, or delete it first: "
            f"kubectl delete pytorchjob {self.name} -n {self.settings.namespace}",
        )

    def _is_same(self, job: Object) -> bool:
        theirs, ours = job["metadata"].get("annotations", {}), self.body["metadata"]["annotations"]
        return theirs.get(SPEC_HASH) == ours[SPEC_HASH]

    def _follow(self) -> None:
        """Watch the job until it has succeeded, and raise on any other end."""
        clocks, state, ran = Clocks(), None, False
        before, told_at = time.monotonic(), time.monotonic()
        while True:
            job, pods = self._ask(lambda: (self.cluster.job(self.name), self.cluster.pods(self.name)))
            if job is not None and job["metadata"]["uid"] != self.uid:
                job = None
            pods = [pod for pod in pods if _owner(pod) == self.uid]
            now_state = observe(job, pods, self.settings.nodes, ran)
            ran = ran or now_state is State.RUNNING
            self._tell_ends(pods)
            for line in self.log.lines(pods[0]) if pods and pod_index(pods[0]) == 0 else ():
                write(sys.stdout, f"{line}\n")  # as it was written, so that what reads JSON lines can read them here
            stepped = self.progress.advanced()
            now = time.monotonic()
            passed, before = min(now - before, 60.0), now
            if now_state is not state:
                state, clocks.state, told_at = now_state, 0.0, float("-inf")
            clocks.state += passed
            clocks.all += passed if state is not State.SUSPENDED else 0.0
            if stepped:
                clocks.still = 0.0
            elif state is State.RUNNING and self.progress.known:
                clocks.still += passed

            if state is State.SUCCEEDED:
                self._require_done()
                say(f"launcher: job {self.name} has succeeded")
                return
            if state is State.ABSENT:
                raise self._lost()
            if state is State.FAILED:
                raise self._failed(job or {})
            if now - told_at > 60.0:
                say(f"launcher: {state.value}, {duration(clocks.state)}; {self.progress}")
                told_at = now
            self._check_settings()
            self._check_deadlines(state, clocks, passed, pods)
            time.sleep(self.poll_s)

    def _check_settings(self) -> None:
        """No restart mends a mistake in the settings."""
        wrong = [end for end in self.seen_ends.values() if end.exit_code == EXIT_USAGE]
        if wrong:
            raise TrainingError(f"{wrong[0]}:\n{_indent(wrong[0].lines)}", wrong[0].hint)

    def _check_deadlines(self, state: State, clocks: Clocks, passed: float, pods: list[Object]) -> None:
        wait = self.settings
        if state in (State.PENDING, State.RESTARTING):
            found = troubles(pods, self._events(pods))
            hopeless = [trouble for trouble in found if trouble.hopeless]
            clocks.hopeless = clocks.hopeless + passed if hopeless else 0.0
            if clocks.hopeless > wait.pull_s or clocks.state > wait.start_s:
                waited = clocks.hopeless if clocks.hopeless > wait.pull_s else clocks.state
                what = f"job {self.name} is {state.value} for {duration(waited)}"
                hint = (hopeless or found)[0].hint if found else self._look()
                raise TrainingError("\n  ".join([what, *map(str, hopeless or found or self._last_ends())]), hint)
        if clocks.still > wait.progress_s:
            raise TrainingError(
                f"job {self.name} runs, and has made no new step for {duration(clocks.still)} ({self.progress})"
                + "".join(f"\n  {trouble}" for trouble in troubles(pods, self._events(pods)))
                + "".join(f"\n  {end}" for end in self._last_ends()),
                "a rank or a network hangs: its node's state and the log above may tell; run the same command again to "
                "go on from the last checkpoint, with a larger job setting `progress_s` if steps are this slow",
            )
        if wait.run_s is not None and clocks.all > wait.run_s:
            raise TrainingError(
                f"job {self.name} has taken {duration(clocks.all)}, more than run_s allows ({self.progress})",
                "run the same command again, with a larger run_s, to go on from the last checkpoint",
            )

    def _tell_ends(self, pods: list[Object]) -> None:
        for end in ends(pods):
            if (end.uid, end.number) not in self.seen_ends:
                self.seen_ends[end.uid, end.number] = end
                if end.exit_code:
                    say(f"launcher: {end}")

    def _last_ends(self) -> list[str]:
        """The newest bad ends, with their last lines; several pods that say the same, once."""
        told: dict[str, str] = {}
        for end in reversed(self.seen_ends.values()):
            if end.exit_code:
                told.setdefault(end.lines, f"{end}:\n{_indent(end.lines)}")
        return list(told.values())[:4]

    def _events(self, pods: list[Object]) -> list[Object]:
        names = [self.name, *(pod["metadata"]["name"] for pod in pods if not is_running(pod))]
        return [event for name in names for event in self._ask(lambda name=name: self.cluster.events(name))]

    def _failed(self, job: Object) -> TrainingError:
        message = next((item.get("message", "") for item in conditions(job) if item["type"] == "Failed"), "")
        last = self._last_ends()
        hint = next((end.hint for end in reversed(self.seen_ends.values()) if end.exit_code), self._look())
        return TrainingError("\n  ".join([f"job {self.name} has failed: {message} ({self.progress})", *last]), hint)

    def _lost(self) -> TrainingError:
        if self._done():
            return TrainingError(f"job {self.name} is gone, the run is complete", "run the same command again")
        return TrainingError(
            f"job {self.name} was deleted by somebody else, at {self.progress}",
            "its checkpoints are kept: run the same command again to go on",
        )

    def _require_done(self) -> None:
        """A job has succeeded as soon as any of its pods has: rank 0's marker says that the training has."""
        if not self._ask(self._done, (UnreachableError, StorageError)):
            raise TrainingError(
                f"job {self.name} has succeeded, but {self.options.out}/DONE.json is not there",
                "do image and launcher have the same version, and the same storage? " + self._look(),
            )

    def _done(self) -> bool:
        """Whether the completion marker is there; an error where it is another training's."""
        try:
            done = self.storage.read_json("DONE.json")
        except StorageNotFoundError:
            return False
        expected = {
            "recipe_digest": self.recipe.digests(),
            "data_digest": {Manifest.load(open_storage(self.options.data)).digest},
        }
        wrong = [name for name, digests in expected.items() if done.get(name) not in digests]
        if wrong:
            raise UsageError(
                f"{self.options.out}/DONE.json is of another training ({', '.join(wrong)} differ)",
                "use another --out; image and launcher of different versions can do this too",
            )
        return True

    def _look(self) -> str:
        return f"kubectl describe pytorchjob {self.name} -n {self.settings.namespace}"

    def _clean_up(self, why: str, uid: str = "") -> None:
        """Delete the job if it is this launcher's and still there. With its `uid`, by one request and no other."""
        if self.settings.leave:
            return
        try:
            if not uid:
                job = self.cluster.job(self.name)
                if not job or not self._is_same(job) or observe(job, (), 1, False) is State.FAILED:
                    return  # what the operator has ended stays to be looked at
                uid = job["metadata"]["uid"]
            self.cluster.delete(self.name, uid)
            say(f"launcher: {why}: deleted job {self.name}")
        except ClusterError as error:
            say(f"launcher: {why}, but job {self.name} could not be deleted ({error.what}): it goes on")

    def _ask(self, question: Any, outage: tuple[type[PirlError], ...] = (UnreachableError,)) -> Any:
        """The answer, however often it takes to ask: the training does not need the API server, nor this launcher."""
        since = None
        while True:
            try:
                answer = question()
                if since is not None:
                    say(f"launcher: answered again after {duration(time.monotonic() - since)}")
                return answer
            except outage as error:
                now = time.monotonic()
                if since is None:
                    since = now
                    say(f"launcher: {error.what}; the training goes on, asking again")
                elif now - since > self.outage_s:
                    raise PirlError(
                        f"{error.what}, for {duration(now - since)}; job {self.name} is left as it is",
                        "run the same command again when it answers: it adopts the job",
                    ) from None
                time.sleep(self.poll_s)


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGINT raise `Stopped`, once."""
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


def _differences(ours: Any, theirs: Any, path: str) -> list[str]:
    """`path: there -> here` of each leaf of `ours` that is another one in `theirs`, which may have more."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [line for key in ours for line in _differences(ours[key], theirs.get(key), f"{path}.{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [line for index, (a, b) in pairs for line in _differences(a, b, f"{path}[{index}]")]
    return [] if ours == theirs else [f"{path}: {theirs!r} -> {ours!r}"]


def _owner(pod: Object) -> str:
    return next((owner["uid"] for owner in pod["metadata"].get("ownerReferences", ())), "")


def _indent(text: str) -> str:
    return "\n".join(f"    {readable(line)}" for line in text.splitlines()[-12:])
