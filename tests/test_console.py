"""The console never ends the work, and prints names as they are."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from images import flat_folder, folder_of_classes, truncated_jpeg
from test_cli import Pirl, pirl

from pirl import logs
from pirl.cli import _show as show_error
from pirl.cli.app import plain_console, show_rows
from pirl.errors import DataError, StorageError
from pirl.shards import open_source, write_shards
from pirl.storage import open_storage

__all__ = ["pirl"]  # the fixture

NAME = "50% [lr=0.1] [/x] :tada: {y}"
PIRL = [sys.executable, "-c", "from pirl.cli import main; main()"]


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which PIRL is the program; the exit codes of its last pipe are the last line of stderr."""
    script = f'exec 9>&2; pirl() {{ {shlex.join(PIRL)} "$@"; }}; {command}; echo "${{PIPESTATUS[*]}}" >&9'
    return subprocess.run(
        ["bash", "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


# --- streams that take nothing -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "codes"),
    [
        ("pirl show demo >&-", "0"),
        ("pirl show demo <&- >&- 2>&-", "0"),
        ("pirl show nothing 2>&-", "2"),
        ("pirl show nothing 2>/dev/full", "2"),
        ("pirl --nothing 2>/dev/full", "2"),
        ("pirl --version >/dev/full", "0"),
        ("pirl show demo | true", "0 0"),
        ("pirl --help | true", "0 0"),
    ],
)
def test_a_console_that_takes_nothing_changes_no_exit_code(command: str, codes: str) -> None:
    done = shell(command)
    assert done.stderr.splitlines()[-1] == codes
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_sharding_survives_readers_that_leave(tmp_path: Path) -> None:
    folder_of_classes(tmp_path / "images", classes=2, images=40)
    done = shell(f"pirl shard {tmp_path}/images {tmp_path}/shards --processes 2 2>&1 | head -1")
    assert done.stderr.splitlines()[-1] == "0 0"
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["images"] == 80


def test_a_training_survives_a_reader_that_leaves(tmp_path: Path, shards: str, tiny_toml: Path) -> None:
    """Both output streams of two ranks and a loader each are a pipe that is closed after the first line of a step."""
    command = [*PIRL, "train", str(tiny_toml), "--data", shards, "--out", str(tmp_path / "r")]
    command += ["--processes", "2", "--workers", "1", "--log-every", "1", "train.epochs=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as training:
        assert training.stdout
        assert any("step 1" in line for line in training.stdout)
        training.stdout.close()
        assert training.wait(timeout=500) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))
    assert (tmp_path / "r" / "DONE.json").exists()


def test_a_full_disk_fails_a_result_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        logs.guard_streams()
        logs.info("a line")
        print("another line", flush=True)
        with pytest.raises(StorageError, match="No space left"):
            logs.output("[1, 2]\n")


def test_a_reader_that_has_paused_holds_up_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as pipe, open(reader, "rb", buffering=0) as out:
        monkeypatch.setattr(sys, "stdout", pipe)
        logs.guard_streams(wait_s=0.01)
        for number in range(3000):  # a pipe holds 64 KiB
            logs.info(f"line {number:04d} {'-' * 50}")
        first = out.read(1 << 20)
        assert first.startswith(b"line 0000")
        assert b"line 2999" not in first
        logs.info("read again")
        assert out.read(1 << 20).endswith(b"read again\n")


