"""Folders, lists and S3 prefixes: which files are images, what is left out, and what is said of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from images import encoded, truncated_jpeg
from PIL import Image
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 (fixtures)

from pirl import cli
from pirl.errors import DataError, PirlError, UsageError
from pirl.shards import Quarantine, ShardReader, Source, compare_classes, open_source, summary, write_shards
from pirl.shards.filter import LeftOut
from pirl.storage import open_storage

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIRL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shard(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`pirl shard` in this process -> exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pirl", "shard", *map(str, arguments), "--processes", "1"])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        shown = capfd.readouterr()
        return exit.value.code if isinstance(exit.value.code, int) else 0, shown.out, shown.err

    return run


def square(kind: str = "JPEG") -> bytes:
    return encoded(Image.new("RGB", (8, 8), (200, 100, 50)), kind)


def put(root: Path, *names: str, data: bytes = b"") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data or square())
    return root


def upload(folder: Path, uri: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            open_storage(uri).write_bytes(path.relative_to(folder).as_posix(), path.read_bytes())
    return uri


def left_out(source: Source) -> dict[str, list[str]]:
    return {part["reason"]: part["names"] for part in source.left_out.as_json()}


def labelled(source: Source) -> dict[str, str]:
    assert source.labels is not None
    assert source.classes is not None
    return {name: source.classes[label] for name, label in zip(source.names, source.labels)}


# --- by content, not by suffix ----------------------------------------------------------------------------------------


@pytest.fixture
def suffixes(tmp_path: Path) -> Path:
    root = put(tmp_path / "in", *(f"{c}/x{s}" for c in "ab" for s in (".jpg", ".jfif", ".jpe", ".JPEG", "", ".0001")))
    put(root, "c/only.jfif")
    put(root, "b/moving.gif", "b/moving", data=square("GIF"))
    put(root, "a/x.tga", data=square("TGA"))
    put(root, "b/raw.nef", data=square("TIFF"))
    put(root, "b/scan", data=square("TIFF"))
    put(root, "a/note", "a/BM", data=b"BM is not a picture, nor is P5, nor II*\0")
    put(root, "b/notes.txt", data=square())
    put(root, "d/only.tga", data=square("TGA"))
    return root


NOT_IMAGES = {
    "not an image (.tga)": ["a/x.tga", "d/only.tga"],
    "not an image (no usual suffix)": ["a/BM", "a/note"],
    "not an image (.nef)": ["b/raw.nef"],
    "not an image (.txt)": ["b/notes.txt"],
}


def test_an_image_is_one_by_its_content(suffixes: Path) -> None:
    source = open_source(str(suffixes))
    expected = {f"{c}/x{s}": c for c in "ab" for s in (".JPEG", "", ".0001", ".jfif", ".jpe", ".jpg")}
    assert labelled(source) == {**expected, "b/moving": "b", "b/moving.gif": "b", "b/scan": "b", "c/only.jfif": "c"}
    assert left_out(source) == NOT_IMAGES
    assert source.classes == ["a", "b", "c", "d"]


def test_objects_are_filtered_as_files_are(suffixes: Path, bucket: str) -> None:  # noqa: F811
    put(suffixes, "a/.ipynb_checkpoints/x.jpg", "@eaDir/x.jpg", "a/._x.jpg", "a/Thumbs.db")
    local, remote = open_source(str(suffixes)), open_source(upload(suffixes, f"{bucket}/in"))
    assert list(remote.names) == list(local.names)
    assert left_out(remote) == left_out(local)
    assert labelled(remote) == labelled(local)
    assert "no class, since no image is in it: d" in summary(remote)


def test_what_is_left_out_is_said_and_named(suffixes: Path, tmp_path: Path, shard: Command) -> None:
    put(suffixes, "e/cut.jpg", data=truncated_jpeg())
    code, out, _ = shard(suffixes, tmp_path / "out", "--max-bad-share", "0.2")
    assert code == 0
    assert "17 images, 5 classes: a, b, c, d, e; images a class: least 0, median 1, most 9" in out
    assert "1 class without an image: d" in out
    assert "left out, each named in quarantine.json: 2 not an image (.tga)" in out
    assert "2 classes without a readable image: d, e" in out
    assert "16 images in 1 shard, 1 quarantined" in out
    quarantine = Quarantine.load(open_storage(tmp_path / "out"))
    assert {part.reason: part.names for part in quarantine.left_out} == NOT_IMAGES
    assert quarantine.empty_classes == ["d", "e"]
    assert [image.name for image in quarantine.images] == ["e/cut.jpg"]


def test_quarantines_of_version_0_1_are_read(tmp_path: Path) -> None:
    (tmp_path / "quarantine.json").write_text('{"quarantined": 1, "of": 2, "images": [{"name": "a", "reason": "b"}]}')
    assert Quarantine.load(open_storage(tmp_path)).left_out == []


def test_many_reasons_are_shortened_on_the_console() -> None:
    files = LeftOut()
    for k in range(12):
        files.add(f"reason {k}", "name", files=12 - k)
    assert str(files) == ", ".join(f"{12 - k} reason {k}" for k in range(8)) + ", and 4 more reasons"


def test_the_same_bytes_as_version_0_1(tmp_path: Path) -> None:
    """A folder that was right before keeps its ids, its digest, and a quarantine.json without new keys."""
    for k, name in enumerate(("b/x.ppm", "a/2.ppm", "a/10.ppm", "a/sub/y.ppm")):
        put(tmp_path / "in", name, data=b"P6\n1 1\n255\n" + bytes((k, 9, 9)))
    manifest = write_shards(open_source(str(tmp_path / "in")), open_storage(tmp_path / "out"))
    assert manifest.digest == "20a57b4d033cb4c1f46986cb4bf0f757210a73b2eb9313799c5573af345376a0"
    assert json.loads((tmp_path / "out/quarantine.json").read_text()) == {"quarantined": 0, "of": 4, "images": []}


# --- hidden, and of systems -------------------------------------------------------------------------------------------

SYSTEM = (
    *("ant/.ipynb_checkpoints/1-checkpoint.jpg", "ant/@eaDir/1.jpg/SYNOPHOTO_THUMB_S.jpg", "ant/._1.jpg"),
    *("ant/sub/.DS_Store", "ant/Thumbs.db", "ant/sub/desktop.ini", "__MACOSX/ant/._1.jpg", ".git/x.jpg", ".x.jpg"),
)
SYSTEM_NAMED = sorted(
    (
        *("ant/.ipynb_checkpoints/", "ant/@eaDir/", "ant/._1.jpg", "ant/sub/.DS_Store", "ant/Thumbs.db"),
        *("ant/sub/desktop.ini", "__MACOSX/", ".git/", ".x.jpg"),
    )
)


@pytest.mark.parametrize("place", ["folder", "S3"])
def test_hidden_files_and_those_of_systems_are_left_out(tmp_path: Path, bucket: str, place: str) -> None:  # noqa: F811
    root = put(tmp_path / "in", "ant/1.jpg", "bee/1.jpg", *SYSTEM)
    source = open_source(str(root) if place == "folder" else upload(root, f"{bucket}/in"))
    assert labelled(source) == {"ant/1.jpg": "ant", "bee/1.jpg": "bee"}
    assert left_out(source) == {"hidden, or of a system": SYSTEM_NAMED}


def test_a_flat_folder_of_a_camera(tmp_path: Path) -> None:
    root = put(tmp_path / ".hidden", "1.jpg", "._1.jpg", ".thumbs/1.jpg", "@eaDir/1.jpg")
    source = open_source(str(root))  # a hidden folder that is named is the user's choice
    assert (list(source.names), source.classes, len(source.left_out)) == (["1.jpg"], None, 3)


def test_a_link_into_a_loop_is_named(tmp_path: Path) -> None:
    root = put(tmp_path / "in", "ant/1.jpg", "bee/1.jpg")
    (root / "ant/again").symlink_to(root / "ant")
    assert left_out(open_source(str(root))) == {"a link to a folder above it": ["ant/again/"]}


def test_keys_that_are_no_names_are_counted(bucket: str, tmp_path: Path) -> None:  # noqa: F811
    client = boto3.client("s3", region_name="us-east-1")
    for key in ("ant/1.jpg", "bee/1.jpg", "ant//2.jpg", "ant/../3.jpg"):
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"in/{key}", Body=square())
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key="in/cow/", Body=b"")  # a console's mark of a folder
    source = open_source(f"{bucket}/in")
    assert list(source.names) == ["ant/1.jpg", "bee/1.jpg"]
    assert left_out(source) == {"its key has an empty or dot part": ["ant/../3.jpg", "ant//2.jpg"]}


@pytest.mark.parametrize("image", ["ant/1.jpg", "ant/1"])
def test_tars_beside_images_are_named(tmp_path: Path, bucket: str, image: str) -> None:  # noqa: F811
    root = put(tmp_path / "in", image)
    put(root, "ant/labels.tar.gz", "ant/masks.tar", data=b"\x1f\x8b")
    tars = ["ant/labels.tar.gz", "ant/masks.tar"]
    for source in (root, upload(root, f"{bucket}/in")):
        assert left_out(open_source(str(source))) == {"a tar file next to images": tars}


def test_nothing_but_other_files_is_refused_with_what_there_is(tmp_path: Path) -> None:
    put(tmp_path / "in", "a/1.tga", "a/2.tga", data=square("TGA"))
    with pytest.raises(PirlError, match=r"no image in .*; left out: 2 not an image \(\.tga\)"):
        open_source(str(tmp_path / "in"))


# --- one level too high -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["folder", "S3"])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            [f"{part}/{name}/1.jpg" for part in ("train", "val", "test") for name in ("ant", "bee", "cow")],
            ["test, train, val", "hold the same folders (ant, bee, cow)", "in/train"],
        ),
        (["train/ant/1.jpg", "train/bee/1.jpg", "val/1.jpg", "val/2.jpg"], ["train, val", "in/train"]),
        (["Training/ant/1.jpg", "Training/bee/1.jpg"], ["Training", "in/Training"]),
    ],
)
def test_a_folder_one_level_too_high_is_refused(
    tmp_path: Path,
    bucket: str,  # noqa: F811
    place: str,
    names: list[str],
    words: list[str],
) -> None:
    root = put(tmp_path / "in", *names)
    with pytest.raises(UsageError) as caught:
        open_source(str(root) if place == "folder" else upload(root, f"{bucket}/in"))
    for word in words:
        assert word in str(caught.value)


def test_equal_folders_in_every_class_are_said(tmp_path: Path) -> None:
    root = put(tmp_path / "in", *(f"{part}/{name}/1.jpg" for part in ("photo", "sketch") for name in ("ant", "bee")))
    assert "photo, sketch hold the same folders (ant, bee)" in summary(open_source(str(root)))[1]
    put(root, "photo/1.jpg")
    assert len(summary(open_source(str(root)))) == 1
    splits = put(tmp_path / "splits", *(f"{part}/{name}/1.jpg" for part in ("train", "val") for name in ("ant", "bee")))
    assert "hold the same folders (ant, bee)" in summary(open_source(str(put(splits, "extra/1.jpg"))))[1]
    named_so = put(tmp_path / "vehicles", "train/1.jpg", "bus/1.jpg")
    assert len(summary(open_source(str(named_so)))) == 1


# --- a test set beside its training set -------------------------------------------------------------------------------


def test_labels_are_matched_by_name(tmp_path: Path) -> None:
    test = put(tmp_path / "in", "bee/1.jpg", "dog/1.jpg", "dog/2.jpg")
    (test / "zebra").mkdir()
    write_shards(open_source(str(test)), open_storage(tmp_path / "out"))
    reader = ShardReader(tmp_path / "out")
    assert reader.match_classes(["ant", "bee", "cow", "dog"]) == ["ant", "cow"]
    assert (reader.labels().tolist(), reader.label(2)) == ([1, 3, 3], 3)
    assert reader.match_classes(["dog", "bee"]) == []  # again, by the numbers that it has now
    assert reader.labels().tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="1 class that training does not have: dog"):
        reader.match_classes(["ant", "bee"])


def test_classes_are_compared_before_anything_is_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train = put(tmp_path / "train", *(f"{c}/{k}.jpg" for c in ("ant", "bee", "cow") for k in range(4)))
    fewer = put(tmp_path / "fewer", "ant/1.jpg", "cow/1.jpg")
    more = put(tmp_path / "more", "ant/1.jpg", "dog [lr=0.1]/1.jpg")
    flat = put(tmp_path / "flat", "1.jpg")

    def run(test: Path) -> tuple[object, str, str]:
        command = [
            "pirl",
            "run",
            train,
            test,
            "--root",
            tmp_path / "root",
            "--dry-run",
            "train.batch_size=4",
            "loss.negatives=4",
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capfd.readouterr()

    code, out, err = run(fewer)
    assert code == 0, err
    assert "training: 12 images, 3 classes: ant, bee, cow; images a class: least 4, median 4, most 4" in out
    assert "1 class without a test image: bee" in out
    code, _, err = run(more)
    assert code == 1
    assert "1 class that training does not have: dog [lr=0.1]" in err
    code, _, err = run(flat)
    assert code == 2
    assert "the test images have no classes" in err


def test_class_names_that_look_alike_are_reported(tmp_path: Path) -> None:
    source = open_source(str(put(tmp_path / "in", "Ant/1.jpg", "ant/1.jpg", "bee/1.jpg")))
    assert summary(source)[1] == "classes whose names differ in case, blanks or Unicode form only: 'Ant', 'ant'"
    train = open_source(str(put(tmp_path / "train", "caf\u00e9/1.jpg", "bee/1.jpg")))
    test = open_source(str(put(tmp_path / "test", "cafe\u0301/1.jpg", "bee/1.jpg")))
    with pytest.raises(DataError, match=r"one name in both: 'caf\\xe9', 'cafe\\u0301'"):
        compare_classes(train, test)


def test_an_empty_text_is_not_the_current_folder() -> None:
    with pytest.raises(UsageError, match="empty"):
        open_source("")


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_are_shown_as_they_are(tmp_path: Path, shard: Command) -> None:
    root = put(tmp_path / "in [lr=0.1] 50%", *(f"{c}/[bold]{k}.jpg" for c in ("[red]", "[bold]") for k in range(2)))
    put(root, "[red]/[blue].xyz", data=b"x")
    out = tmp_path / "out [/x] 5%"
    assert "2 classes: [bold], [red];" in shard(root, out, "--dry-run")[1]
    code, shown, _ = shard(root, out)
    assert (code, shown.count(str(out))) == (0, 1)
    assert "4 images in 1 shard, 0 quarantined" in shown
    assert "1 not an image (.xyz)" in shown


# --- lists ------------------------------------------------------------------------------------------------------------

NAMES = [f"images/{k}.jpg" for k in range(4)]
LISTS: dict[str, tuple[bytes, list[str], list[int] | None]] = {
    "plain": ("\n".join(NAMES).encode(), NAMES, None),
    "as Caffe has it": ("".join(f"{name} {k % 2}\n" for k, name in enumerate(NAMES)).encode(), NAMES, [0, 1, 0, 1]),
    "as Caffe has it, with names": (
        "".join(f"{name}  {'ab'[k % 2]} \r\n" for k, name in enumerate(NAMES)).encode(),
        NAMES,
        [0, 1, 0, 1],
    ),
    "UTF-16": ("".join(f"{name}\r\n" for name in NAMES).encode("utf-16"), NAMES, None),
    "UTF-16, the other order": (("\ufeff" + "\r\n".join(NAMES)).encode("utf-16-be"), NAMES, None),
    "UTF-8 with a mark": ("\r\n".join(NAMES).encode("utf-8-sig"), NAMES, None),
    "backslashes": ("\n".join(name.replace("/", "\\") for name in NAMES).encode(), NAMES, None),
    "backslashes and labels": (
        "\n".join(f"{name} {k}" for k, name in enumerate(NAMES)).replace("/", "\\").encode(),
        NAMES,
        [0, 1, 2, 3],
    ),
    "blanks behind the names": ("".join(f"{name} \n" for name in NAMES).encode(), NAMES, None),
    "a name with a blank and a number": (b"images/a 1\nimages/0.jpg\n", ["images/a 1", "images/0.jpg"], None),
    "a name with a line separator of Unicode": ("images/b\u2028.jpg\n".encode(), ["images/b\u2028.jpg"], None),
    "what systems leave": (b"images/0.jpg\nimages/._0.jpg\n@eaDir/x.jpg\n", ["images/0.jpg"], None),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_in_every_form(tmp_path: Path, case: str) -> None:
    data, names, labels = LISTS[case]
    put(tmp_path, *NAMES, "images/a 1", "images/b\u2028.jpg")
    (tmp_path / "list.txt").write_bytes(data)
    source = open_source(str(tmp_path / "list.txt"))
    assert list(source.names) == names
    assert (source.labels.tolist() if source.labels is not None else None) == labels
    write_shards(source, open_storage(tmp_path / "out"), max_bad_share=0)
    assert len(source.left_out) == (2 if case == "what systems leave" else 0)


def test_lists_of_absolute_paths_below_a_hidden_folder(tmp_path: Path) -> None:
    put(tmp_path / ".cache", "1.jpg", "._1.jpg", "__MACOSX/1.jpg")
    lines = [f"{tmp_path}/.cache/{name}" for name in ("1.jpg", "._1.jpg", "__MACOSX/1.jpg")]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert list(open_source(str(tmp_path / "list.txt")).names) == lines[:1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("images/0.jpg\n".encode("utf-16")[2:], "is not UTF-8 text"),
        (b"\xff\xfe\x00\xd8x\x00", "is not utf-16-le text"),
        (b"images/0.jpg 1\nnone.jpg\n", "line 2"),
    ],
)
def test_lists_in_no_form(tmp_path: Path, data: bytes, message: str) -> None:
    put(tmp_path, *NAMES)
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        open_source(str(tmp_path / "list.txt"))
    assert caught.value.hint


def test_hints_name_the_option_of_the_command(tmp_path: Path, shard: Command) -> None:
    put(tmp_path, *NAMES)
    (tmp_path / "list.txt").write_text("\n".join([*NAMES, "images/none.jpg"]))
    code, _, err = shard(tmp_path / "list.txt", tmp_path / "out")
    assert code == 1
    assert "(--max-bad-share)" in err
    assert "images/none.jpg: No such file" in err
    with pytest.raises(PirlError, match=r"\(`max_bad_share`\)"):
        write_shards(open_source(str(tmp_path / "list.txt")), open_storage(tmp_path / "out"))
