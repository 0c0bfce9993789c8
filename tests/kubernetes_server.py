"""A small API server: custom objects, pods, events and logs of one namespace, as a launcher sees them.

Objects live in `objects` by (plural, name). A test plays the operator: it sets statuses and adds pods. `unavailable`
makes every request fail in one of the ways of real servers.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

Object = dict[str, Any]
WAYS = ("503", "401", "reset", "html")
QUEUE = "kueue.x-k8s.io/queue-name"
SUSPENDED: dict[str, Callable[[Object], Object]] = {
    "pytorchjobs": lambda spec: spec["runPolicy"],
    "trainjobs": lambda spec: spec,
}
GROUPS = {
    "pytorchjobs.kubeflow.org",
    "trainjobs.trainer.kubeflow.org",
    "trainingruntimes.trainer.kubeflow.org",
    "localqueues.kueue.x-k8s.io",
    "toyjobs.toy.dev",
    "toyruntimes.toy.dev",
}


class KubernetesServer(ThreadingHTTPServer):
    """Listens at `url`."""

    daemon_threads = True

    def __init__(self, served: tuple[str, ...] = ("pytorchjobs",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.served = served
        self.objects: dict[tuple[str, str], Object] = {}
        self.events: list[Object] = []
        self.logs: dict[str, str] = {}
        self.unavailable = ""
        self.armed: list[tuple[str, str, float]] = []
        self.suspends = False
        self.forbidden: set[tuple[str, str]] = set()  # (verb, resource) that reviews of rights deny
        self.denials: list[str] = []  # of the webhook of the next jobs
        self.failed = 0
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._uids = itertools.count(1)

    def fail_on(self, pattern: str, way: str, seconds: float) -> None:
        """Begin an outage with the first request that matches, such as "POST .*/pytorchjobs", outside of another."""
        self.armed.append((pattern, way, seconds))

    def begin_due(self, request: str) -> None:
        """Begin the outage that begins with this request, if there is one."""
        with self.lock:
            due = [] if self.unavailable else [each for each in self.armed if re.match(each[0], request)]
            if due:
                self.armed.remove(due[0])
                self.unavailable = due[0][1]
                threading.Timer(due[0][2], setattr, (self, "unavailable", "")).start()

    def create(self, plural: str, body: Object) -> Object:
        """Store the object with a uid of its own."""
        with self.lock:
            body["metadata"]["uid"] = f"uid-{next(self._uids)}"
            self.objects[plural, body["metadata"]["name"]] = body
        return body

    def all(self, plural: str) -> list[Object]:
        """Return all objects of one type."""
        with self.lock:
            return [body for (kind, _), body in sorted(self.objects.items()) if kind == plural]

    def condition(self, plural: str, type_: str, message: str = "") -> None:
        """Set a condition of every object of one type, as its operator does."""
        for body in self.all(plural):
            item = {"type": type_, "status": "True", "message": message}
            body.setdefault("status", {}).setdefault("conditions", []).append(item)

    def delete(self, plural: str, name: str) -> None:
        """Delete an object and all that it owns."""
        with self.lock:
            uid = self.objects.pop((plural, name))["metadata"]["uid"]
            for key, body in list(self.objects.items()):
                owners = body["metadata"].get("ownerReferences", ())
                if key in self.objects and any(owner["uid"] == uid for owner in owners):
                    self.delete(*key)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: KubernetesServer

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def answer(self, code: int, content: Any) -> None:
        """Send JSON, or text as it is."""
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(code)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def fail(self) -> None:
        """Fail in the way that is set."""
        self.server.failed += 1
        if self.server.unavailable == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        elif self.server.unavailable == "html":
            self.answer(200, "<html>please log in</html>")
        else:
            self.answer(int(self.server.unavailable), {"message": "try later"})

    def handle_any(self) -> None:
        """Answer one request."""
        server, url = self.server, urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        server.requests.append(f"{self.command} {url.path}")
        server.begin_due(server.requests[-1])
        if server.unavailable:
            self.fail()
            return
        parts, query = url.path.strip("/").split("/"), parse_qs(url.query)
        if "namespaces" not in parts or parts[1] == "authorization.k8s.io":
            self.of_cluster(parts, body)
            return
        plural, rest = parts[parts.index("namespaces") + 2], parts[parts.index("namespaces") + 3 :]
        core = parts[0] == "api"
        if not core and plural not in server.served:
            self.answer(404, {"message": f"the server could not find {plural}"})
            return
        with server.lock:
            self.of_resource(plural, rest, query, body)

    do_GET = do_POST = do_DELETE = do_PATCH = handle_any

    def of_cluster(self, parts: list[str], body: Any) -> None:
        """Answer for the version, the types of a group, the rights of an account, or a list over all namespaces."""
        if parts == ["version"]:
            self.answer(200, {"gitVersion": "v1.34.4"})
        elif self.command == "POST":
            right = body["spec"]["resourceAttributes"]
            allowed = (right["verb"], right["resource"]) not in self.server.forbidden
            self.answer(201, {"status": {"allowed": allowed}})
        elif len(parts) == 3 and parts[0] == "apis":
            served = [plural for plural in self.server.served if f"{plural}.{parts[1]}" in GROUPS]
            self.answer(200 if served else 404, {"resources": [{"name": plural} for plural in served], "message": "no"})
        else:
            self.answer(200, {"items": self.server.all(parts[-1])})

    def of_resource(self, plural: str, rest: list[str], query: dict[str, list[str]], body: Any) -> None:
        """Answer for one type of object."""
        server, key = self.server, (plural, rest[0] if rest else "")
        if plural == "events":
            about = query["fieldSelector"][0].partition("=")[2]
            found = [event for event in server.events if event["involvedObject"]["name"] == about]
            self.answer(200, {"items": found})
        elif rest[1:] == ["log"]:
            self.answer(200, server.logs.get(rest[0], ""))
        elif self.command == "POST":
            name = body["metadata"]["name"]
            if (plural, name) in server.objects:
                self.answer(409, {"message": f"{name} already exists"})
            elif plural in SUSPENDED and server.denials:
                self.answer(403, {"message": server.denials.pop(0)})
            else:
                if server.suspends and QUEUE in body["metadata"].get("labels", {}) and plural in SUSPENDED:
                    SUSPENDED[plural](body["spec"])["suspend"] = True  # Kueue's webhook
                self.answer(201, server.create(plural, body))
        elif not rest:
            label, _, value = query["labelSelector"][0].partition("=")
            self.answer(
                200, {"items": [o for o in server.all(plural) if o["metadata"].get("labels", {}).get(label) == value]}
            )
        elif key not in server.objects:
            self.answer(404, {"message": f"{rest[0]} not found"})
        elif self.command == "PATCH":
            if self.headers["Content-Type"] != "application/merge-patch+json" or not isinstance(body, dict):
                self.answer(400, {"message": "error decoding patch"})
                return
            server.objects[key]["metadata"] |= body["metadata"]
            self.answer(200, server.objects[key])
        elif self.command == "DELETE":
            uid = ((body or {}).get("preconditions") or {}).get("uid")
            if uid and uid != server.objects[key]["metadata"]["uid"]:
                self.answer(409, {"message": "another uid"})
            else:
                server.delete(*key)
                self.answer(200, {})
        else:
            self.answer(200, server.objects[key])


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    """A running server, and KUBECONFIG that leads to it."""
    server = KubernetesServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": server.url}}],
        "users": [{"name": "test", "user": {}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    for module in ("kubernetes.config", "kubernetes.config.kube_config"):  # both read KUBECONFIG when imported
        monkeypatch.setattr(f"{module}.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
