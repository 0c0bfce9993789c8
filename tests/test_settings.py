"""Items of settings: what is joined is split again, and what is not one value is refused."""

from __future__ import annotations

import random

import pytest

from pirl.errors import ConfigError
from pirl.settings import join_items, json_value, read_items, split_items

PIECES = ["a", "=", " ", "'", '"', "[", "]", "{", "}", ",", "\\", "#", "-", "é", ".", "3", "\t", "$", "*"]


def test_what_is_joined_is_split_again() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        items = ["".join(rng.choices(PIECES, k=rng.randint(1, 8))) for _ in range(rng.randint(0, 4))]
        assert split_items(join_items(items)) == items


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("", []),
        ("  train.epochs=3   loss.kind=nce ", ["train.epochs=3", "loss.kind=nce"]),
        ("views.image_scale=[0.3, 1.0] a=1", ["views.image_scale=[0.3, 1.0]", "a=1"]),
        ('model.head="mlp" name="two words"', ['model.head="mlp"', 'name="two words"']),
        ("'name=two words' a=1", ["name=two words", "a=1"]),
        ('env={"A": "b ] c"} nodes=4', ['env={"A": "b ] c"}', "nodes=4"]),
        ("""env='{"A": "b c"}' nodes=4""", ['env={"A": "b c"}', "nodes=4"]),
        ("a=['x y', \"it's\"]", ["a=['x y', \"it's\"]"]),
        ('a="\\" b" c=1', ['a="\\" b"', "c=1"]),
    ],
)
def test_blanks_within_brackets_and_quotes_belong_to_the_item(text: str, items: list[str]) -> None:
    assert split_items(text) == items


@pytest.mark.parametrize("text", ["a=[1, 2", "a='x", 'a="x', "a={", "'a=1"])
def test_what_is_not_closed_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not closed"):
        split_items(text)


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        (["a"], "not of the form"),
        (["=1"], "not of the form"),
        (["a=1\nb=2"], "line break"),
        (["a=1", "a=2"], "a is given twice"),
        (['a={"x": 1, "x": 2}'], "'x' is given twice"),
    ],
)
def test_items_that_are_refused(items: list[str], problem: str) -> None:
    _, problems = read_items(items, json_value, "name=value")
    assert problem in "".join(problems)
