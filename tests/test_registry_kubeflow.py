"""The registry on a Kubeflow Model Registry keeps every promise of the embedded one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from model_registry_server import ModelRegistryServer

from pirl.errors import PirlError, RegistryError, UsageError
from pirl.registry import Provenance, Version, open_registry
from pirl.registry.kubeflow import KubeflowCatalogue
from pirl.storage import open_storage

RECORD = Provenance.model_validate(
    {
        "lineage": {"data_digest": "abc123", "recipe_digest": "def456", "code_version": "0.1.0", "epochs": 3},
        "metrics": {
            "checkpoint": "",
            "train_data": "",
            "test_data": "",
            "pretrained": {"knn": {"top1": {"mean": 0.8, "std": 0.004}}},
        },
    }
)


@pytest.fixture(params=["v1alpha3", "v1"])
def server(request: pytest.FixtureRequest) -> Iterator[ModelRegistryServer]:
    server = ModelRegistryServer((request.param,))
    yield server
    server.stop()
    assert server.complaints == []  # nothing was sent that the contract does not have


@pytest.fixture
def register(server: ModelRegistryServer, tmp_path: Path) -> Callable[..., Version]:
    def call(run: str, promote: bool = True, weights: bytes = b"weights") -> Version:
        files = {"trunk.safetensors": weights}
        run_id = f"file://{tmp_path}/{run}"
        registry = open_registry(server.uri)
        return registry.register("pirl", run_id=run_id, files=files, provenance=RECORD, promote=promote)

    return call


def pointers(uri: str) -> tuple[str | None, str | None]:
    registry = open_registry(uri)
    return registry.pointer("pirl", "champion"), registry.pointer("pirl", "latest")


def message(call: Callable[[], object], kind: type[PirlError]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.hint
    return str(caught.value)


def test_a_version_with_its_lineage_and_its_artifact(
    server: ModelRegistryServer, register: Callable[..., Version], tmp_path: Path
) -> None:
    version = register("run-1")
    assert (version.model, version.version, version.gated) == ("pirl", "v0001", True)
    assert version.uri == f"file://{tmp_path}/run-1/registered/pirl"
    assert open_storage(version.uri).list() == ["README.md", "model.json", "trunk.safetensors"]
    assert version.record.lineage == RECORD.lineage
    registry = open_registry(server.uri)
    assert registry.models() == ["pirl"]
    assert registry.get("pirl", verify=True) == version
    (artifact,) = server.objects["artifacts"]
    assert artifact["uri"] == f"{version.uri}/trunk.safetensors"
    assert artifact["modelSourceId"] == version.record.run_id
    (found,) = server.objects["model_versions"]
    assert found["state"] == "LIVE"
    assert found["customProperties"]["data_digest"]["string_value"] == "abc123"
    assert found["customProperties"]["epochs"]["int_value"] == "3"
    assert found["customProperties"]["knn_top1"]["double_value"] == 0.8


def test_the_same_run_twice_is_one_version(server: ModelRegistryServer, register: Callable[..., Version]) -> None:
    first = register("run-1")
    written = [request for request in server.requests if not request.startswith("GET")]
    assert register("run-1") == first
    assert [request for request in server.requests if not request.startswith("GET")] == written
    assert register("run-2").version == "v0002"
    assert "'v0001'" not in message(lambda: register("run-1", weights=b"other"), RegistryError)
    assert [version.version for version in open_registry(server.uri).versions("pirl")] == ["v0001", "v0002"]


@pytest.mark.parametrize("answer_lost", [False, True])
def test_a_failure_at_any_write_leaves_no_half_version_and_is_repaired(
    server: ModelRegistryServer, register: Callable[..., Version], answer_lost: bool
) -> None:
    """The server stops at each write in turn, with the write done or not; the same call afterwards finishes it."""
    register("earlier")
    registry = open_registry(server.uri)
    kinds = {kind: len(items) for kind, items in server.objects.items()}
    failures = 0
    for writes in range(20):
        server.writes_left, server.answer_lost = writes, answer_lost
        run = f"run-{writes}"
        try:
            register(run)
            break
        except RegistryError:
            failures += 1
        server.writes_left = None
        seen = registry.versions("pirl")
        for version in seen:
            assert registry.get("pirl", version.version, verify=True) == version
        assert pointers(server.uri)[0] in {version.version for version in seen}
        after = register(run)
        assert after.version == f"v{writes + 2:04d}"
        assert pointers(server.uri) == (after.version, after.version)
        for kind in ("model_versions", "artifacts"):
            assert len(server.objects[kind]) == kinds[kind] + writes + 1
    assert failures == 6  # version, artifact, LIVE, gate, champion, latest


def test_many_at_once_get_a_number_each(server: ModelRegistryServer, register: Callable[..., Version]) -> None:
    results: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=number: results.update({n: register(f"run-{n % 4}", promote=False).version}))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert sorted(set(results.values())) == ["v0001", "v0002", "v0003", "v0004"]
    assert all(results[number] == results[number + 4] for number in range(4))


def test_pointers_move_by_the_gate_and_by_hand(server: ModelRegistryServer, register: Callable[..., Version]) -> None:
    register("run-1", promote=False)
    assert pointers(server.uri) == (None, None)
    register("run-2")
    register("run-3")
    registry = open_registry(server.uri)
    assert registry.promote("pirl", "v0002").version == "v0002"
    assert pointers(server.uri) == ("v0002", "v0003")
    register("run-3")  # a repeated step of an old pipeline run
    assert pointers(server.uri) == ("v0002", "v0003")
    assert registry.get("pirl", "v0001").gated is False
    properties = server.objects["registered_models"][0]["customProperties"]
    assert properties["pirl_champion"]["string_value"] == "v0002"


def test_others_in_the_same_server_are_left_alone(
    server: ModelRegistryServer, register: Callable[..., Version]
) -> None:
    api = KubeflowCatalogue(server.uri)._api
    theirs = api.post("registered_models", {"name": "bert"})
    assert theirs
    api.post("model_versions", {"name": "v0001", "registeredModelId": theirs["id"]})
    assert register("run-1").version == "v0001"
    assert open_registry(server.uri).models() == ["pirl"]
    assert "no model 'bert'" in message(lambda: open_registry(server.uri).versions("bert"), UsageError)


def test_more_versions_than_a_page(server: ModelRegistryServer, register: Callable[..., Version]) -> None:
    register("run-1")
    server.objects["model_versions"] += [
        {
            **server.objects["model_versions"][0],
            "name": f"v{number:04d}",
            "id": str(1000 + number),
            "customProperties": {},
        }
        for number in range(2, 151)
    ]
    assert register("run-2").version == "v0151"


def test_changed_files_are_noticed(server: ModelRegistryServer, register: Callable[..., Version]) -> None:
    place = open_storage(register("run-1").uri)
    registry = open_registry(server.uri)
    place.write_bytes("trunk.safetensors", b"weightz")
    assert "is not what was registered" in message(lambda: registry.get("pirl", verify=True), RegistryError)
    place.write_bytes("model.json", place.read_bytes("model.json").replace(b"abc123", b"abc124"))
    assert "was changed after" in message(lambda: registry.get("pirl"), RegistryError)
    place.delete("model.json")
    assert "belongs to pirl v0001" in message(lambda: registry.get("pirl"), RegistryError)


class TestServers:
    def test_one_with_another_api(self, tmp_path: Path) -> None:
        server = ModelRegistryServer(("v2",))
        assert "serves no Model Registry API" in message(lambda: open_registry(server.uri).models(), RegistryError)
        server.stop()

    def test_none(self) -> None:
        server = ModelRegistryServer()
        server.stop()
        assert "does not answer" in message(lambda: open_registry(server.uri).models(), RegistryError)

    def test_the_token_is_asked_for_and_never_sent_without_tls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MODEL_REGISTRY_TOKEN", "very-secret")
        server = ModelRegistryServer(token="very-secret")
        text = message(lambda: open_registry(server.uri).models(), RegistryError)
        server.stop()
        assert "refuses GET (401)" in text
        assert "very-secret" not in text
        assert KubeflowCatalogue("model-registry+https://host")._api._headers["Authorization"] == "Bearer very-secret"

    @pytest.mark.parametrize("uri", ["model-registry://host", "model-registry+ftp://host", "model-registry:x"])
    def test_wrong_addresses(self, uri: str) -> None:
        assert "model-registry+https://HOST" in message(lambda: open_registry(uri), UsageError)
