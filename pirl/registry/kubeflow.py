"""A catalogue on a Kubeflow Model Registry, by its REST API.

    model-registry+https://registry.example.com         also +http, with a port or a path before /api
    MODEL_REGISTRY_TOKEN, or KF_PIPELINES_SA_TOKEN_PATH  the bearer token or its file; sent over https only

The server holds names, states and properties, no files. A version's files (trunk.safetensors, model.json, the card) lie
in the storage of the run that it was made of, in <run>/registered/<model>/: keep the runs that are registered.

Three objects make a version: the model, the version (its number in the name), its artifact. A version begins as
ARCHIVED and without the property `pirl_record_sha256`; setting both in one request, after the artifact, makes it
visible. A version that was interrupted before is invisible, and the same call completes it.
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
from pirl.registry.record import (
    CHAMPION,
    RECORD,
    RESTORE,
    TRUNK,
    Provenance,
    Stamps,
    Version,
    new_record,
    order,
    parse_record,
    require_digest,
    require_same_files,
)
from pirl.results import Evaluation
from pirl.storage import Storage, open_storage
from pirl.storage.base import without_login

SCHEMES = ("model-registry+https://", "model-registry+http://")
API_VERSIONS = ("v1", "v1alpha3")  # releases serve the one or the other
PAGE = 100
TIMEOUT_S = 30.0

_RUN, _SHA, _GATED = "pirl_run", "pirl_record_sha256", "pirl_gated"


class KubeflowCatalogue:
    """Versions of models on a server."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._api = _Api(self.uri.removeprefix("model-registry+"))

    def claim(self, model: str, run_id: str, stamps: Stamps, provenance: Provenance) -> tuple[str, bytes]:
        """Return the version of this run and its model.json, which lies in the run."""
        version = self._number(model, run_id, provenance)
        files = _files_of(run_id, model)
        claim = new_record(model, version, run_id, stamps, provenance)
        if files.create(RECORD, claim):
            return version, claim
        registered = files.read_small(RECORD)
        require_same_files(parse_record(registered, files), stamps, version)
        return version, registered

    def _number(self, model: str, run_id: str, provenance: Provenance) -> str:
        """Return the version of this run, a new one if it has none.

        The server refuses a name that is taken: a number has one winner, and the losers look again.
        """
        parent = self._model(model) or self._create_model(model)
        lineage = provenance.lineage.model_dump(exclude_defaults=True)
        properties = _properties({_RUN: run_id, **lineage, **_scores(provenance.metrics)})
        while True:
            versions = self._versions(parent["id"])
            for name, version in versions.items():
                if _get(version, _RUN) == run_id:
                    return name
            name = f"v{1 + max(map(order, versions), default=0):04d}"
            body = {"name": name, "registeredModelId": parent["id"], "state": "ARCHIVED"}
            if self._api.post("model_versions", {**body, "customProperties": properties}):
                return name

    def files(self, model: str, version: str) -> Storage:
        """Return the folder of a version, in the run that it was made of."""
        return _files_of(_get(self._version(model, version), _RUN), model)

    def commit(self, model: str, version: str, record_sha256: str) -> None:
        """Create the artifact, then make the version LIVE."""
        entry = self._version(model, version)
        path = f"model_versions/{entry['id']}/artifacts"
        if not list(self._api.all(path)):
            run = _get(entry, _RUN)
            self._api.post(
                path,
                {
                    "artifactType": "model-artifact",
                    "name": f"{model}-{version}",
                    "uri": f"{_files_of(run, model).uri}/{TRUNK}",
                    "modelFormatName": "safetensors",
                    "modelFormatVersion": "1",
                    "modelSourceKind": "pirl",
                    "modelSourceClass": "run",
                    "modelSourceId": run,
                    "state": "LIVE",
                },
            )
        self._set("model_versions", entry, {_SHA: record_sha256}, state="LIVE")

    def gate(self, model: str, version: str) -> None:
        """Set the property of a version that came through the gate."""
        entry = self._version(model, version)
        if not _get(entry, _GATED):
            self._set("model_versions", entry, {_GATED: "true"})

    def models(self) -> list[str]:
        """Return the names of all models that have a visible version, sorted."""
        names = [model["name"] for model in self._api.all("registered_models")]
        return sorted(name for name in names if self.versions(name))

    def versions(self, model: str, gated: bool = False) -> list[str]:
        """Return the visible versions of a model, oldest first; with `gated` those that came through the gate."""
        required = (_SHA, _GATED) if gated else (_SHA,)
        parent = self._model(model)
        entries = self._versions(parent["id"]) if parent else {}
        visible = (name for name, entry in entries.items() if all(_get(entry, key) for key in required))
        return sorted(visible, key=order)

    def load(self, model: str, version: str) -> Version:
        """Return a visible version; raise `RegistryError` where its record is missing or damaged."""
        entry = self._version(model, version)
        files = _files_of(_get(entry, _RUN), model)
        try:
            record = files.read_small(RECORD)
        except StorageNotFoundError as error:
            raise RegistryError(f"{error.what}; it belongs to {model} {version}", RESTORE) from None
        require_digest(record, _get(entry, _SHA), files)
        return Version(model, version, files.uri, parse_record(record, files), bool(_get(entry, _GATED)))

    def pointer(self, model: str, pointer: str) -> str | None:
        """Return the version that a pointer names, a property of the model."""
        entry = self._model(model)
        return (_get(entry, f"pirl_{pointer}") or None) if entry else None

    def point(self, model: str, pointer: str, version: str) -> None:
        """Set the property of a pointer."""
        self._set("registered_models", self._model(model) or {}, {f"pirl_{pointer}": version})

    def moves(self, model: str) -> str | None:
        """Return the champion, as the state of its pointer."""
        return self.pointer(model, CHAMPION)

    def move_champion(self, model: str, version: str, moves: str | None) -> bool:
        """Point to a version if the champion is still `moves`.

        The API has no conditional write: between this look and the request another process may still move it.
        """
        if self.pointer(model, CHAMPION) != moves:
            return False
        self.point(model, CHAMPION, version)
        return True

    def _model(self, name: str) -> dict[str, Any] | None:
        return self._api.get("registered_model", name=name)

    def _create_model(self, name: str) -> dict[str, Any]:
        body = {"name": name, "description": "A ResNet trunk, pretrained without labels by PIRL."}
        model = self._api.post("registered_models", body) or self._model(name)  # another process may have created it
        if model is None:
            raise RegistryError(f"{self.uri} cannot create the model {name!r}", "ask the administrator of the server")
        return model

    def _versions(self, model_id: str) -> dict[str, dict[str, Any]]:
        """Return all by name, also the unfinished and those of other programs: their numbers are taken."""
        return {version["name"]: version for version in self._api.all(f"registered_models/{model_id}/versions")}

    def _version(self, model: str, version: str) -> dict[str, Any]:
        parent = self._model(model)
        entry = self._versions(parent["id"]).get(version) if parent else None
        if entry is None:
            raise RegistryError(f"{self.uri} has no {model} {version}", "it was removed meanwhile")
        return entry

    def _set(self, kind: str, entry: dict[str, Any], properties: dict[str, str], **fields: str) -> None:
        """Change properties of an object; all of them are sent, because servers replace all at once."""
        merged = {**entry.get("customProperties", {}), **_properties(properties)}
        self._api.patch(f"{kind}/{entry['id']}", {"customProperties": merged, **fields})


