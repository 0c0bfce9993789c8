"""Every command that the README shows is run, in its order, on images that look like a user's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import vissl_files
from images import folder_of_classes

README = Path(__file__).parent.parent / "README.md"
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    folder_of_classes(folder / "photos" / "train", classes=4, images=320, width=40, height=30)
    folder_of_classes(folder / "photos" / "test", classes=4, images=10, width=40, height=30)
    vissl_files.write(folder / "model_final_checkpoint_phase199.torch", vissl_files.checkpoint("r50-200ep-linear"))
    return folder


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 15


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works(command: str, folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        shlex.split(command), cwd=folder, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"make ([a-z-]+)", README.read_text())) - {"sure"}
    known = set(re.findall(r"^([a-z-]+):", (README.parent / "Makefile").read_text(), re.MULTILINE))
    assert targets <= known


def test_links_of_the_readme_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README.read_text()):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        assert (README.parent / path).exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", (README.parent / path).read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}, link
