"""Commands of the README and the guide: each is run, in their order, on images that look like a user's."""

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

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Return the lines of a page's blocks of commands."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


COMMANDS = [*commands(README), *commands(ROOT / "docs" / "guide.md")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    folder_of_classes(folder / "photos" / "train", classes=4, images=320, width=40, height=30)
    folder_of_classes(folder / "photos" / "test", classes=4, images=10, width=40, height=30, first=5000)
    vissl_files.write(
        folder / "model_final_checkpoint_phase199.torch", vissl_files.checkpoint("r50-200ep-linear", random=True)
    )
    return folder


def test_the_readme_shows_commands() -> None:
    assert len(commands(README)) >= 15


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works(command: str, folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        shlex.split(command), cwd=folder, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(
        re.findall(r"make ([a-z-]+)", " ".join(re.findall(r"```.*?```|`[^`]+`", page.read_text(), re.DOTALL)))
    )
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}, link