def _files_of(run_id: str, model: str) -> Storage:
    """Return the folder of a run's version."""
    return open_storage(run_id) / "registered" / model


class _Api:
    """Requests to one server; an unexpected answer is a `RegistryError` with the next step."""

    def __init__(self, server: str) -> None:
        self.server = server
        self._shown = without_login(server)
        self._headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if server.startswith("https://") and (token := _token()):
            self._headers["Authorization"] = f"Bearer {token}"
        # a POST whose answer was lost is not repeated, because the caller reads the state again
        retries = urllib3.Retry(
            total=4, connect=2, backoff_factor=0.3, status_forcelist=(502, 503, 504), raise_on_status=False
        )
        self._pool = urllib3.PoolManager(timeout=TIMEOUT_S, retries=retries)
        self._root = ""

    def get(self, path: str, **query: Any) -> dict[str, Any] | None:
        """Return one object, None if it does not exist."""
        status, body = self._request("GET", f"{path}?{urlencode(query)}")
        return None if status == 404 else body

    def all(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield the objects of a list, page by page."""
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
        """Create an object and return it; None where the server has one of this name."""
        status, answer = self._request("POST", path, body)
        return None if status == 409 else answer

    def patch(self, path: str, body: dict[str, Any]) -> None:
        """Change fields of an object."""
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
            "give the address of the REST service (port 8080), not of the web page",
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
                "run it again: finished steps are not repeated",
            )
        try:
            content = json.loads(answer.data or b"{}")
        except ValueError:
            content = None
        if not isinstance(content, dict):
            if answer.status == 404:
                return 404, {}
            raise RegistryError(
                f"{self._shown} does not answer with a JSON object", "check that it is a Kubeflow Model Registry"
            )
        return answer.status, content


def _token() -> str:
    if token := os.environ.get("MODEL_REGISTRY_TOKEN"):
        return token
    path = Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", ""))
    return path.read_text().strip() if path.is_file() else ""


def _properties(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with their types, as the API expects them; anything but a number becomes text."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, float):
            result[key] = {"metadataType": "MetadataDoubleValue", "double_value": value}
        elif isinstance(value, int) and not isinstance(value, bool):
            result[key] = {"metadataType": "MetadataIntValue", "int_value": str(value)}
        else:
            result[key] = {"metadataType": "MetadataStringValue", "string_value": str(value)}
    return result


def _get(entry: dict[str, Any], key: str) -> str:
    return str(entry.get("customProperties", {}).get(key, {}).get("string_value", ""))


def _scores(evaluation: Evaluation | None) -> dict[str, float]:
    scores = evaluation.pretrained if evaluation else {}
    return {f"{name}_top1": rates.top1.mean for name, rates in scores.items()}


def is_model_registry(uri: str) -> bool:
    """Return whether a registry's URI names a server; raise `UsageError` for one with a wrong scheme."""
    if uri.startswith(SCHEMES):
        return True
    if uri.startswith("model-registry"):
        raise UsageError(
            f"{without_login(uri)!r} is not the address of a model registry", f"write {SCHEMES[0]}HOST:PORT"
        )
    return False
