"""The language of docstrings, comments, messages and documents: the words of docs/glossary.md."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for room in ("pirl", "components", "pipelines") for path in (ROOT / room).rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TURNS = {  # a turn -> the field's word
    r"\b(tell|tells|told|telling)\b": "print, log, return, report",
    r"\b(say|says|said|saying)\b": "print, log, return, report",
    r"\b(is|are|was|were) none\b|\bthat (is|are) no\b|\bno numbers?\b": "NaN or infinity; is not a ...",
    r"\bis no (?!longer\b|more\b)[a-z]+": "is not a ...",
    r"\b(go|goes|going|went|gone) on\b": "continue, resume",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again",
    r"\bin vain\b": "without success; timed out",
    r"\bwhoever\b|\bwho (hangs?|asks?|reads?|watch(es)?|starts?|writes?|calls?|has|waits?)\b": "that noun",
    r"\bhopeless\b": "permanent",
    r"\b(is|are|was|were|be|been) away\b": "unavailable",
    r"\bbeing left\b": "evicted",
    r"\bthousand million\b": "one billion",
    r"\bbeside\b": "next to, compared with",
    r"\bright to write\b": "lease",
    r"\bnothing to do\b": "no-op, up to date",
    r"\A(What|Who|Where|Whether)\b(?!.*\?)": "a noun phrase or an imperative",
}
NAMES = set(re.findall(r"\w+", "found told known wanted ours theirs mine there here look looks asked about"))


def names_of_module(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every variable, field, parameter, function and class that a module defines."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name


def wrong_names(source: str) -> list[str]:
    """Return `line: name` of every name with a word that says nothing of its value."""
    names = set(names_of_module(source))
    return [f"{line}: {name}" for line, name in sorted(names) if NAMES & set(name.lower().split("_"))]


def texts_of_module(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every comment and of every string that contains a blank: docstrings and messages."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#: ")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value.strip()


def texts_of_document(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every line outside of code blocks."""
    inside = False
    for number, line in enumerate(source.splitlines(), 1):
        inside ^= line.startswith("```")
        if not inside:
            yield number, re.sub(r"`[^`]*`", "`", line).strip()


def turns(path: Path) -> list[str]:
    """Return one line for each turn in a file."""
    texts = texts_of_module if path.suffix == ".py" else texts_of_document
    return [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}: write {word}"
        for line, text in texts(path.read_text())
        for pattern, word in TURNS.items()
        for match in re.finditer(pattern, text)
    ]


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_are_the_glossarys(path: Path) -> None:
    assert turns(path) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('"""What a run says."""', 2),
        ("x = 1  # numbers that are none", 1),
        ("raise ValueError('the rank who hangs is told')", 2),
        ("name = 'told'", 0),
        ('"""Return the ranks that stalled."""', 0),
    ],
)
def test_turns_are_counted(text: str, count: int) -> None:
    assert sum(len(re.findall(pattern, part)) for _, part in texts_of_module(text) for pattern in TURNS) == count


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_nouns_of_the_field(path: Path) -> None:
    assert wrong_names(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("found = 1", 1),
        ("def look(rows_wanted): ...", 2),
        ("class Ours:\n    theirs: int = 0", 2),
        ("self.told = [x for known in y]", 2),
        ("result = found(founder)", 0),
    ],
)
def test_wrong_names_are_counted(source: str, count: int) -> None:
    assert len(wrong_names(source)) == count
