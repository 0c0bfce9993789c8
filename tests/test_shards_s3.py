"""Images on S3 as the source of shards: objects and tar files, in the same order and with the same bytes as at home."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from images import cmyk_jpeg, encoded, flat_folder, folder_of_classes, jpeg, picture, truncated_jpeg
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 (fixtures)

from pirl.errors import DataError, PirlError, StorageError, UsageError
from pirl.shards import ObjectSource, ShardReader, open_source, write_shards
from pirl.storage import open_storage

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIRL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 JPEGs in 3 classes, some in folders below, other formats, a cut file, files that are no images."""
    folder = folder_of_classes(tmp_path_factory.mktemp("tree") / "in", classes=3, images=10)
    (folder / "class1/zz.JPEG").write_bytes(cmyk_jpeg())
    (folder / "class2/aa.png").write_bytes(encoded(picture(7), "PNG"))
    (folder / "class2/cut.jpg").write_bytes(truncated_jpeg())
    (folder / "class2/notes.txt").write_text("no image")
    for name in ("class0/b/x.jpg", "class0/b-c/x.jpg", "class0/b/a/x.jpg", "class0/A.jpg", "class0/c.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(jpeg(len(name)))
    return folder


def upload(folder: Path, uri: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            open_storage(uri).upload(path, path.relative_to(folder).as_posix())
    return uri


def shard(source: Path | str, out: Path | str, **options: Any) -> ShardReader:
    options = {"shard_bytes": 20_000, "max_bad_share": 0.1} | options
    write_shards(open_source(str(source)), open_storage(out), **options)
    return ShardReader(out)


def content(reader: ShardReader) -> list[tuple[str, int, bytes]]:
    return [(reader.name(i), reader.label(i), reader.read(i)) for i in range(len(reader))]


def tar_of(folder: Path, out: Path, *options: str) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "cf", out, *options, "-C", folder, "."], check=True)
    return out


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [pytest.param(1, marks=slow), 2])
def test_objects_become_the_shards_of_the_same_folder(tree: Path, tmp_path: Path, bucket: str, processes: int) -> None:  # noqa: F811
    source = upload(tree, f"{bucket}/images")
    here = shard(tree, tmp_path / "here")
    there = shard(source, f"{bucket}/shards", processes=processes)
    assert there.manifest.digest == here.manifest.digest
    assert there.manifest.shards == here.manifest.shards
    assert there.manifest.source.startswith(source)
    assert content(there) == content(here)
    quarantines = [open_storage(out).read_json("quarantine.json") for out in (tmp_path / "here", f"{bucket}/shards")]
    assert quarantines[0] == quarantines[1]
    assert [image["name"] for image in quarantines[0]["images"]] == ["class2/cut.jpg"]
    assert shard(source, f"{bucket}/shards").manifest == there.manifest  # nothing to do


def test_objects_without_classes(tmp_path: Path, bucket: str) -> None:  # noqa: F811
    folder = flat_folder(tmp_path / "in", 5)
    here = shard(folder, tmp_path / "here")
    there = shard(upload(folder, f"{bucket}/flat"), tmp_path / "there")
    assert there.manifest.classes is None
    assert there.manifest.digest == here.manifest.digest


@pytest.mark.parametrize("format", ["gnu", "ustar", "pax"])
def test_tars_of_a_folder(tree: Path, tmp_path: Path, bucket: str, format: str) -> None:  # noqa: F811
    archive = tar_of(tree, tmp_path / "tars/all.tar", f"--format={format}", "--sort=name")
    expected = {name: (label, data) for name, label, data in content(shard(tree, tmp_path / "here"))}
    for source in (upload(archive.parent, f"{bucket}/tars"), f"{bucket}/tars/all.tar"):
        shutil.rmtree(tmp_path / "there", ignore_errors=True)
        reader = shard(source, tmp_path / "there")
        assert reader.manifest.classes == ["class0", "class1", "class2"]
        found = {name.removeprefix("all.tar/"): (label, data) for name, label, data in content(reader)}
        assert found == expected


def test_our_own_shards_are_a_source(tree: Path, tmp_path: Path, bucket: str) -> None:  # noqa: F811
    first = shard(tree, f"{bucket}/first")
    assert len(first.manifest.shards) > 2
    again = shard(f"{bucket}/first", tmp_path / "again", shard_bytes=50_000, processes=2)
    assert [row[1:] for row in content(again)] == [row[1:] for row in content(first)]
    assert again.manifest.classes == ["0", "1", "2"]  # .cls files have numbers only


