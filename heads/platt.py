"""Which sigmoid turns scores into probabilities, for all labels together and for each?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

_STEPS = 100
_TOL = 1e-8
_BINS = 1 << 16
_TINY = 1e-7  # probabilities are kept this far from 0 and 1 before taking logits
_BLOCK = 1 << 20  # probabilities that are looked at at once
_MOVES = 0.1  # expected positives from which on a label without any has a map of its own
_LABEL_STEPS = 50
_LABEL_TOL = 1e-10  # Newton decrement, in units of log-likelihood


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
    scores: np.ndarray,
    Y: np.ndarray,
    known: np.ndarray | None,
    weight: np.ndarray,
    intercept: bool = True,
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
    centre = float(a @ s / total) if intercept else 0.0
    spread = float(np.sqrt(a @ (s - centre) ** 2 / total))
    rate = a @ y / total
    start = float(np.log(rate / (1 - rate))) if intercept else 0.0
    if not spread > 1e-12 * max(1.0, abs(centre)):
        return PlattScaling(0.0, start)
    z = (s - centre) / spread
    if not intercept:
        (slope,) = _newton(z[None], y, a, np.zeros(1))
        return PlattScaling(float(slope) / spread, 0.0)
    theta = _newton(np.stack([z, np.ones_like(z)]), y, a, np.array([0.0, start]))
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


# ------------------------------------------------------------------ label by label


def logits(P: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) in float64, of probabilities kept 1e-7 away from 0 and 1."""
    # float16 and float32 have no numbers that close to 1.
    margin: np.ndarray = logit(np.clip(P.astype(np.float64), _TINY, 1 - _TINY))
    return margin


@dataclass(frozen=True)
class Entries:
    """Probabilities and truth as dense arrays; rows are images.

    Attributes
    ----------
    P : (n, K) of any floating type
    Y : (n, K) bool
    known : (n, K) bool or None
    weight : (n,)
    """

    P: np.ndarray
    Y: np.ndarray
    known: np.ndarray | None
    weight: np.ndarray

    def take(self, rows: np.ndarray) -> Entries:
        """Some of the images."""
        known = None if self.known is None else self.known[rows]
        return Entries(self.P[rows], self.Y[rows], known, self.weight[rows])

    def counts(self, labels: np.ndarray) -> np.ndarray:
        """(n, labels) weight of each entry."""
        if self.known is None:
            return np.broadcast_to(self.weight[:, None], (len(self.weight), len(labels)))
        return self.weight[:, None] * self.known[:, labels]


