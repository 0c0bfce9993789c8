"""The whole DAG on the demo's images, its training on four nodes: stopped in the middle, and run again to its end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from training import Place, kubectl, make_place, remove_place, until

from pirl.errors import EXIT_DONE
from pirl.jobs.pod import job_name
from pirl.registry import CHAMPION, open_registry
from pirl.storage import Storage, open_storage

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="needs a Kubernetes cluster: set KUBECONFIG"),
]
EPOCHS = 6
STEPS_PER_EPOCH = 78  # 5,000 images in batches of 64


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place, objects = make_place("pirl-dag", tmp_path_factory.mktemp("dag"))
    yield place
    remove_place(place, objects)


class Dag:
    """`pirl run` as a user types it, with the launcher's rights on the cluster."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.root = f"{place.uri}/pirl"
        self.starts = 0

    def start(self) -> None:
        command = [str(Path(sys.executable).with_name("pirl")), "run", "fashion-mnist:train", "fashion-mnist:test"]
        command += ["--root", self.root, "--model", "demo", "--backend", "pytorchjob", f"train.epochs={EPOCHS}"]
        command += self.place.options(memory="2Gi", shared_memory="256Mi")
        self.starts += 1
        self.log = self.place.folder / f"dag-{self.starts}.log"
        with self.log.open("wb") as file:
            env = {**os.environ, **self.place.env, "COLUMNS": "200"}
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)

    def text(self) -> str:
        return self.log.read_text()

    def says(self, what: str, seconds: float) -> None:
        def said() -> bool:
            assert self.process.poll() is None, self.text()
            return what in self.text()

        until(said, seconds)

    def steps(self) -> str:
        """Return the log file of the steps, which the console names."""
        found = re.search(r"log: (\S+)", self.text())
        assert found, self.text()
        return Path(found[1]).read_text()

    def run(self) -> Storage:
        found = re.search(r"run: (\S+)", self.text())
        assert found, self.text()
        return open_storage(found[1])


def test_from_images_to_a_registered_model(place: Place) -> None:
    dag = Dag(place)
    dag.start()
    dag.says("pretrain: 100 of", 600)
    name = job_name(dag.run().uri)
    nodes = {pod["spec"]["nodeName"] for pod in place.pods(name)}
    assert len(nodes) == min(4, len(kubectl("get", "nodes", "-o", "name").split())), "each pod has its own node"
    dag.process.terminate()
    assert dag.process.wait(120) != EXIT_DONE
    until(lambda: not place.pods(name), 120)
    assert name not in str(place.jobs())

    dag.start()
    assert dag.process.wait(1200) == EXIT_DONE, dag.text()
    print(dag.text())
    assert "resuming from" in dag.steps()
    run = dag.run()
    done = run.read_json("DONE.json")
    assert done["steps"] == EPOCHS * STEPS_PER_EPOCH
    assert done["images_seen"] == EPOCHS * STEPS_PER_EPOCH * 64
    assert done["ranks"] == 4
    assert run.exists("report.html")
    assert run.read_json("gate.json")["promote"], run.read_json("gate.json")
    champion = open_registry(f"{dag.root}/registry").pointer("demo", CHAMPION)
    assert run.read_json("registered.json")["version"] == champion == "v0001"