def test_neighbours_in_a_tar_come_together_and_it_is_scanned_once(
    tree: Path,
    tmp_path: Path,
    bucket: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(tar_of(tree, tmp_path / "tars/all.tar").parent, f"{bucket}/tars")
    asked: list[int] = []
    source = open_source(f"{bucket}/tars")
    again = open_source(f"{bucket}/tars")
    assert isinstance(again, ObjectSource)
    fetch = type(again.storage).read_version

    def counted(self: Any, name: str, version: str, offset: int, length: int) -> bytes | None:
        asked.append(length)
        return fetch(self, name, version, offset, length)

    monkeypatch.setattr(type(again.storage), "read_version", counted)
    assert again.fingerprint() == source.fingerprint() == open_source(f"{bucket}/tars").fingerprint()
    assert not asked
    again.expect(range(len(again)))
    for i in range(len(again)):
        assert again.load(i) == (tree / again.names[i].removeprefix("all.tar/")).read_bytes()
    assert len(asked) < 5


# --- what goes wrong --------------------------------------------------------------------------------------------------


def put(uri: str, objects: dict[str, bytes]) -> None:
    for name, data in objects.items():
        open_storage(uri).write_bytes(name, data)


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


BAD: dict[str, tuple[dict[str, bytes], type[PirlError], str]] = {
    "nothing": ({}, DataError, "no image in"),
    "no image": ({"a.txt": b"x"}, DataError, "no image in"),
    "flat and classes": ({"a.jpg": jpeg(0), "c/b.jpg": jpeg(1)}, UsageError, "mixes images"),
    "tar without images": ({"a.tar": tar_bytes({"a.txt": b"x"})}, DataError, "no image in the tar files"),
    "tar cut": ({"a.tar": tar_bytes({"a.jpg": jpeg(0), "b.jpg": jpeg(1)})[:3000]}, DataError, "or was cut"),
    "tar without end": ({"a.tar": tar_bytes({"a.jpg": jpeg(0)})[:2560]}, DataError, "or was cut"),
    "no tar": ({"a.tar": b"\x1f\x8b" + bytes(3000)}, DataError, "is not a tar file"),
    "one without label": (
        {"a.tar": tar_bytes({"a.jpg": jpeg(0), "a.cls": b"1", "b.jpg": jpeg(1)})},
        UsageError,
        "b.jpg in a.tar has no .cls",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_sources_that_are_none(bucket: str, case: str) -> None:  # noqa: F811
    objects, error, message = BAD[case]
    put(f"{bucket}/bad", objects)
    with pytest.raises(error, match=message) as caught:
        open_source(f"{bucket}/bad")
    assert caught.value.hint


def test_a_bucket_that_is_not_there(bucket: str) -> None:  # noqa: F811
    with pytest.raises(StorageError, match="does not exist"):
        open_source(f"{bucket}-not/images")


def test_output_inside_the_images(bucket: str) -> None:  # noqa: F811
    put(f"{bucket}/in", {"a.jpg": jpeg(0)})
    with pytest.raises(UsageError, match="lies inside the images"):
        shard(f"{bucket}/in", f"{bucket}/in/shards")
    assert len(shard(f"{bucket}/in", f"{bucket}/in-shards")) == 1


CHANGES: dict[str, Callable[[str], object]] = {
    "replaced": lambda uri: put(uri, {"1.jpg": jpeg(9)}),
    "longer": lambda uri: put(uri, {"1.jpg": jpeg(1) + b"x"}),
    "gone": lambda uri: open_storage(uri).delete("1.jpg"),
}


@pytest.mark.parametrize("how", CHANGES)
def test_objects_that_change_meanwhile_stop_the_run(tmp_path: Path, bucket: str, how: str) -> None:  # noqa: F811
    uri = f"{bucket}/in"
    put(uri, {f"{i}.jpg": jpeg(i) for i in range(3)})

    def change(done: int, total: int) -> None:
        if done == 3:  # all checked, none written
            CHANGES[how](uri)

    with pytest.raises(DataError, match=r"1\.jpg: changed since"):
        shard(uri, tmp_path / "out", progress=change)
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_server_that_goes_away_is_no_bad_image(
    tree: Path,
    tmp_path: Path,
    bucket: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = open_source(upload(tree, f"{bucket}/images"))
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="is unavailable"):
        write_shards(source, open_storage(tmp_path / "out"), max_bad_share=0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    manifest = write_shards(source, open_storage(tmp_path / "out"), max_bad_share=0.1)
    assert manifest.quarantined == 1


# --- real processes ---------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pirl.shards import open_source, write, write_shards
from pirl.storage import open_storage

if __name__ == "__main__":
    source, out, processes = sys.argv[1:4]
    write.CHUNK_IMAGES = 8
    options = {"shard_bytes": 20_000, "max_bad_share": 0.1, "processes": int(processes)}
    progress = lambda *at: print(*at, flush=True)
    write_shards(open_source(source), open_storage(out), progress=progress, **options)
"""


@pytest.mark.parametrize(
    ("kind", "processes"),
    [("tars", 1), *(pytest.param(*case, marks=slow) for case in (("images", 1), ("images", 2), ("tars", 2)))],
)
def test_killed_from_s3_to_s3_continues_with_the_same_bytes(
    tree: Path,
    tmp_path: Path,
    bucket: str,  # noqa: F811
    kind: str,
    processes: int,
) -> None:
    source = upload(tree if kind == "images" else tar_of(tree, tmp_path / "tars/a.tar").parent, f"{bucket}/{kind}")
    expected = shard(source, tmp_path / "whole").manifest
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), source, f"{bucket}/out", str(processes)]
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    rng = random.Random(processes)
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        assert process.stdout
        for _ in range(rng.randrange(2, 6)):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not open_storage(f"{bucket}/out").exists("manifest.json")
    last = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert last.returncode == 0, last.stderr
    first_line = last.stdout.split("\n", 1)[0]
    assert int(first_line.split()[0]) >= 8  # what was checked before is not checked again
    reader = ShardReader(f"{bucket}/out")
    assert reader.manifest.shards == expected.shards
    reader.verify()


MEMORY = """
import resource
import sys
from pirl.shards import open_source

source = open_source(sys.argv[1])
source.expect([0])
source.load(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source.expect(range(len(source)))
total = sum(len(source.load(i)) for i in range(len(source)))
print(total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@slow
def test_memory_is_bounded(bucket: str) -> None:  # noqa: F811
    blob = os.urandom(4 * 2**20)
    put(f"{bucket}/large", {f"{i:03}.jpg": blob for i in range(80)})
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, f"{bucket}/large"], env=env, capture_output=True, text=True, check=True
    )
    total, grown = map(int, result.stdout.split())
    assert total == 80 * len(blob)
    assert grown < 160 * 2**20  # 64 MB asked for ahead, twice while a body is put together
