"""The same registry on a Kubeflow Model Registry, by its REST API.

    model-registry+https://registry.example.com         also +http, with a port or a path before /api
    MODEL_REGISTRY_TOKEN, or KF_PIPELINES_SA_TOKEN_PATH  the bearer token or its file; sent over https only

The server holds names, states and properties, no files. A version's files (trunk.safetensors, model.json, the card) lie
in the storage of the run that it was made of, in <run>/registered/<model>/: keep the runs that are registered.

Three objects make a version: the model, the version (its number in the name), its artifact. A version begins as
ARCHIVED and without the property `pirl_record_sha256`; setting both in one request, after the artifact, makes it
visible. What broke off before is invisible, and the same call finishes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import urllib3

from pirl.errors import RegistryError, StorageNotFoundError, UsageError
from pirl.registry import embedded
from pirl.registry.embedded import Registry, Version
from pirl.storage import Storage, open_storage
from pirl.storage.base import without_login

SCHEMES = ("model-registry+https://", "model-registry+http://")
API_VERSIONS = ("v1", "v1alpha3")  # releases serve the one or the other
PAGE = 100
TIMEOUT_S = 30.0

_RUN, _SHA, _GATED = "pirl_run", "pirl_record_sha256", "pirl_gated"


class KubeflowRegistry(Registry):
    """Versions of models on a server; what they promise is what `Registry` promises."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._api = _Api(self.uri.removeprefix("model-registry+"))

    def models(self) -> list[str]:
        names = [model["name"] for model in self._api.all("registered_models")]
        return sorted(name for name in names if self.has(name))

    def pointer(self, model: str, pointer: str) -> str | None:
        found = self._model(model)
        return (_get(found, f"pirl_{pointer}") or None) if found else None

    def _moves(self, model: str) -> Any:
        return self.pointer(model, embedded.CHAMPION)

    def _move_champion(self, model: str, version: str, moves: Any) -> bool:
        """Point to this version if the pointer is as `_moves` saw it. The API has no conditional write: between the
        last look and the request another process may still move it."""
        if self.pointer(model, embedded.CHAMPION) != moves:
            return False
        self._point(model, embedded.CHAMPION, version)
        return True

    def _point(self, model: str, pointer: str, version: str) -> None:
        self._set("registered_models", self._model(model) or {}, {f"pirl_{pointer}": version})

    def _claim(self, model: str, run_id: str, stamps: dict[str, Any], record: dict[str, Any]) -> tuple[str, bytes]:
        version = self._number(model, run_id, record)
        place = self._files(model, run_id)
        claim = embedded.new_record(model, version, run_id, stamps, record)
        if place.create("model.json", claim):
            return version, claim
        found = place.read_small("model.json")
        embedded.require_same_files(embedded.parse(found, place), stamps, version)
        return version, found

    def _number(self, model: str, run_id: str, record: dict[str, Any]) -> str:
        """The version of this run, a new one if it has none.

        The server refuses a name that is taken: a number has one winner, and the losers look again.
        """
        parent = self._model(model) or self._create_model(model)
        lineage = {key: value for key, value in record.get("lineage", {}).items() if value is not None}
        properties = _properties({_RUN: run_id, **lineage, **_scores(record)})
        while True:
            versions = self._versions(parent["id"])
            for name, found in versions.items():
                if _get(found, _RUN) == run_id:
                    return name
            name = f"v{1 + max(map(embedded.order, versions), default=0):04d}"
            body = {"name": name, "registeredModelId": parent["id"], "state": "ARCHIVED"}
            if self._api.post("model_versions", {**body, "customProperties": properties}):
                return name

    def _commit(self, model: str, version: str, record_sha256: str) -> None:
        found = self._version(model, version)
        where = f"model_versions/{found['id']}/artifacts"
        if not list(self._api.all(where)):
            run = _get(found, _RUN)
            self._api.post(
                where,
                {
                    "artifactType": "model-artifact",
                    "name": f"{model}-{version}",
                    "uri": f"{self._files(model, run).uri}/trunk.safetensors",
                    "modelFormatName": "safetensors",
                    "modelFormatVersion": "1",
                    "modelSourceKind": "pirl",
                    "modelSourceClass": "run",
                    "modelSourceId": run,
                    "state": "LIVE",
                },
            )
        self._set("model_versions", found, {_SHA: record_sha256}, state="LIVE")

    def _pass_gate(self, model: str, version: str) -> None:
        found = self._version(model, version)
        if not _get(found, _GATED):
            self._set("model_versions", found, {_GATED: "true"})

    def _place(self, model: str, version: str) -> Storage:
        return self._files(model, _get(self._version(model, version), _RUN))

    def _with(self, model: str, *wanted: str) -> list[str]:
        parent = self._model(model)
        properties = [{"COMMIT.json": _SHA, "GATE.json": _GATED}[name] for name in wanted]
        versions = self._versions(parent["id"]) if parent else {}
        found = (name for name, version in versions.items() if all(_get(version, key) for key in properties))
        return sorted(found, key=embedded.order)

    def _load(self, model: str, version: str) -> Version:
        found = self._version(model, version)
        place = self._files(model, _get(found, _RUN))
        try:
            record = place.read_small("model.json")
        except StorageNotFoundError as error:
            raise RegistryError(f"{error.what} It belongs to {model} {version}.", embedded.RESTORE) from None
        embedded.require_digest(record, _get(found, _SHA), place)
        return Version(model, version, place.uri, embedded.parse(record, place), bool(_get(found, _GATED)))

    def _files(self, model: str, run_id: str) -> Storage:
        return open_storage(run_id) / "registered" / model

    def _model(self, name: str) -> dict[str, Any] | None:
        return self._api.get("registered_model", name=name)

    def _create_model(self, name: str) -> dict[str, Any]:
        body = {"name": name, "description": "A ResNet trunk, pretrained without labels by PIRL."}
        found = self._api.post("registered_models", body) or self._model(name)  # another one was quicker
        if found is None:
            raise RegistryError(f"{self.uri} neither makes nor has the model {name!r}", "ask who keeps the server")
        return found

    def _versions(self, model_id: str) -> dict[str, dict[str, Any]]:
        """All by name, also the unfinished and those of other programs: their numbers are taken."""
        return {version["name"]: version for version in self._api.all(f"registered_models/{model_id}/versions")}

    def _version(self, model: str, version: str) -> dict[str, Any]:
        parent = self._model(model)
        found = self._versions(parent["id"]).get(version) if parent else None
        if found is None:
            raise RegistryError(f"{self.uri} has no {model} {version}", "it was removed meanwhile")
        return found

    def _set(self, kind: str, found: dict[str, Any], properties: dict[str, str], **fields: str) -> None:
        """Change properties of an object: servers replace all of them at once, so the others go along."""
        merged = {**found.get("customProperties", {}), **_properties(properties)}
        self._api.patch(f"{kind}/{found['id']}", {"customProperties": merged, **fields})


