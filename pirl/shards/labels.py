"""Labels of a source: from texts, from folders; checks of its classes, and their summary for the user."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from pirl.errors import DataError, UsageError
from pirl.text import count

MAX_CLASSES = 1_000_000
SHOWN = 5  # names in a message
SPLITS = frozenset(
    [
        "train",
        "training",
        "trainval",
        "val",
        "valid",
        "validation",
        "dev",
        "test",
        "testing",
        "eval",
        "evaluation",
        "holdout",
    ]
)


def check_class(name: str) -> None:
    """Raise UsageError unless `name` can be written into our files."""
    if not name.isprintable():  # also the surrogates of a name that is not UTF-8, which JSON files cannot carry
        raise UsageError(f"the class name {name!r} has characters that cannot be written", "rename the class")


def numbered(given: list[str], where: str) -> tuple[np.ndarray, list[str]]:
    """Return labels, written as class indices or names, as indices, int64 (N,), and the classes."""
    if all(label.isascii() and label.isdecimal() for label in given):
        indices = np.array([int(label[:20]) for label in given], dtype=object)
        if indices.max() >= MAX_CLASSES:
            raise UsageError(f"{where}: class index {indices.max()} is not below {MAX_CLASSES:,}", "number from 0 on")
        if len(set(given)) != len(set(indices)):
            one, other = _same_number(given)
            raise UsageError(f"{where}: the labels {one!r} and {other!r} are one number", "write each label in one way")
        return indices.astype(np.int64), [str(i) for i in range(int(indices.max()) + 1)]
    classes = sorted(set(given))
    for name in classes:
        check_class(name)
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[label] for label in given], np.int64), classes


def _same_number(given: Iterable[str]) -> tuple[str, str]:
    """Return two different texts of one number."""
    texts: dict[int, str] = {}
    return next((texts[int(text)], text) for text in given if texts.setdefault(int(text), text) != text)


def by_folder(names: Sequence[str], where: str) -> tuple[np.ndarray | None, list[str] | None]:
    """Return labels, int64 (N,), and classes by the first folder of each name; None where all lie on top."""
    tops = [top_folder(name) for name in names]
    classes = sorted(set(tops) - {""})
    if not classes:
        return None, None
    if "" in tops:
        raise UsageError(
            f"{where} mixes images ({names[tops.index('')]!r}, ...) with classes ({classes[0]!r}, ...)",
            "give a place with one kind only: images, or images below one name per class",
        )
    for name in classes:
        check_class(name)
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[top] for top in tops], np.int64), classes


def top_folder(name: str) -> str:
    """Return the first folder of a name, empty where it lies in none."""
    return name.partition("/")[0] if "/" in name else ""


def check_level(names: Sequence[str], classes: Sequence[str], where: str, place: str = "") -> list[str]:
    """Raise UsageError where the class folders are the splits of a data set (train, val ...), so one level too high.

    `place` is where they lie, for the hint. Returns notes: a warning where all class folders hold the same folders,
    whatever their names are.
    """
    named = [name for name in classes if name.lower() in SPLITS]
    splits = len(named) == len(classes)
    below: dict[str, set[str]] = defaultdict(set)
    for name in names:
        top, _, rest = name.partition("/")
        if "/" in rest:
            below[top].add(rest.partition("/")[0])
        elif not splits and len(named) < 2:
            return []  # a class with images of its own: the usual case, decided by the first name
    inner = sorted(set.intersection(*below.values())) if len(below) > 1 else []
    same = f"{', '.join(sorted(below))} hold the same folders ({listed(inner)})"
    if splits and (len(classes) > 1 or any(len(folders) > 1 for folders in below.values())):
        train = next((name for name in classes if name.lower().startswith("train")), classes[0])
        raise UsageError(
            f"the class folders of {where} are splits of a data set: {listed(classes)}, expected one folder a class"
            + (f"; {same}" if inner else ""),
            f"give one split: {place}/{train}" if place else "give the images of one split only",
        )
    if len(inner) > 1 and all(folders == set(inner) for folders in below.values()):
        return [f"{same}: if those are the classes, give the folder one level below"]
    return []


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many there are more."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def class_summary(labels: np.ndarray | None, classes: Sequence[str] | None, images: int) -> list[str]:
    """Return lines: the number of images and classes, the first names, images a class, and classes without an image."""
    if labels is None or classes is None:
        return [f"{count(images, 'image')} without labels"]
    per_class = np.bincount(labels[labels >= 0], minlength=len(classes))
    least, middle, most = int(per_class.min()), float(np.median(per_class)), int(per_class.max())
    lines = [
        f"{count(images, 'image')}, {count(len(classes), 'class', 'classes')}: {listed(list(classes))}; "
        f"images a class: least {least:,}, median {middle:,g}, most {most:,}"
    ]
    if alike := _alike(classes):
        lines.append(f"classes whose names differ in case, blanks or Unicode form only: {listed(alike)}")
    if empty := [name for name, number in zip(classes, per_class) if not number]:
        lines.append(f"{count(len(empty), 'class', 'classes')} without an image: {listed(empty)}")
    return lines


def _alike(names: Sequence[str]) -> list[str]:
    """Return the names that look like another one, as they are written in Python."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups["".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    return [ascii(name) for group in groups.values() if len(group) > 1 for name in group]


def untested_notes(classes: Sequence[str]) -> list[str]:
    """Return a note on the classes without a test image, none where every class has one."""
    return [f"{count(len(classes), 'class', 'classes')} without a test image: {listed(classes)}"] if classes else []


def match_classes(
    train: Sequence[str], test: Sequence[str], held: Iterable[int], where: str
) -> tuple[list[int], list[str]]:
    """Match the classes of a test set with those of its training set by name.

    `held` are the test classes that have an image. Returns the training index of each test class (-1: none) and the
    training classes without a test image. DataError naming the test classes that training does not have.
    """
    index = {name: number for number, name in enumerate(train)}
    numbers = [index.get(name, -1) for name in test]
    present = sorted(set(held))
    unknown = [test[number] for number in present if numbers[number] < 0]
    if unknown:
        alike = _alike([*train, *unknown])
        raise DataError(
            f"{where} has {count(len(unknown), 'class', 'classes')} that training does not have: {listed(unknown)}; "
            f"the training images have {listed(list(train))}",
            f"give these one name in both: {listed(alike)}"
            if alike
            else "leave the class out of the test images, or train with it",
        )
    names_present = {test[number] for number in present}
    return numbers, [name for name in train if name not in names_present]
