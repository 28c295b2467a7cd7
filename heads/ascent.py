"""Which threshold has each class, so that the mean F-beta per image is highest?

Coordinate ascent: with all other classes' labels as they are, lowering the cut of class k past
a score gives one more label to one image, whose F-beta changes by a known amount;
a running sum over the sorted column gives the exact optimum over all cuts of
that class. The mean never falls, so classes take turns until a round gains nothing.

A cut below the lowest true score only adds wrong labels, so columns are sorted only that far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from heads.cuts import Limits, apply_threshold, best_cut
from heads.folds import Fold
from heads.inputs import LabelledRows, check_beta
from heads.metrics import fbeta_per_image

_GAIN = 1e-12  # of the mean; what is less is rounding
_ENOUGH = 1e-7  # gain of a round that is worth another
_ROUNDS = 20


@dataclass(frozen=True)
class Scored(LabelledRows):
    """Checked scores and truth of images, scored by F-beta."""

    beta: float

    @classmethod
    def of(cls, rows: LabelledRows, beta: float) -> Scored:
        """Rows with the beta that they are scored by."""
        return cls(**vars(rows), beta=check_beta(beta))

    def global_threshold(self, min_labels: int = 0, max_labels: int | None = None) -> float:
        """The best one threshold for all classes, within the scores if it is infinite."""
        threshold, _ = best_cut(self, self.beta, Limits(min_labels, max_labels))
        if not self.P.size:
            return threshold
        return float(np.clip(threshold, self.P.min(), _above(self.P.max())))

    def fbeta(self, sets: csr_matrix) -> np.ndarray:
        """(n,) F-beta of label sets."""
        return fbeta_per_image(self.truth, sets, self.beta, self.unknown, self.missed)


def _above(score: np.floating) -> float:
    return float(np.nextafter(np.float64(score), np.inf))


@dataclass
class _Column:
    """Scores of one class from the highest down, as far as a cut may go.

    Attributes
    ----------
    rows : (m,) images
    right : (m,) 0 or 1
    end : ascending numbers of labels that a cut can give, 0 first; equal scores go together
    level : threshold of each
    now : which of them is taken
    """

    rows: np.ndarray
    right: np.ndarray
    end: np.ndarray
    level: np.ndarray
    now: int


def _column(scores: np.ndarray, rows: np.ndarray, positive: np.ndarray, start: float) -> _Column:
    """Column of one class; `rows` are those where it is known, `positive` where it is true."""
    known = scores[rows].astype(np.float64)
    lowest = min(float(scores[positive].min()), start)
    reached = known >= lowest
    below = known[~reached].max(initial=-np.inf)
    rows, known = rows[reached], known[reached]
    order = np.argsort(-known, kind="stable")
    rows, known = rows[order], known[order]
    true = np.zeros(len(scores), dtype=bool)
    true[positive] = True
    after = np.append(known[1:], below)
    last = np.flatnonzero(known != after)
    upper, lower = known[last], after[last]
    middle = upper / 2 + np.where(np.isfinite(lower), lower, upper) / 2
    level = np.where(middle > lower, middle, upper)
    return _Column(
        rows=rows,
        right=true[rows].astype(np.float64),
        end=np.concatenate([[0], last + 1]),
        level=np.concatenate([[_above(known[0])], level]),
        now=int(np.searchsorted(last, np.count_nonzero(known >= start))),
    )


def _columns(data: Scored, start: float) -> dict[int, _Column]:
    """Columns of the classes with a known positive."""
    by_class = data.truth[data.weight > 0].tocsc()
    images = np.flatnonzero(data.weight > 0)
    unknown = None if data.unknown is None else csr_matrix(data.unknown).tocsc()
    columns = {}
    for k in np.flatnonzero(np.diff(by_class.indptr)).tolist():
        positive = images[by_class.indices[by_class.indptr[k] : by_class.indptr[k + 1]]]
        rows = images
        if unknown is not None:
            rows = np.setdiff1d(rows, unknown.indices[unknown.indptr[k] : unknown.indptr[k + 1]])
        columns[k] = _column(data.P[:, k], rows, positive, start)
    return columns


def class_thresholds(data: Scored, start: float) -> np.ndarray:
    """Thresholds of a local optimum of the mean F-beta per image, from one threshold for all.

    Parameters
    ----------
    data : Scored
    start : float
        The threshold that classes without a known positive keep.

    Returns
    -------
    (K,) float64
        Half way to the next score; where none is to be taken just above the
        highest. A class moves only if that gains.

    Notes
    -----
    O(n K log n) once and O(rows above the lowest positives) a round; about five rounds.
    """
    chosen = apply_threshold(data.P, start)
    if data.unknown is not None:
        chosen = csr_matrix(chosen - chosen.multiply(data.unknown).astype(bool))
        chosen.eliminate_zeros()
    size = np.asarray(chosen.sum(axis=1), dtype=np.float64).ravel()
    right = np.asarray(chosen.multiply(data.truth).sum(axis=1), dtype=np.float64).ravel()
    state = _State(
        right=right,
        size=size,
        true=data.beta**2 * (np.diff(data.truth.indptr) + data.missed),
        share=(1 + data.beta**2) * data.weight / data.weight.sum(),
        void=1 / (1 + data.beta**2),
    )
    columns = _columns(data, start)
    for _ in range(_ROUNDS):
        if not sum(state.improve(column) for column in columns.values()) > _ENOUGH:
            break
    thresholds = np.full(data.P.shape[1], start)
    for k, column in columns.items():
        if column.end[column.now] != np.count_nonzero(data.P[column.rows, k] >= start):
            thresholds[k] = column.level[column.now]
    return thresholds


@dataclass
class _State:
    """Labels that every image has: right ones and all; and what they are scored against.

    F-beta = (1 + b^2) right / (b^2 true + size), and 1 for 0 / 0.
    """

    right: np.ndarray
    size: np.ndarray
    true: np.ndarray  # b^2 |y_i|
    share: np.ndarray  # weights, of sum 1 + b^2
    void: float  # the F-beta of no true and no predicted label, over 1 + b^2

    def improve(self, column: _Column) -> float:
        """Give one class its best cut; the gain in mean F-beta."""
        rows, now = column.rows, int(column.end[column.now])
        size, hits, true = self.size[rows], self.right[rows], self.true[rows]
        size[:now] -= 1
        hits[:now] -= column.right[:now]
        below = true + size
        change = (hits + column.right) / (below + 1)
        change -= hits / np.maximum(below, 1e-300)
        change -= self.void * (below == 0)
        change *= self.share[rows]
        mean = np.concatenate([[0.0], np.cumsum(change)])[column.end]
        best = int(mean.argmax())
        gain = float(mean[best] - mean[column.now])
        if not gain > _GAIN:
            return 0.0
        column.now, end = best, int(column.end[best])
        size[:end] += 1
        hits[:end] += column.right[:end]
        self.size[rows], self.right[rows] = size, hits
        return gain


def shrunk(own: np.ndarray, start: float, positives: np.ndarray, strength: float) -> np.ndarray:
    """t + n_k / (n_k + strength) (t_k - t): a class with few positives stays near the rest."""
    if np.isinf(strength):
        return np.full(len(own), start)
    trust = positives / np.maximum(positives + strength, 1e-300)
    # The ends are given back as they are, without rounding.
    mixed: np.ndarray = np.where(trust < 1, start + trust * (own - start), own)
    return mixed


def held_out_fbeta(
    data: Scored,
    strengths: Sequence[float],
    folds: Sequence[Fold],
    min_labels: int,
    max_labels: int | None,
) -> np.ndarray:
    """(strengths, n) F-beta of each image under thresholds of the other folds.

    NaN where these have no image with weight, so that there is none.
    """
    values = np.full((len(strengths), len(data.P)), np.nan)
    for train, test in folds:
        fitted, held = data.take(train), data.take(test)
        if not fitted.weight.any():
            continue
        start = fitted.global_threshold(min_labels, max_labels)
        own, positives = class_thresholds(fitted, start), fitted.weight @ fitted.truth
        for row, strength in zip(values, strengths, strict=True):
            thresholds = shrunk(own, start, positives, strength)
            sets = apply_threshold(held.P, thresholds, min_labels, max_labels)
            row[test] = held.fbeta(sets)
    return values
