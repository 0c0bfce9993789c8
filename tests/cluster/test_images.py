"""The images of `make images` as pods of a restricted namespace, on a read-only root file system.

PIRL_TRAINER_IMAGE and PIRL_STEPS_IMAGE name them, as the cluster has them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from conftest import TINY
from training import kubectl, until

NAMESPACE = "pirl-images"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="needs a Kubernetes cluster: set KUBECONFIG"),
]

# What no image should bring, and where it must not be able to write.
LOOK = """
import os, shutil, stat, sys
assert (os.getuid(), os.getgid()) == (65532, 65532), os.getuid()
found = [name for name in ('gcc', 'cc', 'g++', 'clang', 'make', 'git', 'kubectl') if shutil.which(name)]
assert not found, found
assert not os.path.exists('/opt/pirl/bin/pip')
assert not os.path.exists('/tmp/.cache') and not os.path.exists('/root/.cache/pip')
try: open('/opt/pirl/probe', 'w'); raise SystemExit('the root file system can be written')
except OSError: pass
compiled = os.path.join(os.path.dirname(sys.modules['pirl'].__file__), '__pycache__')
assert os.listdir(compiled), 'not compiled: every start would do it again'
"""

TRAIN = f"""
import io, os
import numpy as np
from PIL import Image
import pirl
{LOOK}
from pirl.shards import open_source, write_shards
from pirl.storage import open_storage
for k in range(42):
    os.makedirs(f'/tmp/images/class{{k % 3}}', exist_ok=True)
    pixels = np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f'/tmp/images/class{{k % 3}}/{{k}}.jpg')
open('/tmp/tiny.toml', 'w').write({TINY!r})
if __name__ == '__main__':
    write_shards(open_source('/tmp/images'), open_storage('/tmp/shards'))
"""

TRAINER = [
    f"cat > /tmp/look.py <<'END'\n{TRAIN}\nEND",
    "python /tmp/look.py",
    "python -c 'from pirl.doctor import machine_checks; print(*machine_checks(), sep=chr(10))'",
    "pirl train /tmp/tiny.toml --data /tmp/shards --out /tmp/run --workers 1 --processes 1 train.epochs=1",
    "test -f /tmp/run/DONE.json",
    "! python -c 'import kfp' 2>/dev/null",
]
STEPS = [
    *TRAINER[:2],
    "pirl doctor",
    "pirl train /tmp/tiny.toml --data /tmp/shards --out /tmp/run --processes 1 train.epochs=1",
    "pirl eval /tmp/run --data /tmp/shards --test /tmp/shards",
    "pirl register /tmp/run --registry /tmp/registry --min-gain=-1",
    "python -c 'import components.shard, components.pretrain, components.retrain, pipelines.pretrain, kubernetes'",
    "pirl train demo --data s3://b/d --out s3://b/r --backend pytorchjob --help >/dev/null",
]


@pytest.fixture(scope="module", autouse=True)
def namespace() -> Iterator[None]:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    there = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump(there))
    yield
    kubectl("delete", "namespace", NAMESPACE)


def nodes_with(image: str) -> dict[str, str]:
    """A selector for a node that has the image already; nothing where none has, and it will be pulled."""
    for node in json.loads(kubectl("get", "nodes", "-o", "json"))["items"]:
        if any(image in there["names"] for there in node["status"].get("images", ())):
            return {"kubernetes.io/hostname": node["metadata"]["name"]}
    return {}


def pod(name: str, image: str, commands: list[str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "nodeSelector": nodes_with(image),
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "runAsGroup": 65532,  # Kubernetes takes the user from an image, but not its group
                "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": name,
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-exc", "\n".join(commands)],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [
                        {"name": "tmp", "mountPath": "/tmp"},
                        {"name": "shared-memory", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "256Mi"}},
            ],
        },
    }


@pytest.mark.parametrize(("name", "commands"), [("trainer", TRAINER), ("steps", STEPS)])
def test_it_does_its_work_in_a_restricted_pod(name: str, commands: list[str]) -> None:
    variable = f"PIRL_{name.upper()}_IMAGE"
    image = os.environ.get(variable)
    if not image:
        pytest.skip(f"{variable} names no image (`make images` builds them)")
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump(pod(name, image, commands)))

    def phase() -> str:
        return str(json.loads(kubectl("get", "pod", name, "-n", NAMESPACE, "-o", "json"))["status"]["phase"])

    until(lambda: phase() in ("Succeeded", "Failed"), 600, every_s=1)
    log = kubectl("logs", name, "-n", NAMESPACE)
    assert phase() == "Succeeded", log
