"""The benchmarks: sides in turns, parity before time, and a miss that is told."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_recipe

import benchmarks
from benchmarks import g8_checkpoint, g9_resume
from benchmarks.g4_negatives import Sides
from benchmarks.harness import Result, compare, finish


@pytest.mark.parametrize("path", sorted(Path(benchmarks.__file__).parent.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_benchmark_can_be_imported(path: Path) -> None:
    assert importlib.import_module(f"benchmarks.{path.stem}")


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


def test_both_ways_to_save_hold_the_same(tmp_path: Path) -> None:
    sides = g8_checkpoint.Sides(tmp_path, tiny_recipe(), images=50)
    sides.check()
    speed = g8_checkpoint.speed_while_saving(sides, lambda: None, threads=1, times=1)
    assert speed > 0
    sides.state.bank.memory[7, 3] += 1
    with pytest.raises(AssertionError):
        g8_checkpoint.same(sides.checkpoints.load()[1], sides.content())  # type: ignore[index]


@pytest.mark.slow
def test_both_ways_to_resume_go_on_where_they_should(
    tmp_path: Path, tiny_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes, killed twice: the reference does again what it had done, ours what came after its checkpoint.

    An epoch of so many small steps takes far longer than the two saves that ours is killed after.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe, files = (str(tiny_toml), ["train.batch_size=2"]), 20_000
    result = g9_resume.measure(recipe, files, steps=12, repeats=1, save_every_s=0.5, results=tmp_path)
    redone = result.facts["redone_steps"]
    assert redone["reference"][0] >= 12
    assert all(0 < count < files / 2 for count in redone["ours"])


def test_ids_that_are_left_out_or_come_twice_are_told(tmp_path: Path) -> None:
    side = object.__new__(g9_resume.Side)
    side.name, side.notes = "ours", tmp_path / "ours.notes"
    order = np.array([4, 2, 0, 5, 1, 3])
    side.notes.write_text("start\n[4, 2]\n[0, 5]\nstart\n[0, 5]\n[1, 3]\n[7")
    assert side.check(order) == 6
    side.notes.write_text("start\n[4, 2]\nstart\n[1, 3]\n")
    with pytest.raises(AssertionError, match="left out 2 images"):
        side.check(order)
    side.notes.write_text("start\n[4, 2]\n[4, 2]\n")
    with pytest.raises(AssertionError, match="out of order"):
        side.check(order)
