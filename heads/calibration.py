"""How does a score become a probability?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

_STEPS = 100
_TOL = 1e-8
_BINS = 1 << 16


@dataclass(frozen=True)
class PlattScaling:
    """P = sigma(slope s + intercept), one map for all labels.

    One map keeps the order of all scores, so that a rare label, whose own slope
    would rest on one or two positives, is no worse off than a frequent one, and
    no threshold rule on scores changes its answer.

    Attributes
    ----------
    slope, intercept : float
    """

    slope: float
    intercept: float

    def transform(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities in the type of the scores."""
        return expit(scores * scores.dtype.type(self.slope) + scores.dtype.type(self.intercept))


def fit_platt(
    scores: np.ndarray, Y: np.ndarray, known: np.ndarray | None, weight: np.ndarray
) -> PlattScaling:
    """Maximum likelihood of the map, smoothed as in Platt (1999).

    Parameters
    ----------
    scores, Y : (n, K)
        Held-out scores and targets in [0, 1], 0 where unknown.
    known : (n, K) bool or None
    weight : (n,)

    Notes
    -----
    Minimises sum_i a_i loss(y', slope s + intercept), where y' moves y towards
    1/2 as one more positive and one more negative would: y' = (n_pos + 1) /
    (n_pos + 2) for y = 1 and 1 / (n_neg + 2) for y = 0. Newton steps on
    standardised scores, halved until the loss falls. More than 2^16 scores are
    counted in that many bins of equal width, each at its mean, which moves the
    answer by far less than its own uncertainty; so the time is O(n K) once.
    """
    if scores.size > _BINS:
        s, y, a = _binned(scores, Y, known, weight)
    else:
        shape = (weight if known is None else weight[:, None] * known).reshape(len(weight), -1)
        a = np.broadcast_to(shape, scores.shape)
        used = a > 0
        s, y, a = scores[used].astype(np.float64), Y[used].astype(np.float64), a[used]
    total, positives = a.sum(), a @ y
    low, high = 1 / (total - positives + 2), (positives + 1) / (positives + 2)
    y = low + (high - low) * y
    centre = a @ s / total
    spread = float(np.sqrt(a @ (s - centre) ** 2 / total))
    rate = a @ y / total
    theta = np.array([0.0, np.log(rate / (1 - rate))])
    if not spread > 1e-12 * max(1.0, abs(centre)):
        return PlattScaling(0.0, float(theta[1]))
    theta = _newton((s - centre) / spread, y, a, theta)
    slope = float(theta[0]) / spread
    return PlattScaling(slope, float(theta[1] - slope * centre))


def _binned(
    scores: np.ndarray, Y: np.ndarray, known: np.ndarray | None, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean score, mean target and weight of each bin that is not empty."""
    low, high = float(scores.min()), float(scores.max())
    per_unit = (_BINS - 1) / max(high - low, 1e-300)
    sums = np.zeros((3, _BINS))
    rows = max(1, (1 << 20) // scores.shape[1])
    for start in range(0, len(scores), rows):
        at = slice(start, start + rows)
        a = np.repeat(weight[at], scores.shape[1])
        if known is not None:
            a *= known[at].ravel()
        s = scores[at].ravel().astype(np.float64)
        index = ((s - low) * per_unit).astype(np.intp)
        for total, values in zip(sums, (a, a * s, a * Y[at].ravel()), strict=True):
            total += np.bincount(index, values, minlength=_BINS)
    kept = sums[0] > 0
    a, s, y = sums[:, kept]
    return s / a, y / a, a


def _newton(z: np.ndarray, y: np.ndarray, a: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Minimiser (2,) of sum_i a_i loss(y_i, theta_0 z_i + theta_1)."""

    def loss(at: np.ndarray) -> float:
        margin = at[0] * z + at[1]
        return float(a @ (np.logaddexp(0, margin) - y * margin))

    value = loss(theta)
    for _ in range(_STEPS):
        p = expit(theta[0] * z + theta[1])
        residual, h = a * (p - y), a * p * (1 - p)
        gradient = np.array([residual @ z, residual.sum()])
        hz = h @ z
        hessian = np.array([[h @ (z * z), hz], [hz, h.sum()]])
        hessian.flat[::3] += 1e-12 * (1 + hessian.trace())
        step = np.linalg.solve(hessian, gradient)
        decrement = float(gradient @ step)
        if decrement < _TOL * max(1.0, abs(value)):
            break
        size = 1.0
        while size > 1e-10 and loss(theta - size * step) > value - 1e-4 * size * decrement:
            size /= 2
        theta = theta - size * step
        value = loss(theta)
    return theta