class _Api:
    """Requests to one server; what it answers other than expected is a `RegistryError` with the next step."""

    def __init__(self, server: str) -> None:
        self.server = server
        self._shown = without_login(server)
        self._headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if server.startswith("https://") and (token := _token()):
            self._headers["Authorization"] = f"Bearer {token}"
        # a POST whose answer was lost is not repeated here: the caller looks again what there is
        retries = urllib3.Retry(
            total=4, connect=2, backoff_factor=0.3, status_forcelist=(502, 503, 504), raise_on_status=False
        )
        self._pool = urllib3.PoolManager(timeout=TIMEOUT_S, retries=retries)
        self._root = ""

    def get(self, path: str, **query: Any) -> dict[str, Any] | None:
        """One object; None where there is none."""
        status, body = self._request("GET", f"{path}?{urlencode(query)}")
        return None if status == 404 else body

    def all(self, path: str) -> Iterator[dict[str, Any]]:
        """The objects of a list, page by page."""
        token = ""
        while True:
            query = {"pageSize": PAGE, "orderBy": "ID", **({"nextPageToken": token} if token else {})}
            status, body = self._request("GET", f"{path}?{urlencode(query)}")
            if status == 404:
                return
            yield from body.get("items", [])
            token = body.get("nextPageToken", "")
            if not token:
                return

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The created object; None where the server has one of this name."""
        status, answer = self._request("POST", path, body)
        return None if status == 409 else answer

    def patch(self, path: str, body: dict[str, Any]) -> None:
        self._request("PATCH", path, body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        if not self._root:
            self._root = self._probe()
        return self._send(method, f"{self._root}/{quote(path, safe='/?&=%+')}", body)

    def _probe(self) -> str:
        for version in API_VERSIONS:
            root = f"{self.server}/api/model_registry/{version}"
            if self._send("GET", f"{root}/registered_models?pageSize=1", None)[0] != 404:
                return root
        raise RegistryError(
            f"{self._shown} serves no Model Registry API of {' or '.join(API_VERSIONS)}",
            "is it the address of the REST service (port 8080), and not of the web page?",
        )

    def _send(self, method: str, url: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        try:
            answer = self._pool.request(
                method, url, headers=self._headers, body=None if body is None else json.dumps(body).encode()
            )
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise RegistryError(
                f"{self._shown} does not answer: {reason}", "check the address, then run it again"
            ) from None
        if answer.status in (401, 403):
            raise RegistryError(
                f"{self._shown} refuses {method} ({answer.status})",
                "set MODEL_REGISTRY_TOKEN; behind Istio the service account needs an AuthorizationPolicy",
            )
        if answer.status >= 400 and answer.status not in (404, 409):
            text = answer.data.decode(errors="replace")[:200]
            raise RegistryError(
                f"{self._shown} answers {method} with {answer.status}: {text}",
                "run it again: what is done is found done",
            )
        try:
            found = json.loads(answer.data or b"{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            if answer.status == 404:
                return 404, {}
            raise RegistryError(f"{self._shown} answers with no JSON object", "is it a Kubeflow Model Registry?")
        return answer.status, found


def _token() -> str:
    if token := os.environ.get("MODEL_REGISTRY_TOKEN"):
        return token
    path = Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", ""))
    return path.read_text().strip() if path.is_file() else ""


def _properties(values: dict[str, Any]) -> dict[str, Any]:
    """As the API wants them: a type beside each value. Anything else than a number becomes text."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, float):
            result[key] = {"metadataType": "MetadataDoubleValue", "double_value": value}
        elif isinstance(value, int) and not isinstance(value, bool):
            result[key] = {"metadataType": "MetadataIntValue", "int_value": str(value)}
        else:
            result[key] = {"metadataType": "MetadataStringValue", "string_value": str(value)}
    return result


def _get(found: dict[str, Any], key: str) -> str:
    return str(found.get("customProperties", {}).get(key, {}).get("string_value", ""))


def _scores(record: dict[str, Any]) -> dict[str, float]:
    scores = (record.get("metrics") or {}).get("pretrained") or {}
    return {f"{name}_top1": float(rates["top1"]["mean"]) for name, rates in scores.items() if "top1" in rates}


def is_model_registry(uri: str) -> bool:
    """Whether a registry's URI names a server; `UsageError` for one that nearly does."""
    if uri.startswith(SCHEMES):
        return True
    if uri.startswith("model-registry"):
        raise UsageError(f"{without_login(uri)!r} is no address of a model registry", f"write {SCHEMES[0]}HOST:PORT")
    return False
