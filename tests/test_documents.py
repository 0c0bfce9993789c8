"""Length of the documents and of their sentences."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs and list items of a document, each on one line: no code, tables, headings and pictures."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<=\n\n)( {4}.*\n)+", "", text)  # a block of code by indentation
    text = re.sub(r"^(#|\||!\[).*$", "", text, flags=re.MULTILINE)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text) if part.strip()]


def sentence_lengths(text: str) -> list[int]:
    """Return the number of words of each sentence; code and the address of a link are one word and none."""
    lengths = []
    for paragraph in paragraphs(text):
        plain = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]+`", "Code", paragraph))
        sentences = re.split(r"(?<=[.!?])[\"')*\]]*\s+(?=[\"'(*\[]*[A-Z0-9±])", re.sub(r"^([-*]|\d+\.) ", "", plain))
        lengths += [sum(any(map(str.isalnum, word)) for word in sentence.split()) for sentence in sentences]
    return [length for length in lengths if length]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_sentences_have_at_most_20_words_on_average(path: Path) -> None:
    assert mean(sentence_lengths(path.read_text())) <= 20


def test_the_readme_has_less_than_900_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 900


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("One sentence of five words. And one with a [link](https://host/a b) and `code --here`.\n", [5, 7]),
        ("# A heading\n\nText that is\nwrapped once.\n\n| a | table |\n|---|---|\n", [5]),
        ("```sh\npirl doctor\n```\n\nThe command:\n\n    kubectl get pods\n    kubectl get jobs\n\nIts end.\n", [2, 2]),
        (
            "- One item. Two sentences.\n- **Bold.** A second item,\n  wrapped, of 3.5 lines.\n1. End\n",
            [2, 2, 1, 7, 1],
        ),
    ],
)
def test_sentences_are_counted(text: str, lengths: list[int]) -> None:
    assert sentence_lengths(text) == lengths
