"""A launcher that follows a training while the API server and storage are unavailable in turn."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import ranks
from conftest import TINY, tiny_recipe, training
from faulty_s3 import FaultyS3
from kubernetes_server import KubernetesServer, kubernetes  # noqa: F401 fixture
from paced import HoldAt, train_paced
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 fixtures
from test_launcher import PYTORCHJOB, TRAINJOB, Scene, scene  # noqa: F401 fixture
from test_train import assert_same_bits, final

from pirl.programs import Training
from pirl.storage import open_storage
from pirl.training.spec import Options
from pirl.world import World


def train_held(world: World, options: Options, until: Path) -> None:
    train_paced(world, tiny_recipe(), options, HoldAt(6, until))


def follow(scene: Scene, place: str, folder: Path, direct: str, proxy: FaultyS3, away_s: float) -> float:  # noqa: F811
    """Run a launcher and its job's training, with outages of `away_s`; return the seconds outside of the training."""
    folder.mkdir()
    (folder / "tiny.toml").write_text(TINY)
    scene.program = Training(training(folder / "tiny.toml", f"{place}/data", f"{place}/run"))
    options, released = Options(data=f"{place}/data", out=f"{place}/run", log_every=1), folder / "released"
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environment["AWS_ENDPOINT_URL"] = direct

    def reached() -> bool:
        return not (scene.server.armed or scene.server.unavailable or proxy.armed or proxy.outage)

    if away_s:
        # before the job exists, while pods are listed, while the log is read
        for request, way in ((f"POST .*/{scene.words.plural}", "503"), (".*/pods", "reset"), (".*/log", "401")):
            scene.server.fail_on(request, way, away_s)
        proxy.fail_on("(GET|HEAD) .*/metrics.jsonl", "hang", away_s)
    started = time.monotonic()
    with scene.launched():
        scene.start_pods()
        began = time.monotonic()
        processes = ranks.start(train_held, 1, folder / "ranks", options, released, **environment)
        scene.saying("launcher: running")
        scene.until(reached)
        if away_s:
            proxy.fail_on("(GET|HEAD) .*/DONE.json", "refused", away_s)
        released.touch()
        assert ranks.finish(processes) == [0], ranks.output(folder / "ranks")
        trained_s = time.monotonic() - began
        scene.server.condition(scene.words.plural, scene.words.succeeded)
    return time.monotonic() - started - trained_s


@pytest.mark.parametrize("away_s", [1.2, pytest.param(15, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scene", [PYTORCHJOB, TRAINJOB], ids=lambda words: words.kind.name, indirect=True)
def test_outages_while_a_training_is_followed(
    scene: Scene,  # noqa: F811
    bucket: str,  # noqa: F811
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    away_s: float,
) -> None:
    """One job, one line for each of its log, and the training's own result. With 15 s the lost time is printed."""
    direct = os.environ["AWS_ENDPOINT_URL"]
    for run in ("quiet", "away"):
        for path in Path(shards.removeprefix("file://")).iterdir():
            open_storage(f"{bucket}/{run}/data").upload(path, path.name)
    with FaultyS3(direct) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        quiet_s = follow(scene, f"{bucket}/quiet", tmp_path / "quiet", direct, proxy, 0)
        scene.text()
        scene.said = ""
        scene.server.objects.clear()
        scene.server.requests.clear()
        disturbed_s = follow(scene, f"{bucket}/away", tmp_path / "away", direct, proxy, away_s)
        assert not proxy.armed
    assert scene.error is None
    with scene.capture.disabled():
        print(f"5 outages of {away_s:g} s, lost {disturbed_s - quiet_s:.1f} s besides the training")
    for resource in scene.words.kind.resources:
        assert len(scene.server.all(resource.plural)) == 1
    assert not any(request.startswith("DELETE") for request in scene.server.requests)
    assert scene.text().count("line of rank 0") == 1
    assert "has succeeded" in scene.text()
    assert_same_bits(final(f"{bucket}/away/run"), final(f"{bucket}/quiet/run"))