def test_a_closed_descriptor_is_no_later_files() -> None:
    program = (
        "import os\nfrom pirl import logs\nlogs.configure()\nassert os.open('/', os.O_RDONLY) > 2\nos.write(1, b'x')"
    )
    done = subprocess.run(["bash", "-c", f'exec {sys.executable} -c "$0" <&- >&- 2>&-', program], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("form", ["human", "json"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_every_name_can_be_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str, form: str) -> None:
    monkeypatch.setenv("PIRL_LOG", form)
    name = "f\N{LATIN SMALL LETTER U WITH DIAERESIS}r \N{SNOWMAN} \udcff"
    with open(tmp_path / "out", "w", encoding=encoding) as file:
        for guard in (lambda: None, logs.guard_streams):
            monkeypatch.setattr(sys, "stdout", file)
            guard()
            logs.info(name)
            monkeypatch.undo()
            monkeypatch.setenv("PIRL_LOG", form)
    lines = (tmp_path / "out").read_text(encoding).splitlines()
    if form == "json":
        assert [json.loads(line)["message"] for line in lines] == [name] * 2
    else:
        assert lines == [name.encode(encoding, "backslashreplace").decode(encoding)] * 2


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_the_library_prints_without_a_console_too(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None) -> None:
    if stream:
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    logs.info("a line")
    logs.error("a line")
    logs.output("a line")


def test_a_form_that_is_none_is_refused_in_words(pirl: Pirl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIRL_LOG", "xml")
    shown = pirl("recipes")
    assert shown.code == 2
    assert "PIRL_LOG is 'xml'" in shown.err


def test_nohup_stays_in_force(tmp_path: Path) -> None:
    program = (
        "import os, signal; from pirl import logs; logs.configure(); "
        "os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    )
    done = shell(f"trap '' HUP; {sys.executable} -c \"{program}\"")
    assert done.stdout == "alive\n"


# --- names ---------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "shards": lambda at: ["shard", at / "images", at / NAME / "s", "--processes", "1"],
    "shards that would be": lambda at: ["shard", at / "images", at / NAME / "s", "--dry-run"],
    "a source that is not there": lambda at: ["shard", at / NAME / "none", at / "s"],
    "a preview": lambda at: ["preview", "demo", at / "images", "--count", "1", "--out", at / NAME / "sheet.html"],
    "a recipe that is not there": lambda at: ["show", at / NAME / "none.toml"],
    "a training that would be": lambda at: [
        *("train", at / "tiny.toml", "--data", at / "shards", "--out", at / NAME, "--dry-run"),
    ],
    "a pipeline": lambda at: ["compile", at / "tiny.toml" / NAME],
    "an import": lambda at: ["import", at / NAME / "none.torch", "--out", at / "run"],
    "an export": lambda at: ["export", at / NAME, at / "trunk.safetensors"],
    "runs": lambda at: ["runs", at / "runs"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_names_are_printed_as_they_are(
    pirl: Pirl, tmp_path: Path, shards: str, tiny_toml: Path, command: Callable[[Path], list[object]]
) -> None:
    (tmp_path / "shards").symlink_to(shards.removeprefix("file://"))
    flat_folder(tmp_path / "images", images=2)
    run = tmp_path / "runs" / NAME
    run.mkdir(parents=True)
    (run / "config.toml").write_text("")
    shown = pirl(*command(tmp_path))
    assert NAME in shown.out + shown.err
    assert "file:///" not in shown.out + shown.err


def test_every_way_to_print_has_paths(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    uri = open_storage(tmp_path / "my runs").uri
    logs.info(f"run: {uri}")
    logs.warn(f"{uri} is left out")
    logs.error(f"{uri} is damaged")
    plain_console().print(f"run: {uri}")
    show_rows([{"run": "a", "uri": uri}], as_json=False)
    show_error(DataError(f"{uri} is empty", f"run `pirl shard SOURCE {uri}`"))
    shown = "".join(capsys.readouterr())
    assert "file:///" not in shown
    assert shown.count("my runs") == 7


def test_a_hint_names_the_option_of_the_command(pirl: Pirl, tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "images", images=1)
    (folder / "cut.jpg").write_bytes(truncated_jpeg())
    shown = pirl("shard", folder, tmp_path / "out", "--processes", "1")
    assert (shown.code, "allow a larger share (--max-bad-share)" in shown.err) == (1, True), shown.err
    with pytest.raises(DataError) as raised:
        write_shards(open_source(str(folder)), open_storage(tmp_path / "out"))
    assert "allow a larger share (`max_bad_share`)" in raised.value.hint


def test_a_number_of_one_has_no_plural(pirl: Pirl, tmp_path: Path) -> None:
    shown = pirl("shard", flat_folder(tmp_path / "images", images=1), tmp_path / "out", "--processes", "1")
    assert "1 image in 1 shard" in shown.out
