"""Which row has an id? Asked of thousands of ids at a time."""

from __future__ import annotations

from itertools import count

import numpy as np

from featcache.contents import Names

MISSING, SEVERAL = -1, -2
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, made odd
_SHIFT = np.uint64(29)


class Rows:
    """Rows by their ids: sorted hashes, no two ids with one, so that many are found at once.

    O(n log n) once and 8 bytes an id; O(m log n) for m ids. A dictionary would take twenty
    times the memory, and the time to make n Python objects before the first answer.

    Parameters
    ----------
    ids : (n,) bytes
        Encoded as in a cache; they are referred to, not copied.
    """

    def __init__(self, ids: np.ndarray) -> None:
        self._ids = ids
        # A byte more than the longest: whatever is cut to that length is none of the ids.
        self._type = np.dtype((np.bytes_, 8 * (ids.dtype.itemsize // 8 + 1)))
        # A key is a hash whose last bits are the row: sorting brings the rows along.
        self._row_bits = np.uint64(2 ** len(ids).bit_length() - 1)
        words, rows = self._words(ids), np.arange(len(ids), dtype=np.uint64)
        for self._seed in count():
            keys = np.sort(self._hashes(words) | rows)
            again = (keys[1:] ^ keys[:-1]) <= self._row_bits  # the hash is that of the one before
            left, right = self._rows(keys[:-1][again]), self._rows(keys[1:][again])
            if _equal(words[:, left], words[:, right]).all():
                break  # else two ids have one hash
        first = np.append(True, ~again)[: len(ids)]
        self._keys = keys[first]
        self._several: np.ndarray | None = None
        if again.any():
            self._several = np.diff(np.append(np.flatnonzero(first), len(ids))) > 1

    def find(self, names: Names) -> np.ndarray:
        """(m,) intp: the row of each name; MISSING, or SEVERAL where several rows have it."""
        wanted = self._words(self._encoded(names))
        if not len(self._keys):
            return np.full(wanted.shape[1], MISSING, np.intp)
        at = np.searchsorted(self._keys, self._hashes(wanted))
        found = self._rows(self._keys.take(at, mode="clip"))
        same = _equal(self._words(self._ids[found]), wanted)
        if self._several is not None:
            found[self._several.take(at, mode="clip")] = SEVERAL
        found[~same] = MISSING
        return found

    def _encoded(self, names: Names) -> np.ndarray:
        listed = names.tolist() if isinstance(names, np.ndarray) else list(names)
        try:
            return np.array(listed, self._type)
        except UnicodeEncodeError:  # NumPy encodes ASCII alone, and that much the faster
            return np.char.encode(np.asarray(listed, np.str_), "utf-8", "surrogatepass")

    def _words(self, texts: np.ndarray) -> np.ndarray:
        """(w, n) uint64: the bytes of (n,) texts, cut or filled up with zeros."""
        words = texts.astype(self._type, copy=False).view(np.uint64)
        return words.reshape(len(texts), self._type.itemsize // 8).T

    def _hashes(self, words: np.ndarray) -> np.ndarray:
        """(n,) uint64 of (w, n) words, zeros in the bits of rows."""
        mixed = np.full(words.shape[1], self._seed, np.uint64)
        for word in words:
            mixed = (mixed ^ word) * _ODD
            mixed ^= mixed >> _SHIFT
        return mixed & ~self._row_bits

    def _rows(self, keys: np.ndarray) -> np.ndarray:
        return (keys & self._row_bits).astype(np.intp)


def _equal(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(n,) bool of (w, n) words."""
    same = ours[0] == theirs[0]
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        same &= our == their
    return same
