"""Parquet files as a source: Hugging Face's layout, on disk and on S3."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from images import encoded
from PIL import Image
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 (fixtures)

import pirl.extras
from pirl.errors import PirlError, UsageError
from pirl.shards import Manifest, ShardReader, Source, SourceOptions, open_source, write_shards
from pirl.storage import open_storage

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402


def square(k: int) -> bytes:
    """Image k: its red value tells it from the others."""
    return encoded(Image.new("RGB", (16, 16), (k, 100, 100)), "PNG")


def table(
    first: int,
    rows: int,
    labels: Any = None,
    names: list[str] | None = None,
    image: str = "image",
    label: str = "label",
) -> bytes:
    """A parquet file of row groups of 70 rows, in the layout of Hugging Face."""
    column = pa.array([{"bytes": square(first + k), "path": f"{k}.png"} for k in range(rows)])
    columns = {image: column}
    if labels is not None:
        columns[label] = pa.array(labels)
    features = {label: {"names": names, "_type": "ClassLabel"}} if names else {}
    made = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    parquet.write_table(made, file, row_group_size=70)
    return file.getvalue()


def put(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / f"{name.replace('_', '-')}.parquet").write_bytes(data)
    return folder


def trained_on(source: Source, out: Path, **options: Any) -> tuple[Manifest, list[tuple[int, int]]]:
    """(red value, label) of each id, after sharding."""
    manifest = write_shards(source, open_storage(out), shard_bytes=40_000, **options)
    reader = ShardReader(str(out))
    reds = [reader.image(i).getpixel((8, 8))[0] for i in range(len(reader))]
    return manifest, [(red, reader.label(i)) for i, red in enumerate(reds)]


FILES = {
    "train_00000_of_00002": table(0, 150, [k % 2 for k in range(150)], ["ant", "bee"]),
    "train_00001_of_00002": table(150, 50, [1] * 50, ["ant", "bee"]),
}
EXPECTED = [(k, k % 2) for k in range(150)] + [(k, 1) for k in range(150, 200)]


def test_rows_have_dense_ids_in_order_on_disk_and_on_s3(
    tmp_path: Path,
    bucket: str,  # noqa: F811
) -> None:
    folder = put(tmp_path / "in", **FILES)
    for name, data in FILES.items():
        open_storage(f"{bucket}/in").write_bytes(f"{name.replace('_', '-')}.parquet", data)
    places = [str(folder), f"{folder}/train-*.parquet", f"{bucket}/in", f"{folder}/train-0000{{0..1}}-of-00002.parquet"]
    digests = set()
    for number, place in enumerate(places):
        source = open_source(place)
        assert source.classes == ["ant", "bee"]
        assert source.fingerprint() == open_source(place).fingerprint()
        manifest, rows = trained_on(source, tmp_path / f"out{number}", processes=2 if number == 0 else 1)
        assert rows == EXPECTED
        digests.add(manifest.digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ({"a": table(0, 2, ["cow", "ant"])}, {}, [(0, 1), (1, 0)]),
        ({"a": table(0, 2, [3, 1])}, {}, [(0, 3), (1, 1)]),
        ({"a": table(0, 2, [1, 0], image="img", label="fine")}, {"image": "img", "label": "fine"}, [(0, 1), (1, 0)]),
        ({"a": table(0, 2, image="img")}, {}, [(0, -1), (1, -1)]),
        ({"a": table(0, 2, [-1, -1], ["ant"])}, {}, [(0, -1), (1, -1)]),
    ],
    ids=["names", "numbers", "chosen columns", "no labels", "labels that are not published"],
)
def test_columns(tmp_path: Path, files: dict[str, bytes], options: dict[str, str], expected: list[Any]) -> None:
    source = open_source(str(put(tmp_path / "in", **files)), SourceOptions(**options))
    assert trained_on(source, tmp_path / "out")[1] == expected


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ({"train_0": FILES["train_00001_of_00002"], "test_0": FILES["train_00001_of_00002"]}, {}, ["test, train"]),
        ({"a": table(0, 2)}, {"label": "label"}, ["no column 'label'", "image", "`label`=COLUMN"]),
        ({"a": table(0, 2)}, {"image": "img"}, ["no column of encoded images 'img'", "`image`=COLUMN"]),
        ({"a": table(0, 2, [0.5, 1.0])}, {}, ["0.5", "class indices or names"]),
        ({"a": table(0, 2, [0, -1], ["ant"])}, {}, ["-1", "class indices or names"]),
        ({"a": table(0, 2, [0, 7], ["ant"])}, {}, ["label 7, but 1 classes"]),
        ({"a": table(0, 2, [0, 0], ["ant"]), "b": table(0, 1, [0], ["bee"])}, {}, ["different classes"]),
        ({"a": FILES["train_00001_of_00002"][:-20]}, {}, ["a.parquet", "not a parquet file, or was cut"]),
    ],
    ids=["two splits", "no label", "no image", "floats", "half without", "label too large", "other classes", "cut"],
)
def test_what_is_refused(tmp_path: Path, files: dict[str, bytes], options: dict[str, str], words: list[str]) -> None:
    with pytest.raises(PirlError) as caught:
        open_source(str(put(tmp_path / "in", **files)), SourceOptions(**options))
    assert caught.value.hint
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_of_a_pattern_is_refused(tmp_path: Path) -> None:
    put(tmp_path, a_0=FILES["train_00001_of_00002"])
    with pytest.raises(PirlError, match=r"no file .*a-1\.parquet, which a-\{0\.\.1\}\.parquet names"):
        open_source(f"{tmp_path}/a-{{0..1}}.parquet")


def test_without_its_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "in", **FILES)
    monkeypatch.setitem(pirl.extras.EXTRAS, "parquet", ("absent_library",))
    with pytest.raises(UsageError, match=r"pirl-pipeline\[parquet\]"):
        open_source(str(tmp_path / "in"))
