"""Random numbers as a pure function of what they are for, so that views do not depend on workers, ranks or restarts.

Philox4x32-10 is a counter-based generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Apply Philox4x32 with 10 rounds: `counter` (..., 4) and `key` (..., 2) uint32, broadcast, to (..., 4) uint32."""
    shape = np.broadcast_shapes(counter.shape[:-1], key.shape[:-1])
    x0, x1, x2, x3 = (np.broadcast_to(counter[..., i], shape).astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    for _ in range(10):
        left, right = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (right >> _32) ^ x1 ^ k0, right & _LOW, (left >> _32) ^ x3 ^ k1, left & _LOW
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def uniforms(seed: int, epoch: int, ids: np.ndarray, view: int | np.ndarray, n: int) -> np.ndarray:
    """Return `n` uniform numbers for each id, (B, n) float64 in [0, 1) with 53 random bits.

    `ids` (B,) are image ids below 2^64, `view` (0..255, an integer or (B,)) names an independent stream of the same
    image; `seed` counts modulo 2^64, `epoch` lies below 2^48 and `n` is at most 512. Column k of a row never depends on
    `n` or on the other rows. Key = seed; counter = (id low, id high, epoch low, epoch high << 16 | view << 8 | block).
    """
    views = np.asarray(view, np.int64)
    if not 0 <= epoch < 1 << 48 or not 0 <= n <= 512 or ((views < 0) | (views > 255)).any():
        raise ValueError(f"no such random numbers: epoch {epoch}, view {view}, n {n}")
    ids = np.asarray(ids).astype(np.uint64)
    blocks = -(-n // 2)
    counter = np.empty((len(ids), blocks, 4), np.uint32)
    counter[..., 0] = (ids & _LOW)[:, None]
    counter[..., 1] = (ids >> _32)[:, None]
    counter[..., 2] = epoch & 0xFFFFFFFF
    stream = (epoch >> 32 << 16) + (views << 8)
    counter[..., 3] = np.broadcast_to(stream, (len(ids),))[:, None] + np.arange(blocks)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32)
    words = philox4x32(counter, key).reshape(len(ids), blocks * 2, 2)[:, :n]
    return ((words[..., 0] >> np.uint32(5)) * 67108864.0 + (words[..., 1] >> np.uint32(6))) * 2.0**-53
