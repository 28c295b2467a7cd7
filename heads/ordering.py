"""How are scores by the million compared, sorted, looked up, widened and multiplied?"""

from __future__ import annotations

from functools import cache

import numpy as np

_BLOCK = 1 << 20  # scores that are compared at once
_TABLE = 1 << 26  # entries that a table may have


def contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which values are among the ascending ones."""
    at = np.searchsorted(ascending, values)
    at[at == len(ascending)] = 0
    return ascending[at] == values if len(ascending) else np.zeros(len(values), dtype=bool)


def members(ascending: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """:func:`contains` by a table of all entries, where that is not too large."""
    if size > _TABLE:
        return contains(ascending, values)
    table = np.zeros(size, dtype=bool)
    table[ascending] = True
    return table[values]


def reaches(P: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """P >= cut, exactly, for cuts in double precision that go with P's shape."""
    with np.errstate(over="ignore"):
        rounded = cut.astype(P.dtype)
        above = np.nextafter(rounded, P.dtype.type(np.inf))
    rounded = np.where(rounded < cut, above, rounded)
    if P.dtype == np.float16 and (rounded > 0).all():
        # The bits of floats, read as integers, are in the order of the positive ones,
        # and integers are compared many times as fast.
        P, rounded = P.view(np.int16), rounded.view(np.int16)
    chosen: np.ndarray = rounded <= P
    return chosen


def at_least(P: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Entries with a score of at least the cut, or their label's one, ascending."""
    n, K = P.shape
    step = max(1, _BLOCK // max(1, K))
    parts = [np.flatnonzero(reaches(P[i : i + step], cut)) + i * K for i in range(0, n, step)]
    return np.concatenate([np.zeros(0, np.intp), *parts])


def descending(scores: np.ndarray) -> np.ndarray:
    """Order of finite scores from the highest down; equal ones in whatever order."""
    if scores.dtype != np.float16:
        return np.argsort(-scores)
    # numpy sorts integers of 16 bits by counting. Bits of positive floats ascend with them.
    bits = scores.view(np.uint16)
    return np.argsort(np.where(bits < 0x8000, 0x7FFF - bits, bits), kind="stable")


def grouped(image: np.ndarray) -> np.ndarray:
    """Order by image, and by place where they are equal; 16 bits at a time."""
    order = np.argsort(image.astype(np.uint16), kind="stable")
    rest = image >> 16
    return order[np.argsort(rest[order].astype(np.uint16), kind="stable")] if rest.any() else order


def single(P: np.ndarray) -> np.ndarray:
    """float16 as float32, thrice as fast as numpy's conversion; all others as they are."""
    return _singles()[P.view(np.uint16)] if P.dtype == np.float16 else P


@cache
def _singles() -> np.ndarray:
    """The values of all 2^16 bit patterns of a float16."""
    values: np.ndarray = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    return values


def log_products(factors: np.ndarray) -> np.ndarray:
    """(n,) sums of logarithms of rows (n, K), a logarithm for each product of eight; alters them.

    Factors must be between e^-80 and e^80.
    """
    for _ in range(3):
        half = (factors.shape[1] + 1) // 2
        rest = factors[:, half:]
        factors = factors[:, :half]
        factors[:, : rest.shape[1]] *= rest
    sums: np.ndarray = np.log(factors).sum(axis=1)
    return sums
