"""Whether there is anything new to train: data, recipe and code against those of the versions that are there.

Everything is compared by content: the digest of the shards, of the recipe, and the version of this code. The name of a
run is made of the three, so that a schedule that is repeated, overlaps itself or broke off goes on with the same run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pirl import __version__
from pirl.config import Recipe, parse_recipe
from pirl.errors import DataError, StorageNotFoundError
from pirl.registry.embedded import CHAMPION
from pirl.registry.locate import open_registry
from pirl.shards import Manifest, ShardReader, Source
from pirl.storage import open_storage

if TYPE_CHECKING:
    from pirl.warm import WarmStart


@dataclass(frozen=True)
class Decision:
    """`retrain` or not, and every reason; `run` is the URI of the run that it is about."""

    retrain: bool
    reasons: list[str]
    run: str
    recipe: Recipe
    warm: WarmStart | None = None


def data_uri(root: str, split: str, source: Source) -> str:
    """Where the shards of this state of a source belong: another state of it, another place."""
    return f"{root}/data/{split}-{source.fingerprint()[:12]}"


def decide_retrain(
    root: str, registry: str, model: str, recipe: Recipe, data: str, warm_epochs: int | None = None
) -> Decision:
    """Compare the shards at `data`, the recipe and the code with the champion's lineage.

    `warm_epochs` allows a warm start from the champion, where images were added and nothing else has changed: for that
    many epochs, 0 for as many as the recipe has.

    Nothing to do: if the champion was made of the same; if another version was (somebody went back to an older
    champion: the schedule does not undo that); or if a run of the same was trained and did not pass the gate.
    """
    digest = Manifest.load(open_storage(data)).digest
    warm_recipe = parse_recipe(recipe.to_toml(), [f"train.epochs={warm_epochs}"]) if warm_epochs else recipe
    recipes = recipe.digests() | warm_recipe.digests()
    cold = _run(root, recipe, digest, "cold")

    known = open_registry(registry)
    versions = known.versions(model) if known.has(model) else []
    champion = known.pointer(model, CHAMPION) if versions else None
    for version in reversed(versions):
        lineage = version.record.get("lineage", {})
        if _changes(lineage, digest, recipes) == []:
            told = f"{model} {version.version} was made of the same data, recipe and code"
            if version.version != champion:
                told += f"; the champion is {champion or 'none'}, promote by hand to change that"
            return Decision(False, [told], version.record["run_id"], recipe)

    if champion is None:
        reasons = [f"{model} has no champion yet"]
        return _unless_rejected(Decision(True, reasons, cold, recipe))
    theirs = known.get(model, champion).record["lineage"]
    changes = _changes(theirs, digest, recipes)
    reasons = [f"champion {champion}: {change}" for change in changes]
    if warm_epochs is not None and [change.partition(" ")[0] for change in changes] == ["data"]:
        warm, told = _warm(root, theirs, data)
        reasons.append(told)
        if warm:
            run = _run(root, warm_recipe, digest, "warm")
            return _unless_rejected(Decision(True, reasons, run, warm_recipe, warm))
    return _unless_rejected(Decision(True, reasons, cold, recipe))


def _changes(lineage: dict[str, Any], digest: str, recipes: set[str]) -> list[str]:
    """What differs from a version's lineage, each with the old and the new value."""
    found = []
    if lineage.get("data_digest") != digest:
        found.append(f"data changed ({_short(lineage.get('data_digest'))} -> {digest[:12]})")
    if lineage.get("recipe_digest") not in recipes:
        found.append(f"recipe changed ({_short(lineage.get('recipe_digest'))} -> {min(recipes)[:12]})")
    if lineage.get("code_version") != __version__:
        found.append(f"code changed ({lineage.get('code_version')} -> {__version__})")
    return found


def _short(digest: Any) -> str:
    return str(digest)[:12] if digest else "unknown"


def _run(root: str, recipe: Recipe, digest: str, start: str) -> str:
    key = hashlib.sha256("\n".join([digest, recipe.digest(), __version__, start]).encode()).hexdigest()
    return f"{root}/runs/{recipe.name}-{key[:12]}"


def _unless_rejected(decision: Decision) -> Decision:
    run = open_storage(decision.run)
    try:
        gate = run.read_json("gate.json")
    except StorageNotFoundError:
        return decision
    if gate["promote"]:  # it broke off between the gate and the registry
        return decision
    told = f"{decision.run} was trained on the same and did not pass the gate: {'; '.join(gate['reasons'])}"
    return replace(decision, retrain=False, reasons=[*decision.reasons, told])


def _warm(root: str, champion: dict[str, Any], data: str) -> tuple[WarmStart | None, str]:
    """The champion's shards by their digest, if they are still below ROOT/data, and whether images were only added."""
    from pirl.evaluate import split_checkpoint_uri  # here, so that a look into a registry does not load torch
    from pirl.warm import WarmStart, only_added

    storage = open_storage(root)
    for name in storage.list("data/"):
        if not name.endswith("/manifest.json"):
            continue
        place = f"{root}/{name.removesuffix('/manifest.json')}"
        try:
            if Manifest.load(open_storage(place)).digest != champion["data_digest"]:
                continue
        except DataError:
            continue
        if not only_added(ShardReader(place), ShardReader(data)):
            return None, "a cold start: images were removed or changed, not only added"
        run, checkpoint = split_checkpoint_uri(champion["checkpoint"])
        return WarmStart(run, checkpoint or "", place), "a warm start: images were only added"
    return None, "a cold start: the champion's shards are gone"
