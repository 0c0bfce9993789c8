"""The way of a run into the registry: through the gate, with its lineage."""

from __future__ import annotations

from typing import Any

from pirl import __version__
from pirl.config import parse_recipe
from pirl.errors import RegistryError, StorageNotFoundError, UsageError, did_you_mean
from pirl.outputs import check_registry
from pirl.registry.embedded import CHAMPION, Version
from pirl.registry.locate import open_registry
from pirl.storage import Storage, open_storage


def decide(run: str, registry: str, model: str, metric: str = "linear_1pct", min_gain: float = 0.01) -> bool:
    """Whether a run may become a champion: written to its `gate.json`, with every reason.

    The trunk must beat its own initial weights in `metric` by more than `min_gain` (0.01 is a point of top-1) and than
    the spread of both; a negative `min_gain` asks for that alone. It must not fall behind the champion either, where
    that was measured on the same images.
    """
    storage = open_storage(run)
    result = _evaluation(storage)
    if metric not in result["pretrained"]:
        raise UsageError(
            f"there is no metric {metric!r}.{did_you_mean(metric, result['pretrained'])}",
            f"the evaluation has {', '.join(result['pretrained'])}",
        )
    trained, random = (result[trunk][metric]["top1"] for trunk in ("pretrained", "random"))
    gain, noise = trained["mean"] - random["mean"], trained["std"] + random["std"]
    needed = max(min_gain, noise) if min_gain >= 0 else min_gain
    promote = gain > needed
    reasons = [
        f"{metric} top-1 is {_percent(trained)}, with random weights {_percent(random)}: {100 * gain:+.2f} points, "
        f"{'' if promote else 'not '}more than {100 * needed:.2f}, {'the spread' if needed == noise else 'asked for'}"
    ]
    champion = _champion(registry, model)
    if champion and champion.record["run_id"] != storage.uri:
        theirs = champion.record["metrics"]
        if theirs["test_data"] == result["test_data"] and theirs["train_data"] == result["train_data"]:
            before = theirs["pretrained"][metric]["top1"]
            better = trained["mean"] >= before["mean"]
            reasons.append(f"the champion {champion.version} has {_percent(before)}" + ("" if better else ", more"))
            promote = promote and better
        else:
            reasons.append(f"the champion {champion.version} was measured on other images: not compared")
    storage.write_json("gate.json", {"promote": promote, "metric": metric, "min_gain": min_gain, "reasons": reasons})
    return promote


def register_run(run: str, registry: str, model: str) -> Version:
    """Register a run that passed the gate; it becomes latest and champion. The same run gives the same version."""
    from pirl.evaluate import load_trunk  # here, so that a look into a registry does not load torch
    from pirl.export import trunk_bytes

    storage = open_storage(run)
    result = _evaluation(storage)
    try:
        gate, done = storage.read_json("gate.json"), storage.read_json("DONE.json")
    except StorageNotFoundError as error:
        raise RegistryError(
            f"{run} is not ready: {error.what}", "`pirl train`, `pirl eval` and the gate come first"
        ) from None
    if not gate["promote"]:
        raise RegistryError(
            f"{run} did not pass the gate: {'; '.join(gate['reasons'])}", "train longer, or differently"
        )
    check_registry(registry)
    recipe, _, trunk = load_trunk(result["checkpoint"])
    record = {
        "lineage": {
            "data_digest": done["data_digest"],
            "recipe": recipe.name,
            "recipe_digest": recipe.digest(),
            "code_version": done["version"],
            "registered_by": __version__,
            "checkpoint": result["checkpoint"],
            "images_seen": done["images_seen"],
            "epochs": done["epochs"],
        },
        "config": parse_recipe(storage.read_bytes("config.toml").decode()).model_dump(mode="json", exclude_none=True),
        "metrics": result,
        "gate": gate,
    }
    files = {"trunk.safetensors": trunk_bytes(trunk, recipe)}
    version = open_registry(registry).register(model, run_id=storage.uri, files=files, record=record, promote=True)
    storage.write_json("registered.json", {"model": model, "version": version.version, "uri": version.uri})
    return version


def _evaluation(run: Storage) -> dict[str, Any]:
    try:
        return run.read_json("eval.json")
    except StorageNotFoundError:
        raise RegistryError(f"{run.uri} has no evaluation", "`pirl eval RUN --data URI --test URI` makes one") from None


def _champion(registry: str, model: str) -> Version | None:
    known = open_registry(registry)
    return known.get(model, CHAMPION) if known.has(model) else None


def _percent(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:.2f} ± {100 * value['std']:.2f} %"
