"""A text file that lists images, with or without labels, as a source."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Sequence
from pathlib import Path

from pirl.errors import DataError, UsageError
from pirl.shards.filter import HIDDEN, SYSTEM_NAMES, LeftOut, is_hidden
from pirl.shards.labels import numbered
from pirl.shards.place import shown_path
from pirl.shards.sources import FileSource

PROBED = 20  # lines whose files decide in which form the list is
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def list_source(path: Path) -> FileSource:
    """Return the images of a text file with one image a line: `path`, `path<TAB>label`, or Caffe's `path label`.

    Paths are relative to the list's folder. Labels are class names, or class indices when each of them is a number.
    """
    lines = [(number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} lists no image", "write one path a line, or path<TAB>label")
    rows = _rows(lines, path)
    slashes = _as_files([name for name, _ in rows], path.parent)
    names: list[str] = []
    kept: list[int] = []
    left_out = LeftOut()
    for row, name in enumerate(slashes):
        if _is_left_out(name):
            left_out.add(HIDDEN, name)
        else:
            names.append(name)
            kept.append(row)
    if not names:
        raise DataError(f"{path} lists no image; left out: {left_out}", "write one path a line, or path<TAB>label")
    labels, classes = numbered([label for _, label in rows], str(path)) if rows[0][1] else (None, None)
    kept_labels = None if labels is None else labels[kept]
    return FileSource(f"list {shown_path(path)}", path.parent, names, kept_labels, classes, left_out)


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check the permissions of the list") from None
    encoding = "utf-8"
    for mark, name in _MARKS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], name
            break
    try:
        text = data.decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not {encoding} text: {error.reason}", "save the list as UTF-8") from None
    if "\0" in text:
        raise UsageError(f"{path} is not UTF-8 text: it has bytes of zero", "save the list as UTF-8, one path a line")
    return re.split(r"\r\n|\n|\r", text)


def _rows(lines: Sequence[tuple[int, str]], path: Path) -> list[tuple[str, str]]:
    """Return (path, label) of each line, the label empty without one. UsageError for a line unlike the others."""
    tabs = "\t" in lines[0][1]
    caffe = not tabs and _is_caffe([line for _, line in lines[:PROBED]], path.parent)
    rows = []
    for number, line in lines:
        name, separator, label = line.rstrip().rpartition(" ") if caffe else line.partition("\t")
        if (not caffe and bool(separator) != tabs) or not name.strip() or (separator and not label.strip()):
            raise UsageError(
                f"{path}, line {number}: {line!r} is not like the lines before",
                "every line is `path`, or every line is `path<TAB>label`, or every line is `path label`",
            )
        rows.append((name.rstrip() if caffe else name, label.strip()))
    return rows


def _is_caffe(lines: Sequence[str], folder: Path) -> bool:
    """Return whether the lines are `path label`: no line is a file, and one is without its last word."""
    heads = [head for line in lines if (head := line.rstrip().rpartition(" ")[0].rstrip())]
    whole = any(_is_file(folder, name) for name in (*lines, *_replaced(lines)))
    return not whole and any(_is_file(folder, name) for name in (*heads, *_replaced(heads)))


def _as_files(names: Sequence[str], folder: Path) -> Sequence[str]:
    """Return the names with slashes for backslashes, or without outer blanks, where only such files exist."""
    for form in (_replaced, _stripped):
        probed = [pair for pair in zip(names, form(names)) if pair[0] != pair[1]][:PROBED]
        plain, changed = (any(_is_file(folder, pair[side]) for pair in probed) for side in (0, 1))
        if changed and not plain:
            return form(names)
    return names


def _stripped(names: Sequence[str]) -> list[str]:
    return [name.strip() for name in names]


def _replaced(names: Sequence[str]) -> list[str]:
    return [name.replace("\\", "/") for name in names]


def _is_file(folder: Path, name: str) -> bool:
    try:
        return os.path.isfile(os.path.join(folder, name))
    except ValueError:  # a name with a zero byte
        return False


def _is_left_out(name: str) -> bool:
    """Return whether a listed path is hidden or of a system.

    Hidden folders above an absolute path are the user's choice.
    """
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    if not parts:
        return False
    folders = parts[:-1] if not name.startswith("/") else [part for part in parts[:-1] if part.lower() in SYSTEM_NAMES]
    return is_hidden(parts[-1]) or any(is_hidden(part) for part in folders)
