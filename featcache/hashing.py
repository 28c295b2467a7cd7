"""Which number stands for an id, on every machine and whatever the other ids are?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def id_hashes(purpose: str, ids: Iterable[str]) -> np.ndarray:
    """A 64-bit number of each id, uint64.

    The first that :func:`featcache.views.generator` of (purpose, id) draws, without making a
    generator for each of a million ids: Philox 4x64-10 (Salmon et al. 2011) of all at once.
    """
    start = f"{purpose}\x1f".encode()
    digests = b"".join(hashlib.sha256(start + i.encode()).digest()[:16] for i in ids)
    keys = np.frombuffer(digests, "<u8").reshape(-1, 2).astype(np.uint64)
    return _philox(keys[:, 0], keys[:, 1])


def _philox(k0: np.ndarray, k1: np.ndarray) -> np.ndarray:
    """First word of the block of counter 1, under the keys (k0, k1)."""
    c0, c1, c2, c3 = (np.full(k0.shape, value, np.uint64) for value in (1, 0, 0, 0))
    for _ in range(_ROUNDS):
        high_0, low_0 = _product(_MULTIPLIERS[0], c0)
        high_1, low_1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + np.uint64(_WEYL[0]), k1 + np.uint64(_WEYL[1])  # modulo 2^64
    return c0


def _product(a: int, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of the product, from halves of 32 bits."""
    a_high, a_low = np.uint64(a >> 32), np.uint64(a & 0xFFFFFFFF)
    b_high, b_low = b >> _HALF, b & _LOW
    middle = a_high * b_low + (a_low * b_low >> _HALF)
    carry = a_low * b_high + (middle & _LOW)
    return a_high * b_high + (middle >> _HALF) + (carry >> _HALF), np.uint64(a) * b
