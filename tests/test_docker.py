"""The images as their recipe stands. Built and run they are by `tests/cluster/test_images.py`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from components.step import IMAGE as STEPS
from pirl import __version__
from pirl.jobs.settings import IMAGE as TRAINER

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
LINES = [line.strip() for line in DOCKERFILE.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def stages() -> dict[str, list[str]]:
    """Instructions of each stage by its name."""
    found: dict[str, list[str]] = {}
    for line in LINES:
        if line.startswith("FROM "):
            found[line.split()[-1]] = current = [line]
        elif found:
            current.append(line)
    return found


def chain(name: str) -> list[str]:
    """Instructions of a stage and of those that it is made of."""
    lines = stages()[name]
    parent = lines[0].split()[1]
    return (chain(parent) if parent in stages() else []) + lines


def test_the_base_can_be_chosen_and_nothing_is_latest() -> None:
    assert LINES[0].startswith("ARG BASE=")
    assert ":latest" not in DOCKERFILE
    assert re.search(r":\S+$", LINES[0]), "the default has a version"
    assert {line.split()[1] for line in LINES if line.startswith("FROM ")} <= {"${BASE}", *stages()}


@pytest.mark.parametrize("image", ["trainer", "steps"])
def test_an_image_is_the_base_and_one_environment_for_a_user_without_rights(image: str) -> None:
    lines = chain(image)
    assert lines[0].startswith("FROM ${BASE}")
    assert not [line for line in lines if line.startswith(("RUN", "ADD"))], "built elsewhere, and only copied here"
    assert all("--from=" in line for line in lines if line.startswith("COPY"))
    user = next(line for line in reversed(lines) if line.startswith("USER")).split()[1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number, which Kubernetes can compare with 0"
    labels = " ".join(line for line in lines if line.startswith("LABEL"))
    for name in ("title", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert "--from=code" in [line for line in lines if line.startswith("COPY")][-1], "what changes often comes last"


def test_no_secret_has_a_place() -> None:
    names = re.findall(r"\b(?:ARG|ENV)\s+(.*)", DOCKERFILE)
    assert not re.search(r"KEY|SECRET|TOKEN|PASSWORD", " ".join(names).upper())


def test_what_is_copied_exists_and_is_let_through() -> None:
    copied = {
        word.rstrip("/")
        for line in LINES
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert {"pirl", "components", "pipelines", "constraints.txt", "pyproject.toml"} <= copied
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored


def requirements(*arguments: str) -> list[str]:
    command = [sys.executable, "docker/requirements.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_trainer_needs_all_but_what_speaks_to_a_cluster() -> None:
    line = next(line for line in stages()["requirements"] if "--without" in line)
    without = re.search(r"--without ([a-z -]+) >", line)
    assert without
    everything = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert requirements() == everything
    left = set(everything) - set(requirements("--without", *without[1].split()))
    assert {re.split(r"[<>=]", name)[0] for name in left} == {"kfp", "kfp-kubernetes", "kubernetes"}
    code = (
        "import sys; [sys.modules.__setitem__(name, None) for name in ('kfp', 'kubernetes')]; "
        "import pirl.train, pirl.doctor.__main__"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_name_that_is_no_dependency_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        requirements("--without", "kpf")


def test_names_are_those_that_jobs_and_pipelines_ask_for() -> None:
    script = (ROOT / "docker" / "build").read_text()
    version = __version__.replace("+", "-")
    names = {f"localhost/{name}:{version}" for name in re.findall(r"name=(pirl-\S+)", script)}
    assert names == {TRAINER, STEPS}


def test_an_image_that_does_not_exist_is_refused() -> None:
    done = subprocess.run(
        ["bash", "docker/build", "trainr"], cwd=ROOT, capture_output=True, text=True, check=False, env={"PATH": "/bin"}
    )
    assert done.returncode == 2
    assert "->" in done.stderr


def test_extras_of_the_images() -> None:
    plain = requirements()
    more = requirements("--extras", "heif,parquet", "--without", "kfp")
    assert {line for line in more if line not in plain} == {"pillow>=11.3", "pillow-heif>=1.0", "pyarrow>=17"}
    assert {line.split("=")[0].rstrip("><") for line in plain if line not in more} == {"kfp"}
    command = [sys.executable, "docker/requirements.py", "--extras", "heic"]
    wrong = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "has no extra heic, expected heif" in wrong.stderr
    assert "ARG EXTRAS=" in stages()["requirements"]
    assert '--build-arg "EXTRAS=${EXTRAS:-}"' in (ROOT / "docker" / "build").read_text()


def test_the_bill_of_materials_names_each_installed_package() -> None:
    (folder,) = {str(Path(pytest.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "docker/sbom.py", folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout)
    packages = {each["name"]: each for each in document["components"]}
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    assert packages["pytest"]["purl"] == f"pkg:pypi/pytest@{pytest.__version__}"
    assert {"torch", "boto3", "kfp"} <= set(packages)
    for image in ("trainer", "steps"):
        assert f"COPY --from={image}-sbom /sbom.json /opt/pirl/" in stages()[image]
