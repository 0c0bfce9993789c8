"""The console of `pirl run`: one line a step, all of the executor's output in a file, nothing else through a pipe."""

from __future__ import annotations

import io
import re
import signal
import sys
from pathlib import Path

import pytest

from pipelines import local
from pirl.cli.steps import StepConsole, log_path, step_console
from pirl.run import Run

OUTPUT = """\
06:00:00.000 - INFO - Running pipeline: \x1b[95m'pirl-pretrain'\x1b[0m
06:00:00.000 - INFO - Executing task \x1b[96m'shard-2'\x1b[0m
    [KFP Executor 2026-12-01 INFO]: Looking for component `shard` in --component_module_path `x.py`
    [KFP Executor 2026-12-01 INFO]: Got executor_input:
    {
        "inputs": {}
    }
    3 images, 1 class
    sharding test: 0/600
    sharding test: 600/600
    warning: 1 file skipped
06:00:01.000 - INFO - Task \x1b[96m'shard-2'\x1b[0m finished with status \x1b[92mSUCCESS\x1b[0m
06:00:01.000 - INFO - Executing task \x1b[96m'pretrain'\x1b[0m
    epoch   1.00/2  step 25/50  loss 9.4040  lr 7.95e-05  184 images/s  waited 11%  ETA 21 s
    error: step pretrain: no space -> make room
06:00:09.000 - ERROR - Task \x1b[96m'pretrain'\x1b[0m finished with status \x1b[91mFAILURE\x1b[0m
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, log: Path, out: io.StringIO, **settings: bool) -> str:
    """Return the console's text of `OUTPUT`, which comes in pieces that cut lines."""
    monkeypatch.setattr(sys, "stdout", out)
    with step_console(log, **settings):
        for start in range(0, len(OUTPUT), 7):
            print(OUTPUT[start : start + 7], end="")
    return out.getvalue()


def test_a_pipe_gets_lines_without_control_characters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = shown(monkeypatch, tmp_path / "log", io.StringIO()).splitlines()
    assert [re.sub(r"[\d.]+ s$", "N s", line) if "after" in line else line for line in lines] == [
        "shard test: 600 of 600",
        "shard test: warning: 1 file skipped",
        "shard test: done after N s",
        "pretrain: 25 of 50  184 images/s  ETA 21 s",
        "pretrain: failed after N s",
        "error: step pretrain: no space -> make room",
    ]
    assert (tmp_path / "log").read_text() == re.sub(r"\x1b\[\d+m", "", OUTPUT)


def test_quiet_shows_the_failed_step_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = shown(monkeypatch, tmp_path / "log", io.StringIO(), quiet=True)
    assert text == "error: step pretrain: no space -> make room\n"


def test_verbose_shows_all_that_is_logged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = shown(monkeypatch, tmp_path / "log", io.StringIO(), verbose=True)
    assert text == (tmp_path / "log").read_text()


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_has_one_live_line_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_color: str) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    text = shown(monkeypatch, tmp_path / "log", Terminal())
    colours = {code for codes in re.findall(r"\x1b\[([\d;]*)m", text) for code in codes.split(";")}
    assert bool(colours & {"31", "32", "33", "34", "35", "36", "38"}) == (not no_color)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
    last = [line.strip() for line in plain.splitlines() if "shard test" in line or "pretrain" in line]
    assert any(line.endswith("failed") and "pretrain" in line for line in last)
    assert "executor_input" not in plain


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b[" not in shown(monkeypatch, tmp_path / "log", Terminal())


def test_the_log_lies_beside_the_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert log_path(str(tmp_path / "root"), "r").parent == tmp_path / "root" / "logs"
    monkeypatch.setenv("PIRL_CACHE", str(tmp_path / "cache"))
    assert log_path("s3://bucket/root", "r").parent == tmp_path / "cache" / "logs"


def test_a_console_that_has_gone_ends_no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = io.StringIO()
    gone.close()
    monkeypatch.setattr(sys, "stdout", gone)
    stream = StepConsole(tmp_path / "log", verbose=True)
    stream.write(OUTPUT)
    stream.finish()
    assert "pretrain" in (tmp_path / "log").read_text()


def test_an_interrupt_is_noted_and_left_to_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local, "_in_foreground", lambda: True)  # a terminal has sent it to the step too
    before = signal.getsignal(signal.SIGINT)
    with local.passing_on_stop() as interrupted:
        signal.raise_signal(signal.SIGINT)
    assert interrupted == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before
    assert "has no checkpoint yet" in local.saved_state(Run.at(str(tmp_path)))
