"""Which labels are too rare to train, and what do they predict?

A label with fewer than `min_positives` positive images, or one class only,
keeps W0. All such labels share one bias shift, since theirs and the trained
labels' scores meet the same threshold; without W0 and b0 each takes its base rate.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logit

from heads.training import TrainingSet

_SHIFT_STEPS = 60
_SHIFT_TOL = 1e-6
_SHIFT_REACH = 8.0  # the longest step, so that a flat start is left in order


def trainable(data: TrainingSet, images: np.ndarray, min_positives: int) -> np.ndarray:
    """(K,) bool: labels with enough positives among `images`, and with both classes.

    An image of weight zero does not count; a soft target counts as a positive
    where it is above 0 and as a negative where it is below 1.

    Raises
    ------
    ValueError
        If `min_positives` is negative.
    """
    if min_positives < 0:
        raise ValueError(f"min_positives is {min_positives}; expected a whole number >= 0")
    images = images[data.weight[images] > 0]
    positives, negatives = np.zeros((2, data.n_labels), int)
    for run in data.chunks(images):  # a fold's targets at once may be as much as all of X
        Y = data.Y[run]
        positives += np.count_nonzero(Y, axis=0)
        known = len(run) if data.known is None else np.count_nonzero(data.known[run], axis=0)
        negatives += known - np.count_nonzero(Y >= 1, axis=0)
    return (positives >= max(1, min_positives)) & (negatives > 0)


def label_counts(
    data: TrainingSet, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted positives sum_i a_i y_ik and known images sum_i a_i; (k,) float64 each."""
    at = np.ix_(images, labels)
    weight = data.weight[images]
    positives = weight @ data.Y[at]  # in float64: few negatives must not round to none
    if data.known is None:
        return positives, np.full(len(labels), weight.sum())
    return positives, weight @ data.known[at]


def logistic_rare_bias(data: TrainingSet, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(k,) bias of rare labels: logit((n_pos + 1/2) / (n + 1)), or b0 plus a shared shift.

    The shift c minimises sum_k sum_i a_i loss(y_ik, z_ik + c) + loss(1/2, c), z
    the margins of W0, b0. The last term, one more row that is half positive,
    keeps c finite without any positive: about half a positive is expected then.
    """
    positives, total = label_counts(data, images, labels)
    if data.intercept_init is None:
        return logit((positives + 0.5) / (total + 1)).astype(data.dtype)
    if not len(labels):
        return np.empty(0, data.dtype)
    margins, weights = _rare_margins(data, images, labels)
    target = float(positives.sum()) + 0.5
    shift = _solve_shift(margins, weights, target)
    return (data.intercept_init[labels] + shift).astype(data.dtype)


def _solve_shift(margins: np.ndarray, weights: np.ndarray, target: float) -> float:
    """c with sum a sigma(z + c) + sigma(c) = target.

    Newton steps on the logarithm of the left side, which in the tail of sigma is
    linear in c; bracketed, so that they cannot run away.
    """
    shift, low, high = 0.0, -np.inf, np.inf
    weights = weights.astype(margins.dtype)
    for _ in range(_SHIFT_STEPS):
        s = expit(margins + margins.dtype.type(shift))
        extra = float(expit(shift))
        expected = _weighted_sum(weights, s) + extra
        s *= 1 - s
        slope = _weighted_sum(weights, s) + extra * (1 - extra)
        low, high = (shift, high) if expected < target else (low, shift)
        step = np.log(target / expected) * expected / slope if slope > 0 else np.inf
        following = shift + float(np.clip(step, -_SHIFT_REACH, _SHIFT_REACH))
        if not low <= following <= high:
            following = (low + high) / 2
        if abs(following - shift) < _SHIFT_TOL:
            break
        shift = following
    return shift


def _weighted_sum(weights: np.ndarray, values: np.ndarray) -> float:
    """sum of weights times values; one weight a row, or one an entry."""
    if weights.ndim == 1:
        return float((weights @ values).sum(dtype=np.float64))
    return float(np.einsum("ij,ij->j", weights, values).sum(dtype=np.float64))


def _rare_margins(
    data: TrainingSet, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(m v, k) margins of W0, b0 and their weights, (m v,) or (m v, k)."""
    margins = data.row_base(images, labels)
    assert margins is not None
    weights = data.row_weight(images)
    if data.known is None:
        return margins, weights
    known = np.repeat(data.known[np.ix_(images, labels)], data.n_views, axis=0)
    return margins, weights[:, None] * known


def squared_rare_bias(data: TrainingSet, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(k,) bias of rare labels: the weighted mean target, or b0 plus the shared mean residual.

    A label without a known image keeps b0, or zero.
    """
    positives, total = label_counts(data, images, labels)
    if data.intercept_init is None:
        return np.divide(positives, total, out=np.zeros(len(labels)), where=total > 0).astype(
            data.dtype
        )
    if not len(labels):
        return np.empty(0, data.dtype)
    margins, weights = _rare_margins(data, images, labels)
    fitted = _weighted_sum(weights.astype(margins.dtype), margins)
    whole = float(total.sum())
    shift = (float(positives.sum()) - fitted) / whole if whole > 0 else 0.0
    return (data.intercept_init[labels] + shift).astype(data.dtype)
