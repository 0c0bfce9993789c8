"""The registry: a run gets one version, nothing half-done is visible, pointers move only through the gate."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import warned
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401

from pirl.config import ModelConfig, load_recipe
from pirl.errors import PirlError, RegistryError, StorageError, UsageError
from pirl.registry import FolderCatalogue, Provenance, Registry, Version, VersionRecord, model_card, open_registry
from pirl.storage import LocalStorage, Storage, open_storage

SPAWN = multiprocessing.get_context("spawn")
FILES = {"trunk.safetensors": b"weights"}
EVALUATION: dict[str, Any] = {
    "checkpoint": "step-00000001",
    "train_data": "beefbeef",
    "test_data": "feedbeef",
    "train_images": 60000,
    "test_images": 10000,
    "pretrained": {
        "linear": {
            "top1": {"mean": 0.8512, "std": 0.0011, "runs": [0.85, 0.852, 0.851]},
            "top5": {"mean": 0.99, "std": 0, "runs": [0.99]},
        },
        "knn": {"top1": {"mean": 0.8, "std": 0.004, "runs": [0.8]}},
    },
    "random": {"linear": {"top1": {"mean": 0.71, "std": 0.002, "runs": [0.71]}}},
}
RECORD = Provenance.model_validate(
    {
        "lineage": {"data_digest": "abc123", "recipe": "demo", "code_version": "0.1.0", "checkpoint": "file:///run/c"},
        "metrics": EVALUATION,
    }
)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "registry") if request.param == "local" else request.getfixturevalue("bucket") + "/registry"


@pytest.fixture
def registry(root: str) -> Registry:
    return open_registry(root)


def register(registry: Registry, run: str, *, promote: bool = False, model: str = "pirl-demo", **more: Any) -> Version:
    return registry.register(model, run_id=run, files=more.get("files", FILES), provenance=RECORD, promote=promote)


def folder(registry: Registry) -> Storage:
    """Return the storage of a registry in a folder."""
    assert isinstance(registry.catalogue, FolderCatalogue)
    return registry.catalogue.storage


def pointers(registry: Registry, model: str = "pirl-demo") -> tuple[str | None, str | None]:
    """Return (champion, latest); the copies that people and version 0.1 read say the same."""
    place = folder(registry) / model
    names = ("champion", "latest")
    copies = [place.read_json(f"{name}.json")["version"] if place.exists(f"{name}.json") else None for name in names]
    assert copies == [registry.pointer(model, name) for name in names]
    return copies[0], copies[1]


def message(call: Callable[[], object], kind: type[PirlError]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.hint
    return str(caught.value)


class TestRegister:
    def test_a_version(self, registry: Registry, tmp_path: Path) -> None:
        (tmp_path / "trunk").write_bytes(b"weights")
        files = {"trunk.safetensors": tmp_path / "trunk", "extra.json": b"{}"}
        version = register(registry, "run-1", files=files)
        assert (version.model, version.version, version.gated) == ("pirl-demo", "v0001", False)
        place = open_storage(version.uri)
        assert place.list() == ["COMMIT.json", "README.md", "extra.json", "model.json", "trunk.safetensors"]
        assert place.read_bytes("trunk.safetensors") == b"weights"
        assert place.read_json("model.json") == version.record.to_json()
        assert version.record.lineage == RECORD.lineage
        assert version.record.metrics == RECORD.metrics
        assert version.record.run_id == "run-1"
        assert version.record.files["trunk.safetensors"].bytes == 7
        assert len(version.record.files["trunk.safetensors"].sha256) == 64
        assert place.read_bytes("README.md").decode() == model_card(version.record)
        assert registry.get("pirl-demo", "v0001", verify=True) == version

    def test_the_same_run_twice_is_one_version(self, registry: Registry) -> None:
        first = register(registry, "run-1")
        before = {name: folder(registry).read_bytes(name) for name in folder(registry).list()}
        assert register(registry, "run-1") == first
        assert {name: folder(registry).read_bytes(name) for name in folder(registry).list()} == before
        assert register(registry, "run-2").version == "v0002"
        assert register(registry, "run-1") == first
        assert [version.version for version in registry.versions("pirl-demo")] == ["v0001", "v0002"]

    def test_the_same_run_with_other_files(self, registry: Registry) -> None:
        register(registry, "run-1")
        text = message(lambda: register(registry, "run-1", files={"trunk.safetensors": b"other!!"}), RegistryError)
        assert "'run-1' is registered as pirl-demo v0001 with other files: trunk.safetensors" in text
        assert "mv" in text
        assert "--model" in text
        assert [version.version for version in registry.versions("pirl-demo")] == ["v0001"]

    def test_models(self, registry: Registry) -> None:
        assert registry.models() == []
        register(registry, "run-1", model="b")
        register(registry, "run-1", model="a.2")
        assert registry.models() == ["a.2", "b"]

    @pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", "ü", "x" * 200, "a\n"])
    def test_names(self, registry: Registry, name: str) -> None:
        assert "is not a name for a model" in message(lambda: register(registry, "r", model=name), UsageError)
        assert "is not a name for a file" in message(lambda: register(registry, "r", files={name: b""}), UsageError)
        message(lambda: registry.get(name), UsageError)
        assert folder(registry).list() == []

    def test_what_the_registry_writes_itself_is_refused(self, registry: Registry) -> None:
        with pytest.raises(ValueError, match=r"COMMIT\.json"):
            register(registry, "r", files={"COMMIT.json": b""})

    def test_a_file_that_is_not_there(self, registry: Registry, tmp_path: Path) -> None:
        text = message(lambda: register(registry, "r", files={"trunk.safetensors": tmp_path / "gone"}), RegistryError)
        assert str(tmp_path / "gone") in text
        assert folder(registry).list() == []

    def test_ten_thousand_versions_keep_their_order(self, tmp_path: Path) -> None:
        registry = open_registry(str(tmp_path))
        place = register(registry, "run-1", promote=True).uri
        for version in ("v9999", "v10000"):
            for name in ("model.json", "COMMIT.json", "GATE.json"):
                open_storage(tmp_path).write_bytes(
                    f"pirl-demo/versions/{version}/{name}", open_storage(place).read_bytes(name)
                )
        assert [version.version for version in registry.versions("pirl-demo")] == ["v0001", "v9999", "v10000"]
        assert register(registry, "run-2", promote=True).version == "v0002"
        assert pointers(registry)[1] == "v10000"


class Interrupted(Exception):
    """Stands for the death of the process."""


class DyingStorage(LocalStorage):
    """Dies before its n-th write."""

    writes_left = 0

    def __truediv__(self, part: str) -> DyingStorage:
        child = DyingStorage(self.path / part)
        child.clock = self.clock
        return child

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.clock = [10**9]

    def tick(self) -> None:
        if self.clock[0] == 0:
            raise Interrupted
        self.clock[0] -= 1

    def write_bytes(self, name: str, data: bytes) -> None:
        self.tick()
        super().write_bytes(name, data)

    def create(self, name: str, data: bytes) -> bool:
        self.tick()
        return super().create(name, data)

    def upload(self, path: Path, name: str) -> None:
        self.tick()
        super().upload(path, name)


class TestCrash:
    def test_at_every_write(self, tmp_path: Path) -> None:
        """Die before each write in turn: nothing half-done shows, and the same call afterwards finishes the work."""
        deaths = 0
        while True:
            root = tmp_path / str(deaths)
            whole = open_registry(str(root))
            register(whole, "earlier", promote=True)
            storage = DyingStorage(root)
            storage.clock[0] = deaths
            try:
                register(Registry(FolderCatalogue(storage)), "run", promote=True)
                break
            except Interrupted:
                pass
            for version in whole.versions("pirl-demo"):
                assert whole.get("pirl-demo", version.version, verify=True) == version
            for name in ("champion", "latest"):
                assert whole.get("pirl-demo", name, verify=True).version in ("v0001", "v0002")
            after = register(whole, "run", promote=True)
            assert after.version == "v0002"
            assert whole.get("pirl-demo", "champion", verify=True) == after
            assert pointers(whole) == ("v0002", "v0002")
            assert [version.version for version in whole.versions("pirl-demo")] == ["v0001", "v0002"]
            deaths += 1
        assert deaths == 9  # model.json, claims, trunk, card, COMMIT, GATE, the move, champion, latest

    def test_a_half_version_is_passed_by(self, root: str) -> None:
        registry = open_registry(root)
        half = folder(registry) / "pirl-demo" / "versions" / "v0001"
        half.write_json("model.json", {"run_id": "dead", "files": {}})
        assert registry.models() == []
        assert "no model 'pirl-demo'" in message(lambda: registry.versions("pirl-demo"), UsageError)
        assert register(registry, "alive", promote=True).version == "v0002"
        assert pointers(registry) == ("v0002", "v0002")
        assert "'v0002'" in message(lambda: registry.get("pirl-demo", "v0001"), UsageError)

    def test_a_source_that_changes_meanwhile_is_not_committed(self, tmp_path: Path) -> None:
        class Meddling(LocalStorage):
            def __truediv__(self, part: str) -> Meddling:
                return Meddling(self.path / part)

            def upload(self, path: Path, name: str) -> None:
                path.write_bytes(b"WEIGHTS")
                super().upload(path, name)

        (tmp_path / "trunk").write_bytes(b"weights")
        registry = Registry(FolderCatalogue(Meddling(tmp_path / "registry")))
        call = lambda: register(registry, "r", files={"trunk.safetensors": tmp_path / "trunk"})  # noqa: E731
        assert "trunk.safetensors is not what was registered" in message(call, RegistryError)
        assert registry.models() == []


def register_many(root: str, runs: list[str], gate: Any, queue: Any) -> None:
    registry = open_registry(root)
    gate.wait()
    for run in runs:
        queue.put((run, register(registry, run, promote=True).version))


class TestConcurrency:
    @pytest.mark.parametrize("shared", [False, True], ids=["own runs", "the same runs"])
    def test_many_processes(self, tmp_path: Path, shared: bool) -> None:
        """Every run gets exactly one version of its own, without gaps, and the pointers end at the newest."""
        processes, each = 4, 6
        gate, queue = SPAWN.Barrier(processes), SPAWN.Queue()
        children = [
            SPAWN.Process(
                target=register_many,
                args=(str(tmp_path), [f"{'all' if shared else child}-{index}" for index in range(each)], gate, queue),
            )
            for child in range(processes)
        ]
        for child in children:
            child.start()
        results = [queue.get(timeout=120) for _ in range(processes * each)]
        for child in children:
            child.join()
        count = each if shared else processes * each
        assert len(set(results)) == len(dict(results)) == count
        registry = open_registry(str(tmp_path))
        versions = registry.versions("pirl-demo")
        assert [version.version for version in versions] == [f"v{number:04d}" for number in range(1, count + 1)]
        assert {version.record.run_id: version.version for version in versions} == dict(results)
        assert pointers(registry) == (f"v{count:04d}", f"v{count:04d}")

    def test_a_slow_promotion_does_not_stay_before_a_newer_one(self, tmp_path: Path) -> None:
        """Just before the pointer to v0001 is written, v0002 comes and is registered and promoted completely."""
        whole = open_registry(str(tmp_path))

        class Overtaken(LocalStorage):
            def __truediv__(self, part: str) -> Overtaken:
                return Overtaken(self.path / part)

            def write_bytes(self, name: str, data: bytes) -> None:
                if name == overtaken_at and not folder(whole).exists("pirl-demo/versions/v0002/COMMIT.json"):
                    register(whole, "quick", promote=True)
                super().write_bytes(name, data)

        for overtaken_at in ("champion.json", "latest.json"):
            whole = open_registry(str(tmp_path / overtaken_at))
            register(Registry(FolderCatalogue(Overtaken(tmp_path / overtaken_at))), "slow", promote=True)
            assert pointers(whole) == ("v0002", "v0002")


class TestClaims:
    def test_earlier_versions_are_not_read_one_by_one(self, registry: Registry) -> None:
        for number in range(3):
            register(registry, f"run-{number}")
        for number in range(1, 4):
            (folder(registry) / f"pirl-demo/versions/v000{number}").write_bytes("model.json", b"not read")
        assert register(registry, "run-3").version == "v0004"

    def test_what_is_forgotten_or_damaged_is_read_again(self, registry: Registry) -> None:
        first = register(registry, "run-1")
        for content in (None, b"{", b"[]", b'{"v0001": "run-1"}'):
            place = folder(registry) / "pirl-demo"
            place.write_bytes("claims.json", content) if content else place.delete("claims.json")
            assert register(registry, "run-1") == first
        assert register(registry, "run-2").version == "v0002"


class TestPointers:
    def test_only_the_gate_moves_them(self, registry: Registry) -> None:
        register(registry, "run-1")
        assert pointers(registry) == (None, None)
        assert "has no champion yet" in message(lambda: registry.get("pirl-demo", "champion"), UsageError)
        assert "has no latest yet" in message(lambda: registry.get("pirl-demo", "latest"), UsageError)
        assert register(registry, "run-2", promote=True).gated
        register(registry, "run-3")
        assert pointers(registry) == ("v0002", "v0002")
        assert registry.get("pirl-demo").version == registry.get("pirl-demo", "latest").version == "v0002"
        assert register(registry, "run-3", promote=True).gated  # the gate let it through later
        assert pointers(registry) == ("v0003", "v0003")
        register(registry, "run-1", promote=True)  # older than the latest
        assert pointers(registry) == ("v0003", "v0003")

    def test_going_back_stays(self, registry: Registry) -> None:
        register(registry, "run-1", promote=True)
        register(registry, "run-2", promote=True)
        assert registry.promote("pirl-demo", "v0001").version == "v0001"
        assert pointers(registry) == ("v0001", "v0002")
        register(registry, "run-2", promote=True)  # a repeated step of an old pipeline run
        assert pointers(registry) == ("v0001", "v0002")
        register(registry, "run-3", promote=True)
        assert pointers(registry) == ("v0003", "v0003")

    def test_by_hand_without_the_gate(self, registry: Registry) -> None:
        register(registry, "run-1")
        registry.promote("pirl-demo", "v0001")
        assert pointers(registry) == ("v0001", None)
        message(lambda: registry.promote("pirl-demo", "v0009"), UsageError)
        assert pointers(registry) == ("v0001", None)

    def test_a_pointer_to_nothing(self, registry: Registry) -> None:
        register(registry, "run-1", promote=True)
        register(registry, "run-2", promote=True)
        (folder(registry) / "pirl-demo/versions/v0002").delete("COMMIT.json")
        assert "points to v0002" in message(lambda: registry.get("pirl-demo"), RegistryError)

    @pytest.mark.parametrize("damage", [b"{}", b"{", b"[]", b""])
    def test_a_damaged_pointer_is_repaired_by_promoting(self, registry: Registry, damage: bytes) -> None:
        """Also one of version 0.1, which had champion.json alone; the versions are listed all the same."""
        register(registry, "run-1", promote=True)
        place = folder(registry) / "pirl-demo"
        for name in ("champion/00000001.json", "champion.json"):
            place.write_bytes(name, damage)
            text = message(lambda: registry.get("pirl-demo"), RegistryError)
            assert "is damaged" in text
            assert "pirl promote pirl-demo" in text
            assert [version.version for version in registry.versions("pirl-demo")] == ["v0001"]
            registry.promote("pirl-demo", "v0001")
            assert pointers(registry) == ("v0001", "v0001")
            for move in place.list("champion/"):
                place.delete(move)

    def test_the_pointer_of_version_0_1_is_read_and_moved(self, registry: Registry) -> None:
        register(registry, "run-1", promote=True)
        register(registry, "run-2", promote=True)
        place = folder(registry) / "pirl-demo"
        for move in place.list("champion/"):
            place.delete(move)
        assert pointers(registry) == ("v0002", "v0002")
        registry.promote("pirl-demo", "v0001")
        assert pointers(registry) == ("v0001", "v0002")

    @pytest.mark.parametrize("damage", [b"{}", b"{", b"[]", b""])
    def test_a_damaged_latest_is_repaired_by_promoting(self, registry: Registry, damage: bytes) -> None:
        register(registry, "run-1", promote=True)
        register(registry, "run-2", promote=True)
        folder(registry).write_bytes("pirl-demo/latest.json", damage)
        assert "pirl promote pirl-demo" in message(lambda: registry.get("pirl-demo", "latest"), RegistryError)
        registry.promote("pirl-demo", "v0001")
        assert pointers(registry) == ("v0001", "v0002")
        assert registry.get("pirl-demo", "latest").version == "v0002"

    @pytest.mark.parametrize(
        ("name", "damage"),
        [("model.json", b"{"), ("COMMIT.json", b"{"), ("COMMIT.json", b"{}"), ("COMMIT.json", b"[]")],
    )
    def test_a_damaged_version_does_not_hide_the_others(self, registry: Registry, name: str, damage: bytes) -> None:
        for number in (1, 2):
            register(registry, f"run-{number}")
        (folder(registry) / "pirl-demo/versions/v0001").write_bytes(name, damage)
        with warned("v0001 is left out"):
            assert [version.version for version in registry.versions("pirl-demo")] == ["v0002"]

    def test_the_move_is_asked_for_again_when_another_was_quicker(self, registry: Registry) -> None:
        """While v0001 asks, v0002 becomes the champion: v0001 asks again, about that one."""
        answers: list[str | None] = []

        def ask() -> bool:
            champion = registry.pointer("pirl-demo", "champion")
            answers.append(champion)
            if champion is None:
                registry.register("pirl-demo", run_id="quick", files=FILES, provenance=RECORD, promote=False)
                registry.catalogue.move_champion("pirl-demo", "v0002", 0)
            return champion is None

        slow = registry.register("pirl-demo", run_id="slow", files=FILES, provenance=RECORD, promote=True, ask=ask)
        assert answers == [None, "v0002"]
        assert slow.version == "v0001"
        assert registry.pointer("pirl-demo", "champion") == "v0002"


class TestWrongNamesAndDamage:
    def test_did_you_mean(self, registry: Registry) -> None:
        register(registry, "run-1", promote=True)
        assert "Did you mean 'pirl-demo'?" in message(lambda: registry.get("pirl-dmeo"), UsageError)
        assert "Did you mean 'pirl-demo'?" in message(lambda: registry.versions("pirl_demo"), UsageError)
        assert "Did you mean 'champion'?" in message(lambda: registry.get("pirl-demo", "champoin"), UsageError)
        assert "Did you mean 'v0001'?" in message(lambda: registry.get("pirl-demo", "v001"), UsageError)

    def test_an_empty_registry(self, registry: Registry) -> None:
        assert "holds no model yet" in message(lambda: registry.get("pirl-demo"), UsageError)

    def test_tampering(self, registry: Registry) -> None:
        version = register(registry, "run-1")
        place = open_storage(version.uri)
        place.write_bytes("trunk.safetensors", b"weightz")
        assert registry.get("pirl-demo", "v0001") == version
        verified = lambda: registry.get("pirl-demo", "v0001", verify=True)  # noqa: E731
        assert "trunk.safetensors is not what was registered" in message(verified, RegistryError)
        place.delete("trunk.safetensors")
        assert "trunk.safetensors is missing" in message(verified, RegistryError)
        place.write_bytes("model.json", place.read_bytes("model.json").replace(b"0.8512", b"0.9512"))
        assert "model.json was changed" in message(lambda: registry.get("pirl-demo", "v0001"), RegistryError)
        place.write_bytes("model.json", b"{")
        assert "model.json is damaged" in message(lambda: register(registry, "run-1"), RegistryError)
        assert register(registry, "run-2").version == "v0002"  # another run does not need it

    def test_a_disk_that_refuses(self, tmp_path: Path) -> None:
        (tmp_path / "registry").write_bytes(b"a file")
        assert str(tmp_path) in message(lambda: register(open_registry(str(tmp_path / "registry")), "r"), StorageError)


class TestModelCard:
    def test_numbers_and_their_meaning(self) -> None:
        own = VersionRecord(name="pirl-demo", version="v0001", run_id="run-1", files={})
        card = model_card(own.model_copy(update={"lineage": RECORD.lineage, "metrics": RECORD.metrics}))
        assert card.startswith("# pirl-demo v0001\n")
        assert "- data digest: `abc123`" in card
        assert "| linear, all labels, top-1 | 85.12 ± 0.37 | 71.00 ± 0.45 |" in card
        assert "| nearest neighbours, top-1 | 80.00 ± 0.40 | not measured |" in card
        assert "one data set only (60,000 labelled training images, 10,000 test images)" in card
        assert "feedbeef" in card
        assert card.endswith("\n")

    def test_an_empty_record(self) -> None:
        card = model_card(VersionRecord(run_id="run-1", files={}))
        assert "registered without an evaluation" in card
        assert "has no architecture" in card

    @pytest.mark.parametrize(
        ("model", "ways"),
        [
            (load_recipe("demo").model, 1),  # narrower than torchvision can build
            (ModelConfig(block="basic", layers=(1, 1, 1, 1), stem="small"), 2),
            (ModelConfig(block="bottleneck", layers=(1, 2, 1, 1), stem="small", stem_stride=1), 2),
            (ModelConfig(block="bottleneck", layers=(1, 1, 1, 1), stem="imagenet", stem_stride=1), 2),
            (ModelConfig(), 2),
        ],
    )
    def test_its_code_loads_the_weights(
        self, model: ModelConfig, ways: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each way on the card, run as it stands, gives the features of the trunk that was saved."""
        # Imported here: the children of the tests above import this module, and would wait seconds for torch.
        import torch
        from safetensors.torch import save_file

        from pirl.model import Trunk

        torch.set_num_threads(1)
        trunk = Trunk(model).eval()
        monkeypatch.chdir(tmp_path)
        save_file(trunk.state_dict(), "trunk.safetensors")
        recipe = load_recipe("demo").model_copy(update={"model": model})
        card = model_card(VersionRecord(run_id="run-1", files={}).model_copy(update={"config": recipe}))
        snippets = re.findall(r"```python\n(.*?)```", card, re.S)
        assert len(snippets) == ways
        images = torch.rand(2, 3, 32, 32)
        for snippet in snippets:
            names: dict[str, Any] = {}
            exec(snippet, names)
            loaded = names.get("trunk") or names["net"]
            assert torch.equal(loaded(images), trunk(images))
        assert "minus mean (0.286, 0.286, 0.286)" in card


def test_storage_is_accepted_as_root(tmp_path: Path) -> None:
    storage: Storage = open_storage(tmp_path)
    assert register(Registry(FolderCatalogue(storage)), "r").uri == f"file://{tmp_path}/pirl-demo/versions/v0001"
    assert os.listdir(tmp_path) == ["pirl-demo"]
