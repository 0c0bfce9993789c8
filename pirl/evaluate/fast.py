"""The fast protocol, from a checkpoint to `eval.json`: features once, probes, next to those of the initial weights.

A result belongs to the weights that it was measured on: it has the digest of the backbone and of the checkpoint. Every
rank calls each function; the results are the same on all of them, and rank 0 writes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pirl import logs
from pirl.checkpoint import Commit
from pirl.config import Recipe
from pirl.errors import StorageError, UsageError
from pirl.evaluate.crops import LabelledCrops
from pirl.evaluate.execution import Execution
from pirl.evaluate.features import Extractor, Features, extract_all, precision, share_of
from pirl.evaluate.images import check_labels, count_shared, require_distinct
from pirl.evaluate.load import load_model
from pirl.evaluate.parts import Parts
from pirl.evaluate.probe import (
    FAST,
    Pair,
    Protocol,
    as_json,
    bank_neighbours,
    count_few,
    embed,
    probe,
)
from pirl.model import PIRL, Trunk, build_model, weights_digest
from pirl.results import BankScores, Evaluation, FewLabels, ProbeSettings
from pirl.run import Run
from pirl.shards import Manifest, ShardReader
from pirl.storage import open_storage
from pirl.text import count
from pirl.world import World


def evaluate(
    checkpoint: str | Run,
    train_data: str,
    test_data: str,
    protocol: Protocol = FAST,
    execution: Execution | None = None,
) -> Evaluation:
    """Probe a checkpoint's backbone and the same with its initial weights. Return the content of `eval.json`.

    All rates are shares of 1. The spread is the standard deviation over the probe's seeds; for nearest neighbours,
    which have no seed, the standard error of a share. Where the bank is of the training images, `bank` is what its own
    rows score on the test images; random weights have no counterpart.
    """
    started, execution = time.perf_counter(), execution or Execution()
    run = checkpoint if isinstance(checkpoint, Run) else Run.at(checkpoint)
    train, test = (ShardReader(uri) for uri in (train_data, test_data))
    recipe, commit, model, memory = _load(run, train, execution.world)
    header = result_header(recipe, train, test, protocol, model.trunk, commit, execution.world)
    trunks = {"pretrained": model.trunk, "random": build_model(recipe).trunk.eval()}
    result, pairs = probe_trunks(trunks, recipe, (train, test), header, protocol, execution, run)
    rows = recipe.rows(len(train)) if commit.data_digest == header.train_data else 0
    result = result.model_copy(update={"unfinished": _unfinished(run, commit, recipe, rows)})
    if commit.data_digest == header.train_data:
        bank = _ask_bank(model, memory, train_data, recipe, pairs["pretrained"].test, header, protocol, execution)
        result = result.model_copy(update={"bank": bank})
    return result.model_copy(update={"seconds": round(time.perf_counter() - started, 1)})


def _load(run: Run, train: ShardReader, world: World) -> tuple[Recipe, Commit, PIRL, Tensor]:
    """Return what `load_model` does, of the bank this rank's rows if it is of these images, else none."""
    rows = None
    if world.size > 1:
        own = run.commit().data_digest == train.manifest.digest
        images = run.recipe().rows(len(train)) if own else 0
        rows = share_of(images, world)
    return load_model(run, rows)


def _ask_bank(
    model: PIRL,
    memory: Tensor,
    train_data: str,
    recipe: Recipe,
    test: Features,
    header: Evaluation,
    protocol: Protocol,
    execution: Execution,
) -> BankScores:
    """Return the scores of the memory bank's rows on the features of the test images."""
    embedded, classes = embed(model, test), len(header.classes)
    return bank_neighbours(memory, train_data, recipe, embedded, classes, protocol, execution.world, execution.progress)


def _unfinished(run: Run, commit: Commit, recipe: Recipe, rows: int) -> str:
    """Return the progress of a training that has not reached its end at a checkpoint; "" where it has.

    `rows` are those of an epoch; 0 where the evaluation is of other images, whose number no rank needs to know.
    """
    completion = run.completion()
    if completion and (completion.imported or completion.checkpoint_name == commit.name):
        return ""
    cursor, epochs = commit.cursor, recipe.train.epochs
    if not rows:
        return f"in epoch {cursor.epoch + 1} of {epochs}"
    if cursor.step >= epochs * recipe.steps_per_epoch(rows):
        return ""
    return f"epoch {cursor.epoch + cursor.samples / rows:.2f} of {epochs}"


