"""The number of data loading processes that a rank gets where none is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tiny_recipe

from pirl.training import workers
from pirl.training.workers import available_cores, loading_processes


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "300000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_cores_are_those_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(64), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("cores", "ranks_here", "shared_memory", "expected"),
    [
        (1, 1, 2**40, 0),
        (2, 2, 2**40, 0),
        (48, 8, 2**40, 5),
        (48, 1, 2**40, 8),  # more would wait
        (2, 4, 2**40, 0),
        (48, 1, 12 * 3 * 3 * (16**2 + 4 * 5**2), 5),  # twelve slots of a rank's three images
        (48, 1, 0, 0),
    ],
)
def test_cores_beside_the_ranks_are_shared(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks_here: int, shared_memory: int, expected: int
) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: cores)
    monkeypatch.setattr(workers, "_free_shared_memory", lambda: shared_memory)
    assert loading_processes(tiny_recipe(), 3, ranks_here) == expected
