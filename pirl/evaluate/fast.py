"""The fast protocol, from a checkpoint to `eval.json`: features once, probes, next to those of the initial weights.

A result belongs to the weights that it was measured on: it has the digest of the trunk and of the checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from pirl import logs
from pirl.checkpoint import Commit
from pirl.config import Recipe
from pirl.errors import StorageError, UsageError
from pirl.evaluate.load import is_collapsed, load_model, require_finite
from pirl.evaluate.probe import (
    FAST,
    Features,
    Protocol,
    as_json,
    bank_neighbours,
    check_labels,
    embed,
    extract,
    load_pixels,
    probe,
)
from pirl.model import Trunk, build_model, weights_digest
from pirl.results import Evaluation, ProbeSettings, Scores
from pirl.run import Run
from pirl.shards import Manifest, ShardReader
from pirl.storage import open_storage


def evaluate(
    checkpoint: str | Run,
    train_data: str,
    test_data: str,
    protocol: Protocol = FAST,
    progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Probe a checkpoint's trunk and the same trunk with its initial weights. Return the content of `eval.json`.

    All rates are shares of 1. The spread is the standard deviation over the probe's seeds; for nearest neighbours,
    which have no seed, the standard error of a share. Where the bank is of the training images, `bank` is what its own
    rows score on the test images; random weights have no counterpart.
    """
    started = time.perf_counter()
    recipe, commit, model, memory = load_model(checkpoint)
    train, test = (ShardReader(uri) for uri in (train_data, test_data))
    header = result_header(recipe, train, test, protocol, model.trunk, commit)
    trunks = {"pretrained": model.trunk, "random": build_model(recipe).trunk.eval()}
    scores, collapsed, features = probe_trunks(trunks, recipe, train, test, len(header.classes), protocol, progress)
    bank = None
    if commit.data_digest == header.train_data:
        embedded = Features(embed(model, features["pretrained"]), torch.from_numpy(test.labels()))
        bank = bank_neighbours(memory, train_data, recipe, embedded, len(header.classes), protocol)
    seconds = round(time.perf_counter() - started, 1)
    return header.model_copy(update={**scores, "collapsed": collapsed, "bank": bank, "seconds": seconds})


def probe_trunks(
    trunks: dict[str, Trunk],
    recipe: Recipe,
    train: ShardReader,
    test: ShardReader,
    classes: int,
    protocol: Protocol = FAST,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, dict[str, Scores]], list[str], dict[str, Tensor]]:
    """Return the scores of each trunk, the names of those whose features have collapsed, and the test features."""
    readers = (train, test)
    pixels = [load_pixels(reader, recipe) for reader in readers]
    scores, collapsed, tested = {}, [], {}
    for name, trunk in trunks.items():
        progress(f"features of the {name} trunk")
        sets = []
        for images, reader in zip(pixels, readers):
            x = extract(trunk, images, recipe)
            require_finite(x, range(len(x)), reader, name)
            sets.append(Features(x, torch.from_numpy(reader.labels())))
        if is_collapsed(sets[0].x):
            progress(f"the features of the {name} trunk have collapsed: the same for all training images")
            collapsed.append(name)
        progress(f"probes on the {name} trunk")
        scores[name] = probe(sets[0], sets[1], classes, protocol)
        tested[name] = sets[1].x
    return scores, collapsed, tested


def evaluate_bank(checkpoint: str, train_data: str, test_data: str, protocol: Protocol = FAST) -> Evaluation:
    """Return only the `bank` of `evaluate`: no training image is read, each test image passes the trunk once.

    `UsageError` where the checkpoint has no bank of these training images.
    """
    started = time.perf_counter()
    recipe, commit, model, memory = load_model(checkpoint)
    train, test = (ShardReader(uri) for uri in (train_data, test_data))
    header = result_header(recipe, train, test, protocol, model.trunk, commit)
    if commit.data_digest != header.train_data:
        raise UsageError(
            f"{header.checkpoint} has no memory bank of the images in {train_data}",
            "give the --data that it was trained on, or use --protocol fast, which needs no bank",
        )
    features = extract(model.trunk, load_pixels(test, recipe), recipe)
    require_finite(features, range(len(features)), test, "pretrained")
    embedded = Features(embed(model, features), torch.from_numpy(test.labels()))
    bank = bank_neighbours(memory, train_data, recipe, embedded, len(header.classes), protocol)
    return header.model_copy(update={"bank": bank, "seconds": round(time.perf_counter() - started, 1)})


def evaluate_trunk(
    trunk: Trunk,
    recipe: Recipe,
    train_data: str,
    test_data: str,
    protocol: Protocol = FAST,
    progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Probe a trunk without a checkpoint, such as a registered one."""
    started = time.perf_counter()
    train, test = (ShardReader(uri) for uri in (train_data, test_data))
    header = result_header(recipe, train, test, protocol, trunk)
    scores, collapsed, _ = probe_trunks(
        {"pretrained": trunk}, recipe, train, test, len(header.classes), protocol, progress
    )
    seconds = round(time.perf_counter() - started, 1)
    return header.model_copy(update={**scores, "collapsed": collapsed, "seconds": seconds})


def result_header(
    recipe: Recipe,
    train: ShardReader,
    test: ShardReader,
    protocol: Protocol,
    trunk: Trunk,
    commit: Commit | None = None,
) -> Evaluation:
    """Return an evaluation without scores: checkpoint, weights, data and protocol."""
    classes = check_labels(train, test)
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
        protocol=applied(protocol, recipe),
    )


def applied(protocol: Protocol, recipe: Recipe) -> ProbeSettings:
    """Return the protocol as it is applied to a recipe's trunk."""
    return ProbeSettings(**as_json(protocol), resize=recipe.eval.resize, crop=recipe.eval.crop)


def evaluate_run(
    uri: str, train_data: str, test_data: str, progress: Callable[[str], None] = lambda text: None
) -> Evaluation:
    """Evaluate a run's newest checkpoint, or the one named, into its `eval.json`; keep a result for the same."""
    run = Run.at(uri)
    before = _kept_evaluation(run, train_data, test_data)
    if before:
        locations = {"train_uri": open_storage(train_data).uri, "test_uri": open_storage(test_data).uri}
        result = before.model_copy(update=locations)
        if result != before:
            run.save_evaluation(result)
        return result
    run.require_writable()
    result = evaluate(run, train_data, test_data, progress=progress)
    run.save_evaluation(result)
    return result


def _kept_evaluation(run: Run, train_data: str, test_data: str) -> Evaluation | None:
    """Return the run's evaluation if it is of the same checkpoint, data, protocol and section `eval`."""
    commit = run.commit()
    digests = [Manifest.load(open_storage(uri)).digest for uri in (train_data, test_data)]
    try:
        before = run.evaluation()
    except StorageError as error:
        logs.warn(f"evaluated again: {error.what}")
        return None
    if before is None or not before.pretrained:
        return None
    same = [before.checkpoint, before.commit, before.train_data, before.test_data]
    settings = before.protocol.model_dump(mode="json")
    own = applied(FAST, run.recipe()).model_dump(mode="json")
    return before if same == [commit.name, commit.sha256, *digests] and settings | own == settings else None
