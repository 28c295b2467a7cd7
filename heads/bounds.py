"""How good is the best cut of a candidate, and when need that not be known?

The scores of a candidate above some floor are put into bins of descending score.
Above a bin w_i wrong labels of image i are passed, and below it tp_i right ones. As

    F_i = (1 + b^2) tp_i / (b^2 |y_i| + tp_i + w_i)

grows with tp_i and falls with w_i, no cut inside the bin has a higher mean F-beta than
these counts give. Cuts below the floor are bounded alike, with all known true labels
and the wrong ones above the floor. Only bins whose bound is not below what is to be
beaten are sorted, and swept cut by cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from heads.cuts import between
from heads.ordering import grouped
from heads.screening import Truth

TIE = 1e-12  # scores that are closer differ by rounding only
SLACK = 1e-5  # of bounds, which are summed in single precision
_STEPS = 8192  # equal steps from the floor to the highest score, of which bins consist
# Ends of the bins, in labels passed, as multiples of the number that the best cut passes:
# dense around that, reaching from 0.15 to 6.7 times as many.
_ENDS = np.exp(1.9 * np.sinh(np.linspace(-2.6, 2.6, 33)) / np.sinh(2.6))


@dataclass(frozen=True)
class Best:
    """The best cut of a candidate.

    Attributes
    ----------
    score : float
        Mean F-beta.
    passed : int
        Labels that the cut passes.
    cut : float
        Scores at or above it are passed.
    """

    score: float
    passed: int
    cut: float


class Bounds:
    """What the cuts of a candidate are worth at most.

    Parameters
    ----------
    score : (E,) array
        Of which those above `floor` count; true entries come first.
    image : (E,) int64
    right : int
        How many entries are true.
    floor : float
    truth : Truth
    near : float
        About how many labels the best cut passes.

    Attributes
    ----------
    inside : (J,) float32
        No cut in the bin has a higher mean F-beta.
    below : float
        No cut below the floor has.
    """

    def __init__(
        self,
        score: np.ndarray,
        image: np.ndarray,
        right: int,
        floor: float,
        truth: Truth,
        near: float,
    ) -> None:
        self._score, self._image, self._right, self._truth = score, image, right, truth
        self._bin, self._edge = _binned(score, floor, _ENDS * near)
        bins = len(self._edge)
        cell = self._bin * len(truth.true)
        cell += image
        none = truth.single[0]
        self._tp = _running(cell[:right], bins, none)
        self._wrong = _running(cell[right:], bins, np.zeros_like(none))
        self.inside = self._means(self._tp[1:], self._wrong[:-1])
        self._all = truth.positive.astype(np.float32) + none
        self.below = -np.inf
        if np.isfinite(floor):
            self.below = float(self._means(self._all, self._wrong[-1]))

    @property
    def upper(self) -> float:
        """No cut has a higher mean F-beta."""
        return max(float(self.inside.max()), self.below) + SLACK

    def enough(self, score: float) -> float:
        """A floor below which no cut has a mean F-beta above `score`, as high as bins tell."""
        below = self._means(self._all, self._wrong[1:])
        sure = np.flatnonzero(below + SLACK <= score)
        return float(self._edge[sure[0]]) if len(sure) else -np.inf

    def _means(self, tp: np.ndarray, wrong: np.ndarray) -> np.ndarray:
        _, weighted, factor = self._truth.single
        below = wrong + weighted
        below += tp
        np.divide(tp, below, out=below)
        means: np.ndarray = below @ factor
        return means

    def best(self, least: float) -> Best | None:
        """The best cut above the floor, or None if its score is below `least`."""
        open_bins = np.flatnonzero(self.inside + SLACK >= least)
        if not len(open_bins):
            return None
        first, last = open_bins[0], open_bins[-1]
        at = np.flatnonzero((self._bin >= first) & (self._bin <= last))
        tp = np.floor(self._tp[first].astype(np.float64))
        return _swept(
            self._score[at],
            self._image[at],
            at < self._right,
            tp,
            tp + self._wrong[first],
            self._truth,
        )


def _binned(score: np.ndarray, floor: float, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bin of each score (int64), the highest first, and their lower ends.

    Scores at or below the floor are in no bin, and get the number of bins.
    """
    high = score.max(initial=floor)
    whole = not np.isfinite(floor)
    if whole:
        floor = score.min(initial=high)
    if not high > floor:
        return np.full(len(score), 0 if whole else 1), np.array([floor])
    scaled = score - floor
    scaled *= (_STEPS - 1) / (high - floor)
    np.maximum(scaled, 0, out=scaled)
    step = scaled.astype(np.int64)
    passed = np.cumsum(np.bincount(step, minlength=_STEPS)[::-1])  # from the top
    last = np.unique(np.minimum(np.searchsorted(passed, ends), _STEPS - 2))
    if whole:
        last = np.append(last, _STEPS - 1)
    table = np.searchsorted(last, np.arange(_STEPS))[::-1].copy()
    edge = floor + (_STEPS - 1 - last) * ((high - floor) / (_STEPS - 1))
    return table[step], edge


def _running(cell: np.ndarray, bins: int, start: np.ndarray) -> np.ndarray:
    """(bins + 1, n): how many entries of each image come before each bin, and after the last."""
    n = len(start)
    counts = np.empty((bins + 1, n), np.float32)
    counts[0] = start
    counts[1:] = np.bincount(cell, minlength=bins * n)[: bins * n].reshape(bins, n)
    for before, row in pairwise(counts):  # faster than numpy.cumsum along this axis
        row += before
    return counts


def _swept(
    score: np.ndarray,
    image: np.ndarray,
    right: np.ndarray,
    tp: np.ndarray,
    passed: np.ndarray,
    truth: Truth,
) -> Best:
    """The best of all cuts through some scores, below which `tp` of `passed` labels are right."""
    order = np.argsort(-score)
    score, image, right = score[order], image[order], right[order]
    order = grouped(image)
    i, r = image[order], right[order]
    first = np.empty(len(i), dtype=bool)
    first[:1] = True
    np.not_equal(i[1:], i[:-1], out=first[1:])
    new = np.flatnonzero(first)
    place = np.cumsum(first) - 1
    total = np.cumsum(r) - r
    hits = total - total[new][place] + (tp + truth.none)[i]
    below = np.arange(len(i)) - new[place] + (passed + truth.beta**2 * truth.true + truth.none)[i]
    change = np.empty(len(i))
    change[order] = ((hits + r) / (below + 1) - hits / below) * truth.factor[i]
    mean = np.empty(len(i) + 1)
    mean[0] = truth.score(tp, passed)
    np.cumsum(change, out=mean[1:])
    mean[1:] += mean[0]
    # Equal scores are passed together: a cut stands only where the next score differs.
    end = np.flatnonzero(np.concatenate([[True], score[1:] != score[:-1], [True]]))
    best = int(end[np.argmax(mean[end] >= mean[end].max() - TIE)])
    if best == 0:
        cut = float(np.nextafter(score[0], np.inf, dtype=score.dtype)) if len(score) else np.inf
    else:
        cut = between(score[min(best, len(score) - 1)], score[best - 1])
    n = len(tp)
    tp = tp + np.bincount(image[:best], right[:best], minlength=n)
    passed = passed + np.bincount(image[:best], minlength=n)
    return Best(truth.score(tp, passed), int(passed.sum()), cut)
