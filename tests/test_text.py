"""Numbers and locations as text."""

from __future__ import annotations

from pirl.text import count, duration, percent, score, size, with_paths


def test_a_number_and_its_noun_agree() -> None:
    assert [count(n, "image") for n in (0, 1, 2, 70_000)] == ["0 images", "1 image", "2 images", "70,000 images"]
    assert [count(n, "class", "classes") for n in (1, 3)] == ["1 class", "3 classes"]


def test_seconds_as_text() -> None:
    assert [duration(s) for s in (0, 12.4, 59.6, 185, 7384)] == ["0 s", "12 s", "1:00", "3:05", "2:03:04"]


def test_bytes_as_text() -> None:
    assert [size(n) for n in (0, 7, 999, 1000, 1500, 12_498_555, 656e6, 1_310_000_000, 512e9, 2 * 10**12, 110e12)] == [
        "0 B", "7 B", "999 B", "1 kB", "1.5 kB", "12.5 MB", "656 MB", "1.31 GB", "512 GB", "2 TB", "110 TB",
    ]  # fmt: skip


def test_shares_as_text() -> None:
    assert percent(0.125) == "12.50"
    assert score(0.125, 0.0031) == "12.50 ± 0.31"


def test_a_person_reads_paths() -> None:
    """A location with a blank or a percent sign is as it was typed; other URIs stay."""
    assert with_paths("file:///a%20b/runs has no checkpoint") == "/a b/runs has no checkpoint"
    assert with_paths("register file:///r/m: s3://b/x, file://") == "register /r/m: s3://b/x, file://"
