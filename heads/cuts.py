"""Which cut through all scores gives the best label sets?

The rule of a *global threshold* t: an image gets each label with score >= t,
but never more than its `max_labels` highest ones and never fewer than its
`min_labels` highest ones (among equal scores the lower column goes first).

Finding t: a cut falls through all scores, from the highest down. Each score that
it passes gives one more label to one image i and changes its F-beta

    F_i = (1 + b^2) tp_i / (b^2 |y_i| + n_i),    0/0 = 1,

so the mean over images at *every* cut is a running sum of such changes. Only
scores above some tau are sorted: at any cut below tau, image i keeps the n_i
labels (tp_i of them right) that it has at tau. F_i grows with each further
label that is right and falls with each that is wrong, so that

    F_i <= (1 + b^2) P_i / (b^2 |y_i| + n_i + P_i - tp_i),    P_i = known true labels.

If the mean of this bound is not above the best mean so far, no lower cut is
better and the optimum is certified; otherwise tau is lowered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from numbers import Integral

import numpy as np
from scipy.sparse import csr_matrix

from heads.inputs import LabelledRows, Matrix, check_beta, check_rows, check_scores
from heads.metrics import fbeta, weighted_mean
from heads.ordering import at_least, contains, descending, grouped, members, reaches

_TIE = 1e-12  # means that are closer differ by rounding only
_SAMPLE = 1 << 16  # scores that are looked at to guess tau
_BLOCK = 1 << 24  # scores that are compared at once


@dataclass(frozen=True)
class Limits:
    """Least and greatest number of labels of an image."""

    min_labels: int = 0
    max_labels: int | None = None

    def __post_init__(self) -> None:
        least, most = self.min_labels, self.max_labels
        if not isinstance(least, Integral) or least < 0:
            raise ValueError(f"min_labels is {least!r}; expected a whole number, 0 or more")
        if most is not None and not (isinstance(most, Integral) and most >= max(1, least)):
            raise ValueError(
                f"max_labels is {most!r}; expected None, or at least 1 and min_labels = {least}"
            )

    def within(self, K: int) -> tuple[int, int | None]:
        """Both limits for K labels; None where the upper one does not bind."""
        upper = None if self.max_labels is None or self.max_labels >= K else self.max_labels
        return min(self.min_labels, K), upper


# ------------------------------------------------------------- the rule itself


def apply_threshold(
    P: np.ndarray,
    threshold: float | np.ndarray,
    min_labels: int = 0,
    max_labels: int | None = None,
) -> csr_matrix:
    """Label sets of the rule above.

    Parameters
    ----------
    P : (n, K) array
        Scores, finite.
    threshold : float, or (K,) array of finite ones
        Compared in double precision, whatever the dtype of P. With one for each label,
        the highest labels are those that exceed their own threshold most.
    min_labels, max_labels : int
        Least and greatest number of labels of an image (None: any).

    Returns
    -------
    csr_matrix of shape (n, K), bool
    """
    P = check_scores(P)
    n, K = P.shape
    lower, upper = Limits(min_labels, max_labels).within(K)
    thresholds = np.atleast_1d(np.asarray(threshold, dtype=np.float64))
    if not lower and upper is None:
        return _label_sets([at_least(P, thresholds)], P.shape)
    own = len(thresholds) > 1
    cut = np.zeros(1) if own else thresholds
    step = max(1, _BLOCK // max(1, K))
    entries = [np.zeros(0, np.intp)]
    for start in range(0, n, step):
        block = P[start : start + step]
        if own:  # x - t >= 0 holds exactly where x >= t does
            block = block - thresholds
        rows = np.arange(len(block))[:, None]
        if upper is None:
            chosen = reaches(block, cut)
            chosen[rows, _highest(block, lower)] = True
        else:
            top = _highest(block, upper)
            chosen = np.zeros(block.shape, dtype=bool)
            chosen[rows, top] = reaches(block[rows, top], cut) | (np.arange(upper) < lower)
        entries.append(np.flatnonzero(chosen) + start * K)
    return _label_sets(entries, P.shape)


def _label_sets(entries: list[np.ndarray], shape: tuple[int, int]) -> csr_matrix:
    """The matrix whose entries i K + k, ascending, are True."""
    row, label = np.divmod(np.concatenate(entries), max(1, shape[1]))
    indptr = np.searchsorted(row, np.arange(shape[0] + 1))
    return csr_matrix((np.ones(len(label), bool), label, indptr), shape=shape)


def _highest(P: np.ndarray, m: int) -> np.ndarray:
    """(n, m) columns of the m highest scores of each row, best first, ties to the left."""
    n, K = P.shape
    step = max(1, _BLOCK // max(1, K))
    if n > step:  # a copy of some rows at a time
        return np.concatenate([_highest(P[i : i + step], m) for i in range(0, n, step)])
    if m == 0:
        return np.zeros((n, 0), dtype=np.intp)
    if m == 1:
        return P.argmax(axis=1)[:, None]
    least = np.partition(P, K - m, axis=1)[:, K - m]
    rows, columns = np.nonzero(least[:, None] <= P)
    order = np.lexsort((columns, -P[rows, columns], rows))
    first = np.searchsorted(rows, np.arange(n))  # nonzero gives ascending rows
    rank = np.arange(len(rows)) - first[rows]
    return columns[order][rank < m].reshape(n, m)


# --------------------------------------------------------- the best threshold


@dataclass(frozen=True)
class _Truth:
    """What label sets are scored against; entries (i, k) are written as i K + k."""

    positive: np.ndarray  # ascending entries that are known to be true
    unknown: np.ndarray | None  # (n, K) bool, or ascending entries; None: none
    n_positive: np.ndarray  # (n,) of them in each row
    n_true: np.ndarray  # (n,) the same and those outside the K labels
    weights: np.ndarray  # (n,)
    beta: float

    def fbeta(self, right: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        return fbeta(right, self.n_true, predicted, self.beta)

    def only_known(self, entries: np.ndarray) -> np.ndarray:
        if self.unknown is None:
            return entries
        if self.unknown.ndim == 2:
            return entries[~self.unknown[np.divmod(entries, self.unknown.shape[1])]]
        return entries[~contains(self.unknown, entries)]


def _entries(matrix: csr_matrix) -> np.ndarray:
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    return rows * matrix.shape[1] + matrix.indices


def _truth(rows: LabelledRows, beta: float) -> tuple[np.ndarray, _Truth]:
    """Scores and truth of the rows that have weight."""
    if not len(rows.P):
        raise ValueError("P has no rows; a threshold needs at least one image")
    if not rows.weight.all():
        rows = rows.take(rows.weight > 0)
    n_positive, unknown = np.diff(rows.truth.indptr), rows.unknown
    if not (unknown is None or isinstance(unknown, np.ndarray)):
        unknown = _entries(unknown)
    return rows.P, _Truth(
        positive=_entries(rows.truth),
        unknown=unknown,
        n_positive=n_positive,
        n_true=n_positive + rows.missed,
        weights=rows.weight,
        beta=check_beta(beta),
    )


@dataclass(frozen=True)
class _Fall:
    """Known scores that the cut passes, from the highest down.

    Labels that an image has at every cut are passed first, at score infinity.
    """

    score: np.ndarray  # (N,) descending, of the dtype of P
    image: np.ndarray  # (N,)
    right: np.ndarray  # (N,) bool
    complete: bool  # False: lower scores were left out


def _falls(P: np.ndarray, truth: _Truth, limits: Limits, whole: bool = False) -> Iterator[_Fall]:
    """Longer and longer beginnings of the fall; the last (only, if `whole`) is complete."""
    n, K = P.shape
    lower, upper = limits.within(K)
    top = _highest(P, lower if upper is None else upper)
    top += np.arange(0, n * K, K)[:, None] if K else 0
    always = np.sort(top[:, :lower].ravel())
    if upper is not None:
        yield _fall(P, truth, always, np.sort(top[:, lower:].ravel()), True)
        return
    wanted = 4 * (len(truth.positive) + n)
    sample = _sample(P)
    while not whole and 4 * wanted < P.size:
        rank = max(1, len(sample) * wanted // P.size)
        tau = np.partition(sample, -rank)[-rank]
        yield _fall(P, truth, always, at_least(P, tau), False)
        wanted *= 4
    yield _fall(P, truth, always, np.arange(P.size), True)


def _sample(P: np.ndarray) -> np.ndarray:
    """Scores at regular steps that visit all columns."""
    K = P.shape[1]
    step = max(1, P.size // _SAMPLE)
    while gcd(step, K) > 1:
        step += 1
    return P[np.divmod(np.arange(0, P.size, step), K)] if P.size else P.ravel()


def _fall(
    P: np.ndarray, truth: _Truth, always: np.ndarray, passed: np.ndarray, complete: bool
) -> _Fall:
    """Sort the entries `passed`, after those that every cut has (`always`); both ascending."""
    if len(always):
        passed = passed[~contains(always, passed)]
    always, passed = truth.only_known(always), truth.only_known(passed)
    K = max(1, P.shape[1])
    scores = P[np.divmod(passed, K)]
    order = descending(scores)
    right = [members(truth.positive, entries, P.size) for entries in (always, passed)]
    entries = np.concatenate([always, passed[order]])
    at_once = np.full(len(always), np.inf, dtype=P.dtype)
    return _Fall(
        score=np.concatenate([at_once, scores[order]]),
        image=entries // K,
        right=np.concatenate([right[0], right[1][order]]),
        complete=complete,
    )


def _means(fall: _Fall, truth: _Truth) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean F-beta at every cut.

    Returns
    -------
    level : (C,) array
        Lowest score that the cut has passed, descending; infinity first.
    mean : (C,) array
    end : (C,) array
        How many entries of the fall the cut has passed.
    """
    order = grouped(fall.image)
    image, right = fall.image[order], fall.right[order]
    before = np.searchsorted(image, np.arange(len(truth.weights)))  # entries of earlier images
    total = np.concatenate([[0], np.cumsum(right)])
    n = np.arange(len(image)) - before[image]
    tp = total[:-1] - total[before[image]]
    n_true, b = truth.n_true[image], truth.beta
    change = np.empty(len(image))
    change[order] = fbeta(tp + right, n_true, n + 1, b) - fbeta(tp, n_true, n, b)
    share = truth.weights / truth.weights.sum()
    change *= share[fall.image]
    zero = np.zeros(len(share))
    mean = np.concatenate([[0.0], np.cumsum(change)]) + share @ truth.fbeta(zero, zero)
    level = np.concatenate([np.array([np.inf], fall.score.dtype), fall.score])
    # Equal scores are passed together: a cut stands only where the next score differs.
    end = np.flatnonzero(np.append(level[1:] != level[:-1], True))
    return level[end], mean[end], end


