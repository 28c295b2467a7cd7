"""Which sigmoid turns scores into probabilities, for all labels together?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

_STEPS = 100
_TOL = 1e-8
_BINS = 1 << 16
_TINY = 1e-7  # probabilities are kept this far from 0 and 1 before taking logits
_BLOCK = 1 << 18  # probabilities that are looked at at once
_CACHED = 1 << 16  # that stay in a core's cache from one operation to the next


@dataclass(frozen=True)
class PlattScaling:
    """P = sigma(slope s + intercept), one map for all labels.

    One map keeps the order of all scores where the slope is positive, so that a rare
    label, whose own slope would rest on one or two positives, is no worse off than a
    frequent one, and no threshold rule on scores changes its answer.

    Attributes
    ----------
    slope, intercept : float
    """

    slope: float
    intercept: float

    def transform(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities in the type of the scores."""
        slope, intercept = scores.dtype.type(self.slope), scores.dtype.type(self.intercept)
        P = np.empty_like(scores)
        rows = max(1, _CACHED // max(1, scores[:1].size))
        for start in range(0, len(scores), rows):
            block = P[start : start + rows]
            np.multiply(scores[start : start + rows], slope, out=block)
            block += intercept
            sigmoid(block)
        return P


def sigmoid(t: np.ndarray) -> np.ndarray:
    """1 / (1 + exp -t) in place; of float32 in less than half the time of scipy's ``expit``."""
    np.negative(t, out=t)
    with np.errstate(over="ignore"):  # 1 / inf is the 0 that is meant
        np.exp(t, out=t)
    t += 1
    return np.reciprocal(t, out=t)


def fit_platt(
    scores: np.ndarray,
    Y: np.ndarray,
    known: np.ndarray | None,
    weight: np.ndarray,
    intercept: bool = True,
    rising: bool = False,
) -> PlattScaling:
    """Maximum likelihood of the map, smoothed as in Platt (1999).

    Parameters
    ----------
    scores, Y : (n, K)
        Held-out scores and targets in [0, 1], 0 where unknown.
    known : (n, K) bool or None
    weight : (n,)
    intercept : bool
        False: 0 (temperature scaling, where scores are logits).
    rising : bool
        The best map of slope >= 0. Scores of a head need it: nearly flat, each is almost
        the mean of the targets that it was trained on, and leaving out a positive lowers
        that mean, so that held-out scores fall where the head knows nothing.

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
        rows = max(1, _BLOCK // scores.shape[1])
        parts = (
            (scores[at], Y[at], weight[at, None] * (1.0 if known is None else known[at]))
            for at in (slice(start, start + rows) for start in range(0, len(scores), rows))
        )
        counted = binned(parts, float(scores.min()), float(scores.max()))
        return best_platt(*counted, intercept, rising)
    a = np.broadcast_to(weight[:, None] * (1.0 if known is None else known), scores.shape)
    used = a > 0
    s, y, a = scores[used].astype(np.float64), Y[used].astype(np.float64), a[used]
    return best_platt(s, y, a, intercept, rising)


def best_platt(
    s: np.ndarray, y: np.ndarray, a: np.ndarray, intercept: bool = True, rising: bool = False
) -> PlattScaling:
    """:func:`fit_platt` of scores s, targets y and weights a > 0, each (N,) float64."""
    if not len(s):  # nothing is known, say in a fold: scores are taken for logits
        return PlattScaling(1.0, 0.0)
    total, positives = a.sum(), a @ y
    low, high = 1 / (total - positives + 2), (positives + 1) / (positives + 2)
    y = low + (high - low) * y
    centre = float(a @ s / total) if intercept else 0.0
    spread = float(np.sqrt(a @ (s - centre) ** 2 / total))
    rate = a @ y / total
    start = float(np.log(rate / (1 - rate))) if intercept else 0.0
    if not spread > 1e-12 * max(1.0, abs(centre)):
        return PlattScaling(0.0, start)
    z = (s - centre) / spread
    ones = np.ones((int(intercept), len(z)))
    theta = _newton(np.vstack([z, ones]), y, a, np.array([0.0, start])[: 1 + len(ones)])
    slope = float(theta[0]) / spread
    if rising and slope < 0:  # the loss is convex: the best slope >= 0 is 0
        return PlattScaling(0.0, start)
    return PlattScaling(slope, float(theta[1] - slope * centre) if intercept else 0.0)


def binned(
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], low: float, high: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean score, mean target and weight of each of 2^16 bins that is not empty.

    `parts` are scores between low and high, targets and weights, of shapes that go together.
    """
    per_unit = (_BINS - 1) / max(high - low, 1e-300)
    sums = np.zeros((3, _BINS))
    for s, y, a in parts:
        s, y, a = s.ravel().astype(np.float64), y.ravel(), np.broadcast_to(a, s.shape).ravel()
        index = ((s - low) * per_unit).astype(np.intp)
        if np.all(a == a[0]):  # counted without weights, which is quicker
            sums[0] += a[0] * np.bincount(index, minlength=_BINS)
            sums[1] += a[0] * np.bincount(index, s, minlength=_BINS)
        else:
            sums[0] += np.bincount(index, a, minlength=_BINS)
            sums[1] += np.bincount(index, a * s, minlength=_BINS)
        (held,) = np.nonzero(y)  # few
        sums[2] += np.bincount(index[held], a[held] * y[held], minlength=_BINS)
    a, s, y = sums[:, sums[0] > 0]
    return s / a, y / a, a


def _newton(z: np.ndarray, y: np.ndarray, a: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Minimiser (q,) of sum_i a_i loss(y_i, theta . z_i), z of shape (q, N)."""

    def loss(at: np.ndarray) -> float:
        margin = at @ z
        return float(a @ (np.logaddexp(0, margin) - y * margin))

    value = loss(theta)
    for _ in range(_STEPS):
        p = expit(theta @ z)
        gradient, h = z @ (a * (p - y)), a * p * (1 - p)
        hessian = (z * h) @ z.T
        hessian.flat[:: len(z) + 1] += 1e-12 * (1 + hessian.trace())
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


def logits(P: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) in float64, of probabilities kept 1e-7 away from 0 and 1."""
    # float16 and float32 have no numbers that close to 1.
    margin: np.ndarray = logit(np.clip(P.astype(np.float64), _TINY, 1 - _TINY))
    return margin


def mapped(P: np.ndarray, slope: np.ndarray | float, intercept: np.ndarray | float) -> np.ndarray:
    """sigma(slope logit P + intercept), some rows at a time; float64 of float64, else float32."""
    result = np.empty(P.shape, np.promote_types(P.dtype, np.float32))
    step = max(1, _BLOCK // max(1, P.shape[1]))
    for start in range(0, len(P), step):
        at = slice(start, start + step)
        result[at] = expit(logits(P[at]) * slope + intercept)
    return result
