"""The benchmarks: sides in turns, parity before time, and a miss that is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.g4_negatives import Sides
from benchmarks.harness import Result, compare, finish


def measure(tmp_path: Path, order: list[str], required: float, same: bool = True) -> Result:
    def parity() -> None:
        order.append("parity")
        assert same, "the sides differ"

    sides = {"reference": lambda: order.append("reference"), "ours": lambda: order.append("ours")}
    return compare("G0", "nothing", sides, required, parity, repeats=2, facts={"images": 3}, results=tmp_path)


def test_sides_take_turns_after_parity_and_a_first_time(tmp_path: Path) -> None:
    order: list[str] = []
    result = measure(tmp_path, order, 0)
    assert order == ["parity"] + ["reference", "ours"] * 3
    assert [len(times) for times in result.times.values()] == [2, 2]  # the first time does not count
    written = json.loads((tmp_path / "G0.json").read_text())
    assert written["facts"]["images"] == 3
    assert written["facts"]["cores"] > 0
    assert written["reached"]


def test_sides_that_differ_are_not_timed(tmp_path: Path) -> None:
    order: list[str] = []
    with pytest.raises(AssertionError, match="differ"):
        measure(tmp_path, order, 0, same=False)
    assert order == ["parity"]
    assert not list(tmp_path.iterdir())


def test_a_missed_goal_is_told_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measure(tmp_path, [], 1e9)
    assert "MISSED" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        finish([result])
    assert end.value.code == 1


def test_the_loss_and_the_port_of_the_references_are_one() -> None:
    Sides(images=3000, batch=4, negatives=200).check()
