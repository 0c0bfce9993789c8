"""Progress in a TrainJob's status: the posted values, and a server that fails or hangs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pirl.metrics import Context, Log
from pirl.metrics.trainer_status import CA_FILE, TOKEN_FILE, URL, TrainerStatus
from pirl.storage import open_storage


class Server(ThreadingHTTPServer):
    """A status server that keeps what it was sent; it answers with `code`, after `delay_s`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.code, self.delay_s = 200, 0.0
        self.posts: list[tuple[str, dict[str, Any]]] = []


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_POST(self) -> None:
        """Keep token and body."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.posts.append((self.headers.get("Authorization", ""), body))
        time.sleep(self.server.delay_s)
        self.send_response(self.server.code)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Stay silent."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server, and the variables that Trainer sets."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv(URL, f"http://127.0.0.1:{server.server_address[1]}/status")
    monkeypatch.setenv(TOKEN_FILE, str(tmp_path / "token"))
    monkeypatch.delenv(CA_FILE, raising=False)
    monkeypatch.setattr(TrainerStatus, "every_s", 0.01)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def context(tmp_path: Path) -> Context:
    return Context(open_storage(str(tmp_path / "run")), steps=200)


def values(step: int, loss: float = 1.5) -> dict[str, float]:
    return {"step": step, "loss": loss, "lr": 0.1, "epoch": 1.0, "images_per_s": 100.0, "step_s": 0.1}


def test_progress_and_metrics_are_posted(server: Server, tmp_path: Path) -> None:
    sink = TrainerStatus(context(tmp_path))
    sink.step(values(50))
    time.sleep(0.01)
    sink.step(values(100))
    sink.close()
    token, body = server.posts[-1]
    status = body["trainerStatus"]
    assert token == "Bearer secret"
    assert status["progressPercentage"] == 50
    assert {"name": "loss", "value": "1.5"} in status["metrics"]
    assert status["estimatedRemainingSeconds"] >= 0
    assert status["lastUpdatedTime"].endswith("Z")


@pytest.mark.parametrize("fault", ["500", "closed", "token", "nan"])
def test_a_failure_does_not_reach_the_training(
    fault: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if fault == "500":
        server.code = 500
    elif fault == "closed":
        monkeypatch.setenv(URL, "http://127.0.0.1:1/status")
    elif fault == "token":
        monkeypatch.setenv(TOKEN_FILE, str(tmp_path / "absent"))
    log = Log(context(tmp_path).run, [TrainerStatus(context(tmp_path))])
    for step in range(1, 20):
        log.step(**values(step, float("nan") if fault == "nan" else 1.0))
        time.sleep(0.005)
    assert len(log.sinks) == 1
    log.close()
    shown = "".join(capsys.readouterr())
    assert shown.count("cannot be posted") == (0 if fault == "nan" else 1)


def test_a_server_that_hangs_does_not_hold_up_a_step(server: Server, tmp_path: Path) -> None:
    server.delay_s = 1.0
    sink = TrainerStatus(context(tmp_path))
    for step in range(1, 100):
        sink.step(values(step))
    assert len(server.posts) <= 1
    sink.close()


def test_without_a_server_it_is_a_no_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL, raising=False)
    sink = TrainerStatus(context(tmp_path))
    sink.step(values(1))
    sink.close()
    assert not sink._thread.ident
