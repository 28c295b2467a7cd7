"""How are many smooth convex problems on the same rows minimised at once?

The unknowns of label k are weights w (r,) and an intercept b. All labels move
together, so that an iteration is a few matrix products for all of them:
conjugate gradients (Polak-Ribiere) with a preconditioner M, and a line search
of its own for each label. Margins are linear along a direction, so the search
costs no product: Newton steps on the derivative, kept inside a bracket. A label
whose decrement g' M^-1 g / 2 is small leaves the products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

_LINE_STEPS = 12
_LINE_TOL = 0.1  # of the slope at the start: how flat the search ends


@dataclass
class Solution:
    """Minimisers, and how they were reached.

    Attributes
    ----------
    W : (K, r), b : (K,)
    n_iter : (K,) int
        Gradients that were looked at.
    converged : (K,) bool
    """

    W: np.ndarray
    b: np.ndarray
    n_iter: np.ndarray
    converged: np.ndarray


class Batch(ABC):
    """Objectives of k labels where they stand; the leading axis of each array is the label.

    Attributes
    ----------
    W : (k, r), b : (k,)
    """

    W: np.ndarray
    b: np.ndarray

    @abstractmethod
    def gradient(self) -> tuple[np.ndarray, np.ndarray]:
        """Gradient by W (k, r) and by b (k,)."""

    @abstractmethod
    def precondition(self, g: np.ndarray, g_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """M^-1 applied to a gradient."""

    @abstractmethod
    def aim(self, direction: np.ndarray, direction_b: np.ndarray) -> np.ndarray:
        """Make all products along a direction; return a first guess of the second derivative."""

    @abstractmethod
    def slope(self, t: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and second derivative of the labels `part` at steps t; the last call counts."""

    @abstractmethod
    def move(self, t: np.ndarray) -> None:
        """Go t along the direction, where `slope` was called last for each label."""

    @abstractmethod
    def keep(self, kept: np.ndarray) -> None:
        """Go on with the labels where `kept` (k,) is True."""


def minimise(batch: Batch, tolerance: np.ndarray, max_iter: int) -> Solution:
    """Move all labels of a batch to their minima.

    Parameters
    ----------
    batch : Batch
        Used up.
    tolerance : (K,)
        Estimated excess over the minimum at which a label stops.
    max_iter : int
    """
    labels = np.arange(len(batch.b))
    result = Solution(
        W=batch.W.copy(),
        b=batch.b.copy(),
        n_iter=np.zeros(len(labels), int),
        converged=np.zeros(len(labels), bool),
    )
    path = _Path(batch.W.shape, batch.W.dtype)
    for iteration in range(1, max_iter + 1):
        g, g_b = batch.gradient()
        step, step_b = batch.precondition(g, g_b)
        decrement = dot(g, step) + g_b * step_b
        done = decrement <= 2 * tolerance[labels]
        stop = done | (iteration == max_iter)
        if stop.any():
            at = labels[stop]
            result.W[at], result.b[at] = batch.W[stop], batch.b[stop]
            result.n_iter[at], result.converged[at] = iteration, done[stop]
            if stop.all():
                break
            left = ~stop
            labels = labels[left]
            batch.keep(left)
            path.keep(left)
            g, g_b, step, step_b, decrement = (
                values[left] for values in (g, g_b, step, step_b, decrement)
            )
        slope = path.turn(g, g_b, step, step_b, decrement)
        second = batch.aim(path.direction, path.direction_b)
        batch.move(_search(batch, slope, second))
    return result


class _Path:
    """The last direction and gradient of each label."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.direction, self.g = np.zeros(shape, dtype), np.zeros(shape, dtype)
        self.direction_b, self.g_b = np.zeros(shape[0], dtype), np.zeros(shape[0], dtype)
        self.decrement = np.zeros(shape[0], dtype)

    def keep(self, kept: np.ndarray) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[kept])

    def turn(
        self,
        g: np.ndarray,
        g_b: np.ndarray,
        step: np.ndarray,
        step_b: np.ndarray,
        decrement: np.ndarray,
    ) -> np.ndarray:
        """Take the next conjugate direction, or -M^-1 g where that one would climb; its slope."""
        change = decrement - dot(self.g, step) - self.g_b * step_b
        beta = np.zeros_like(decrement)
        np.divide(np.maximum(change, 0), self.decrement, out=beta, where=self.decrement > 0)
        direction = beta[:, None] * self.direction - step
        direction_b = beta * self.direction_b - step_b
        slope = dot(direction, g) + direction_b * g_b
        climbs = slope >= 0
        if climbs.any():
            direction[climbs], direction_b[climbs] = -step[climbs], -step_b[climbs]
            slope[climbs] = -decrement[climbs]
        self.direction, self.direction_b = direction, direction_b
        self.g, self.g_b, self.decrement = g, g_b, decrement
        return slope


def _search(batch: Batch, slope: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Step of each label at which its derivative has nearly vanished.

    Where that fails to rounding, the longest step that still descends, so that
    a convex objective never rises.
    """
    t = -slope / second
    low, high = np.zeros_like(t), np.full_like(t, np.inf)
    part = np.arange(len(t))
    for _ in range(_LINE_STEPS):
        derivative, second = batch.slope(t, part)
        open_ = np.abs(derivative) > -_LINE_TOL * slope[part]
        if not open_.any():
            return t
        part, derivative, second = part[open_], derivative[open_], second[open_]
        here = t[part]
        rises = derivative > 0
        high[part] = np.where(rises, here, high[part])
        low[part] = np.where(rises, low[part], here)
        following = here - derivative / second
        middle = np.where(np.isinf(high[part]), 2 * here, (low[part] + high[part]) / 2)
        inside = (following > low[part]) & (following < high[part])
        t[part] = np.where(inside, following, middle)
    t[part] = low[part]
    batch.slope(t, part)
    return t


