"""The members of tar files -> samples: which image belongs to which label.

A sample is what the WebDataset convention makes it: neighbours whose names agree up to the first dot; it ends where the
name changes or one of its parts (the name from the first dot on) comes again. Parts of one name that lie apart are one
sample where no part comes twice. Names with dots (`scan.000.jpg`, `scan.000.cls`) are paired up to their last dot.
Where several images could be meant, the source is refused with two of their names and the option that decides.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pirl.errors import UsageError
from pirl.shards.filter import not_an_image

EACH = "each"
DEFAULT_LABEL = "cls"
NAMES_A_TAR = 100  # of companions that are named one by one; more are named by a pattern


class Member(NamedTuple):
    """A regular file in a tar file: where its bytes lie, whether it is an image, its text where it may be a label."""

    name: str
    offset: int
    size: int
    image: bool
    text: str | None = None

    @property
    def key(self) -> str:
        """The name up to the first dot of the file: what the members of a WebDataset sample share."""
        folder, slash, file = self.name.rpartition("/")
        return f"{folder}{slash}{file.partition('.')[0]}"

    @property
    def part(self) -> str:
        """The rest, in lower case: "jpg", "mask.png"."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()

    @property
    def stem(self) -> str:
        """The name up to the last dot of the file."""
        folder, slash, file = self.name.rpartition("/")
        return f"{folder}{slash}{file.rpartition('.')[0] or file}"


class Sample(NamedTuple):
    """An image in a tar file, with the text of its label."""

    name: str
    offset: int
    size: int
    label: str | None


class Parts(NamedTuple):
    """The parts of a sample that the user has chosen: `image` empty for the only one, `label` empty for `.cls`."""

    image: str = ""
    label: str = ""

    @property
    def label_part(self) -> str:
        """The part that holds the label: "cls", or "json" of `json:KEY`."""
        return self.label.partition(":")[0].lower().lstrip(".") or DEFAULT_LABEL

    @property
    def image_part(self) -> str:
        """The part that is the image."""
        return self.image.lower().lstrip(".")

    def text(self, member: Member) -> str:
        """Return the label that a member of `label_part` holds."""
        text = member.text or ""
        if self.label_part == "json":
            text = _json_label(text, self.label.partition(":")[2] or "label", member.name)
        if not text.strip():
            raise UsageError(f"the label {member.name} is empty", "give every image a label, or none")
        return text.strip()


WHOLE = Parts()  # samples of one image


@dataclass
class Grouped:
    """The samples of one tar file, in its order, and what of it is left out: (reason, name, files)."""

    samples: list[Sample]
    left_out: list[tuple[str, str, int]] = field(default_factory=list)
    words: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of unlabelled names with dots: the word between key and suffix -> (key, name). No word may have two keys."""


def group_samples(members: Sequence[Member], parts: Parts) -> Grouped:
    """Return the samples of one tar file. UsageError naming two members where what belongs together is ambiguous."""
    candidates = _candidates(members)
    grouped = Grouped([])
    used: set[int] = set()  # offsets
    for candidate in candidates:
        images = _images(candidate, parts, grouped.words)
        for image in images:
            label = _label_of(image, candidate, parts)
            used |= {image.offset} | ({label.offset} if label else set())
            grouped.samples.append(
                Sample(image.name, image.offset, image.size, parts.text(label) if label is not None else None)
            )
    grouped.samples.sort(key=lambda sample: sample.offset)
    grouped.left_out = list(_rest(members, used, candidates, parts))
    return grouped


def check_words(groups: Iterable[Grouped]) -> None:
    """Raise UsageError where names with dots are parts of samples (`0.rgb.png`, `0.depth.png`), over several tars."""
    words: dict[str, tuple[str, str]] = {}
    for group in groups:
        for word, (key, name) in group.words.items():
            first_key, first = words.setdefault(word, (key, name))
            if first_key != key:
                part = name.rpartition("/")[2].partition(".")[2].lower()
                raise _ambiguous(f"the samples {first_key} and {key}", first, name, [part])


def _candidates(members: Sequence[Member]) -> list[dict[str, Member]]:
    """Return runs of neighbours with one key and no part twice; those of one key that fit together are one."""
    runs: list[dict[str, Member]] = []
    by_key: dict[str, list[int]] = defaultdict(list)
    key = None
    for member in members:
        if member.key != key or member.part in runs[-1]:
            key = member.key
            by_key[key].append(len(runs))
            runs.append({})
        runs[-1][member.part] = member
    for numbers in by_key.values():
        if len(numbers) > 1:
            together = {part: member for number in numbers for part, member in runs[number].items()}
            if len(together) == sum(len(runs[number]) for number in numbers):
                for number in numbers:
                    runs[number] = {}
                runs[numbers[0]] = together
    return [run for run in runs if run]


def _images(candidate: dict[str, Member], parts: Parts, words: dict[str, tuple[str, str]]) -> list[Member]:
    """Return the members of a candidate that are images of samples; more than one only where names have dots."""
    images = [member for member in candidate.values() if member.image]
    if parts.image_part and parts.image_part != EACH:
        if parts.image_part in candidate:
            return [candidate[parts.image_part]]
        return [member for part, member in candidate.items() if part.endswith(f".{parts.image_part}")]
    if len(images) < 2 or parts.image_part == EACH:
        return images
    several = [member.part for member in images]
    first, second = images[:2]
    stems = {member.stem for member in images}
    plain = any("." not in part for part in several)
    if plain or parts.label_part in candidate or len(stems) < len(images):
        raise _ambiguous(f"the sample {first.key}", first.name, second.name, several)
    if not any(_label_of(member, candidate, parts) for member in images):
        _check_words(images, words)
    return images


def _check_words(images: list[Member], words: dict[str, tuple[str, str]]) -> None:
    """Raise UsageError where a word between key and suffix comes again for another key: then it names a part."""
    for member in images:
        word = member.part.rpartition(".")[0]
        if word.replace(".", "").replace("_", "").replace("-", "").isdecimal():
            continue
        key, name = words.setdefault(word, (member.key, member.name))
        if key != member.key:
            raise _ambiguous(f"the samples {key} and {member.key}", name, member.name, [m.part for m in images])


def _ambiguous(where: str, first: str, second: str, several: list[str]) -> UsageError:
    choices = ", ".join(f"`image`={part}" for part in dict.fromkeys(several[:3]))
    return UsageError(
        f"{where}: several images, {first} and {second}, expected one image a sample",
        f"choose the part that is the image by {choices}, or take every one by `image`={EACH}",
    )


def _label_of(image: Member, candidate: dict[str, Member], parts: Parts) -> Member | None:
    """Return the label of the image's own name up to the last dot, or else of the whole sample."""
    middle = image.part.rpartition(".")[0]
    own = candidate.get(f"{middle}.{parts.label_part}") if middle else None
    return own or candidate.get(parts.label_part)


