"""`docs/operations.md`: its commands for any machine work, the tests that its threats name exist, some of them here."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
from conftest import TINY
from images import encoded, folder_of_classes, jpeg, picture, png_chunk
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 fixtures

from pirl.errors import DataError, StorageError, UsageError
from pirl.jobs import job_settings
from pirl.registry import open_registry
from pirl.shards import Manifest, ShardReader, check_image, open_source, write_shards
from pirl.shards.manifest import content_digest
from pirl.storage import open_storage

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "operations.md").read_text()
KEY = "planted-key-that-nobody-may-see"


def blocks(info: str) -> list[str]:
    """The document's blocks of commands after "```" and `info`, in their order."""
    return re.findall(rf"^```{info}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder in which somebody did all that the document says, with a key in the environment; and what was said."""
    folder = tmp_path_factory.mktemp("operations")
    folder_of_classes(folder / "train", classes=2, images=24, width=24, height=20)
    folder_of_classes(folder / "test", classes=2, images=8, width=24, height=20, first=5000)
    (folder / "tiny.toml").write_text(TINY)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    known = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PIRL_", "KUBE"))}
    environment = {
        **known,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "AWS_ACCESS_KEY_ID": f"id-{KEY}",
        "AWS_SECRET_ACCESS_KEY": KEY,
        "PIRL_ROOT": str(folder / "root"),
        "PIRL_TRAIN_SOURCE": "train",
        "PIRL_TEST_SOURCE": "test",
        "PIRL_RECIPE": "tiny.toml",
        "PIRL_PROCESSES": "1",
        "PIRL_MIN_GAIN": "-1",
    }
    said = []
    for block in blocks("sh"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, block + done.stdout + done.stderr
        said.append(done.stdout + done.stderr)
    return folder, said


class TestDocument:
    @pytest.mark.slow
    def test_it_does_what_it_says(self, followed: tuple[Path, list[str]]) -> None:
        folder, (run_now, resume, roll_back, delete) = followed
        assert "would be sharded" in run_now
        assert "pirl v0001: " in run_now
        assert resume.endswith("up to date\n")
        assert "pirl: champion v0001 -> v0001 (not done)" in roll_back
        assert roll_back.endswith("up to date\n")
        assert "v0001" in delete
        version = open_registry(str(folder / "root" / "registry")).get("pirl", "champion", verify=True)
        assert version.version == "v0001", "a version does not need the checkpoints of its run"

    def test_links_lead_somewhere(self) -> None:
        headings = {
            re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall("^#+ (.*)", TEXT, re.M)
        }
        for link in re.findall(r"\]\(([^)]+)\)", TEXT):
            assert link[1:] in headings if link.startswith("#") else (ROOT / "docs" / link).exists(), link
        for path in set(re.findall(r"manifests/[\w./-]*[\w/]", TEXT)):
            assert (ROOT / path).exists(), path

    def test_every_threat_names_tests_that_exist(self) -> None:
        rows = [line for line in TEXT.splitlines() if line.startswith("| **")]
        wanted = ("Poisoned images", "Hostile checkpoints", "compromised worker", "Leaked keys", "Path traversal")
        for threat in (*wanted, "Decompression bombs", "Oversized metadata"):
            assert any(threat in row.split("|")[1] for row in rows), threat
        for row in rows:
            named = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", row.split("|")[3])
            assert named, f"no test shows this: {row}"
            for file, name in named:
                assert name in names_in(ROOT / file), f"{file} has no {name}"


def names_in(path: Path) -> set[str]:
    """Names of the tests in a file, as pytest writes them after the file's."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + item.name for item in inner if isinstance(item, ast.FunctionDef)}
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


class TestThreats:
    def test_text_in_an_image_that_inflates_without_end(self) -> None:
        """64 KiB that say they are a comment, or a colour profile, of 64 MiB: they are never inflated."""
        whole = encoded(picture(), "PNG")
        for kind in (b"zTXt", b"iCCP"):
            content = b"profile\0\0" + zlib.compress(bytes(64 << 20), 9)
            assert len(content) < 1 << 17
            data = whole[:33] + png_chunk(kind, content) + whole[33:]  # after the header
            tracemalloc.start()
            try:
                assert check_image(data, "bomb.png").extension == "png"
                assert tracemalloc.get_traced_memory()[1] < 4 << 20
            finally:
                tracemalloc.stop()

    @pytest.mark.parametrize("name", ["manifest.json", "gate.json"])
    def test_a_record_of_a_terabyte_is_refused(self, tmp_path: Path, name: str) -> None:
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
        storage = open_storage(tmp_path)
        with pytest.raises(StorageError, match=rf"{name} has more than"):
            Manifest.load(storage) if name == "manifest.json" else storage.read_json(name)

    def test_keys_in_a_shard_are_numbers_whatever_the_files_are_called(self, tmp_path: Path) -> None:
        (tmp_path / "list").mkdir()
        names = ["../outside.jpg", "/".join([".."] * 20) + str(tmp_path / "up.jpg"), "a\rb.jpg", "-rf.jpg"]
        for seed, name in enumerate(names):
            (tmp_path / "list" / name).write_bytes(jpeg(seed))
        (tmp_path / "list" / "l.txt").write_bytes("".join(f"{name}\n" for name in names if "\r" not in name).encode())
        write_shards(open_source(str(tmp_path / "list" / "l.txt")), open_storage(tmp_path / "out"), processes=1)
        write_shards(open_source(str(tmp_path / "list")), open_storage(tmp_path / "flat"), processes=1)
        for folder in ("out", "flat"):
            for shard in (tmp_path / folder).glob("*.tar"):
                with tarfile.open(shard) as file:
                    members = file.getnames()
                assert members
                assert all(re.fullmatch(r"[0-9]+\.[a-z]+", member) for member in members), members

    @pytest.mark.parametrize("name", ["../shard-000000.tar", "/etc/passwd", "shard-000000.tar/../../x.tar", "x.tar"])
    def test_a_manifest_cannot_name_a_file_elsewhere(self, tmp_path: Path, name: str) -> None:
        folder_of_classes(tmp_path / "images", classes=1, images=2)
        storage = open_storage(tmp_path / "out")
        manifest = write_shards(open_source(str(tmp_path / "images")), storage, processes=1)
        assert ShardReader(storage).read(0)
        record = json.loads(storage.read_bytes("manifest.json"))
        record["shards"][0]["name"] = name
        record["digest"] = content_digest(manifest.shards, manifest.classes, {})  # right in all but the name
        storage.write_json("manifest.json", record)
        with pytest.raises(DataError, match=r"shards\.0\.name"):
            ShardReader(storage)

    @pytest.mark.slow
    def test_no_key_in_a_run_or_in_what_was_said(self, followed: tuple[Path, list[str]]) -> None:
        folder, said = followed
        assert KEY not in "".join(said)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 20
        assert [path for path in files if KEY.encode() in path.read_bytes()] == []

    def test_no_key_in_the_job(self, tmp_path: Path, bucket: str) -> None:  # noqa: F811
        folder_of_classes(tmp_path / "images", classes=3, images=14, width=24, height=20)
        (tmp_path / "tiny.toml").write_text(TINY)
        write_shards(open_source(str(tmp_path / "images")), open_storage(f"{bucket}/data"), processes=1)
        command = [str(Path(sys.executable).parent / "pirl"), "train", "tiny.toml", "--backend", "pytorchjob"]
        command += ["--data", f"{bucket}/data", "--out", f"{bucket}/run", "--dry-run"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "name: pirl-s3" in done.stdout  # the Secret, by its name
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert os.environ[name] not in done.stdout + done.stderr

    def test_a_key_among_the_settings_is_refused_and_not_repeated(self) -> None:
        with pytest.raises(UsageError, match="into the Secret") as error:
            job_settings([f'env={{"AWS_SECRET_ACCESS_KEY": "{KEY}"}}'])
        assert KEY not in str(error.value)
