"""How good are label sets and probabilities, image by image and label by label?

In all functions Y is the truth: (n, K), dense or sparse, {0, 1}. An entry is
unknown where `mask` is True or a dense Y is NaN; unknown entries count
neither as truth nor as prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix

from heads.inputs import (
    LabelledRows,
    Matrix,
    check_beta,
    check_boolean,
    check_missed,
    check_rows,
    check_truth,
    check_weights,
    without,
)
from heads.ordering import log_products, single

_BLOCK = 1 << 22  # entries of P that are held in float64 at once


# ---------------------------------------------------------------- label sets


def fbeta(
    right: np.ndarray, true: np.ndarray, predicted: np.ndarray, beta: float, empty: float = 1.0
) -> np.ndarray:
    """F-beta from counts: (1 + b^2) right / (b^2 true + predicted); `empty` where 0/0."""
    below = beta**2 * true + predicted
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, (1 + beta**2) * right / below, empty)


def _counts(
    Y: Matrix, Yhat: Matrix, mask: Matrix | None
) -> tuple[csr_matrix, csr_matrix, csr_matrix]:
    """Right, true and predicted entries, the unknown ones left out; (n, K) CSR each."""
    truth, unknown = check_truth(Y, mask)
    predicted = csr_matrix(check_boolean(Yhat, "Yhat"), dtype=np.float64)
    if predicted.shape != truth.shape:
        raise ValueError(f"Yhat has shape {predicted.shape}, but Y has shape {truth.shape}")
    predicted = without(predicted, unknown)
    return csr_matrix(truth.multiply(predicted)), truth, predicted


def _sum(matrix: csr_matrix, axis: int) -> np.ndarray:
    return np.asarray(matrix.sum(axis=axis)).ravel()


def fbeta_per_image(
    Y: Matrix,
    Yhat: Matrix,
    beta: float = 2,
    mask: Matrix | None = None,
    missed: np.ndarray | None = None,
    empty: float = 1.0,
) -> np.ndarray:
    """F-beta of each image: (1 + b^2) TP_i / (b^2 |y_i| + |yhat_i|).

    Parameters
    ----------
    Y, Yhat : (n, K), dense or sparse, bool or {0, 1}
        True and predicted labels. Sparse input is never made dense.
    beta : float
        Recall counts beta times as much as precision.
    mask : (n, K), dense or sparse, optional
        True where the label is unknown.
    missed : (n,) array of counts, optional
        True labels of each image outside the K classes; added to |y_i|.
    empty : float
        Score of an image that has neither true nor predicted labels.

    Returns
    -------
    ndarray of shape (n,), float64

    Raises
    ------
    ValueError
        If shapes disagree or Y holds anything but 0, 1 and NaN.
    """
    right, truth, predicted = _counts(Y, Yhat, mask)
    true = _sum(truth, 1) + check_missed(missed, truth.shape[0])
    return fbeta(_sum(right, 1), true, _sum(predicted, 1), check_beta(beta), empty)


def mean_fbeta(
    Y: Matrix,
    Yhat: Matrix,
    beta: float = 2,
    mask: Matrix | None = None,
    missed: np.ndarray | None = None,
    empty: float = 1.0,
    sample_weight: np.ndarray | None = None,
) -> float:
    """Weighted mean of :func:`fbeta_per_image` over images.

    Parameters
    ----------
    Y, Yhat, beta, mask, missed, empty
        See :func:`fbeta_per_image`.
    sample_weight : (n,), optional
        What each image counts, >= 0.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If shapes disagree, Y holds anything but 0, 1 and NaN, or there is no image.

    Examples
    --------
    >>> mean_fbeta(np.array([[1, 0], [1, 1]]), np.array([[1, 1], [1, 1]]))
    0.9166666666666667
    """
    values = fbeta_per_image(Y, Yhat, beta, mask, missed, empty)
    return weighted_mean(values, check_weights(sample_weight, len(values)))


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """sum_i a_i v_i / sum_i a_i of at least one value."""
    if not len(values):
        raise ValueError("there are no images; a mean needs at least one")
    return float(weights @ values / weights.sum())


def macro_fbeta(
    Y: Matrix,
    Yhat: Matrix,
    beta: float = 2,
    mask: Matrix | None = None,
    empty: float = 1.0,
    sample_weight: np.ndarray | None = None,
) -> float:
    """Mean over classes of the F-beta of each; `empty` for one neither true nor predicted."""
    counts = _counts(Y, Yhat, mask)
    weights = check_weights(sample_weight, counts[0].shape[0])
    right, true, predicted = (matrix.T @ weights for matrix in counts)
    values = fbeta(right, true, predicted, check_beta(beta), empty)
    return weighted_mean(values, np.ones(len(values)))


def micro_fbeta(
    Y: Matrix,
    Yhat: Matrix,
    beta: float = 2,
    mask: Matrix | None = None,
    missed: np.ndarray | None = None,
    empty: float = 1.0,
    sample_weight: np.ndarray | None = None,
) -> float:
    """F-beta of the counts summed over images and classes; `missed` adds to the true ones."""
    counts = _counts(Y, Yhat, mask)
    weights = check_weights(sample_weight, counts[0].shape[0])
    right, true, predicted = (weights @ _sum(matrix, 1) for matrix in counts)
    true = true + weights @ check_missed(missed, len(weights))
    return float(fbeta(right, true, predicted, check_beta(beta), empty))


# -------------------------------------------------------------------- scores


def average_precision(
    Y: Matrix,
    P: np.ndarray,
    average: Literal["macro", "micro"] | None = "macro",
    mask: Matrix | None = None,
    sample_weight: np.ndarray | None = None,
) -> float | np.ndarray:
    """Average precision, sum_j (R_j - R_{j-1}) Prec_j over the distinct scores of positives.

    Parameters
    ----------
    Y : (n, K), dense or sparse
    P : (n, K), dense
        Any scores; only their order counts, equal ones move together.
    average : {"macro", "micro", None}
        Mean over classes, all entries as one list, or each class by itself.
    mask, sample_weight : optional
        As everywhere in this module.

    Returns
    -------
    float, or ndarray of shape (K,)
        A class without a known positive has no average precision: it is NaN,
        and left out of the macro mean (NaN if no class has one).

    Notes
    -----
    O(n K) to leave out what is below the lowest score of a positive, and O(m log m) for the
    m scores above; some labels or rows at a time.
    """
    rows = check_rows(P, Y, mask, sample_weight)
    if average == "micro":
        return _micro_precision(rows)
    if average not in ("macro", None):
        raise ValueError(f"average is {average!r}; expected 'macro', 'micro' or None")
    K = rows.P.shape[1]
    columns, known, weights = rows.truth.tocsc(), rows.known(), _weights(rows.weight)
    values = np.full(K, np.nan)
    step = max(1, _BLOCK // max(1, len(rows.P)))
    for start in range(0, K, step):  # labels side by side, so that memory is read in order
        scores = single(np.ascontiguousarray(rows.P[:, start : start + step].T))
        for label, of_label in enumerate(scores, start):
            at = columns.indices[columns.indptr[label] : columns.indptr[label + 1]]
            if len(at):
                some = slice(None) if known is None else known[:, label]
                w = weights[some] if isinstance(weights, np.ndarray) else weights
                values[label] = _precision(of_label[at], rows.weight[at], [(of_label[some], w)])
    if average is None:
        return values
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else np.nan


def _weights(weight: np.ndarray) -> float | np.ndarray:
    """One number where all are equal: then they need not be sorted with the scores."""
    same = len(weight) and (weight == weight[0]).all()
    return float(weight[0]) if same else weight


def _micro_precision(rows: LabelledRows) -> float:
    at, weights = rows.truth.nonzero(), _weights(rows.weight)
    step = max(1, _BLOCK // max(1, rows.P.shape[1]))

    def parts() -> Iterator[tuple[np.ndarray, float | np.ndarray]]:
        for start in range(0, len(rows.P), step):
            some = slice(start, start + step)
            scores, known = single(rows.P[some]), rows.known(some)
            w = weights
            if isinstance(w, np.ndarray):
                w = np.repeat(w[some, None], scores.shape[1], axis=1)
                w = w.ravel() if known is None else w[known]
            yield scores.ravel() if known is None else scores[known], w

    return _precision(single(rows.P[at]), rows.weight[at[0]], parts())


def _precision(
    positive: np.ndarray,
    positive_weight: np.ndarray,
    parts: Iterable[tuple[np.ndarray, float | np.ndarray]],
) -> float:
    """Average precision of a list of scores; `positive` are those among `parts` that are true."""
    cuts = np.unique(positive)
    total_right = positive_weight.sum()
    if not total_right > 0:
        return np.nan
    right = _reached(cuts, positive, positive_weight)
    chosen = np.zeros(len(cuts))
    for scores, weights in parts:
        chosen += _reached(cuts, scores, weights)
    gained = right - np.append(right[1:], 0)
    use = gained > 0  # a cut that only rows of weight zero reach
    return float(gained[use] @ (right[use] / chosen[use]) / total_right)


def _reached(cuts: np.ndarray, scores: np.ndarray, weights: float | np.ndarray) -> np.ndarray:
    """Weight of the scores that are at least each of the ascending cuts."""
    above = scores >= cuts[0]
    if not isinstance(weights, np.ndarray):
        ordered = np.sort(scores[above])
        return weights * (len(ordered) - np.searchsorted(ordered, cuts))
    bins = np.searchsorted(cuts, scores[above], side="right") - 1
    counts = np.bincount(bins, weights[above], minlength=len(cuts))
    return counts[::-1].cumsum()[::-1]


def log_loss(
    Y: Matrix,
    P: np.ndarray,
    mask: Matrix | None = None,
    sample_weight: np.ndarray | None = None,
) -> float:
    """Mean over known entries of -y log p - (1 - y) log(1 - p), rows weighted.

    Parameters
    ----------
    Y : (n, K), dense or sparse
        Targets in [0, 1].
    P : (n, K), dense
        Probabilities; clipped to [eps, 1 - eps], eps of their dtype but not
        coarser than that of float32.

    Raises
    ------
    ValueError
        If a probability is outside [0, 1], or no entry is known.
    """
    given = check_rows(P, Y, mask, sample_weight, probabilities=True, soft=True)
    P, truth, weights = given.P, given.truth, given.weight
    eps = min(np.finfo(P.dtype).eps, np.finfo(np.float32).eps)
    loss, count = 0.0, 0.0
    step = max(1, _BLOCK // max(1, P.shape[1]))
    for start in range(0, P.shape[0], step):
        rows = slice(start, start + step)
        p = np.clip(single(P[rows]).astype(np.float64), eps, 1 - eps)
        y = truth[rows].tocoo()
        at = p[y.row, y.col]
        counts = np.full(len(p), P.shape[1], np.float64)
        if (known := given.known(rows)) is not None:
            p *= known
            counts = known.sum(axis=1)
        per_image = -log_products(1 - p)
        per_image -= np.bincount(y.row, y.data * (np.log(at) - np.log1p(-at)), minlength=len(p))
        loss += float(weights[rows] @ per_image)
        count += float(weights[rows] @ counts)
    if not count > 0:
        raise ValueError("no entry of Y is known; a mean loss needs at least one")
    return loss / count


# ----------------------------------------------------------------- intervals


def bootstrap_interval(
    values: np.ndarray,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    random_state: int = 0,
    sample_weight: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a (weighted) mean.

    Parameters
    ----------
    values : (n,) array
        One finite value an image, as from :func:`fbeta_per_image`.
    n_resamples : int
        Rows are drawn with replacement, with their weights, that often.
    confidence : float
        Share of the resampled means inside the interval.
    random_state : int
        Seed; the same seed gives the same interval.
    groups : (n,), optional
        Images that are drawn together: pictures of one scene are not so many observations.

    Returns
    -------
    low, high : float
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values must be (n,), n >= 1, and finite; got shape {values.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1")
    weights = check_weights(sample_weight, len(values))
    if groups is not None:  # a group has its mean as value and the sum as weight
        code = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
        if len(code) != len(values):
            raise ValueError(f"groups has {len(code)} rows, but values has {len(values)}")
        total = np.bincount(code, weights)
        values = np.bincount(code, weights * values) / np.where(total > 0, total, 1)
        weights = total
    # A row without weight is no row: resamples of nothing else would have no mean.
    values, weights = values[weights > 0], weights[weights > 0]
    rng = np.random.default_rng(random_state)
    means = np.empty(n_resamples)
    for b in range(n_resamples):
        rows = rng.integers(len(values), size=len(values))
        means[b] = weighted_mean(values[rows], weights[rows])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_bootstrap_interval(
    first: np.ndarray,
    second: np.ndarray,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    random_state: int = 0,
    sample_weight: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[float, float]:
    """Bootstrap interval of mean(first - second), both scored on the same images."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"first has shape {first.shape}, second {second.shape}; pair the same images"
        )
    return bootstrap_interval(
        first - second, n_resamples, confidence, random_state, sample_weight, groups
    )