def _rest(
    members: Sequence[Member], used: set[int], candidates: list[dict[str, Member]], parts: Parts
) -> Iterable[tuple[str, str, int]]:
    """Yield the members outside of samples, with the reason. UsageError for a label that is not next to its image."""
    keys = {member.key for member in members if member.image}
    stems = {member.stem for member in members if member.image}
    companions: dict[str, list[str]] = defaultdict(list)
    without_image = _labels_without_part(candidates, used, parts)
    for member in members:
        if member.offset in used:
            continue
        lone_label = member.part == parts.label_part or member.part.endswith(f".{parts.label_part}")
        if member.offset in without_image:
            yield f"a label of a sample without the part {parts.image_part}", member.name, 1
        elif lone_label and (member.stem in stems or (member.part == parts.label_part and member.key in keys)):
            twin = next(m.name for m in members if m.image and member.key == m.key)
            raise UsageError(
                f"the label {member.name} and the image {twin} have one name, but do not lie side by side",
                "names come again in this tar file: write each image and its label one after the other",
            )
        elif member.image:
            yield f"another part of a sample ({member.part or 'no suffix'})", member.name, 1
        else:
            companions[_companion(member, lone_label, parts)].append(member.name)
    for reason, names in companions.items():
        if len(names) <= NAMES_A_TAR:
            yield from ((reason, name, 1) for name in names)
        else:
            for suffix, count in Counter(name.rpartition(".")[2] for name in names).items():
                yield reason, f"*.{suffix}", count


def _labels_without_part(candidates: list[dict[str, Member]], used: set[int], parts: Parts) -> set[int]:
    """Return the offsets of the labels of samples that lack the image part that the user has chosen."""
    if parts.image_part in ("", EACH):
        return set()
    labels = [candidate.get(parts.label_part) for candidate in candidates if not used & _offsets(candidate)]
    return {label.offset for label in labels if label}


def _offsets(candidate: dict[str, Member]) -> set[int]:
    return {member.offset for member in candidate.values()}


def _companion(member: Member, lone_label: bool, parts: Parts) -> str:
    if lone_label:
        return f"a label without an image (.{member.part})"
    suffix = member.part.rpartition(".")[2]
    if suffix == "json" and parts.label_part != "json":
        return ".json next to images, whose labels `label`=json:KEY reads"
    if suffix == DEFAULT_LABEL:
        return f"a label that `label`={member.part} reads"
    return not_an_image(member.name)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; ValueError for a key that comes twice, as one of its values would be lost."""
    if twice := [key for key, number in Counter(key for key, _ in pairs).items() if number > 1]:
        raise ValueError(f"the key {twice[0]!r} comes twice")
    return dict(pairs)


def _json_label(text: str, key: str, name: str) -> str:
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the label {name} is not JSON: {error}", "repair it, or choose another `label`") from None
    if not isinstance(value, dict) or key not in value:
        held = f"it has {', '.join(map(str, value))[:200]}" if isinstance(value, dict) else "it is not an object"
        raise UsageError(f"the label {name} has no key {key!r}: {held}", "choose the key by `label`=json:KEY")
    label = value[key]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise UsageError(
            f"the label {name} is {label!r}, expected a whole number or a text", "choose the key by `label`=json:KEY"
        )
    return str(label)
