"""Jumps in the sequence of torch's CPU generator, the Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998).

The state is a window of 624 words on a linear recurrence over GF(2) with the characteristic polynomial p of degree
19,937. With g(t) = t^J mod p, the word J places ahead is the sum of the words i places ahead over the terms t^i of g
(Haramoto et al., "Efficient jump ahead for F2-linear random number generators", 2008). Polynomials are the bits of
Python's integers.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

WORDS, MIDDLE, DEGREE = 624, 397, 19937
UPPER, LOWER, MATRIX = 0x80000000, 0x7FFFFFFF, 0x9908B0DF
# offsets in torch's state: seed, words left in the window, flag, next word; then the window, each word in 64 bits
LEFT, WINDOW = 8, 24
_SPREAD = tuple(sum((byte >> bit & 1) << 2 * bit for bit in range(8)).to_bytes(2, "little") for byte in range(256))


def jump(generator: torch.Generator, values: int) -> None:
    """Move a CPU generator that has only been seeded past its next `values` 32-bit words, one for each float32."""
    state = generator.get_state()
    fields = state.numpy()
    window = fields[WINDOW : WINDOW + 8 * WORDS].view(np.uint64)
    if fields[LEFT : LEFT + 4].view(np.int32)[0] != 1:
        raise ValueError("a generator that has been used cannot jump")
    window[:] = _window_ahead(window.astype(np.uint32), values)
    generator.set_state(state)


def _window_ahead(window: np.ndarray, values: int) -> np.ndarray:
    """Return the (624,) uint32 window that begins `values` words after `window`."""
    terms = np.frombuffer(_power(values).to_bytes(DEGREE // 8 + 1, "little"), np.uint8)
    places = np.flatnonzero(np.unpackbits(terms, bitorder="little"))
    windows = np.lib.stride_tricks.sliding_window_view(_sequence(window, DEGREE), WORDS)
    result = np.zeros(WORDS, np.uint32)
    for part in np.array_split(places, 64):
        result ^= np.bitwise_xor.reduce(windows[part], axis=0)
    return result


def _sequence(window: np.ndarray, more: int) -> np.ndarray:
    """Return the words of `window` and the `more` that follow them, before tempering."""
    words = np.concatenate([window, np.zeros(more, np.uint32)])
    step = WORDS - MIDDLE  # words that do not depend on each other
    for start in range(0, more, step):
        size = min(step, more - start)
        first = words[start : start + size + 1]
        mixed = (first[:-1] & np.uint32(UPPER)) | (first[1:] & np.uint32(LOWER))
        twisted = (mixed >> np.uint32(1)) ^ np.where(mixed & np.uint32(1), np.uint32(MATRIX), np.uint32(0))
        words[start + WORDS : start + WORDS + size] = words[start + MIDDLE : start + MIDDLE + size] ^ twisted
    return words


@cache
def _polynomial() -> tuple[int, ...]:
    """Return the exponents of the characteristic polynomial below its degree (the paper's appendix A)."""
    bits = 31  # of a word that the recurrence leaves to its neighbour
    outer, inner = (1 << WORDS) ^ (1 << MIDDLE), (1 << WORDS - 1) ^ (1 << MIDDLE - 1)
    total = _product(_raised(outer, 32 - bits), _raised(inner, bits))
    for bit in range(32):
        if MATRIX >> bit & 1:
            low = _product(_raised(outer, 32 - bits), _raised(inner, bits - 1 - bit)) if bit < bits else 1
            total ^= low
    total ^= 1 << DEGREE
    return tuple(place for place in range(DEGREE) if total >> place & 1)


def _product(left: int, right: int) -> int:
    result = 0
    while right:
        low = right & -right
        result ^= left * low
        right ^= low
    return result


def _raised(base: int, exponent: int) -> int:
    result = 1
    for _ in range(exponent):
        result = _product(result, base)
    return result


def _power(exponent: int) -> int:
    """Return t^`exponent` mod p."""
    result = 1
    for bit in bin(exponent)[2:]:
        data = result.to_bytes(DEGREE // 8 + 1, "little")
        result = int.from_bytes(b"".join(_SPREAD[byte] for byte in data), "little")  # the square
        result = _reduced(result << 1 if bit == "1" else result)
    return result


def _reduced(value: int) -> int:
    """Return `value` mod p."""
    exponents = _polynomial()
    while high := value >> DEGREE:
        value &= (1 << DEGREE) - 1
        for place in exponents:
            value ^= high << place
    return value
