"""The gate between an evaluation and the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pirl.errors import EXIT_USAGE, RegistryError, UsageError
from pirl.registry import Registry, decide, register_run
from pirl.storage import Storage, open_storage


def evaluated(folder: Path, pretrained: float, random: float, std: float = 0.0, test_data: str = "images") -> Storage:
    """A run whose trunk has a top-1 of `pretrained` in every probe."""

    def scores(top1: float) -> dict[str, Any]:
        value = {"top1": {"mean": top1, "std": std, "runs": [top1]}}
        return {"linear": value, "linear_1pct": value, "knn": value}

    run = open_storage(folder)
    run.write_json(
        "eval.json",
        {
            "checkpoint": f"{run.uri}/checkpoints/step-00000001",
            "train_data": "images",
            "test_data": test_data,
            "pretrained": scores(pretrained),
            "random": scores(random),
        },
    )
    return run


def champion(registry: Path, top1: float, test_data: str = "images") -> None:
    metrics = evaluated(registry.parent / "before", top1, 0.1, test_data=test_data).read_json("eval.json")
    Registry(str(registry)).register("m", run_id="before", files={}, record={"metrics": metrics}, promote=True)


@pytest.mark.parametrize(
    ("pretrained", "random", "std", "min_gain", "promoted"),
    [
        (0.70, 0.60, 0.01, 0.01, True),
        (0.60, 0.60, 0.00, 0.00, False),  # nothing was learned
        (0.605, 0.60, 0.0, 0.01, False),  # less than was asked for
        (0.62, 0.60, 0.02, 0.01, False),  # within the spread of the two
        (0.59, 0.60, 0.02, -0.5, True),  # a negative gain asks for no more than that
    ],
)
def test_the_gain_over_random_weights_decides(
    tmp_path: Path, pretrained: float, random: float, std: float, min_gain: float, promoted: bool
) -> None:
    run = evaluated(tmp_path / "run", pretrained, random, std)
    assert decide(run.uri, str(tmp_path / "registry"), "m", "knn", min_gain) is promoted
    gate = run.read_json("gate.json")
    assert gate["promote"] is promoted
    assert f"{100 * (pretrained - random):+.2f} points" in gate["reasons"][0]


@pytest.mark.parametrize(
    ("before", "test_data", "promoted", "reason"),
    [
        (0.65, "images", True, "v0001 has 65.00"),
        (0.75, "images", False, "v0001 has 75.00 ± 0.00 %, more"),
        (0.75, "others", True, "other images: not compared"),
    ],
)
def test_a_better_champion_on_the_same_images_stays(
    tmp_path: Path, before: float, test_data: str, promoted: bool, reason: str
) -> None:
    champion(tmp_path / "registry", before, test_data)
    run = evaluated(tmp_path / "run", 0.70, 0.60)
    assert decide(run.uri, str(tmp_path / "registry"), "m") is promoted
    assert reason in run.read_json("gate.json")["reasons"][1]


def test_an_unknown_metric_is_a_mistake_with_a_suggestion(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", 0.70, 0.60)
    with pytest.raises(UsageError, match="Did you mean 'linear_1pct'") as error:
        decide(run.uri, str(tmp_path / "registry"), "m", "linear_1pc")
    assert error.value.exit_code == EXIT_USAGE


def test_without_an_evaluation_there_is_nothing_to_decide(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="has no evaluation"):
        decide(str(tmp_path / "run"), str(tmp_path / "registry"), "m")


def test_what_did_not_pass_cannot_be_registered(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", 0.60, 0.60)
    run.write_json("DONE.json", {})
    decide(run.uri, str(tmp_path / "registry"), "m")
    with pytest.raises(RegistryError, match=r"did not pass the gate: .* not more than"):
        register_run(run.uri, str(tmp_path / "registry"), "m")
    assert Registry(str(tmp_path / "registry")).models() == []