def dot(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Row by row inner products."""
    return np.einsum("kj,kj->k", A, B)


class RowBatch(Batch):
    """What batches of logistic losses share: rows, targets, margins.

    Parameters
    ----------
    Z : (n, r)
        Centred about the weighted mean, so that the intercept stands nearly apart.
    Y : (k, n)
    weight : (n,)
    offset : (k, n) or None
        Added to the margins.
    """

    def __init__(
        self,
        Z: np.ndarray,
        Y: np.ndarray,
        weight: np.ndarray,
        offset: np.ndarray | None,
        W: np.ndarray,
        b: np.ndarray,
    ) -> None:
        self.Z, self.weight = Z, weight
        self.Y, self.offset = Y, offset
        self.W, self.b = W.copy(), b.copy()
        self.margin = self._margins(W, b)
        if offset is not None:
            self.margin += offset
        self.by_label = ["Y", "offset", "margin", "W", "b"]

    def _margins(self, W: np.ndarray, b: np.ndarray) -> np.ndarray:
        margin: np.ndarray = W @ self.Z.T
        margin += b[:, None]
        return margin

    def keep(self, kept: np.ndarray) -> None:
        for name in self.by_label:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[kept])


def base_rate_loss(Y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(k,) least log-loss without features: sum_i a_i times the entropy of the base rate."""
    total = float(weight.sum())
    rate = np.clip((Y @ weight).astype(np.float64) / total, 1e-12, 1 - 1e-12)
    return -total * (rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def tail(margin: np.ndarray) -> np.ndarray:
    """sigma(-|mu|), in the type of mu: what keeps its digits where sigma(mu) is near 1."""
    p = np.abs(margin)
    np.negative(p, out=p)
    np.exp(p, out=p)
    return np.divide(p, 1 + p, out=p)


def residual(margin: np.ndarray, tail: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """sigma(mu) - y, exact also where y is 1 and sigma(mu) nearly so."""
    r = (margin > 0) - Y
    r -= np.copysign(tail, margin)
    return r


class LogisticBatch(RowBatch):
    """sum_i a_i (log(1 + exp mu_i) - y_i mu_i) + 1/2 sum_j penalty_kj w_j^2.

    M is the Hessian's diagonal at an even row weight, c_k e_j + penalty_kj with
    c_k = mean of s (1 - s) and e_j = sum_i a_i z_ij^2: near the whole Hessian
    where Z lies along principal axes.

    Parameters
    ----------
    penalty : (k, 1) or (k, r)
    """

    def __init__(
        self,
        Z: np.ndarray,
        Y: np.ndarray,
        weight: np.ndarray,
        offset: np.ndarray | None,
        W: np.ndarray,
        b: np.ndarray,
        penalty: np.ndarray,
    ) -> None:
        super().__init__(Z, Y, weight, offset, W, b)
        self.penalty = penalty
        self.total = weight.sum()
        self.squares = np.einsum("ij,ij,i->j", Z, Z, weight)
        p = tail(self.margin)
        self.r, self.h = residual(self.margin, p, Y), p * (1 - p)
        self.by_label += ["penalty", "r", "h"]

    def gradient(self) -> tuple[np.ndarray, np.ndarray]:
        weighted = self.r * self.weight
        return weighted @ self.Z + self.penalty * self.W, weighted.sum(axis=1)

    def precondition(self, g: np.ndarray, g_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c = self.h @ self.weight
        return g / ((c / self.total)[:, None] * self.squares + self.penalty), g_b / c

    def aim(self, direction: np.ndarray, direction_b: np.ndarray) -> np.ndarray:
        self.direction, self.direction_b = direction, direction_b
        self.q = self._margins(direction, direction_b)
        self.aq = self.q * self.weight
        self.aqq = self.aq * self.q
        penalised = self.penalty * direction
        self.square = dot(penalised, direction)
        self.linear = dot(penalised, self.W)
        return dot(self.aqq, self.h) + self.square

    def slope(self, t: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        some = slice(None) if len(part) == len(t) else part
        t = t[some]
        margin = t[:, None] * self.q[some]
        margin += self.margin[some]
        p = tail(margin)
        r, h = residual(margin, p, self.Y[some]), p * (1 - p)
        self.r[some], self.h[some] = r, h
        square = self.square[some]
        first = dot(self.aq[some], r) + self.linear[some] + t * square
        return first, dot(self.aqq[some], h) + square

    def move(self, t: np.ndarray) -> None:
        self.W += t[:, None] * self.direction
        self.b += t * self.direction_b
        self.q *= t[:, None]
        self.margin += self.q
