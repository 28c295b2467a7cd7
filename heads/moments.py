"""Which sums over rows determine a squared loss?  They add up, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

_ROWS = 4096  # rows of one product: float32 inside, float64 between


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
        sum_i a_i (x_i - o) (x_i - o)'
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
        total = cls.zero(origin, T.shape[1])
        o = origin.astype(X.dtype)
        for start in range(0, len(X), _ROWS):
            at = slice(start, start + _ROWS)
            root = np.sqrt(weight[at]).astype(X.dtype)
            rows = (X[at] - o) * root[:, None]
            targets = T[at] * root[:, None]
            # One array times itself: BLAS makes half of the product only.
            total.xx[...] += rows.T @ rows
            total.xt[...] += rows.T @ targets
            total.x[...] += root @ rows
            total.t[...] += root @ targets
            total.tt[...] += np.einsum("ik,ik->k", targets, targets)
        return replace(total, weight=float(weight.sum()))

    def __add__(self, other: Moments) -> Moments:
        if not np.array_equal(self.origin, other.origin):
            raise ValueError("moments about different origins cannot be added; use one origin")
        return Moments(
            origin=self.origin,
            weight=self.weight + other.weight,
            x=self.x + other.x,
            xx=self.xx + other.xx,
            t=self.t + other.t,
            xt=self.xt + other.xt,
            tt=self.tt + other.tt,
        )

    def targets(self, columns: np.ndarray) -> Moments:
        """The same rows with some of the targets only."""
        return replace(self, t=self.t[columns], xt=self.xt[:, columns], tt=self.tt[columns])

    def squared_error(self, D: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(k,) sum_i a_i (t_i - b - D x_i)^2; products in the type of D (k, d)."""
        c = b + D @ self.origin
        fitted = np.einsum("kj,kj->k", D @ self.xx.astype(D.dtype), D, dtype=np.float64)
        crossed = np.einsum("kj,jk->k", D, self.xt)
        linear = D @ self.x
        return fitted + 2 * c * linear + c * c * self.weight - 2 * (crossed + c * self.t) + self.tt

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
        return self.xx - np.outer(self.x, x), self.xt - np.outer(x, self.t)