def probe_trunks(
    trunks: Mapping[str, Trunk],
    recipe: Recipe,
    readers: tuple[ShardReader, ShardReader],
    header: Evaluation,
    protocol: Protocol,
    execution: Execution,
    run: Run | None = None,
) -> tuple[Evaluation, dict[str, Pair]]:
    """Return the header with the scores of each backbone, and this rank's features.

    Features that are computed are kept in `run` until the result is saved.
    """
    world, progress = execution.world, execution.progress
    extractor = Extractor(trunks, recipe, world.device)
    folder = run.evaluation_parts(_parts_name(trunks, recipe, header)) if run else None
    sets = []
    for title, reader in zip(("train", "test"), readers):
        crops = LabelledCrops(reader, recipe, seed=0)
        sets.append(extract_all(extractor, crops, world, execution.workers, Parts(folder, title), progress))
    pairs = {name: Pair(sets[0][name], sets[1][name]) for name in trunks}
    scores, collapsed, errors = probe(pairs, len(header.classes), protocol, world, progress)
    train = next(iter(pairs.values())).train
    update = {
        **scores,
        "collapsed": collapsed,
        "confusion": errors,
        "ranks": world.size,
        **_bounds(train, header, protocol),
    }
    return header.model_copy(update=update), pairs


def _parts_name(trunks: Mapping[str, Trunk], recipe: Recipe, header: Evaluation) -> str:
    """Return a name that is the same where the features are."""
    what = [
        {name: weights_digest(trunk.state_dict()) for name, trunk in trunks.items()},
        [header.train_data, header.test_data],
        [recipe.eval.resize, recipe.eval.crop, list(recipe.views.mean), list(recipe.views.std)],
    ]
    return "fast-" + hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _bounds(train: Features, header: Evaluation, protocol: Protocol) -> dict[str, object]:
    """Return the steps of the probes, the precision of the features, and what a large data set has changed."""
    assert header.few_labels is not None
    images = {"linear": len(train.y), "linear_1pct": header.few_labels.labels}
    steps = {name: protocol.steps(number) for name, number in images.items()}
    differences = []
    for name, number in images.items():
        if steps[name] < (all_steps := protocol.unbounded_steps(number)):
            differences.append(
                f"{name}: {count(steps[name], 'step')} for {all_steps:,}, which {protocol.epochs} epochs would take"
            )
    dtype = precision(len(train.y), train.x.shape[1])
    if dtype != torch.float32:
        differences.append("features in half precision")
    return {"steps": steps, "differences": differences}


def evaluate_bank(
    checkpoint: str | Run,
    train_data: str,
    test_data: str,
    protocol: Protocol = FAST,
    execution: Execution | None = None,
) -> Evaluation:
    """Return only the `bank` of `evaluate`: no training image is read, each test image passes the backbone once.

    `UsageError` where the checkpoint has no bank of these training images.
    """
    started, execution = time.perf_counter(), execution or Execution()
    run = checkpoint if isinstance(checkpoint, Run) else Run.at(checkpoint)
    train, test = (ShardReader(uri) for uri in (train_data, test_data))
    recipe, commit, model, memory = _load(run, train, execution.world)
    header = result_header(recipe, train, test, protocol, model.trunk, commit, execution.world)
    if commit.data_digest != header.train_data:
        raise UsageError(
            f"{header.checkpoint} has no memory bank of the images in {train_data}",
            "give the --data that it was trained on, or use --protocol fast, which needs no bank",
        )
    extractor = Extractor({"pretrained": model.trunk}, recipe, execution.world.device)
    crops = LabelledCrops(test, recipe, seed=0)
    parts = Parts(None, "test")
    features = extract_all(extractor, crops, execution.world, execution.workers, parts, execution.progress)
    bank = _ask_bank(model, memory, train_data, recipe, features["pretrained"], header, protocol, execution)
    seconds = round(time.perf_counter() - started, 1)
    return header.model_copy(update={"bank": bank, "ranks": execution.world.size, "seconds": seconds})


def evaluate_trunk(
    trunk: Trunk,
    recipe: Recipe,
    train_data: str,
    test_data: str,
    protocol: Protocol = FAST,
    execution: Execution | None = None,
) -> Evaluation:
    """Probe a backbone without a checkpoint, such as a registered one."""
    started = time.perf_counter()
    readers = ShardReader(train_data), ShardReader(test_data)
    execution = execution or Execution()
    header = result_header(recipe, *readers, protocol, trunk, None, execution.world)
    result, _ = probe_trunks({"pretrained": trunk}, recipe, readers, header, protocol, execution)
    return result.model_copy(update={"seconds": round(time.perf_counter() - started, 1)})


