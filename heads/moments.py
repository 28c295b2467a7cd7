"""Which sums over rows determine a squared loss?  They add up, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

_COLUMNS = 1024  # features of one block; scipy's syrk would hold the interpreter's lock
_ROWS = 4096  # rows of one product: float32 inside, float64 between

Block = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, targets, weights


@dataclass(frozen=True)
class Moments:
    """Weighted sums of rows x_i and targets t_i about a fixed origin o; a monoid under ``+``.

    Attributes
    ----------
    origin : (d,) float64
        o, near the mean of x, so that centring later loses no digits.
    weight : float
        sum_i a_i
    x : (d,)
        sum_i a_i (x_i - o)
    xx : (d, d)
        Lower triangle, zeros above it, of sum_i a_i (x_i - o) (x_i - o)'
    t : (k,)
        sum_i a_i t_i
    xt : (d, k)
        sum_i a_i (x_i - o) t_i'
    tt : (k,)
        sum_i a_i t_i^2
    """

    origin: np.ndarray
    weight: float
    x: np.ndarray
    xx: np.ndarray
    t: np.ndarray
    xt: np.ndarray
    tt: np.ndarray

    @classmethod
    def zero(cls, origin: np.ndarray, n_targets: int) -> Moments:
        """The moments of no rows."""
        d = len(origin)
        return cls(
            origin=origin,
            weight=0.0,
            x=np.zeros(d),
            xx=np.zeros((d, d)),
            t=np.zeros(n_targets),
            xt=np.zeros((d, n_targets)),
            tt=np.zeros(n_targets),
        )

    @classmethod
    def of(cls, X: np.ndarray, T: np.ndarray, weight: np.ndarray, origin: np.ndarray) -> Moments:
        """Moments of rows X (n, d), targets T (n, k) and weights (n,).

        Products run in the type of X over a few thousand rows at a time and are
        added in float64: O(n d (d + k)) time, O(d (d + k)) memory.
        """
        return cls.of_blocks([(X, T, weight)], origin, T.shape[1])

    @classmethod
    def of_blocks(cls, blocks: Iterable[Block], origin: np.ndarray, n_targets: int) -> Moments:
        """:meth:`of` rows that come some at a time."""
        total = cls.zero(origin, n_targets)
        sum_of_weights = 0.0
        for X, T, weight in blocks:
            sum_of_weights += float(weight.sum())
            for start in range(0, len(X), _ROWS):
                at = slice(start, start + _ROWS)
                total._add(X[at], T[at], np.sqrt(weight[at]).astype(X.dtype))
        return replace(total, weight=sum_of_weights)

    def _add(self, X: np.ndarray, T: np.ndarray, root: np.ndarray) -> None:
        """Add some rows, of which `root` are the roots of the weights, in place."""
        rows = X - self.origin.astype(X.dtype)
        targets = T
        if not np.all(root == 1):
            rows *= root[:, None]
            targets = T * root[:, None]
        # Blocks on and below the diagonal: BLAS makes half of an array times itself.
        for start in range(0, rows.shape[1], _COLUMNS):
            at = slice(start, start + _COLUMNS)
            some = rows[:, at]
            self.xx[at, at] += np.tril(some.T @ some)
            self.xx[at, :start] += some.T @ rows[:, :start]
        self.xt[...] += rows.T @ targets
        self.x[...] += root @ rows
        self.t[...] += root @ targets
        self.tt[...] += np.einsum("ik,ik->k", targets, targets)

    @classmethod
    def sum(cls, parts: Iterable[Moments]) -> Moments:
        """Moments of the rows of all parts, of which there is at least one."""
        first, *others = parts
        if not all(np.array_equal(part.origin, first.origin) for part in others):
            raise ValueError("moments about different origins cannot be added; use one origin")
        sums: dict[str, np.ndarray] = {}
        for name in ("x", "xx", "t", "xt", "tt"):
            sums[name] = getattr(first, name).copy()
            for part in others:
                sums[name] += getattr(part, name)
        return cls(first.origin, first.weight + sum(part.weight for part in others), **sums)

    def __add__(self, other: Moments) -> Moments:
        return Moments.sum([self, other])

    def targets(self, columns: np.ndarray) -> Moments:
        """The same rows with some of the targets only."""
        if np.array_equal(columns, np.arange(len(self.t))):
            return self
        return replace(self, t=self.t[columns], xt=self.xt[:, columns], tt=self.tt[columns])

    def squared_error(self, D: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(k,) sum_i a_i (t_i - b - D x_i)^2; products in the type of D (k, d)."""
        c = b + D @ self.origin
        triangle = self._xx32 if D.dtype == np.float32 else self.xx
        fitted = -((D * D) @ np.diag(self.xx))
        for start in range(0, D.shape[1], _COLUMNS // 2):
            at = slice(start, start + _COLUMNS // 2)
            some = D[:, start:] @ triangle[start:, at]  # zeros above
            fitted += 2 * np.einsum("kj,kj->k", some, D[:, at], dtype=np.float64)
        crossed = np.einsum("kj,kj->k", D, self._tx)
        linear = D @ self.x
        return fitted + 2 * c * linear + c * c * self.weight - 2 * (crossed + c * self.t) + self.tt

    @cached_property
    def _xx32(self) -> np.ndarray:
        return self.xx.astype(np.float32)

    @cached_property
    def _tx(self) -> np.ndarray:
        return np.ascontiguousarray(self.xt.T)

    @property
    def mean_x(self) -> np.ndarray:
        """(d,) weighted mean of x."""
        return self.origin + self.x / self.weight

    @property
    def mean_t(self) -> np.ndarray:
        """(k,) weighted mean of t."""
        return self.t / self.weight

    @property
    def raw(self) -> np.ndarray:
        """(d,) raw second moments sum_i a_i x_ij^2."""
        o = self.origin
        return np.maximum(np.diag(self.xx) + 2 * o * self.x + o * o * self.weight, 0)

    def centred(self) -> tuple[np.ndarray, np.ndarray]:
        """(d, d) and (d, k) sums of products about the means."""
        x = self.x / self.weight
        xx = np.outer(self.x, -x)
        xx += self.xx
        xx += np.tril(self.xx, -1).T
        return xx, self.xt - np.outer(x, self.t)
