"""The order in which an epoch visits the rows: any part of it by itself, a pure function of (seed, epoch, rows).

`permutation` is a keyed permutation of 0..N-1 (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
2002). A place p < N is written as two digits, p = high * right + low; each round of a Feistel network adds a keyed hash
of one digit to the other; a result that is not below N goes through the network again (cycle walking). With
left = ceil(sqrt(N)) there are fewer than N + left values, so that about one place in sqrt(N) walks. A part of the order
costs as much at any N, and the inverse network gives the place of a row.

`sorted`, the order of version 0.1, sorts N random keys.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np

from .views import philox4x32, uniforms

OrderKind = Literal["sorted", "permutation"]

SORT_STREAM = 250  # of the counter-based random numbers; the views use small stream numbers
PERMUTATION_STREAM = 253
ROUNDS = 10  # as many as the standard for small domains has (NIST SP 800-38G, FF1)
MOST_ROWS = 2**62

_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class EpochOrder(ABC):
    """The order of one epoch."""

    rows: int

    def __len__(self) -> int:
        return self.rows

    @abstractmethod
    def part(self, start: int, stop: int) -> np.ndarray:
        """Return the rows at the places `start` to `stop` - 1, int64, read-only; the last part may be shorter."""


def open_order(kind: OrderKind, seed: int, epoch: int, rows: int) -> EpochOrder:
    """Return the order of an epoch over `rows` rows."""
    return (KeyedPermutation if kind == "permutation" else SortedKeys)(seed, epoch, rows)


class SortedKeys(EpochOrder):
    """The order of version 0.1, which holds and sorts N keys."""

    def __init__(self, seed: int, epoch: int, rows: int) -> None:
        self.rows = rows
        self.order = epoch_order(seed, epoch, rows)

    def part(self, start: int, stop: int) -> np.ndarray:
        return self.order[start:stop]


class KeyedPermutation(EpochOrder):
    """A Feistel network with cycle walking over [0, rows)."""

    def __init__(self, seed: int, epoch: int, rows: int) -> None:
        if not 0 < rows <= MOST_ROWS:
            raise ValueError(f"no order of {rows} rows")
        self.rows = rows
        left = math.isqrt(rows - 1) + 1
        self.left, self.right = np.uint64(left), np.uint64(-(-rows // left))
        self.keys = _round_keys(seed, epoch)

    def part(self, start: int, stop: int) -> np.ndarray:
        rows = self.at(np.arange(start, min(stop, self.rows), dtype=np.int64))
        rows.flags.writeable = False
        return rows

    def at(self, places: np.ndarray) -> np.ndarray:
        """Return the rows at `places` (n,) int64."""
        return self._walk(places, self._forward)

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Return the places of `rows` (n,) int64: the inverse of `at`."""
        return self._walk(rows, self._backward)

    def _walk(self, values: np.ndarray, network: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        out = network(values.astype(np.uint64))
        while len(outside := np.flatnonzero(out >= self.rows)):
            out[outside] = network(out[outside])
        return out.astype(np.int64)

    def _forward(self, values: np.ndarray) -> np.ndarray:
        high, low = np.divmod(values, self.right)
        for number, key in enumerate(self.keys):
            if number % 2:
                low = (low + _mix(high, key) % self.right) % self.right
            else:
                high = (high + _mix(low, key) % self.left) % self.left
        return high * self.right + low

    def _backward(self, values: np.ndarray) -> np.ndarray:
        high, low = np.divmod(values, self.right)
        for number, key in reversed(list(enumerate(self.keys))):
            if number % 2:
                low = (low + self.right - _mix(high, key) % self.right) % self.right
            else:
                high = (high + self.left - _mix(low, key) % self.left) % self.left
        return high * self.right + low


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """Return the order of version 0.1, (rows,) int64, read-only: the rows sorted by a random key each."""
    keys = uniforms(seed, epoch, np.arange(rows), SORT_STREAM, 1)[:, 0]
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """Return the keys of the rounds, (ROUNDS,) uint64, by Philox at (round, 0, epoch, stream) under the seed."""
    counter = np.zeros((ROUNDS, 4), np.uint32)
    counter[:, 0] = np.arange(ROUNDS)
    counter[:, 2] = epoch & 0xFFFFFFFF
    counter[:, 3] = (epoch >> 32 << 16) + (PERMUTATION_STREAM << 8)
    words = philox4x32(counter, np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32)).astype(np.uint64)
    return words[:, 0] << np.uint64(32) | words[:, 1]


def _mix(digits: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return a hash of each digit, uint64: the output function of SplitMix64 (Steele et al., OOPSLA 2014)."""
    mixed = digits + key  # modulo 2^64
    mixed = (mixed ^ mixed >> _SHIFTS[0]) * _FACTORS[0]
    mixed = (mixed ^ mixed >> _SHIFTS[1]) * _FACTORS[1]
    return mixed ^ mixed >> _SHIFTS[2]