def _counts(fall: _Fall, end: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Right and predicted labels of each of the n images after `end` entries."""
    image, right = fall.image[:end], fall.right[:end]
    return np.bincount(image[right], minlength=n), np.bincount(image, minlength=n)


def between(lower: np.floating, upper: np.floating) -> float:
    """The middle of two scores as a number of their dtype, above `lower`, not above `upper`."""
    middle = upper.dtype.type(float(lower) / 2 + float(upper) / 2)
    return float(middle if lower < middle <= upper else upper)


def best_global_threshold(
    P: np.ndarray,
    Y: Matrix,
    beta: float = 2,
    mask: Matrix | None = None,
    sample_weight: np.ndarray | None = None,
    missed: np.ndarray | None = None,
    min_labels: int = 0,
    max_labels: int | None = None,
) -> tuple[float, float]:
    """Threshold that maximises the mean F-beta per image, over all cuts.

    Parameters
    ----------
    P : (n, K) array
        Scores, finite; float16, float32 or float64.
    Y : (n, K), dense or sparse, {0, 1}
        True labels; CSR is fastest.
    beta : float
    mask : (n, K), dense or sparse, optional
        True where the label is unknown, which then does not count.
    sample_weight : (n,) array, optional
    missed : (n,) array of counts, optional
        True labels of each image outside the K classes.
    min_labels, max_labels : int
        Least and greatest number of labels of an image (None: any).

    Returns
    -------
    threshold : float
        The middle between the lowest score that is taken and the highest that
        is not, of those that can change the result, as a number of P's dtype;
        infinity if nothing beyond `min_labels` is to be taken, minus infinity
        if everything up to `max_labels` is. Of equally good cuts (within
        1e-12) the highest, which gives the fewest labels.
    score : float
        Mean F-beta of the rule at that threshold on these rows.

    Raises
    ------
    ValueError
        If a score is NaN or infinite (named by row and label), or shapes differ.

    Notes
    -----
    Exact; the certificate is stated at the head of the module. One pass over P,
    then a sort of some 4 (n + number of true labels) scores; in the worst case
    O(n K log(n K)).
    """
    rows = check_rows(P, Y, mask, sample_weight, missed)
    return best_cut(rows, beta, Limits(min_labels, max_labels))


def best_cut(rows: LabelledRows, beta: float, limits: Limits) -> tuple[float, float]:
    """:func:`best_global_threshold` of rows that were checked."""
    P, truth = _truth(rows, beta)
    for fall in _falls(P, truth, limits):
        level, mean, end = _means(fall, truth)
        best = int(np.argmax(mean >= mean.max() - _TIE))
        if not fall.complete:
            if best == len(level) - 1:
                continue  # the next lower score, needed for the middle, was left out
            right, predicted = _counts(fall, len(fall.image), len(P))
            bound = truth.fbeta(truth.n_positive, predicted + truth.n_positive - right)
            if weighted_mean(bound, truth.weights) > mean[best]:
                continue
        break
    if best == 0:
        threshold = np.inf
    elif best == len(level) - 1:
        threshold = -np.inf
    else:
        threshold = between(level[best + 1], level[best])
    score = truth.fbeta(*_counts(fall, int(end[best]), len(P)))
    return threshold, weighted_mean(score, truth.weights)


def threshold_curve(
    P: np.ndarray,
    Y: Matrix,
    beta: float = 2,
    mask: Matrix | None = None,
    sample_weight: np.ndarray | None = None,
    missed: np.ndarray | None = None,
    min_labels: int = 0,
    max_labels: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean F-beta at all cuts, for plots; parameters as of :func:`best_global_threshold`.

    Returns
    -------
    threshold : (C,) array
        Each distinct score, descending, after infinity.
    mean : (C,) array
        Mean F-beta where labels with score >= threshold are taken.
    """
    P, truth = _truth(check_rows(P, Y, mask, sample_weight, missed), beta)
    (fall,) = _falls(P, truth, Limits(min_labels, max_labels), whole=True)
    level, mean, _ = _means(fall, truth)
    return level, mean
