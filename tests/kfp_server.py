"""A server that checks what KFP's API (v2beta1) documents: paths, fields, types, required parameters and references.

Written from the backend's protobuf definitions and the checks of its API server: unknown fields are 400, a parameter
has the JSON type of its input, a reference leads to something, a cron expression has six fields.
"""

from __future__ import annotations

import json
import re
import threading
from datetime import UTC, datetime, timedelta
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

JSON_TYPES: dict[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int, float),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}
RUN = {"experiment_id", "display_name", "description", "pipeline_spec", "pipeline_version_reference"} | {
    "runtime_config",
    "service_account",
}
RECURRING = RUN | {"max_concurrency", "trigger", "mode", "no_catchup"}
PAGE = {"page_token", "page_size", "sort_by", "filter", "namespace"}


class Refused(Exception):
    """The answer to a request that breaks the contract."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class KfpServer:
    """`states` are what a run goes through, one each time it is asked for; `down` requests are answered with 503;
    `refuse` ends each request whose "METHOD path" matches it."""

    def __init__(self, token: str = "") -> None:
        self.token = token
        self.pipelines: list[dict[str, Any]] = []
        self.versions: list[dict[str, Any]] = []
        self.experiments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.schedules: list[dict[str, Any]] = []
        self.states = ["SUCCEEDED"]
        self.failed_tasks: list[str] = []
        self.down = 0
        self.refuse = ""
        self.page = False  # as a proxy that wants a login answers everything
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.complaints: list[str] = []
        self._count = 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"kfp": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> tuple[int, dict[str, Any]]:
        with self._lock:
            split = urlsplit(url)
            query = {key: values[0] for key, values in parse_qs(split.query).items()}
            self.requests.append(f"{method} {split.path}")
            self.bodies.append(body)
            if self.down and "/runs/" in split.path:
                self.down -= 1
                return 503, {"message": "no healthy upstream"}
            if self.token and headers.get("Authorization") != f"Bearer {self.token}":
                return 401, {"code": 16, "message": "unauthenticated"}
            try:
                if self.refuse and re.search(self.refuse, f"{method} {split.path}"):
                    raise Refused(500, "the server was stopped")
                return 200, self._route(method, split.path, query, headers, body)
            except Refused as refusal:
                if refusal.status == 400:
                    self.complaints.append(f"{method} {url}: {refusal.message}")
                return refusal.status, {"code": 3, "message": refusal.message}

    def _route(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes) -> dict[str, Any]:
        def data() -> dict[str, Any]:
            if headers.get_content_type() != "application/json":
                raise Refused(400, f"content type {headers.get_content_type()}")
            return json.loads(body)

        routes: list[tuple[str, str, Any]] = [
            ("GET", r"healthz", lambda: {"multi_user": False}),
            ("GET", r"pipelines", lambda: self._list("pipelines", self.pipelines, query, PAGE)),
            ("POST", r"pipelines", lambda: self._create_pipeline(data())),
            ("POST", r"pipelines/upload", lambda: self._upload_pipeline(query, headers, body)),
            ("POST", r"pipelines/upload_version", lambda: self._upload_version(query, headers, body)),
            ("GET", r"pipelines/([\w-]+)/versions", lambda id: self._list_versions(id, query)),
            ("GET", r"pipelines/[\w-]+/versions/([\w-]+)", self._get_version),
            ("GET", r"pipelines/([\w-]+)", lambda id: self._get(self.pipelines, "pipeline_id", id)),
            ("GET", r"experiments", lambda: self._list("experiments", self.experiments, query, PAGE)),
            ("GET", r"experiments/([\w-]+)", lambda id: self._get(self.experiments, "experiment_id", id)),
            ("POST", r"experiments", lambda: self._create_experiment(data())),
            ("POST", r"runs", lambda: self._create_run(data())),
            ("GET", r"runs/([\w-]+)", self._get_run),
            ("GET", r"recurringruns", lambda: self._list("recurringRuns", self.schedules, query, PAGE)),
            ("GET", r"runs", lambda: self._list("runs", self.runs, query, PAGE)),
            ("POST", r"recurringruns", lambda: self._create_schedule(data())),
            ("GET", r"recurringruns/([\w-]+)", lambda id: self._get(self.schedules, "recurring_run_id", id)),
            ("POST", r"recurringruns/([\w-]+):(enable|disable)", self._switch),
            ("DELETE", r"recurringruns/([\w-]+)", self._delete_schedule),
        ]
        for wanted, pattern, act in routes:
            match = re.fullmatch(f"/apis/v2beta1/{pattern}", path)
            if match and method == wanted:
                return act(*match.groups())
        raise Refused(404, f"there is no {method} {path}")

    def _new(self, kind: str) -> dict[str, Any]:
        """An id, and a time that is later than all before."""
        self._count += 1
        created = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self._count)
        return {kind: f"{kind.removesuffix('_id').replace('_', '-')}-{self._count}", "created_at": created.isoformat()}

    def _list(self, field: str, items: list[dict[str, Any]], query: dict[str, str], known: set[str]) -> dict[str, Any]:
        if unknown := query.keys() - known:
            raise Refused(400, f"unknown query {sorted(unknown)}")
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            if predicate["operation"] not in ("EQUALS", 1) or predicate["key"] not in ("name", "display_name"):
                raise Refused(400, f"filter {predicate}")
            items = [item for item in items if item["display_name"] == predicate["stringValue"]]
        key, _, order = (query.get("sort_by") or "created_at").partition(" ")
        if key not in ("created_at", "display_name", "name") or order not in ("", "asc", "desc"):
            raise Refused(400, f"sort_by {query['sort_by']}")
        items = sorted(items, key=lambda item: item[key], reverse=order == "desc")
        start, size = int(query.get("page_token") or 0), int(query.get("page_size") or 20)
        more = {"next_page_token": str(start + size)} if start + size < len(items) else {}
        return {field: items[start : start + size], "total_size": len(items), **more}

    def _get(self, items: list[dict[str, Any]], key: str, id: str) -> dict[str, Any]:
        for item in items:
            if item[key] == id:
                return item
        raise Refused(404, f"{key} {id} not found")

    def _create_pipeline(self, data: dict[str, Any]) -> dict[str, Any]:
        _known(data, {"display_name", "name", "description", "namespace", "tags"})
        if not data.get("display_name") and not data.get("name"):
            raise Refused(400, "a pipeline needs a name")
        if any(one["display_name"] == data["display_name"] for one in self.pipelines):
            raise Refused(409, f"{data['display_name']} already exists")
        self.pipelines.append({**self._new("pipeline_id"), **data})
        return self.pipelines[-1]

    def _upload_pipeline(self, query: dict[str, str], headers: Any, body: bytes) -> dict[str, Any]:
        _known(query, {"name", "display_name", "description", "namespace", "tags"})
        made = self._create_pipeline({"display_name": query["name"], "description": query.get("description", "")})
        self._add_version(made["pipeline_id"], query["name"], headers, body)
        return made

    def _upload_version(self, query: dict[str, str], headers: Any, body: bytes) -> dict[str, Any]:
        _known(query, {"name", "display_name", "pipelineid", "description", "tags"})
        self._get(self.pipelines, "pipeline_id", query.get("pipelineid", ""))
        return self._add_version(query["pipelineid"], query["name"], headers, body)

    def _add_version(self, pipeline_id: str, name: str, headers: Any, body: bytes) -> dict[str, Any]:
        if any((one["pipeline_id"], one["display_name"]) == (pipeline_id, name) for one in self.versions):
            raise Refused(409, f"{name} already exists")
        message = BytesParser().parsebytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body)
        parts = {part.get_param("name", header="content-disposition"): part for part in message.get_payload()}
        if set(parts) != {"uploadfile"}:
            raise Refused(400, f"parts {sorted(parts)}")
        documents = list(yaml.safe_load_all(parts["uploadfile"].get_payload(decode=True)))
        if "root" not in documents[0] or documents[0].get("schemaVersion") != "2.1.0":
            raise Refused(400, "no pipeline spec")
        spec = documents[0]
        if len(documents) == 2:
            spec = {"pipeline_spec": documents[0], "platform_spec": documents[1]}
        version = {"pipeline_id": pipeline_id, "display_name": name, "name": name, "pipeline_spec": spec}
        self.versions.append({**self._new("pipeline_version_id"), **version})
        return self.versions[-1]

    def _get_version(self, id: str) -> dict[str, Any]:
        return self._get(self.versions, "pipeline_version_id", id)

    def _list_versions(self, id: str, query: dict[str, str]) -> dict[str, Any]:
        self._get(self.pipelines, "pipeline_id", id)
        mine = [one for one in self.versions if one["pipeline_id"] == id]
        return self._list("pipeline_versions", mine, query, PAGE - {"namespace"})

    def _create_experiment(self, data: dict[str, Any]) -> dict[str, Any]:
        _known(data, {"display_name", "description", "namespace"})
        self.experiments.append({**self._new("experiment_id"), **data})
        return self.experiments[-1]

    def _check_run(self, data: dict[str, Any], known: set[str]) -> None:
        _known(data, known)
        if not isinstance(data.get("display_name"), str) or not data["display_name"]:
            raise Refused(400, "the name is empty")
        self._get(self.experiments, "experiment_id", data.get("experiment_id", ""))
        if ("pipeline_spec" in data) == ("pipeline_version_reference" in data):
            raise Refused(400, "either a spec or a reference")
        if reference := data.get("pipeline_version_reference"):
            if set(reference) != {"pipeline_id", "pipeline_version_id"}:
                raise Refused(400, f"reference {reference}")
            spec = self._get(self.versions, "pipeline_version_id", reference["pipeline_version_id"])["pipeline_spec"]
        else:
            spec = data["pipeline_spec"]
        config = data.get("runtime_config", {})
        _known(config, {"parameters", "pipeline_root"})
        inputs = spec.get("pipeline_spec", spec)["root"].get("inputDefinitions", {}).get("parameters", {})
        given = config.get("parameters", {})
        _known(given, set(inputs))
        for name, wanted in inputs.items():
            if name not in given:
                if "defaultValue" not in wanted and not wanted.get("isOptional"):
                    raise Refused(400, f"parameter {name} is not optional")
                continue
            types, value = JSON_TYPES[wanted["parameterType"]], given[name]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise Refused(400, f"input parameter {name} requires type {wanted['parameterType']}, got {value!r}")

    def _create_run(self, data: dict[str, Any]) -> dict[str, Any]:
        self._check_run(data, RUN)
        self.runs.append(
            {**self._new("run_id"), **data, "state": "PENDING", "storage_state": "AVAILABLE", "state_history": []}
        )
        return self.runs[-1]

    def _get_run(self, id: str) -> dict[str, Any]:
        run = self._get(self.runs, "run_id", id)
        run["state"] = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        told = bool(run["state_history"]) and run["state_history"][-1]["state"] == run["state"]
        run["state_history"].append({"state": run["state"]})
        tasks = []  # as the real one tells: every node of the workflow, of a step several, and what fails with them
        for name in ("shard-train", *self.failed_tasks):
            state = "SUCCEEDED"
            if name in self.failed_tasks:
                state = run["state"] if told else "RUNNING"  # later than of the run itself
            nodes = {name: state, f"{name}(0)": state, f"{name}-driver": "SUCCEEDED", "executor": state}
            tasks += [{"display_name": node, "state": state} for node, state in nodes.items()]
        around = ("root", "root(0)", "pirl-pretrain-x7k2p", "condition-branches-1", "condition-branches-1-driver")
        tasks += [{"display_name": node, "state": run["state"]} for node in around]
        tasks.append({"display_name": "root-driver", "state": "SUCCEEDED"})
        return {**run, "run_details": {"task_details": tasks}}

    def _create_schedule(self, data: dict[str, Any]) -> dict[str, Any]:
        self._check_run(data, RECURRING)
        if not 1 <= int(data.get("max_concurrency", 0)) <= 10:
            raise Refused(400, f"max_concurrency {data.get('max_concurrency')}")
        if data.get("mode") not in ("ENABLE", "DISABLE") or not isinstance(data.get("no_catchup", False), bool):
            raise Refused(400, f"mode {data.get('mode')}, no_catchup {data.get('no_catchup')}")
        _known(data["trigger"], {"cron_schedule", "periodic_schedule"})
        if cron := data["trigger"].get("cron_schedule"):
            _known(cron, {"cron", "start_time", "end_time"})
            if len(cron["cron"].split()) != 6 and not cron["cron"].startswith("@"):
                raise Refused(400, f"expected 6 fields: {cron['cron']}")
        status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[data["mode"]]
        shown = {**data, "max_concurrency": str(data["max_concurrency"]), "status": status}  # an int64 in JSON
        self.schedules.append({**self._new("recurring_run_id"), **shown})
        return self.schedules[-1]

    def tick(self, schedule: dict[str, Any], state: str) -> dict[str, Any]:
        """A run that a schedule has started."""
        run = {"display_name": f"{schedule['display_name']}-tick", "recurring_run_id": schedule["recurring_run_id"]}
        self.runs.append({**self._new("run_id"), **run, "state": state})
        return self.runs[-1]

    def _switch(self, id: str, verb: str) -> dict[str, Any]:
        self._get(self.schedules, "recurring_run_id", id)["status"] = f"{verb.upper()}D"
        return {}

    def _delete_schedule(self, id: str) -> dict[str, Any]:
        self.schedules.remove(self._get(self.schedules, "recurring_run_id", id))
        return {}


def _known(data: dict[str, Any], fields: set[str]) -> None:
    if unknown := data.keys() - fields:
        raise Refused(400, f"unknown fields {sorted(unknown)}")


class _Handler(BaseHTTPRequestHandler):
    kfp: KfpServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for each answer

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, answer = self.kfp.answer(self.command, self.path, self.headers, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if self.kfp.page else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Not on the tests' output."""
