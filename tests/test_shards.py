"""Sharding and reading back: real files, real processes, real kills."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import (
    bomb_png,
    cmyk_jpeg,
    encoded,
    flat_folder,
    folder_of_classes,
    grey16_png,
    jpeg,
    picture,
    small_fashion_mnist,
    truncated_jpeg,
    write_idx,
)
from PIL import Image
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 (fixtures)

from pirl.errors import DataError, PirlError, StorageError, UsageError
from pirl.shards import (
    ArraySource,
    DatasetSource,
    Manifest,
    ShardReader,
    decode_image,
    fashion,
    find_fashion_mnist,
    open_source,
    write_shards,
)
from pirl.shards import write as write_module
from pirl.storage import open_storage


@pytest.fixture(autouse=True)
def own_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads this machine's caches or settings."""
    monkeypatch.setenv("PIRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PIRL_DATA", raising=False)


def shard(source: Any, out: Path | str, **options: Any) -> Manifest:
    source = open_source(str(source)) if isinstance(source, str | Path) else source
    return write_shards(source, open_storage(out), **options)


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and content of everything in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (_, _, data) in state(folder).items()}


def seal(out: Path) -> None:
    """Make a manifest that was changed by hand consistent again, as an attacker would."""
    from pirl.shards.manifest import Shard, content_digest

    manifest = json.loads((out / "manifest.json").read_text())
    for entry in manifest["shards"]:
        data = (out / entry["name"].replace(".tar", ".json")).read_bytes()
        entry["index_sha256"] = hashlib.sha256(data).hexdigest()
    manifest["digest"] = content_digest([Shard(**entry) for entry in manifest["shards"]], manifest["classes"], {})
    (out / "manifest.json").write_text(json.dumps(manifest))


# --- sources ----------------------------------------------------------------------------------------------------------


