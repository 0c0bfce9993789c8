"""A server that checks what the Kubeflow Model Registry documents: types, required fields, unique names, replacement.

Written from its OpenAPI description: `PATCH` replaces all custom properties, a name is unique (a version's within its
model), an unknown field or a property of another type is 400, and lists come in pages.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

BASE = {
    "id",
    "name",
    "description",
    "externalId",
    "customProperties",
    "createTimeSinceEpoch",
    "lastUpdateTimeSinceEpoch",
}
FIELDS = {
    "registered_models": BASE | {"owner", "state"},
    "model_versions": BASE | {"author", "state", "registeredModelId"},
    "artifacts": BASE
    | {"artifactType", "uri", "state", "modelFormatName", "modelFormatVersion", "storageKey", "storagePath"}
    | {"modelSourceKind", "modelSourceClass", "modelSourceGroup", "modelSourceId", "modelSourceName"},
}
STATES = {"registered_models": {"LIVE", "ARCHIVED"}, "model_versions": {"LIVE", "ARCHIVED"}}
VALUES = {
    "MetadataStringValue": ("string_value", str),
    "MetadataIntValue": ("int_value", str),
    "MetadataDoubleValue": ("double_value", float),
    "MetadataBoolValue": ("bool_value", bool),
}


class Refused(Exception):
    """The answer to a request that breaks the contract."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class ModelRegistryServer:
    """`versions` says which API versions it serves; `fail` may end a request before or after it took effect."""

    def __init__(self, versions: tuple[str, ...] = ("v1alpha3",), token: str = "") -> None:
        self.versions, self.token = versions, token
        self.objects: dict[str, list[dict[str, Any]]] = {kind: [] for kind in FIELDS}
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.writes_left: int | None = None
        self.answer_lost = False
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"registry": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.uri = f"model-registry+http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, url: str, authorization: str, body: bytes) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.requests.append(f"{method} {url}")
            split = urlsplit(url)
            match = re.fullmatch(r"/api/model_registry/(\w+)/(.+)", split.path)
            if not match or match[1] not in self.versions:
                return 404, {"code": "404", "message": "page not found"}
            if self.token and authorization != f"Bearer {self.token}":
                return 401, {"code": "401", "message": "unauthorized"}
            query = {key: values[0] for key, values in parse_qs(split.query).items()}
            try:
                return self._route(method, match[2], query, json.loads(body) if body else {})
            except Refused as refusal:
                if refusal.status == 400:
                    self.complaints.append(f"{method} {url}: {refusal.message}")
                return refusal.status, {"code": str(refusal.status), "message": refusal.message}

    def _route(self, method: str, path: str, query: dict[str, str], body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        routes: list[tuple[str, str, Callable[..., tuple[int, dict[str, Any]]]]] = [
            ("GET", r"(registered_models)", lambda kind: self._list(kind, query)),
            ("POST", r"(registered_models|model_versions)", lambda kind: self._create(kind, body)),
            ("GET", r"registered_model", lambda: self._find("registered_models", query)),
            ("PATCH", r"(registered_models|model_versions)/(\d+)", lambda kind, id: self._update(kind, id, body)),
            (
                "GET",
                r"registered_models/(\d+)/versions",
                lambda id: self._list("model_versions", query, "registeredModelId", id),
            ),
            ("GET", r"model_versions/(\d+)/artifacts", lambda id: self._list("artifacts", query, "_version", id)),
            ("POST", r"model_versions/(\d+)/artifacts", lambda id: self._create("artifacts", body, _version=id)),
        ]
        for wanted, pattern, act in routes:
            match = re.fullmatch(pattern, path)
            if match and method == wanted:
                return act(*match.groups())
        raise Refused(400, f"there is no {method} {path}")

    def _write(self, act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """One that dies before its n-th write, or after it without an answer."""
        if self.writes_left == 0:
            if self.answer_lost:
                act()
            raise Refused(500, "the server was stopped")
        if self.writes_left is not None:
            self.writes_left -= 1
        return act()

    def _list(self, kind: str, query: dict[str, str], key: str = "", value: str = "") -> tuple[int, dict[str, Any]]:
        found = [item for item in self.objects[kind] if not key or item.get(key) == value]
        size, start = int(query.get("pageSize", 100)), int(query.get("nextPageToken", 0) or 0)
        if not 0 < size <= 1000 or query.get("orderBy", "ID") not in ("ID", "CREATE_TIME", "LAST_UPDATE_TIME"):
            raise Refused(400, f"pageSize or orderBy: {query}")
        page = found[start : start + size]
        more = str(start + size) if start + size < len(found) else ""
        return 200, {"items": page, "nextPageToken": more, "pageSize": size, "size": len(page)}

    def _find(self, kind: str, query: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if "name" not in query:
            raise Refused(400, "name or externalId is required")
        for item in self.objects[kind]:
            if item["name"] == query["name"]:
                return 200, item
        raise Refused(404, f"no {kind} named {query['name']}")

    def _check(self, kind: str, body: dict[str, Any]) -> None:
        if unknown := body.keys() - FIELDS[kind]:
            raise Refused(400, f"unknown fields {sorted(unknown)}")
        if body.get("state", "LIVE") not in STATES.get(kind, {"LIVE", "UNKNOWN", "PENDING", "DELETED"}):
            raise Refused(400, f"state {body['state']}")
        for key, value in body.get("customProperties", {}).items():
            field, kind_of = VALUES.get(value.get("metadataType"), ("", type(None)))
            if set(value) != {"metadataType", field} or not isinstance(value[field], kind_of):
                raise Refused(400, f"custom property {key}: {value}")

    def _create(self, kind: str, body: dict[str, Any], **extra: str) -> tuple[int, dict[str, Any]]:
        self._check(kind, body)
        required = {"registered_models": ["name"], "model_versions": ["name", "registeredModelId"]}
        for field in required.get(kind, ["artifactType", "uri"]):
            if not body.get(field):
                raise Refused(400, f"{field} is required")
        parent = body.get("registeredModelId", "")
        if parent and not any(item["id"] == parent for item in self.objects["registered_models"]):
            raise Refused(404, f"no registered model {parent}")
        for item in self.objects[kind]:
            if item["name"] == body["name"] and item.get("registeredModelId", "") == parent:
                raise Refused(409, f"{body['name']} already exists")

        def act() -> dict[str, Any]:
            created = {"state": "LIVE", "customProperties": {}, **body, **extra, "id": str(self._next_id())}
            self.objects[kind].append(created)
            return created

        return 201, self._write(act)

    def _update(self, kind: str, id: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self._check(kind, body)
        if "name" in body or "registeredModelId" in body:
            raise Refused(400, "a name cannot be changed")
        found = next((item for item in self.objects[kind] if item["id"] == id), None)
        if found is None:
            raise Refused(404, f"no {kind} {id}")

        def act() -> dict[str, Any]:
            found.update(body)
            return found

        return 200, self._write(act)

    def _next_id(self) -> int:
        return 1 + sum(len(items) for items in self.objects.values())


class _Handler(BaseHTTPRequestHandler):
    registry: ModelRegistryServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for each answer

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, answer = self.registry.answer(self.command, self.path, self.headers.get("Authorization", ""), body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Not on the tests' output."""
