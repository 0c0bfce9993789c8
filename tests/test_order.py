"""The keyed permutation: exact at any number of rows, computable in parts, without a pattern."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from conftest import tiny_recipe

from pirl.config import Recipe, parse_recipe
from pirl.data import epoch_shares
from pirl.errors import ConfigError
from pirl.order import KeyedPermutation, OrderKind, open_order
from pirl.world import World

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 97, 1023, 1024, 1025, 65_537, 1_000_000]
GOLDEN = [8, 15, 17, 2, 10, 1, 0, 4, 16, 11, 6, 19, 3, 13, 18, 7, 14, 9, 5, 12]
GOLDEN_LARGE = [503037071560, 177662978746, 371523658759]
LARGE = [2**32 + 1, 10**9, 10**12, 2**62]


@pytest.mark.parametrize("rows", SIZES)
def test_every_row_has_one_place(rows: int) -> None:
    order = KeyedPermutation(3, 5, rows)
    whole = order.part(0, rows)
    assert whole.dtype == np.int64
    assert np.array_equal(np.sort(whole), np.arange(rows))
    assert np.array_equal(order.places(whole), np.arange(rows))


@pytest.mark.parametrize("rows", LARGE)
def test_parts_of_large_orders_have_an_inverse(rows: int) -> None:
    order = KeyedPermutation(2**63 - 1, 2**40, rows)
    starts = [0, rows // 3, rows - 1000]
    parts = np.concatenate([order.part(start, start + 1000) for start in starts])
    assert len(set(parts.tolist())) == 3000
    assert 0 <= parts.min() <= parts.max() < rows
    assert np.array_equal(order.places(parts), np.concatenate([np.arange(start, start + 1000) for start in starts]))
    middle = parts.astype(np.float64).mean() / rows
    assert abs(middle - 0.5) < 5 * math.sqrt(1 / 12 / 3000)


@pytest.mark.parametrize("kind", ["sorted", "permutation"])
def test_any_part_agrees_with_the_whole(kind: OrderKind) -> None:
    order = open_order(kind, 7, 2, 1000)
    whole = order.part(0, 1000)
    assert len(order) == len(whole) == 1000
    for start, stop in [(0, 1), (17, 17), (17, 600), (999, 1000), (990, 2000)]:
        assert np.array_equal(order.part(start, stop), whole[start:stop])
    with pytest.raises(ValueError, match="read-only"):
        order.part(0, 10)[0] = 3


def plain_permutation(keys: list[int], rows: int, place: int) -> int:
    """Feistel network and cycle walking in plain Python."""

    def mix(digit: int, key: int) -> int:
        value = (digit + key) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    left = math.isqrt(rows - 1) + 1
    right = -(-rows // left)
    while True:
        high, low = divmod(place, right)
        for number, key in enumerate(keys):
            if number % 2:
                low = (low + mix(high, key)) % right
            else:
                high = (high + mix(low, key)) % left
        place = high * right + low
        if place < rows:
            return place


@pytest.mark.parametrize("rows", [1, 10, 1000, 10**12])
def test_the_network_in_plain_python(rows: int) -> None:
    order = KeyedPermutation(4, 9, rows)
    stop = min(rows, 50)
    keys = [int(key) for key in order.keys]
    assert len(set(keys)) == 10
    assert order.part(0, stop).tolist() == [plain_permutation(keys, rows, place) for place in range(stop)]


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run would repeat and skip images."""
    assert KeyedPermutation(0, 0, 20).part(0, 20).tolist() == GOLDEN
    assert KeyedPermutation(7, 2**33, 10**12).part(5, 8).tolist() == GOLDEN_LARGE


def chi_square(counts: np.ndarray, expected: float) -> float:
    """Return chi-square over its degrees of freedom: about 1 for uniform counts."""
    return float(((counts - expected) ** 2 / expected).sum() / (counts.size - 1))


@pytest.mark.parametrize("rows", [10, 33, 100])
def test_rows_places_and_neighbours_are_uniform_over_epochs(rows: int) -> None:
    epochs = 4000
    orders = np.stack([KeyedPermutation(1, epoch, rows).part(0, rows) for epoch in range(epochs)])
    places = np.stack([np.bincount(orders[:, place], minlength=rows) for place in range(rows)])
    assert chi_square(places, epochs / rows) == pytest.approx(1, abs=6 * math.sqrt(2 / (rows - 1) ** 2) + 0.02)
    steps = np.bincount((np.diff(orders, axis=1) % rows).ravel(), minlength=rows)[1:]  # neither fixed strides
    assert chi_square(steps, epochs * (rows - 1) / (rows - 1)) < 1 + 6 * math.sqrt(2 / (rows - 2))
    between = np.bincount(((orders[1:] - orders[:-1]) % rows).ravel(), minlength=rows)  # nor shifts between epochs
    assert chi_square(between, (epochs - 1)) < 1 + 6 * math.sqrt(2 / (rows - 1))


def test_all_orders_of_a_few_rows_come_equally_often() -> None:
    epochs = 2400
    counts = Counter(tuple(KeyedPermutation(1, epoch, 4).part(0, 4).tolist()) for epoch in range(epochs))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert chi_square(np.array(list(counts.values())), epochs / 24) < 1 + 6 * math.sqrt(2 / 23)


def test_epochs_and_seeds_have_unrelated_orders() -> None:
    rows = 100_000
    first = KeyedPermutation(0, 0, rows).part(0, rows)
    for seed, epoch in [(0, 1), (1, 0), (2**62, 0), (0, 2**40)]:
        other = KeyedPermutation(seed, epoch, rows).part(0, rows)
        assert (first == other).sum() < 12  # one at the mean, as for any two random orders
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / math.sqrt(rows)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / math.sqrt(rows)


def test_every_row_once_on_any_ranks_and_from_any_cursor() -> None:
    recipe = tiny_recipe("train.batch_size=9", "train.order=permutation")
    expected = KeyedPermutation(recipe.train.seed, 3, 100).part(0, 100)
    for size, start in itertools.product([1, 2, 7], [0, 9, 99]):
        shares = [list(epoch_shares(recipe, 100, 3, World(rank, size), start)) for rank in range(size)]
        seen = [
            np.concatenate([share.rows[: share.counts[rank]] for rank, share in enumerate(step)])
            for step in zip(*shares)
        ]
        batches = [expected[first : first + 9] for first in range(start, 100, 9)]
        assert [sorted(rows.tolist()) for rows in seen] == [sorted(batch.tolist()) for batch in batches]


def test_a_batch_of_a_billion_rows_costs_no_memory() -> None:
    recipe = tiny_recipe("train.batch_size=1024", "train.order=permutation")
    tracemalloc.start()
    share = next(epoch_shares(recipe, 10**9, 4, World(3, 8), start=1024 * 500_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(share.rows) == 128
    assert peak < 2**20


def test_a_recipe_of_0_1_keeps_the_sorted_order() -> None:
    old = tiny_recipe()
    assert old.train.order == "sorted"
    assert old.digest() == tiny_recipe("train.order=sorted").digest() != tiny_recipe("train.order=permutation").digest()
    assert len(tiny_recipe("train.order=permutation").digests()) == 1  # version 0.1 had no such recipe
    text = "\n".join(line for line in old.to_toml().splitlines() if not line.startswith("order"))
    assert parse_recipe(text) == old
    assert Recipe.model_validate(old.model_dump()).digests() == old.digests()
    with pytest.raises(ConfigError, match="order"):
        tiny_recipe("train.order=random")