def test_folder_has_torchvisions_order(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for name in (
        "b/x.jpg",
        "b/X.JPEG",
        "b/sub/y.png",
        "b/sub-a/y.png",
        "B/1.webp",
        "a b/10.jpg",
        "a b/9.jpg",
        "é/q.bmp",
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())
    (tmp_path / "in/b/notes.txt").write_text("no image")
    (tmp_path / "in/.hidden").mkdir()
    theirs = ImageFolder(str(tmp_path / "in"), allow_empty=True)
    ours = open_source(str(tmp_path / "in"))
    expected = [name.removeprefix(f"{tmp_path}/in/") for name, _ in theirs.samples]
    assert list(ours.names) == expected
    assert ours.labels is not None
    assert [ours.classes[c] for c in ours.labels] == [theirs.classes[c] for _, c in theirs.samples]  # type: ignore[index]


def test_a_class_without_images_keeps_its_index(tmp_path: Path) -> None:
    folder_of_classes(tmp_path / "in", classes=3, images=1)
    (tmp_path / "in/class1/000.jpg").unlink()
    source = open_source(str(tmp_path / "in"))
    assert source.classes == ["class0", "class1", "class2"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 2]


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    manifest = shard(flat_folder(tmp_path / "in", 3), tmp_path / "out")
    reader = ShardReader(tmp_path / "out")
    assert manifest.classes is None
    assert reader.labels().tolist() == [-1, -1, -1]
    assert reader.label(2) == -1
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        assert tar.getnames() == ["000000000.jpg", "000000001.jpg", "000000002.jpg"]


def test_links_are_followed_but_not_into_loops_and_special_files_are_not_opened(tmp_path: Path) -> None:
    folder = folder_of_classes(tmp_path / "in", classes=2, images=2)
    elsewhere = flat_folder(tmp_path / "elsewhere", 2)
    (folder / "class0/again").symlink_to(folder)  # a folder above itself
    (folder / "class0/more").symlink_to(elsewhere)
    (folder / "class1/self.jpg").symlink_to("self.jpg")
    (folder / "class1/gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "class1/pipe.jpg")
    manifest = shard(folder, tmp_path / "out", max_bad_share=0.9)
    reader = ShardReader(tmp_path / "out")
    names = [reader.name(i) for i in range(len(reader))]
    assert {"class0/more/000.jpg", "class0/more/001.jpg"} <= set(names)
    assert not [name for name in names if name.count("again") > 1]
    bad = {
        entry["name"]: entry["reason"] for entry in json.loads((tmp_path / "out/quarantine.json").read_text())["images"]
    }
    own = {name: reason for name, reason in bad.items() if "again" not in name}
    assert set(own) == {"class1/self.jpg", "class1/gone.jpg", "class1/pipe.jpg"}
    assert own["class1/pipe.jpg"] == "not a regular file"
    assert "symbolic links" in own["class1/self.jpg"]
    assert "No such file" in own["class1/gone.jpg"]
    assert manifest.quarantined == len(bad)


def test_list_of_files(tmp_path: Path) -> None:
    flat_folder(tmp_path / "images", 3)
    elsewhere = tmp_path / "else.jpg"
    elsewhere.write_bytes(jpeg(9))
    listed = tmp_path / "list.txt"
    listed.write_text(f"\ufeffimages/002.jpg\tdog\n\nimages/000.jpg\tcat\r\n{elsewhere}\tdog\n")
    source = open_source(str(listed))
    assert source.classes == ["cat", "dog"]
    shard(source, tmp_path / "out")
    reader = ShardReader(tmp_path / "out")
    assert reader.labels().tolist() == [1, 0, 1]
    assert reader.read(2) == jpeg(9)
    listed.write_text("images/000.jpg\t3\nimages/001.jpg\t0\n")
    numbered = open_source(str(listed))
    assert numbered.classes == ["0", "1", "2", "3"]
    assert numbered.labels is not None
    assert numbered.labels.tolist() == [3, 0]
    listed.write_text("images/000.jpg\nimages/absent.jpg\n")
    assert shard(listed, tmp_path / "out2", max_bad_share=0.5).images == 1
    assert "absent.jpg" in (tmp_path / "out2/quarantine.json").read_text()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a.jpg\tcat\nb.jpg\n", UsageError, "line 2"),
        ("a.jpg\nb.jpg\tcat\n", UsageError, "line 2"),
        ("a.jpg\t\n", UsageError, "line 1"),
        ("\tcat\n", UsageError, "line 1"),
        ("a.jpg\t99999999999999999999999999\n", UsageError, "class index"),
        ("a.jpg\tb\tc\n", UsageError, "class name"),
        ("\n\n", DataError, "lists no image"),
    ],
)
def test_bad_lists(tmp_path: Path, text: str, error: type[PirlError], message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(error, match=message) as caught:
        open_source(str(tmp_path / "list.txt"))
    assert caught.value.hint


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "empty/sub").mkdir(parents=True)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="no image in"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="does not exist"):
        open_source(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="neither a folder nor"):
        open_source(str(tmp_path / "notes.md"))
    with pytest.raises(UsageError, match="Did you mean 'fashion-mnist:train'"):
        open_source("fashon-mnist:train")
    with pytest.raises(UsageError, match="Did you mean 'train'"):
        open_source("fashion-mnist:trian")
    folder_of_classes(tmp_path / "mixed")
    (tmp_path / "mixed/loose.jpg").write_bytes(jpeg())
    with pytest.raises(UsageError, match="mixes images"):
        open_source(str(tmp_path / "mixed"))


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "in", 1)
    with open(os.fsencode(folder) + b"/caf\xe9.jpg", "wb") as file:
        file.write(jpeg(5))
    with open(os.fsencode(folder) + b"/zz\xff.jpg", "wb") as file:
        file.write(b"broken")
    with pytest.raises(DataError) as caught:
        shard(folder, tmp_path / "out")
    str(caught.value).encode()  # printable on any terminal
    shard(folder, tmp_path / "out", max_bad_share=0.5)
    reader = ShardReader(tmp_path / "out")
    assert os.fsencode(reader.name(1)) == b"caf\xe9.jpg"
    assert json.loads((tmp_path / "out/quarantine.json").read_text())["images"][0]["name"] == "zz\udcff.jpg"


class Dataset:
    """A data set in torchvision's manner: all kinds of images, one of them broken."""

    classes = ("red", "green")

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        if self.broken and i == 3:
            raise OSError("image file is truncated")
        modes = ("RGB", "L", "CMYK", "1", "RGBA", "P", "YCbCr", "RGB")
        return picture(i).convert(modes[i]), i % 2


@pytest.mark.parametrize("processes", [1, 2])
def test_any_map_dataset(tmp_path: Path, processes: int) -> None:
    manifest = shard(DatasetSource(Dataset(broken=True)), tmp_path / "out", max_bad_share=0.2, processes=processes)
    reader = ShardReader(tmp_path / "out")
    assert manifest.classes == ["red", "green"]
    assert (manifest.images, manifest.quarantined) == (7, 1)
    kept = [i for i in range(8) if i != 3]
    for id, i in enumerate(kept):
        assert reader.label(id) == i % 2
        assert np.array_equal(
            np.asarray(decode_image(reader.read(id), "x")), np.asarray(Dataset()[i][0].convert("RGB"))
        )


def test_datasets_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensors(Dataset):
        def __getitem__(self, i: int) -> Any:
            return np.zeros(3), 0

    class Labels(Dataset):
        def __getitem__(self, i: int) -> Any:
            return picture(i), i

    with pytest.raises(UsageError, match="PIL image"):
        DatasetSource(Tensors())
    with pytest.raises(UsageError, match="labels from 0 to 7"):
        DatasetSource(Labels())
    unpicklable = Dataset()
    unpicklable.hook = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(write_module, "CHUNK_IMAGES", 2)
    with pytest.raises(UsageError, match="worker processes"):
        shard(DatasetSource(unpicklable), tmp_path / "out", processes=2)


