"""How is one ridge problem solved for many rates and targets at once?

The problem, with rows x_i, weights a_i, targets t_i and m_j = sum_i a_i x_ij^2:

    minimise over (D, b)  sum_i a_i |t_i - b - D x_i|^2 + sum_j (rho m_j + l2) |D_j|^2

The intercept centres rows and targets about their weighted means. In features
divided by the square root of the penalty it is plain ridge. It is solved on the
smaller side: among rows (:class:`RowSystem`) or among features
(:class:`FeatureSystem`). Neither depends on the number of targets before the
last product, and a Cholesky factorisation a rate is cheaper than one
eigendecomposition for all rates.

float32 rows keep float32 products while the largest eigenvalue of the scaled
Gram matrix times the rounding error stays small against the penalty; otherwise
the products are made again in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from heads.dropout import second_moments
from heads.features import inverse_root
from heads.lapack import cholesky, cholesky_solve, eigh
from heads.moments import Moments

_SAFE = 1e-4  # of the penalty: rounding errors of a Gram matrix that are let pass


def _penalty(m: np.ndarray, rho: float, l2: float) -> tuple[str | float, np.ndarray, float]:
    """The penalty rho m + l2 as (name of its shape, shape (d,), size)."""
    if l2 == 0:
        return "m", m, rho
    if rho == 0:
        return "l2", np.ones_like(m), l2
    return rho, rho * m + l2, 1.0


def _rounding(gram: np.ndarray) -> float:
    """Rounding error of `gram`: its largest eigenvalue, nearly, times that of its type."""
    vector = np.ones(len(gram), gram.dtype)
    largest = 0.0
    for _ in range(8):
        vector = gram @ vector
        largest = float(np.linalg.norm(vector))
        if largest == 0:
            break
        vector /= gram.dtype.type(largest)
    return largest * float(np.finfo(gram.dtype).eps)


class _Factor:
    """gram + size I, factorised; `size` 0 is the limit size -> 0, a pseudo-inverse."""

    def __init__(self, gram: np.ndarray, size: float) -> None:
        self.size = size
        self.pseudo: np.ndarray | None = None
        if size > 0:
            shifted = gram.copy()
            shifted.flat[:: len(gram) + 1] += gram.dtype.type(size)
            # Its transpose is the same matrix in LAPACK's order, which is not copied.
            self.factor = cholesky(shifted.T)
            return
        values, vectors = eigh(gram.astype(np.float64))
        cut = len(gram) * np.finfo(gram.dtype).eps * max(values[-1], 0.0)
        kept = vectors[:, values > cut]
        self.pseudo = (kept / values[values > cut]) @ kept.T
        self.kernel = np.eye(len(gram)) - kept @ kept.T

    def solve(self, B: np.ndarray) -> np.ndarray:
        """(gram + size I)^-1 B."""
        if self.pseudo is not None:
            return (self.pseudo @ B).astype(B.dtype, copy=False)
        return cholesky_solve(self.factor, B)

    def residual_maker(self) -> np.ndarray:
        """size (gram + size I)^-1 = I - gram (gram + size I)^-1."""
        if self.pseudo is not None:
            return self.kernel
        return self.size * self.solve(np.eye(len(self.factor), dtype=self.factor.dtype))


@dataclass(frozen=True)
class _Scaled:
    """Rows of a `RowSystem` in features divided by the root of one penalty.

    Attributes
    ----------
    name : shape of the penalty
    scale : (d,)
    rows : (n, d)
    gram : (n, n)
    cross : (r, n) or None
        Inner products of the test rows with the rows.
    rounding : float
        See :func:`_rounding`.
    """

    name: str | float
    scale: np.ndarray
    rows: np.ndarray
    gram: np.ndarray
    cross: np.ndarray | None
    rounding: float


class RowSystem:
    """Solves among n rows, for n < d: gram = X X' of scaled, centred, weighted rows.

    Methods may run in several threads.

    Parameters
    ----------
    X : (n, d)
    T : (n, k)
    weight : (n,) float64
    l2 : float
    test : (r, d), optional
        Rows that `predict` scores.
    """

    def __init__(
        self,
        X: np.ndarray,
        T: np.ndarray,
        weight: np.ndarray,
        l2: float,
        test: np.ndarray | None = None,
    ) -> None:
        self.l2 = l2
        total = weight.sum()
        self.mean_x = weight @ X / total
        self.mean_t = (weight @ T / total).astype(T.dtype)
        self.m = second_moments(X, weight)
        self.weight, self.root = weight, np.sqrt(weight).astype(X.dtype)
        self.unit = np.sqrt(weight / total)  # the direction that the intercept takes out
        self.X, self.test = X, test
        self.targets = (T - self.mean_t) * self.root[:, None]
        self._made: _Scaled | None = None

    def _at(self, rho: float) -> tuple[_Scaled, _Factor]:
        """Scaled rows and the factorised system at one rate."""
        name, shape, size = _penalty(self.m, rho, self.l2)
        made = self._made
        if made is None or made.name != name:
            made = self._make(name, shape, self.X.dtype)
        if made.gram.dtype == np.float32 and made.rounding > _SAFE * size:
            made = self._make(name, shape, np.dtype(np.float64))
        self._made = made
        return made, _Factor(made.gram, size)

    def _make(self, name: str | float, shape: np.ndarray, dtype: np.dtype[Any]) -> _Scaled:
        # Centred in that very type: what float32 leaves along the intercept's direction, or
        # between equal rows of different weights, float64 would take for a direction of data.
        scale, mean = inverse_root(shape), self.mean_x.astype(dtype)
        rows = self.X.astype(dtype, copy=False) - mean
        rows *= np.sqrt(self.weight).astype(dtype)[:, None]
        rows *= scale.astype(dtype)
        cross = None
        if self.test is not None:
            cross = ((self.test.astype(dtype, copy=False) - mean) * scale.astype(dtype)) @ rows.T
        gram = rows @ rows.T
        return _Scaled(name, scale, rows, gram, cross, _rounding(gram))

    def predict(self, rho: float) -> np.ndarray:
        """b + D x of the test rows; (r, k)."""
        made, factor = self._at(rho)
        assert made.cross is not None
        if len(made.cross) < self.targets.shape[1]:
            margins = factor.solve(made.cross.T).T @ self.targets
        else:
            margins = made.cross @ factor.solve(self.targets)
        return (margins + self.mean_t).astype(self.targets.dtype, copy=False)

    def coefficients(self, rho: float) -> tuple[np.ndarray, np.ndarray]:
        """D (k, d) and b (k,)."""
        made, factor = self._at(rho)
        D = (factor.solve(self.targets).T @ made.rows) * made.scale
        return _with_intercept(D, self.mean_x, self.mean_t)

    def held_out(self, rho: float, blocks: list[np.ndarray]) -> np.ndarray:
        """Scores (n, k) of each row without its block of rows: t - (I - H_gg)^-1 r_g.

        H is the hat matrix of all rows at fixed m, r the residuals. Weights are
        positive and blocks partition the rows.
        """
        maker = self._at(rho)[1].residual_maker() - np.outer(self.unit, self.unit)
        residual = maker @ self.targets
        left = _leave_out(residual, lambda at: maker[at[:, :, None], at[:, None, :]], blocks)
        return (self.targets - left) / self.root[:, None] + self.mean_t


@dataclass(frozen=True)
class _Gram:
    """The same of a `FeatureSystem`, with gram (d, d)."""

    name: str | float
    scale: np.ndarray
    gram: np.ndarray
    rounding: float


class FeatureSystem:
    """Solves among d features, for n >= d, from :class:`~heads.moments.Moments`."""

    def __init__(self, moments: Moments, l2: float, dtype: np.dtype[Any]) -> None:
        self.l2 = l2
        self.dtype = dtype
        self.mean_x, self.mean_t = moments.mean_x, moments.mean_t
        self.m = moments.raw
        self.xx, xt = moments.centred()
        self.tx = np.ascontiguousarray(xt.T)
        self._made: _Gram | None = None

    def rounds_badly(self, rho: float) -> bool:
        """Whether float32 products in the moments matter at this rate."""
        made, size = self._gram(rho, np.dtype(np.float32))
        return made.rounding > _SAFE * size

    def _gram(self, rho: float, dtype: np.dtype[Any]) -> tuple[_Gram, float]:
        name, shape, size = _penalty(self.m, rho, self.l2)
        made = self._made
        if made is None or made.name != name or made.gram.dtype != dtype:
            scale = inverse_root(shape)
            scaled = self.xx * scale
            scaled *= scale[:, None]
            gram = scaled.astype(dtype, copy=False)
            self._made = made = _Gram(name, scale, gram, _rounding(gram))
        return made, size

    def coefficients(self, rho: float) -> tuple[np.ndarray, np.ndarray]:
        """D (k, d) and b (k,)."""
        made, size = self._gram(rho, self.dtype)
        right = (self.tx * made.scale).astype(self.dtype, copy=False)
        D = _Factor(made.gram, size).solve(right.T).T * made.scale
        return _with_intercept(D, self.mean_x, self.mean_t.astype(self.dtype))

    def held_out(
        self, rho: float, X: np.ndarray, T: np.ndarray, weight: np.ndarray, blocks: list[np.ndarray]
    ) -> np.ndarray:
        """Scores (n, k) of each training row without its block; see `RowSystem.held_out`."""
        made, size = self._gram(rho, self.dtype)
        root = np.sqrt(weight)
        rows = (X - self.mean_x) * made.scale * root[:, None]
        targets = (T - self.mean_t) * root[:, None]
        unit = np.sqrt(weight / weight.sum())
        solved = _Factor(made.gram, size).solve(rows.T).T
        residual = targets - rows @ (solved.T @ targets)

        def block(at: np.ndarray) -> np.ndarray:
            hat = rows[at] @ solved[at].swapaxes(1, 2) + unit[at][:, :, None] * unit[at][:, None, :]
            return np.eye(at.shape[1]) - hat

        left = _leave_out(residual, block, blocks)
        return (targets - left) / root[:, None] + self.mean_t


def _leave_out(
    residual: np.ndarray, block: Callable[[np.ndarray], np.ndarray], blocks: list[np.ndarray]
) -> np.ndarray:
    """(I - H_gg)^-1 r_g of all blocks g; `block` gives I - H_gg for (B, s) rows."""
    left = np.empty(residual.shape, np.float64)
    for size in sorted({len(rows) for rows in blocks}):
        at = np.stack([rows for rows in blocks if len(rows) == size])
        matrices = block(at)
        smallest = np.linalg.eigvalsh(matrices)[:, 0].min()
        if smallest < len(residual) * np.finfo(residual.dtype).eps:
            raise ValueError(
                "cv='loo' is undefined where a fit passes through its own training rows; "
                "raise dropout or l2"
            )
        left[at] = np.linalg.solve(matrices, residual[at])
    return left


def _with_intercept(
    D: np.ndarray, mean_x: np.ndarray, mean_t: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """D in the type of the targets, and b = mean t - D mean x."""
    b = mean_t - D @ mean_x
    return D.astype(mean_t.dtype, copy=False), b.astype(mean_t.dtype, copy=False)
