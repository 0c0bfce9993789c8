"""Tar files as a source: which members are one sample, with which label."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from images import encoded
from PIL import Image
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 (fixtures)

from pirl.errors import PirlError, UsageError
from pirl.shards import Quarantine, ShardReader, Source, SourceOptions, decode_image, open_source, summary, write_shards
from pirl.storage import open_storage

Members = list[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIRL_CACHE", str(tmp_path / "cache"))


def square(k: int, kind: str = "JPEG") -> bytes:
    """Image k: its red value tells it from the others."""
    return encoded(Image.new("RGB", (16, 16), (60 * k, 100, 100)), kind)


def tar(*members: tuple[str, bytes], kinds: dict[str, bytes] | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if kinds and name in kinds:
                info.type, info.linkname, info.size = kinds[name], "0.jpg", 0
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def put(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def trained_on(source: Source, out: Path) -> list[tuple[int, int]]:
    """(image k by its pixels, label) of each id, after sharding."""
    write_shards(source, open_storage(out))
    reader = ShardReader(out)
    reds = [decode_image(reader.read(i), "x").getpixel((8, 8))[0] for i in range(len(reader))]
    return [(round(red / 60), reader.label(i)) for i, red in enumerate(reds)]


def pairs(count: int = 3, image: str = "{k}.jpg", label: str = "{k}.cls", offset: int = 0) -> Members:
    """Image k beside its label k."""
    return [
        member
        for k in range(offset, offset + count)
        for member in ((image.format(k=k), square(k)), (label.format(k=k), b"%d" % k))
    ]


TRUE = [(0, 0), (1, 1), (2, 2)]
SAMPLES: dict[str, bytes] = {
    "plain names": tar(*pairs()),
    "names with dots": tar(*pairs(image="scan.00{k}.jpg", label="scan.00{k}.cls")),
    "names with dots, then another": tar(*pairs(2, "scan.00{k}.jpg", "scan.00{k}.cls"), *pairs(1, offset=2)),
    "one name three times": tar(*pairs(image="000.jpg", label="000.cls")),
    "labels behind all images": tar(*sorted(pairs(), key=lambda member: member[0].endswith("cls"))),
    "labels of names with dots behind": tar(
        *sorted(pairs(image="a.{k}.jpg", label="a.{k}.cls"), key=lambda member: member[0].endswith("cls"))
    ),
    "two archives in one file": tar(*pairs(2)) + tar(*pairs(1, offset=2)),
    "two archives, the first with one block of end": tar(*pairs(2)).rstrip(b"\0")
    + bytes(511 + 512)
    + tar(*pairs(1, offset=2)),
    "image without a suffix": tar(*pairs(image="{k}")),
    "image of another suffix": tar(*pairs(image="{k}.jfif")),
    "packed by absolute path": tar(*pairs(image="/data/{k}.jpg", label="/data/{k}.cls")),
    "labels with a byte order mark": tar(
        *(m for k in range(3) for m in ((f"{k}.jpg", square(k)), (f"{k}.cls", b"\xef\xbb\xbf%d" % k)))
    ),
    "suffix in capitals": tar(*pairs(image="{k}.JPEG", label="{k}.CLS")),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_each_image_has_its_own_label(tmp_path: Path, case: str) -> None:
    source = open_source(str(put(tmp_path / "in", a_tar=SAMPLES[case])))
    assert trained_on(source, tmp_path / "out") == TRUE


def test_tar_files_on_s3_and_alone_are_read_alike(tmp_path: Path, bucket: str) -> None:  # noqa: F811
    data = SAMPLES["names with dots"]
    put(tmp_path / "in", a_tar=data)
    open_storage(f"{bucket}/tars").write_bytes("a.tar", data)
    digests = set()
    for number, source in enumerate((tmp_path / "in", tmp_path / "in/a.tar", f"{bucket}/tars")):
        out = tmp_path / f"out{number}"
        assert trained_on(open_source(str(source)), out) == TRUE
        digests.add(ShardReader(out).manifest.digest)
    assert len(digests) == 1


MASKED = tar(
    *(
        member
        for k in range(3)
        for member in ((f"{k}.jpg", square(k)), (f"{k}.mask.png", square(3, "PNG")), (f"{k}.cls", b"%d" % k))
    )
)
REFUSED: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "image and mask": ({"a_tar": MASKED}, ["0.jpg", "0.mask.png", "`image`=jpg", "`image`=mask.png"]),
    "two views without labels": (
        {"a_tar": tar(*((f"{k}.{part}.png", square(k, "PNG")) for k in range(2) for part in ("rgb", "depth")))},
        ["0.rgb.png", "1.rgb.png", "`image`=each"],
    ),
    "two views over two tar files": (
        {f"{k}_tar": tar(*((f"{k}.{part}.png", square(k, "PNG")) for part in ("rgb", "depth"))) for k in range(2)},
        ["0.rgb.png", "1.rgb.png", "`image`=rgb.png"],
    ),
    "two views with one label": (
        {"a_tar": tar(("0.left.jpg", square(0)), ("0.right.jpg", square(0)), ("0.cls", b"0"))},
        ["0.left.jpg", "0.right.jpg", "`image`=left.jpg"],
    ),
    "one name twice, labels behind": (
        {"a_tar": tar(*2 * sorted(pairs(2), key=lambda member: member[0].endswith("cls")))},
        ["0.cls", "0.jpg", "side by side"],
    ),
    "compressed beside plain": ({"a_tar": tar(*pairs(1)), "b_tar_gz": gzip.compress(tar(*pairs(2)))}, ["b.tar.gz"]),
    "compressed alone": ({"b_tgz": gzip.compress(tar(*pairs(2)))}, ["b.tgz", "compressed"]),
    "compressed, named as plain": ({"a_tar": gzip.compress(tar(*pairs(9)), 0)}, ["a.tar", "compressed"]),
    "cut in a member": ({"a_tar": tar(*pairs(6))[:2900]}, ["a.tar", "cut"]),
    "cut behind a member": ({"a_tar": tar(("0.cls", b"0"))[:1024]}, ["a.tar", "cut"]),
    "broken header": (
        {"a_tar": tar(("0.cls", b"0"))[:1024] + b"x" * 512 + tar(*pairs(2))},
        ["a.tar", "header", "1,024"],
    ),
    "no archive behind the end": ({"a_tar": tar(*pairs(1)) + b"x" * 2048}, ["a.tar", "header"]),
    "one image without a label": ({"a_tar": tar(*pairs(2), ("z.jpg", square(0)))}, ["z.jpg", "a.tar", "no .cls"]),
    "empty label": ({"a_tar": tar(("0.jpg", square(0)), ("0.cls", b" \n"))}, ["0.cls", "empty"]),
    "labels in Latin-1": (
        {"a_tar": tar(("0.jpg", square(0)), ("0.cls", b"\xe4"), ("1.jpg", square(1)), ("1.cls", b"\xf6"))},
        ["0.cls", "in/a.tar", "not UTF-8"],
    ),
    "one number written in two ways": (
        {"a_tar": tar(("0.jpg", square(0)), ("0.cls", b"1"), ("1.jpg", square(1)), ("1.cls", b"01"))},
        ["'1' and '01'", "one number"],
    ),
    "empty label in the second of two": (
        {"a_tar": tar(*pairs(1)), "b_tar": tar(("1.jpg", square(1)), ("1.cls", b""))},
        ["in/b.tar", "1.cls", "empty"],
    ),
    "no image": ({"a_tar": tar(("0.txt", b"x"), (".hidden.jpg", square(0)))}, ["no image", "1 hidden", "(.txt)"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_mean_two_things_is_refused_by_name(tmp_path: Path, case: str) -> None:
    files, words = REFUSED[case]
    with pytest.raises(PirlError) as caught:
        open_source(str(put(tmp_path / "in", **files)))
    assert caught.value.hint
    for word in words:
        assert word in str(caught.value)


JSON = tar(*(m for k in range(3) for m in ((f"{k}.jpg", square(k)), (f"{k}.json", b'{"label": %d, "x": {}}' % k))))
DOTTED = tar(*pairs(image="scan.00{k}.jpg", label="scan.00{k}.cls"))
CHOICES: dict[str, tuple[bytes, str, str, list[tuple[int, int]]]] = {
    "the image of image and mask": (MASKED, "jpg", "", TRUE),
    "the mask": (MASKED, "mask.png", "", [(3, 0), (3, 1), (3, 2)]),
    "image and mask, both": (MASKED, "each", "", [(0, 0), (3, 0), (1, 1), (3, 1), (2, 2), (3, 2)]),
    "names with dots": (DOTTED, "jpg", "", TRUE),
    "json": (JSON, "", "json", TRUE),
    "json with a key": (JSON, "jpg", "json:label", TRUE),
    "another part": (tar(*pairs(label="{k}.kind.txt")), "", "kind.txt", TRUE),
    "another part, as .cls": (tar(*pairs(label="{k}.txt")), "", ".txt", TRUE),
}


@pytest.mark.parametrize("case", CHOICES)
def test_options_choose_the_parts(tmp_path: Path, case: str) -> None:
    data, image, label, expected = CHOICES[case]
    source = open_source(str(put(tmp_path / "in", a_tar=data)), SourceOptions(image=image, label=label))
    assert trained_on(source, tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("json:kind", ["0.json", "no key 'kind'", "label, x"]),
        ("json:x", ["0.json", "whole number"]),
        ("cls", ["0.jpg", "no .cls"]),
    ],
)
def test_labels_that_are_none(tmp_path: Path, label: str, words: list[str]) -> None:
    with pytest.raises(PirlError) as caught:
        open_source(str(put(tmp_path / "in", a_tar=JSON)), SourceOptions(label=label))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 100_000, "not JSON"),
        (b'{"label": 1, "label": 2}', "'label' comes twice"),
        (b'{"label": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
    ids=["nested too deeply", "a key twice", "too many digits"],
)
def test_json_labels_that_cannot_be_read(tmp_path: Path, data: bytes, words: str) -> None:
    folder = put(tmp_path / "in", a_tar=tar(("0.jpg", square(0)), ("0.json", data)))
    with pytest.raises(UsageError, match=words):
        open_source(str(folder), SourceOptions(label="json"))


def test_folders_of_names_packed_from_elsewhere_are_classes(tmp_path: Path) -> None:
    names = ["/ant/0.jpg", "../bee/1.jpg", "./../cow/2.jpg"]
    source = open_source(str(put(tmp_path / "in", a_tar=tar(*((name, square(k)) for k, name in enumerate(names))))))
    assert source.classes == ["ant", "bee", "cow"]
    assert trained_on(source, tmp_path / "out") == TRUE


def test_samples_without_the_chosen_part_are_counted(tmp_path: Path) -> None:
    data = tar(*pairs(1), ("1.png", square(1, "PNG")), ("1.cls", b"1"))
    source = open_source(str(put(tmp_path / "in", a_tar=data)), SourceOptions(image="jpg"))
    assert trained_on(source, tmp_path / "out") == [(0, 0)]
    assert source.left_out.counts() == {
        "a label of a sample without the part jpg": 1,
        "another part of a sample (png)": 1,
    }


def test_parts_of_a_folder_of_images_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "in", a_jpg=square(0))
    with pytest.raises(PirlError, match="no tar files"):
        open_source(str(tmp_path / "in"), SourceOptions(image="jpg"))


def test_what_is_left_out_of_tar_files_is_counted_and_named(tmp_path: Path) -> None:
    data = tar(
        *(m for k in range(3) for m in ((f"ant/{k}.jpg", square(k)), (f"ant/{k}.json", b"{}"))),
        ("ant/._0.jpg", b"\0\5\x16\7"),
        ("__MACOSX/ant/._0.jpg", b"\0\5\x16\7"),
        ("ant/@eaDir/0.jpg/SYNOPHOTO.jpg", square(0)),
        ("ant/link.jpg", b""),
        ("ant/9.cls", b"9"),
        ("ant/notes", b"text"),
        kinds={"ant/link.jpg": tarfile.LNKTYPE},
    )
    source = open_source(str(put(tmp_path / "in", a_tar=data)))
    assert trained_on(source, tmp_path / "out") == [(0, 0), (1, 0), (2, 0)]
    left_out = {part.reason: part.names for part in Quarantine.load(open_storage(tmp_path / "out")).left_out}
    assert left_out == {
        "hidden, or of a system": ["a.tar/__MACOSX/", "a.tar/ant/._0.jpg", "a.tar/ant/@eaDir/"],
        ".json next to images, whose labels `label`=json:KEY reads": [f"a.tar/ant/{k}.json" for k in range(3)],
        "a link, or no regular file, in a tar file": ["a.tar/ant/link.jpg"],
        "a label without an image (.cls)": ["a.tar/ant/9.cls"],
        "not an image (no usual suffix)": ["a.tar/ant/notes"],
    }
    assert "3 .json next to images" in summary(source)[-1]


def test_many_companions_are_named_by_a_pattern(tmp_path: Path) -> None:
    """Samples of three files each must not fill quarantine.json."""
    data = tar(("0.jpg", square(0)), *((f"{k}.txt", b"") for k in range(101)))
    source = open_source(str(put(tmp_path / "in", a_tar=data)))
    assert source.left_out.as_json() == [{"reason": "not an image (.txt)", "count": 101, "names": ["a.tar/*.txt"]}]


def test_a_tar_file_that_changes_stops_the_run(tmp_path: Path) -> None:
    source = open_source(str(put(tmp_path / "in", a_tar=SAMPLES["plain names"])))
    put(tmp_path / "in", a_tar=SAMPLES["names with dots"])
    with pytest.raises(PirlError, match="changed since"):
        write_shards(source, open_storage(tmp_path / "out"), max_bad_share=0.5)


def test_the_output_lies_not_among_the_tar_files(tmp_path: Path) -> None:
    source = open_source(str(put(tmp_path / "in", a_tar=SAMPLES["plain names"])))
    with pytest.raises(PirlError, match="inside the images"):
        write_shards(source, open_storage(tmp_path / "in/shards"))


def test_tar_files_of_classes_in_a_tar_file_are_read(tmp_path: Path) -> None:
    """ImageNet's training images: one tar file a class."""
    classes = {f"n0{c}.tar": tar(*((f"n0{c}_{k}.JPEG", square(2 * c + k)) for k in range(2))) for c in range(2)}
    source = open_source(str(put(tmp_path / "in", a_tar=tar(*classes.items()))))
    assert source.classes == ["n00", "n01"]
    assert trained_on(source, tmp_path / "out") == [(0, 0), (1, 0), (2, 1), (3, 1)]
    with_image = open_source(str(put(tmp_path / "other", a_tar=tar(*classes.items(), ("9.jpg", square(1))))))
    assert list(with_image.names) == ["a.tar/9.jpg"]
    assert with_image.left_out.counts() == {"a tar file next to images": 2}


def test_patterns_name_tar_files(tmp_path: Path) -> None:
    folder = put(
        tmp_path / "in", **{f"a-{k}_tar": tar(*pairs(1, offset=k)) for k in range(3)}, **{"b-0_tar": tar(*pairs())}
    )
    for number, pattern in enumerate(["a-{0..2}.tar", "a-*.tar", "a-?.tar"]):
        assert trained_on(open_source(f"{folder}/{pattern}"), tmp_path / f"out{number}") == TRUE