def test_limit_spreads_over_the_source(tmp_path: Path) -> None:
    folder_of_classes(tmp_path / "in", classes=4, images=5)
    manifest = shard(tmp_path / "in", tmp_path / "out", limit=8)
    assert manifest.images == 8
    assert sorted(ShardReader(tmp_path / "out").labels().tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(UsageError, match="another input"):
        shard(tmp_path / "in", tmp_path / "out", limit=4)
    with pytest.raises(UsageError, match="limit"):
        shard(tmp_path / "in", tmp_path / "out3", limit=-1)


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 JPEGs in 3 classes, and one file of each other kind."""
    folder = folder_of_classes(tmp_path_factory.mktemp("tree") / "in", classes=3, images=20)
    (folder / "class1/zz.png").write_bytes(grey16_png())
    (folder / "class2/cmyk.JPEG").write_bytes(cmyk_jpeg())
    (folder / "class2/really-a-png.jpg").write_bytes(encoded(picture(7), "PNG"))
    return folder


@pytest.fixture
def sharded(tree: Path, tmp_path: Path) -> Path:
    shard(tree, tmp_path / "out", shard_bytes=40_000)
    return tmp_path / "out"


def test_read_back_what_was_given(tree: Path, sharded: Path) -> None:
    reader = ShardReader(sharded)
    source = open_source(str(tree))
    assert len(reader) == len(source) == 63
    assert len(reader.manifest.shards) > 3
    assert source.labels is not None
    assert reader.labels().dtype == np.int64
    assert reader.labels().tolist() == source.labels.tolist()
    ids = list(range(63))
    random.Random(0).shuffle(ids)
    for id in ids:
        assert reader.name(id) == source.names[id]
        assert reader.label(id) == source.labels[id]
        assert reader.read(id) == (tree / source.names[id]).read_bytes()
    for wrong in (-1, 63):
        with pytest.raises(IndexError):
            reader.read(wrong)
    reader.verify()
    assert all(s.bytes <= 40_000 for s in reader.manifest.shards)


def test_tar_and_webdataset_read_it(tree: Path, sharded: Path) -> None:
    import webdataset

    expected = open_source(str(tree))
    shards = sorted(sharded.glob("*.tar"))
    listed = [subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True) for path in shards]
    assert not any(result.stderr for result in listed)
    names = [name for result in listed for name in result.stdout.split()]
    assert names[:4] == ["000000000.jpg", "000000000.cls", "000000001.jpg", "000000001.cls"]
    assert [name for name in names if name.endswith("png")] == ["000000040.png", "000000062.png"]
    samples = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(63)]
    for i, sample in enumerate(samples):
        image = sample.get("jpg") or sample["png"]
        assert image == (tree / expected.names[i]).read_bytes()
        assert int(sample["cls"]) == expected.labels[i]  # type: ignore[index]
    decoded = webdataset.WebDataset([str(shards[0])], shardshuffle=False).decode("pil").to_tuple("jpg;png", "cls")
    image, label = next(iter(decoded))
    assert (image.size, label) == ((64, 48), 0)


def test_tar_headers_are_those_of_tarfile(sharded: Path) -> None:
    for path in sharded.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                assert (member.uname, member.gname, member.isreg()) == ("", "", True)
                data = path.read_bytes()[member.offset : member.offset_data]
                info = tarfile.TarInfo(member.name)
                info.size = member.size
                theirs = info.tobuf(tarfile.USTAR_FORMAT)
                assert data == theirs


def test_same_bytes_for_any_number_of_processes_and_any_place(tree: Path, sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "copy", copy_function=shutil.copyfile)  # other times, other path
    shard(tmp_path / "copy", tmp_path / "out2", shard_bytes=40_000, processes=2)
    one, two = contents(sharded), contents(tmp_path / "out2")
    first, second = json.loads(one.pop("manifest.json")), json.loads(two.pop("manifest.json"))
    assert one == two
    assert first.pop("source") != second.pop("source")
    assert first == second


@pytest.mark.parametrize("buffer_bytes", [1024, 4096, 20_000])
def test_files_larger_than_the_buffer(
    tree: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int
) -> None:
    monkeypatch.setattr("pirl.shards.tar.BUFFER_BYTES", buffer_bytes)  # the images have 1 to 10 kB
    shard(tree, tmp_path / "out2", shard_bytes=40_000)
    assert contents(tmp_path / "out2") == contents(sharded)


def test_manifest_file(sharded: Path) -> None:
    manifest = json.loads((sharded / "manifest.json").read_text())
    assert list(manifest) == [
        "format",
        "images",
        "classes",
        "digest",
        "source",
        "quarantined",
        "decoding",
        "pictures",
        "shards",
    ]
    for entry in manifest["shards"]:
        data = (sharded / entry["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        index = json.loads((sharded / entry["name"].replace(".tar", ".json")).read_text())
        assert list(index) == ["offset", "size", "crc32", "label", "name"]
        assert {len(column) for column in index.values()} == {entry["images"]}
        spans = [slice(offset, offset + size) for offset, size in zip(index["offset"], index["size"])]
        assert index["crc32"] == [zlib.crc32(data[span]) for span in spans]
    assert sorted(p.name for p in sharded.iterdir() if not p.name.startswith("shard-")) == [
        "manifest.json",
        "quarantine.json",
    ]


def test_progress_reaches_the_end(tree: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    shard(tree, tmp_path / "out", shard_bytes=40_000, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (126, 126)


# --- bad images -------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_quarantined_and_get_no_id(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "in", 20)
    broken = {
        "000.jpg": (truncated_jpeg(), "truncated"),
        "004.jpg": (b"", "empty"),
        "005.jpg": (b"<html>404</html>", "not an image"),
        "011.jpg": (bomb_png(), "limit"),
        "012.jpg": (b"GIF89a" + bytes(20), "cannot be decoded"),
        "019.jpg": (encoded(picture(), "PNG")[:-200], "cannot be decoded"),
    }
    for name, (data, _) in broken.items():
        (folder / name).write_bytes(data)
    (folder / "020.tif").write_bytes(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    manifest = shard(folder, tmp_path / "out", max_bad_share=0.4)
    report = json.loads((tmp_path / "out/quarantine.json").read_text())
    assert (report["quarantined"], report["of"], manifest.quarantined) == (7, 21, 7)
    reasons = {entry["name"]: entry["reason"] for entry in report["images"]}
    assert list(reasons) == [*broken, "020.tif"]
    for name, (_, reason) in broken.items():
        assert reason in reasons[name]
        assert name not in reasons[name]
    reader = ShardReader(tmp_path / "out")
    assert [reader.name(i) for i in range(14)] == sorted(set(os.listdir(folder)) - set(reasons))
    assert len(reader) == 14


def test_too_many_unreadable_images_publish_nothing(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "in", 10)
    (folder / "003.jpg").write_bytes(truncated_jpeg())
    with pytest.raises(DataError, match=r"1 of 10 images.*0\.05(.|\n)*003\.jpg: cannot be decoded") as caught:
        shard(folder, tmp_path / "out", max_bad_share=0.05)
    assert caught.value.hint
    assert open_storage(tmp_path / "out").list() == [] or set(os.listdir(tmp_path / "out")) == {"_work"}
    (folder / "003.jpg").unlink()  # repaired: the same output is free to use
    assert shard(folder, tmp_path / "out", max_bad_share=0.05).images == 9
    assert not (tmp_path / "out/_work").exists()


def test_no_readable_image(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.jpg").write_bytes(truncated_jpeg(i))
    with pytest.raises(DataError, match="no readable image"):
        shard(tmp_path / "in", tmp_path / "out", max_bad_share=1.0)
    assert not (tmp_path / "out/manifest.json").exists()


# --- again, interrupted, at the same time -----------------------------------------------------------------------------


def test_a_second_run_does_nothing(tree: Path, sharded: Path) -> None:
    before = state(sharded)
    assert shard(tree, sharded, shard_bytes=40_000) == ShardReader(sharded).manifest
    assert state(sharded) == before


def test_another_input_is_refused_and_nothing_is_touched(tree: Path, sharded: Path, tmp_path: Path) -> None:
    before = state(sharded)
    other = flat_folder(tmp_path / "other", 3)
    with pytest.raises(UsageError, match=f"folder {tree}.*folder {other}"):
        shard(other, sharded, shard_bytes=40_000)
    with pytest.raises(UsageError, match=r"40000 bytes.*50000 bytes"):
        shard(tree, sharded, shard_bytes=50_000)
    assert state(sharded) == before


def test_changed_files_are_another_input(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "in", 3)
    shard(folder, tmp_path / "out")
    (folder / "001.jpg").write_bytes(jpeg(99))
    with pytest.raises(UsageError, match="its files have changed since"):
        shard(folder, tmp_path / "out")


def test_files_that_change_in_between_stop_the_run(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "in", 3)
    source = open_source(str(folder))

    def damage(done: int, total: int) -> None:
        if done == 3:  # all checked, none written
            (folder / "001.jpg").write_bytes(jpeg(99))

    with pytest.raises(DataError, match=r"001\.jpg: changed since"):
        write_shards(source, open_storage(tmp_path / "out"), progress=damage)
    assert not (tmp_path / "out/manifest.json").exists()
    with pytest.raises(UsageError, match="unfinished"):
        shard(folder, tmp_path / "out")


def test_foreign_shards_are_not_overwritten(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "in", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shard-000000.tar").write_text("precious")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"shard-000000\.tar and others"):
            shard(folder, tmp_path / "out")
    assert (tmp_path / "out/shard-000000.tar").read_text() == "precious"


def test_output_inside_the_images(tmp_path: Path) -> None:
    folder = folder_of_classes(tmp_path / "in")
    for out in (folder, folder / "shards"):
        with pytest.raises(UsageError, match="inside the images"):
            shard(folder, out)
    assert sorted(os.listdir(folder)) == ["class0", "class1", "class2"]


SCRIPT = """
import sys
from pirl.errors import PirlError
from pirl.shards import open_source, write, write_shards
from pirl.storage import open_storage

if __name__ == "__main__":
    source, out, processes = sys.argv[1:4]
    write.CHUNK_IMAGES = 8
    options = {"shard_bytes": 40_000, "processes": int(processes), "progress": lambda *at: print(*at, flush=True)}
    try:
        write_shards(open_source(source), open_storage(out), **options)
    except PirlError as error:
        print(type(error).__name__, error.what, error.hint, file=sys.stderr)
        sys.exit(error.exit_code)
"""


def start(tmp_path: Path, source: Path, out: Path | str, processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(source), str(out), str(processes)]
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return errors


def workers_of(tmp_path: Path) -> list[int]:
    """Worker processes of the runs that this test has started, orphans among them: they inherit its environment."""
    mark = f"PIRL_CACHE={tmp_path}/cache".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"spawn_main" in (path / "cmdline").read_bytes() and mark in (path / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(path.name))
    return found


def visible(folder: Path) -> dict[str, bytes]:
    """Without what a killed write leaves aside; the storage sweeps it when it is old."""
    return {name: data for name, data in contents(folder).items() if ".pirl-tmp-" not in name}


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_continue_with_the_same_bytes(tree: Path, sharded: Path, tmp_path: Path, processes: int) -> None:
    """kill -9 at random points, again and again into one output, until a run gets through."""
    rng = random.Random(processes)
    out = tmp_path / "killed"
    finished: dict[str, tuple[int, int, bytes]] = {}
    kills = 0
    for steps in ((1, 9, 3, 4, 3), (1, 10, 4))[processes - 1]:
        process = start(tmp_path, tree, out, processes)
        assert process.stdout
        for _ in range(steps):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        deadline = time.monotonic() + 5
        while workers_of(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not workers_of(tmp_path)
        now = state(out) if out.exists() else {}
        for name, before in finished.items():
            assert name not in now or now[name] == before, f"{name} was written again"
        records = {Path(name).name for name in now if re.search(r"_work/[0-9a-f]+/shard-", name)}
        finished = {name: now[name] for r in records for name in (r, r.replace(".json", ".tar"))}
    assert kills >= 2
    finish(start(tmp_path, tree, out, processes))
    after = state(out)
    assert all(after[name] == before for name, before in finished.items())
    assert visible(out) == contents(sharded)


def test_two_runs_at_once_agree(tree: Path, sharded: Path, tmp_path: Path) -> None:
    runs = [start(tmp_path, tree, tmp_path / "both", processes) for processes in (1, 1, 2)]
    for run in runs:
        finish(run)
    again = start(tmp_path, tree, tmp_path / "both")  # whatever a late one has left is removed
    finish(again)
    assert contents(tmp_path / "both") == contents(sharded)


def test_two_inputs_at_once_exclude_each_other(tree: Path, tmp_path: Path) -> None:
    other = flat_folder(tmp_path / "other", 40)
    runs = [start(tmp_path, source, tmp_path / "both") for source in (tree, other)]
    errors = [run.communicate(timeout=60)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 2]
    loser = errors[codes.index(2)]
    assert str(tree) in loser
    assert str(other) in loser
    reader = ShardReader(tmp_path / "both")
    reader.verify()
    assert len(reader) == (63, 40)[codes.index(0)]


def test_a_dead_worker_is_reported_and_the_next_run_continues(tree: Path, sharded: Path, tmp_path: Path) -> None:
    process = start(tmp_path, tree, tmp_path / "out2", 2)
    deadline = time.monotonic() + 20
    while not (workers := workers_of(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process died" in errors
    assert "continues" in errors
    finish(start(tmp_path, tree, tmp_path / "out2", 2))
    assert visible(tmp_path / "out2") == contents(sharded)


# --- outputs that fail ------------------------------------------------------------------------------------------------


def test_full_disk(tree: Path, sharded: Path, tmp_path: Path) -> None:
    """A process that may write no file above 20 kB: as on a full disk, write() fails in the middle of a shard."""

    def little_room() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(tmp_path, tree, tmp_path / "full", preexec_fn=little_room)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "StorageError" in errors
    assert "cannot be written" in errors
    assert "continues where it was" in errors
    assert "Traceback" not in errors
    assert not [name for name in contents(tmp_path / "full") if "unfinished" in name or name.startswith("shard")]
    finish(start(tmp_path, tree, tmp_path / "full"))  # there is room again
    assert contents(tmp_path / "full") == contents(sharded)


def test_output_that_cannot_be_written(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file/below", Path("/proc/sys/pirl")):
        with pytest.raises(StorageError) as caught:
            shard(tree, out)
        assert caught.value.hint


# --- reading damaged data sets ----------------------------------------------------------------------------------------


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(out: Path) -> None:
        manifest = json.loads((out / "manifest.json").read_text())
        change(manifest)
        (out / "manifest.json").write_text(json.dumps(manifest))

    return apply


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(out: Path) -> None:
        index = json.loads((out / "shard-000001.json").read_text())
        change(index)
        (out / "shard-000001.json").write_text(json.dumps(index))
        seal(out)

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard cut": (lambda out: os.truncate(out / "shard-000001.tar", 9000), r"shard-000001\.tar has 9,000 bytes"),
    "shard empty": (lambda out: os.truncate(out / "shard-000001.tar", 0), r"shard-000001\.tar has 0 bytes"),
    "shard longer": (lambda out: (out / "shard-000001.tar").open("ab").write(b"x"), r"shard-000001\.tar has"),
    "shard missing": (lambda out: (out / "shard-000002.tar").unlink(), r"shard-000002\.tar is missing"),
    "index missing": (lambda out: (out / "shard-000002.json").unlink(), r"shard-000002\.json is missing"),
    "index of another": (
        lambda out: shutil.copy(out / "shard-000000.json", out / "shard-000001.json"),
        r"shard-000001\.json has other content",
    ),
    "index too short": (edit_index(lambda index: index["size"].pop()), "does not describe"),
    "index beyond the end": (edit_index(lambda index: index["offset"].__setitem__(0, 10**9)), "does not describe"),
    "index negative": (edit_index(lambda index: index["offset"].__setitem__(0, -512)), "does not describe"),
    "index overflows": (edit_index(lambda index: index["offset"].__setitem__(0, 2**70)), "does not describe"),
    "index label too high": (edit_index(lambda index: index["label"].__setitem__(0, 3)), "does not describe"),
    "index lacks a column": (edit_index(lambda index: index.pop("name")), "does not describe"),
    "manifest missing": (lambda out: (out / "manifest.json").unlink(), "holds no manifest"),
    "manifest no JSON": (lambda out: os.truncate(out / "manifest.json", 100), "is not JSON"),
    "manifest a list": (lambda out: (out / "manifest.json").write_text("[]"), "not a manifest"),
    "manifest of another format": (edit(lambda m: m.update(format=2)), "format"),
    "manifest with another key": (edit(lambda m: m.update(extra=1)), "extra"),
    "manifest with another count": (edit(lambda m: m.update(images=62)), "promises 62"),
    "manifest with a gap": (edit(lambda m: m["shards"].pop(1)), "starts at id"),
    "manifest with other classes": (edit(lambda m: m["classes"].reverse()), "digest"),
    "manifest with another hash": (edit(lambda m: m["shards"][0].update(sha256="0" * 64)), "digest"),
    "manifest with a path": (edit(lambda m: m["shards"][0].update(name="../../etc/shard-000000.tar")), "name"),
    "manifest with negative sizes": (edit(lambda m: m["shards"][0].update(bytes=-1)), "bytes"),
}


def read_all(place: Path) -> list[bytes]:
    reader = ShardReader(place)
    return [reader.read(id) for id in range(len(reader))]


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_when_a_shard_is_first_touched(sharded: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(sharded)
    with pytest.raises(DataError, match=message) as caught:
        read_all(sharded)
    assert caught.value.hint
    assert str(sharded) in caught.value.what
    if case.startswith("shard") or case == "index missing":
        with pytest.raises(DataError, match=message):
            ShardReader(sharded).check()


def test_verify_finds_what_a_size_cannot_tell(sharded: Path) -> None:
    path = sharded / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    reader = ShardReader(sharded)
    with pytest.raises(DataError, match=r"shard-000002\.tar has other content"):
        reader.verify()


def test_an_image_that_changed_while_in_use(sharded: Path) -> None:
    """In a shard of the same size, which nobody notices when it is opened."""
    reader = ShardReader(sharded)
    before = reader.read_many([0, 1])
    path = sharded / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(before[1]) + 100] ^= 1
    path.write_bytes(data)
    assert reader.read_many([0]) == before[:1]
    with pytest.raises(DataError, match=r"shard-000000\.tar has other content than its manifest lists \(image 1\)"):
        reader.read_many([0, 1])


def test_a_shard_cut_while_in_use(sharded: Path) -> None:
    reader = ShardReader(sharded)
    assert reader.read(0)
    os.truncate(sharded / "shard-000000.tar", 1000)
    with pytest.raises(DataError, match=r"shard-000000\.tar was cut"):
        reader.read(0)
    (sharded / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
        reader.read(reader.manifest.shards[1].first_id)


def test_reader_after_fork_pickle_and_in_threads(tree: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("read", "index"):
        monkeypatch.setattr(f"pirl.shards.{module}.max_open", lambda: 2)  # files are closed and opened all the time
    reader = ShardReader(sharded)
    expected = [(tree / reader.name(i)).read_bytes() for i in range(63)]
    assert [pickle.loads(pickle.dumps(reader)).read(i) for i in (0, 30, 62)] == [expected[i] for i in (0, 30, 62)]

    def read(seed: int) -> int:
        ids = random.Random(seed).choices(range(63), k=400)
        return sum(reader.read(i) != expected[i] for i in ids)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(read, range(8))) == 0
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def read_all(start: int) -> None:
        queue.put(all(reader.read((start + i) % 63) == expected[(start + i) % 63] for i in range(63)))

    children = [context.Process(target=read_all, args=(start,)) for start in (0, 30)]
    for child in children:
        child.start()
    assert all(queue.get(timeout=20) for _ in children)
    for child in children:
        child.join()
    assert len(os.listdir("/proc/self/fd")) < 100


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_s3_output(tree: Path, sharded: Path, bucket: str, tmp_path: Path) -> None:  # noqa: F811
    out = f"{bucket}/data/set"
    manifest = shard(tree, out, shard_bytes=40_000, processes=2)
    storage = open_storage(out)
    assert manifest == ShardReader(sharded).manifest
    assert {name: storage.read_bytes(name) for name in storage.list()} == contents(sharded)
    reader = ShardReader(out)
    assert [reader.read(i) for i in range(63)] == [ShardReader(sharded).read(i) for i in range(63)]
    assert reader.name(3) == ShardReader(sharded).name(3)
    reader.verify()
    assert shard(tree, out, shard_bytes=40_000) == manifest  # nothing to do
    with pytest.raises(UsageError, match="another input"):
        shard(tree, out, shard_bytes=50_000)


def test_s3_damage(tree: Path, bucket: str, tmp_path: Path) -> None:  # noqa: F811
    out = f"{bucket}/set"
    shard(tree, out, shard_bytes=40_000)
    storage = open_storage(out)
    data = bytearray(storage.read_bytes("shard-000001.tar"))
    data[600] ^= 1  # in the first image
    storage.write_bytes("shard-000001.tar", bytes(data))
    reader = ShardReader(out)
    first = reader.manifest.shards[1].first_id
    with pytest.raises(DataError, match=r"shard-000001\.tar has other content"):
        reader.read(first)
    with pytest.raises(DataError, match="other content"):
        reader.verify()
    assert reader.read(0) == (tree / reader.name(0)).read_bytes()
    storage.delete("shard-000002.tar")
    with pytest.raises(DataError, match=r"shard-000002\.tar is missing"):
        ShardReader(out).check()
    with pytest.raises(DataError, match=r"shard-000002\.tar is missing"):
        shard(tree, out, shard_bytes=40_000)


def test_s3_kill_and_continue(tree: Path, sharded: Path, bucket: str, tmp_path: Path) -> None:  # noqa: F811
    out = f"{bucket}/killed"
    process = start(tmp_path, tree, out)
    assert process.stdout
    for _ in range(10):
        process.stdout.readline()
    process.kill()
    process.communicate()
    with pytest.raises(DataError, match="interrupted"):
        ShardReader(out)
    finish(start(tmp_path, tree, out))
    storage = open_storage(out)
    assert {name: storage.read_bytes(name) for name in storage.list()} == contents(sharded)


# --- Fashion-MNIST ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without Fashion-MNIST, without a network that answers, without apt."""
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(fashion, "DOWNLOAD_PROBE", "http://127.0.0.1:9/refused")
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw", "fashion-mnist"])
def test_fashion_mnist_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    small_fashion_mnist(tmp_path / "data" / below)
    monkeypatch.setenv("PIRL_DATA", str(tmp_path / "data"))
    source = open_source("fashion-mnist:train")
    assert isinstance(source, ArraySource)
    manifest = shard(source, tmp_path / "out", shard_bytes=30_000, processes=2)
    assert (manifest.images, manifest.classes) == (60, fashion.CLASSES)
    assert len(manifest.shards) > 1
    reader = ShardReader(tmp_path / "out")
    assert reader.labels().tolist() == [i % 10 for i in range(60)]
    for i in range(60):
        with Image.open(io.BytesIO(reader.read(i))) as image:
            assert (image.mode, image.format) == ("L", "PNG")
            assert np.array_equal(np.asarray(image), source.images[i])
    assert len(open_source("fashion-mnist:test")) == 20


@pytest.mark.usefixtures("nowhere")
def test_fashion_mnist_is_found_in_the_promised_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        find_fashion_mnist()
    assert time.monotonic() - start < 8
    positions = [
        caught.value.what.index(place) for place in ("PIRL_DATA", "cache", "torchvision", "dataset-fashion-mnist")
    ]
    assert positions == sorted(positions)
    debian = small_fashion_mnist(fashion.DEBIAN_FOLDER)
    assert find_fashion_mnist() == debian

    def downloaded() -> Path:
        return small_fashion_mnist(tmp_path / "cache/fashion-mnist/FashionMNIST/raw")

    monkeypatch.setattr(fashion, "_download", downloaded)
    assert find_fashion_mnist() == tmp_path / "cache/fashion-mnist/FashionMNIST/raw"
    monkeypatch.setattr(fashion, "_download", lambda: pytest.fail("there is a cached copy"))
    assert find_fashion_mnist() == tmp_path / "cache/fashion-mnist/FashionMNIST/raw"
    own = small_fashion_mnist(tmp_path / "own")
    monkeypatch.setenv("PIRL_DATA", str(own))
    assert find_fashion_mnist() == own
    monkeypatch.setenv("PIRL_DATA", str(tmp_path / "typo"))
    assert find_fashion_mnist() == tmp_path / "cache/fashion-mnist/FashionMNIST/raw"


@pytest.mark.usefixtures("nowhere")
def test_fashion_mnist_download_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def fetch(self: Any, root: str, download: bool) -> None:
        small_fashion_mnist(Path(root) / "FashionMNIST/raw")

    def broken(self: Any, root: str, download: bool) -> None:
        write_idx(Path(root) / "FashionMNIST/raw/train-images-idx3-ubyte.gz", np.zeros((3, 28, 28)))
        raise RuntimeError("Error downloading t10k-images-idx3-ubyte.gz")

    monkeypatch.setattr(fashion, "_require_network", lambda url: None)
    monkeypatch.setattr(datasets.FashionMNIST, "__init__", broken)
    with pytest.raises(DataError, match="Error downloading t10k"):
        find_fashion_mnist()
    assert os.listdir(tmp_path / "cache") == []
    monkeypatch.setattr(datasets.FashionMNIST, "__init__", fetch)
    assert find_fashion_mnist() == tmp_path / "cache/fashion-mnist/FashionMNIST/raw"
    assert os.listdir(tmp_path / "cache") == ["fashion-mnist"]


@pytest.mark.usefixtures("nowhere")
def test_debian_package_is_installed_by_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get that knows the package only after an update."""
    ran: list[str] = []

    def run(command: list[str]) -> bool:
        ran.append(command[1])
        if command[1] == "install" and "update" in ran:
            small_fashion_mnist(fashion.DEBIAN_FOLDER)
        return command[1] == "update" or "update" in ran

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/apt-get")
    monkeypatch.setattr(fashion, "_run", run)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(DataError, match="only root can install it"):
        find_fashion_mnist()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert find_fashion_mnist() == fashion.DEBIAN_FOLDER
    assert ran == ["install", "update", "install"]


def test_a_network_that_swallows_packets_fails_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(fashion, "CONNECT_TIMEOUT_S", 0.3)
    with socket.socket() as silent:  # accepts, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="cannot be reached"):
            fashion._require_network(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert time.monotonic() - start < 3


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-labels-idx1-ubyte.gz", np.zeros(59), "60 train images, but 59 labels"),
        ("train-labels-idx1-ubyte.gz", np.full(60, 10), "labels up to 10"),
        ("train-labels-idx1-ubyte.gz", np.zeros((60, 1)), "no IDX file"),
        ("train-images-idx3-ubyte.gz", np.zeros((0, 28, 28)), "0 train images"),
    ],
)
def test_wrong_fashion_mnist_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, array: np.ndarray, message: str
) -> None:
    monkeypatch.setenv("PIRL_DATA", str(small_fashion_mnist(tmp_path)))
    write_idx(tmp_path / name, array)
    with pytest.raises(DataError, match=message):
        open_source("fashion-mnist:train")


@pytest.mark.usefixtures("nowhere")
def test_broken_fashion_mnist_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setenv("PIRL_DATA", str(small_fashion_mnist(tmp_path)))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    plain = gzip.decompress(whole)
    huge = b"\x00\x00\x08\x03" + b"\xff" * 12
    wrong = [whole[: len(whole) // 2], b"", b"no gzip", *map(gzip.compress, (plain[:-1], plain + b"x", huge))]
    for data in wrong:
        path.write_bytes(data)
        with pytest.raises(DataError, match="train-images") as caught:
            open_source("fashion-mnist:train")
        assert caught.value.hint
    path.unlink()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(plain)  # unpacked, as torchvision leaves it
    assert len(open_source("fashion-mnist:train")) == 60


@pytest.mark.skipif(not fashion.DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIRL_DATA", str(fashion.DEBIAN_FOLDER))
    source = open_source("fashion-mnist:test")
    assert isinstance(source, ArraySource)
    assert source.images.shape == (10_000, 28, 28)
    assert np.bincount(source.labels).tolist() == [1000] * 10
    manifest = shard(source, tmp_path / "out", limit=1000)
    assert manifest.images == 1000
    assert np.bincount(ShardReader(tmp_path / "out").labels(), minlength=10).min() > 50