@dataclass
class LabelMaps:
    """margin = (slope + own slope) x + offset + own offset, x = (logit - centre) / scale.

    The own parts are (K,), zero to begin with. `centre` and `scale` are mean and standard
    deviation of the logits weighted by p (1 - p), so that slope and offset are about as well
    known as each other and independent; each is then worth its number of positives.
    """

    shared: PlattScaling
    intercept: bool
    centre: float
    scale: float
    own: np.ndarray  # (2, K)

    @classmethod
    def shared_by_all(cls, data: Entries, intercept: bool) -> LabelMaps:
        """Fit the map of all labels together."""
        margin = logits(data.P)
        shared = fit_platt(margin, data.Y, data.known, data.weight, intercept)
        p = shared.transform(margin)
        information = p * (1 - p) * data.counts(np.arange(p.shape[1]))
        total = max(float(information.sum()), 1e-300)
        centre = float(np.vdot(information, margin)) / total if intercept else 0.0
        margin -= centre
        scale = float(np.sqrt(np.vdot(information, margin**2) / total))
        own = np.zeros((2, data.P.shape[1]))
        return cls(shared, intercept, centre, max(scale, 1e-6), own)

    def slopes(self) -> np.ndarray:
        """(K,) of the logit."""
        return self.shared.slope + self.own[0] / self.scale

    def intercepts(self) -> np.ndarray:
        """(K,) to be added to slope times logit."""
        return self.shared.intercept + self.own[1] - self.own[0] * self.centre / self.scale

    def improve(self, data: Entries, strength: float) -> None:
        """Minimise sum_i a_i loss + strength / 2 (own slope^2 + own offset^2), label by label."""
        step = max(1, _BLOCK // max(1, len(data.P)))
        for start in range(0, data.P.shape[1], step):
            labels = np.arange(start, min(start + step, data.P.shape[1]))
            self._improve(data, strength, labels)

    def _improve(self, data: Entries, strength: float, labels: np.ndarray) -> None:
        expected = data.weight @ (self.shared.transform(logits(data.P[:, labels])))
        labels = labels[(expected >= _MOVES) | (data.weight @ data.Y[:, labels] > 0)]
        if not len(labels):
            return
        margin = logits(data.P[:, labels])
        self.own[:, labels] = _own_maps(
            (margin - self.centre) / self.scale,
            self.shared.slope * margin + self.shared.intercept,
            data.Y[:, labels],
            data.counts(labels),
            strength,
            self.own[:, labels] if self.intercept else self.own[:1, labels],
        )

    def losses(self, data: Entries) -> np.ndarray:
        """(n,) log-loss of each image, summed over its known labels."""
        total = np.zeros(len(data.P))
        step = max(1, _BLOCK // max(1, len(data.P)))
        slopes, intercepts = self.slopes(), self.intercepts()
        for start in range(0, data.P.shape[1], step):
            at = slice(start, start + step)
            margin = logits(data.P[:, at]) * slopes[at] + intercepts[at]
            loss = np.logaddexp(0, margin) - data.Y[:, at] * margin
            if data.known is not None:
                loss *= data.known[:, at]
            total += loss.sum(axis=1)
        return total


def _own_maps(
    x: np.ndarray,
    offset: np.ndarray,
    Y: np.ndarray,
    a: np.ndarray,
    strength: float,
    own: np.ndarray,
) -> np.ndarray:
    """(2, K) minimisers of sum_i a_i loss(y, u x + v + offset) + strength / 2 (u^2 + v^2).

    Newton's method for all labels at once, each halving its step until its loss
    falls; `own` (2, K), or (1, K) for u alone, is where it starts.
    """
    strength = max(strength, 1e-9)  # a label without positives must not run away
    z = np.stack([x, np.ones_like(x)])[: len(own)]
    active = np.arange(x.shape[1])
    result, moves = np.zeros((2, x.shape[1])), len(own)
    result[:moves] = own

    def loss(at: np.ndarray, labels: np.ndarray) -> np.ndarray:
        margin = np.einsum("qk,qik->ik", at, z[:, :, labels]) + offset[:, labels]
        losses = a[:, labels] * (np.logaddexp(0, margin) - Y[:, labels] * margin)
        total: np.ndarray = losses.sum(axis=0) + strength / 2 * (at**2).sum(axis=0)
        return total

    for _ in range(_LABEL_STEPS):
        theta, part = result[:moves, active], z[:, :, active]
        p = expit(np.einsum("qk,qik->ik", theta, part) + offset[:, active])
        residual, h = a[:, active] * (p - Y[:, active]), a[:, active] * p * (1 - p)
        gradient = np.einsum("qik,ik->kq", part, residual) + strength * theta.T
        hessian = np.einsum("qik,rik,ik->kqr", part, part, h) + strength * np.eye(moves)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        decrement = (gradient * step).sum(axis=1)
        going = decrement > _LABEL_TOL
        if not going.any():
            break
        active, theta = active[going], theta[:, going]
        step, decrement = step[going].T, decrement[going]
        size, value = np.ones(len(active)), loss(theta, active)
        for _ in range(40):
            worse = loss(theta - size * step, active) > value - 1e-4 * size * decrement + 1e-12
            if not worse.any():
                break
            size[worse] /= 2
        result[:moves, active] = theta - size * step
    return result


def mapped(P: np.ndarray, slope: np.ndarray | float, intercept: np.ndarray | float) -> np.ndarray:
    """sigma(slope logit P + intercept), some rows at a time; float64 of float64, else float32."""
    result = np.empty(P.shape, np.promote_types(P.dtype, np.float32))
    step = max(1, _BLOCK // max(1, P.shape[1]))
    for start in range(0, len(P), step):
        at = slice(start, start + step)
        result[at] = expit(logits(P[at]) * slope + intercept)
    return result
