"""Where are the scores of many models, and how are they read?"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from heads.inputs import check_scores

Models: TypeAlias = "np.ndarray | Sequence[np.ndarray | Chained | str | os.PathLike[str]]"

_Path = (str, os.PathLike)
_CHUNK = 1 << 26  # bytes of all models' scores that are looked at at once
_ONE = np.float16(1).view(np.uint16)


class Chained:
    """Scores of one model whose rows are in several (n, K) arrays, one after the other; no copy.

    Has of an array what a :class:`Stack` asks for: shape, dtype, and rows by an ascending index.
    """

    ndim = 2

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts)
        self._first = np.cumsum([0, *(len(part) for part in parts)])
        self.shape = (int(self._first[-1]), parts[0].shape[1])
        self.dtype = np.result_type(*(part.dtype for part in parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        at = np.arange(len(self))[rows]
        bounds = np.searchsorted(at, self._first)
        found = [
            np.asarray(part[at[start:stop] - first], self.dtype)
            for part, first, start, stop in zip(
                self._parts, self._first, bounds, bounds[1:], strict=False
            )
            if start < stop
        ]
        return (
            found[0]
            if len(found) == 1
            else np.concatenate([*found, np.empty((0, self.shape[1]), self.dtype)])
        )


@dataclass(frozen=True)
class Stack:
    """Probabilities of M models on the same rows and labels; read when they are asked for.

    Attributes
    ----------
    models : list of M (n, K) arrays
        In memory, mapped from files, or chained.
    names : list of M str
        What a model is called where it is refused.
    maps : list of maps
        Those that were made here; what was read of them is given back block by block.
    """

    models: list[np.ndarray]
    names: list[str]
    maps: list[mmap.mmap] = field(default_factory=list)

    @classmethod
    def of(cls, P: Models, names: Sequence[str] | None = None) -> Stack:
        """Of an array (M, n, K), or of M arrays (n, K) or names of ``.npy`` files.

        Files are mapped, not read. Scores are not looked at yet.

        Raises
        ------
        ValueError
            If there are no models, or shapes or names do not fit.
        """
        named = [f"P[{m}]" for m in range(len(P))] if names is None else [str(n) for n in names]
        if len(named) != len(P):
            raise ValueError(f"there are {len(named)} names, but {len(P)} models")
        if not named:
            raise ValueError("P holds no models; give (M, n, K) scores with M >= 1")
        models = [_opened(p, name) for p, name in zip(P, named, strict=True)]
        own = [p for p, given in zip(models, P, strict=True) if isinstance(given, _Path)]
        for p, name in zip(models, named, strict=True):
            if p.shape != models[0].shape:
                raise ValueError(
                    f"{name} has shape {p.shape}, but {named[0]} has shape {models[0].shape}"
                )
        # numpy has no public name for the map below a memmap, whose pages are given back.
        return cls(models, named, [p._mmap for p in own])  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.models)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, K) of every model."""
        n, K = self.models[0].shape
        return n, K

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of all scores together."""
        return np.result_type(*(p.dtype for p in self.models))

    def take(self, models: np.ndarray) -> Stack:
        """Some of the models, by their numbers."""
        return Stack([self.models[m] for m in models], [self.names[m] for m in models], self.maps)

    def release(self) -> None:
        """Give back the memory of what was read of maps that were made here."""
        for mapped in self.maps:
            if hasattr(mapped, "madvise"):  # not on Windows
                mapped.madvise(mmap.MADV_DONTNEED)

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Some rows (ascending) at a time and each model's scores there, checked.

        Raises
        ------
        ValueError
            Naming model, row and label of the first score that is no probability.
        """
        size = sum(p.dtype.itemsize for p in self.models) * max(1, self.shape[1])
        step = max(1, _CHUNK // size)
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            straight = some[-1] - some[0] + 1 == len(some)
            at: Any = slice(some[0], some[-1] + 1) if straight else some
            block = [np.asarray(p[at]) for p in self.models]
            for p, name in zip(block, self.names, strict=True):
                _refuse_no_probabilities(p, name, some)
            yield some, block
            self.release()


def _opened(p: Any, name: str) -> np.ndarray:
    if isinstance(p, _Path):
        p = np.load(p, mmap_mode="r", allow_pickle=False)
    if getattr(p, "ndim", None) == 2 and getattr(p, "dtype", None) in (
        np.float16,
        np.float32,
        np.float64,
    ):
        scores: np.ndarray = p
        return scores
    return check_scores(p, name)


def _refuse_no_probabilities(p: np.ndarray, name: str, rows: np.ndarray) -> None:
    if not p.size:
        return
    # The bits of all numbers of 16 bits from 0 to 1 are in order, those of all others above.
    if p.dtype == np.float16 and p.view(np.uint16).max() <= _ONE:
        return
    low, high = float(p.min()), float(p.max())
    if low >= 0 and high <= 1:
        return
    wrong = ~np.isfinite(p)
    if wrong.any():
        row, label = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name} is {p[row, label]} at row {rows[row]}, label {label}; scores must be finite"
        )
    raise ValueError(f"{name} reaches from {low} to {high}; give probabilities")
