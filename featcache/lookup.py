"""Which row has an id? Asked of thousands of ids at a time."""

from __future__ import annotations

import numpy as np

from featcache.names import Names

MISSING, SEVERAL = -1, -2
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, made odd
_SHIFT = np.uint64(29)


class Rows:
    """Rows by their ids: sorted hashes, so that many are found at once.

    O(n log n) once and 8 bytes an id; O(m log n) for m ids. A dictionary would take twenty
    times the memory, and the time to make n Python objects before the first answer. Ids that
    share a hash, of which there are some among ten million, are tried one after the other.

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
        keys = np.sort(self._hashes(words) | rows)
        again = self._is_again(keys, words)
        self._crowded = bool(np.any(again != self._shares_hash(keys)))
        if self._crowded:
            self._bring_ids_together(keys, words)
            again = self._is_again(keys, words)
        first = np.append(True, ~again)[: len(ids)]
        self._keys = keys[first]
        self._several: np.ndarray | None = None
        if again.any():
            self._several = np.diff(np.append(np.flatnonzero(first), len(ids))) > 1

    def _shares_hash(self, keys: np.ndarray) -> np.ndarray:
        """(n - 1,) bool: whether a key has the hash of the one before."""
        return (keys[1:] ^ keys[:-1]) <= self._row_bits

    def _is_again(self, keys: np.ndarray, words: np.ndarray) -> np.ndarray:
        """(n - 1,) bool: whether a key is of the id of the one before."""
        again = self._shares_hash(keys)
        left, right = self._rows(keys[:-1][again]), self._rows(keys[1:][again])
        again[again] = _equal(words[:, left], words[:, right])
        return again

    def _bring_ids_together(self, keys: np.ndarray, words: np.ndarray) -> None:
        """Sort, in place, keys of one hash by their ids and then by their rows."""
        shares = self._shares_hash(keys)
        run = np.append(0, np.cumsum(~shares))
        mixed = np.zeros(run[-1] + 1, bool)
        mixed[run[1:][shares & ~self._is_again(keys, words)]] = True
        at = np.flatnonzero(mixed[run])
        some = keys[at]
        keys[at] = some[np.lexsort((some, *words[:, self._rows(some)], run[at]))]

    def find(self, names: Names) -> np.ndarray:
        """(m,) intp: the row of each name; MISSING, or SEVERAL where several rows have it."""
        wanted = self._words(self._encoded(names))
        if not len(self._keys):
            return np.full(wanted.shape[1], MISSING, np.intp)
        hashes = self._hashes(wanted)
        at = np.searchsorted(self._keys, hashes)
        found = self._rows(self._keys.take(at, mode="clip"))
        same = _equal(self._words(self._ids[found]), wanted)
        if self._crowded:
            self._step_on(wanted, hashes, at, found, same)
        if self._several is not None:
            found[self._several.take(at, mode="clip")] = SEVERAL
        found[~same] = MISSING
        return found

    def _step_on(
        self,
        wanted: np.ndarray,
        hashes: np.ndarray,
        at: np.ndarray,
        found: np.ndarray,
        same: np.ndarray,
    ) -> None:
        """Try the next keys of the hash where the first one is of another id; in place."""
        left = np.flatnonzero(~same)
        while len(left):
            at[left] += 1
            left = left[at[left] < len(self._keys)]
            left = left[(self._keys[at[left]] ^ hashes[left]) <= self._row_bits]
            found[left] = self._rows(self._keys[at[left]])
            same[left] = _equal(self._words(self._ids[found[left]]), wanted[:, left])
            left = left[~same[left]]

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
        mixed = np.zeros(words.shape[1], np.uint64)
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