def result_header(
    recipe: Recipe,
    train: ShardReader,
    test: ShardReader,
    protocol: Protocol,
    trunk: Trunk,
    commit: Commit | None,
    world: World,
) -> Evaluation:
    """Return an evaluation without scores: checkpoint, weights, data and protocol. Rank 0 counts for all."""
    classes = check_labels(train, test)
    few, shared = world.of_main(lambda: _counts((train, test), protocol.label_share))
    return Evaluation(
        checkpoint=commit.name if commit else "",
        weights=weights_digest(trunk.state_dict()),
        commit=commit.sha256 if commit else "",
        train_data=train.manifest.digest,
        test_data=test.manifest.digest,
        train_uri=train.storage.uri,
        test_uri=test.storage.uri,
        train_images=len(train),
        test_images=len(test),
        classes=classes,
        untested=test.match_classes(classes),
        few_labels=few,
        shared_images=shared,
        protocol=applied(protocol, recipe),
    )


def _counts(readers: tuple[ShardReader, ShardReader], share: float) -> tuple[FewLabels, int]:
    """Return the labels of the probe linear_1pct, and the number of test images that are training images too."""
    return count_few(readers[0].labels(), share), count_shared(*readers)


def applied(protocol: Protocol, recipe: Recipe) -> ProbeSettings:
    """Return the protocol as it is applied to a recipe's backbone."""
    return ProbeSettings(**as_json(protocol), resize=recipe.eval.resize, crop=recipe.eval.crop)


def evaluate_run(uri: str, train_data: str, test_data: str, execution: Execution | None = None) -> Evaluation:
    """Evaluate a run's newest checkpoint, or the one named, into its `eval.json`; keep a result for the same."""
    execution, run = execution or Execution(), Run.at(uri)
    world = execution.world
    kept = kept_evaluation(run, train_data, test_data) if world.is_main else None
    if before := world.broadcast_object(kept):
        result = before.model_copy(update=world.of_main(lambda: _update(before, train_data, test_data)))
        if result != before and world.is_main:
            run.save_evaluation(result)
        return result
    if world.is_main:
        run.require_writable()
    result = evaluate(run, train_data, test_data, execution=execution)
    if world.is_main:
        run.save_evaluation(result)
        run.discard_evaluation_parts("fast")
    return result


def _update(before: Evaluation, train_data: str, test_data: str) -> dict[str, Any]:
    """Return the fields of a kept result that are of the places, or that an older version did not count."""
    update: dict[str, Any] = {"train_uri": open_storage(train_data).uri, "test_uri": open_storage(test_data).uri}
    if before.few_labels is None:
        readers = ShardReader(train_data), ShardReader(test_data)
        few, shared = _counts(readers, before.protocol.label_share)
        update |= {"few_labels": few, "shared_images": shared}
    return update


def kept_evaluation(run: Run, train_data: str, test_data: str) -> Evaluation | None:
    """Return the run's evaluation if it is of the same checkpoint, data, protocol and section `eval`."""
    before = read_kept(run.evaluation)
    return before if before and before.pretrained and _is_of(before, run, train_data, test_data) else None


def kept_bank(run: Run, train_data: str, test_data: str) -> Evaluation | None:
    """Return the run's result of the protocol bank if it is of the same checkpoint, data and section `eval`."""
    before = read_kept(run.bank_evaluation)
    return before if before and _is_of(before, run, train_data, test_data) else None


def read_kept(read: Callable[[], Evaluation | None]) -> Evaluation | None:
    """Return an earlier result; None, with a warning, where it cannot be read."""
    try:
        return read()
    except StorageError as error:
        logs.warn(f"evaluated again: {error.what}")
        return None


def _is_of(result: Evaluation, run: Run, train_data: str, test_data: str) -> bool:
    """Return whether a result is of the run's checkpoint, of this data, and by this protocol and section `eval`."""
    commit = run.commit()
    manifests = [Manifest.load(open_storage(uri)) for uri in (train_data, test_data)]
    require_distinct(*manifests)
    digests = [manifest.digest for manifest in manifests]
    same = [result.checkpoint, result.commit, result.train_data, result.test_data]
    settings = result.protocol.model_dump(mode="json")
    own = applied(FAST, run.recipe()).model_dump(mode="json")
    return same == [commit.name, commit.sha256, *digests] and settings | own == settings
