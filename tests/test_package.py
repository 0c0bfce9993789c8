"""The wheel and the sdist, installed into an empty environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from images import small_fashion_mnist

import pirl

ROOT = Path(pirl.__file__).parent.parent
PARTS = ("pirl", "components", "pipelines", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import setuptools.build_meta as b; print(b.build_wheel('dist')); print(b.build_sdist('dist'))"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist of a copy of the sources."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("package")
    for part in PARTS:
        path = ROOT / part
        if path.is_dir():
            shutil.copytree(path, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    (source / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((source / "dist").glob("*.whl")), next((source / "dist").glob("*.tar.gz"))


def test_both_have_all_files(built: tuple[Path, Path]) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for room in ("pirl", "components", "pipelines")
        for path in (ROOT / room).rglob("*")
        if path.is_file() and (path.suffix in (".py", ".toml", ".typed") or path.parent.name == "templates")
        if "__pycache__" not in path.parts
    }
    assert {"pirl/py.typed", "pirl/recipes/demo.toml"} <= sources
    with zipfile.ZipFile(built[0]) as wheel:
        assert sources <= set(wheel.namelist())
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    with tarfile.open(built[1]) as sdist:
        assert sources <= {name.partition("/")[2] for name in sdist.getnames()}


@pytest.mark.parametrize("kind", [0, 1], ids=["wheel", "sdist"])
def test_the_program_works_where_it_is_installed(kind: int, built: tuple[Path, Path], tmp_path: Path) -> None:
    """Its dependencies come from this environment by a path: installing torch again would prove nothing more."""
    venv.create(tmp_path / "env", with_pip=False)
    libraries = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "--python", str(tmp_path / "env" / "bin" / "python"), "install"]
    (libraries / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    done = subprocess.run([*pip, *options, "--ignore-installed", str(built[kind])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PIRL_DATA": str(small_fashion_mnist(tmp_path / "fashion", 5000))}
    program = str(tmp_path / "env" / "bin" / "pirl")

    def output(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    place = output(str(tmp_path / "env" / "bin" / "python"), "-c", "import pirl; print(pirl.__file__)")
    assert place.strip() == str(libraries / "pirl" / "__init__.py")
    assert output(program, "--version") == f"pirl {pirl.__version__}\n"
    assert "demo" in output(program, "recipes")
    assert output(program, "demo", "--dry-run")
