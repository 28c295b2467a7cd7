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


@dataclass(frozen=True)
class Grid:
    """Bins of descending score.

    Attributes
    ----------
    low, scale : float
        A score is in step (score - low) * scale, rounded down, from 0 to the last one.
    table : (S,) int64
        From steps to bins, which have numbers from 1 on; the one after the last bin is that of
        scores too low to be in any.
    edge : (J,) array
        Lower ends of the bins.
    """

    low: float
    scale: float
    table: np.ndarray
    edge: np.ndarray

    @classmethod
    def of(cls, score: np.ndarray, floor: float, near: float) -> Grid:
        """Bins of scores above `floor`, the finer the nearer to the best cut they may be.

        `near` is about how many labels that passes.
        """
        high = score.max(initial=floor)
        whole = not np.isfinite(floor)
        if whole:
            floor = score.min(initial=high)
        if not high > floor:
            return cls(floor, 0.0, np.full(1, 1 if whole else 2), np.array([floor]))
        scale = (_STEPS - 1) / (high - floor)
        passed = np.cumsum(np.bincount(_steps(score, floor, scale, _STEPS), minlength=_STEPS)[::-1])
        last = np.unique(np.minimum(np.searchsorted(passed, _ENDS * near), _STEPS - 2))
        if whole:
            last = np.append(last, _STEPS - 1)
        table = np.searchsorted(last, np.arange(_STEPS))[::-1] + 1
        return cls(floor, scale, table, floor + (_STEPS - 1 - last) / scale)

    def steps(self, score: np.ndarray) -> np.ndarray:
        """Step (int64) of each score."""
        return _steps(score, self.low, self.scale, len(self.table))

    def bins(self, score: np.ndarray) -> np.ndarray:
        """Bin (int64) of each score."""
        return self.table.take(self.steps(score))


def _steps(score: np.ndarray, low: float, scale: float, count: int) -> np.ndarray:
    scaled = score - low
    scaled *= scale
    np.maximum(scaled, 0, out=scaled)
    np.minimum(scaled, count - 1, out=scaled)
    return scaled.astype(np.int64)


class Bounds:
    """What the cuts of a candidate are worth at most.

    Parameters
    ----------
    score : (E,) array
        True entries come first.
    image : (E,) int64
    right : int
        How many entries are true.
    grid : Grid
        Of J bins; scores above the first may be in a bin 0.
    above : (2, n) array
        How many labels of each image are passed that are not among the entries: right ones, and
        wrong ones.
    truth : Truth
    bottom : bool
        Whether cuts below the last bin count, where all labels may be right that are known to be.
    closed : float
        No other cut outside the bins has a higher mean F-beta.

    Attributes
    ----------
    inside : (J,) float32
        No cut in the bin has a higher mean F-beta.
    outside : float
        No other one has.
    """

    def __init__(
        self,
        score: np.ndarray,
        image: np.ndarray,
        right: int,
        grid: Grid,
        above: np.ndarray,
        truth: Truth,
        bottom: bool,
        closed: float = -np.inf,
    ) -> None:
        self._score, self._image, self._right, self._truth = score, image, right, truth
        self._grid, self._step = grid, grid.steps(score)
        self._bin = grid.table.take(self._step)
        self._counts = running(image, self._bin, right, len(grid.edge), above, truth)
        self.inside = means(self._counts[0, 1:], self._counts[1, :-1], truth)
        self.outside = closed
        if bottom:
            self.outside = max(closed, float(means(truth.all, self._counts[1, -1], truth)))

    @classmethod
    def alone(
        cls,
        score: np.ndarray,
        image: np.ndarray,
        right: int,
        floor: float,
        truth: Truth,
        near: float,
    ) -> Bounds:
        """Of all scores above `floor`, in bins of their own (see :meth:`Grid.of`)."""
        none, bottom = np.zeros((2, len(truth.true))), bool(np.isfinite(floor))
        return cls(score, image, right, Grid.of(score, floor, near), none, truth, bottom)

    @property
    def upper(self) -> float:
        """No cut has a higher mean F-beta."""
        return max(float(self.inside.max(initial=-np.inf)), self.outside) + SLACK

    def enough(self, score: float) -> float:
        """A floor below which no cut has a mean F-beta above `score`, as high as bins tell."""
        below = means(self._truth.all, self._counts[1, 1:], self._truth)
        sure = np.flatnonzero(below + SLACK <= score)
        return float(self._grid.edge[sure[0]]) if len(sure) else -np.inf

    def sharpen(self, least: float) -> float:
        """Bound bins more closely where that is not below `least`; no cut has a higher score.

        Within a bin the best case is that right labels count as much as the first of their image
        does, and wrong ones as little as the last.
        """
        open_bins = np.flatnonzero(self.inside + SLACK >= least)
        first, last = (int(open_bins[0]), int(open_bins[-1])) if len(open_bins) else (0, -1)
        at = np.flatnonzero((self._bin > first) & (self._bin <= last + 1))
        if len(at):
            step, right = self._step[at], int(np.searchsorted(at, self._right))
            gain, loss, start = self._changes(first, last + 1)
            cell = (self._bin[at] - (first + 1)) * gain.shape[1]
            cell += self._image[at]
            value = np.concatenate([gain.take(cell[:right]), -loss.take(cell[right:])])
            high, low = int(step.max()), int(step.min())
            place = high - step  # from the top
            change = np.bincount(place, value)
            rise = np.bincount(place[:right], value[:right], minlength=len(change))
            before = np.cumsum(change) - change
            own = self._grid.table[low : high + 1][::-1] - (first + 1)
            begins = np.flatnonzero(np.diff(own, prepend=-1))
            own = own[begins]
            start[own] += np.maximum.reduceat(before + rise, begins) - before[begins]
            inside = self.inside[first : last + 1]
            np.minimum(inside, start, out=inside)
        return self.upper

    def _changes(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(J, n) most gain by a right, and least loss by a wrong label in bins; their starts (J,).

        With u = b^2 |y| + w the mean rises by f u / (u + tp) (u + tp + 1) and falls by
        f tp / (u + tp) (u + tp + 1). The former falls with tp, and with u from
        u^2 = tp (tp + 1) on; the latter falls with u, and first rises and then falls with tp.
        """
        _, weighted, factor = self._truth.single
        tp, wrong = self._counts[:, first : end + 1]
        u, tp0 = wrong + weighted, tp[:-1]
        u0, above = u[:-1], tp0 + u[:-1]
        start = (tp0 / above) @ factor
        least = np.maximum(u[1:] - 1, u0)
        least += tp0
        loss = factor * tp0 / (least * (least + 1))
        if self._truth.beta >= 1:  # u^2 >= |y|^2 >= tp (tp + 1) while there are labels to pass
            gain = factor * u0 / (above * (above + 1))
            return gain, loss, start
        best = np.clip(np.sqrt(tp0 * (tp0 + 1)), u0, u[1:])
        gain = factor * best / ((best + tp0) * (best + tp0 + 1))
        least += tp[1:] - tp0
        return gain, np.minimum(loss, factor * tp[1:] / (least * (least + 1))), start

    def best(self, least: float) -> Best | None:
        """The best cut in the bins, or None if its score is below `least`."""
        open_bins = np.flatnonzero(self.inside + SLACK >= least)
        if not len(open_bins):
            return None
        first, last = open_bins[0], open_bins[-1]
        at = np.flatnonzero((self._bin > first) & (self._bin <= last + 1))
        tp = np.floor(self._counts[0, first].astype(np.float64))
        return _swept(
            self._score[at],
            self._image[at],
            at < self._right,
            tp,
            tp + self._counts[1, first],
            self._truth,
        )


def running(
    image: np.ndarray, bins: np.ndarray, right: int, J: int, above: np.ndarray, truth: Truth
) -> np.ndarray:
    """(2, J + 1, n) float32: right and wrong labels of each image before each bin and after all."""
    n = len(truth.true)
    cell = bins * n
    cell += image
    cell[right:] += (J + 2) * n
    counts = np.bincount(cell, minlength=2 * (J + 2) * n).reshape(2, J + 2, n)[:, :-1]
    counts = counts.astype(np.float32)
    counts[:, 0] += above
    counts[0, 0] += truth.single[0]
    for j in range(J):  # faster than numpy.cumsum along this axis
        counts[:, j + 1] += counts[:, j]
    return counts


def means(tp: np.ndarray, wrong: np.ndarray, truth: Truth) -> np.ndarray:
    """Mean F-beta from counts (..., n) of right, with `Truth.none`, and of wrong labels."""
    _, weighted, factor = truth.single
    below = wrong + weighted
    below += tp
    np.divide(tp, below, out=below)
    result: np.ndarray = below @ factor
    return result


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
    stands = np.ones(len(score) + 1, dtype=bool)
    stands[1:-1] = score[1:] != score[:-1]
    end = np.flatnonzero(stands)
    best = int(end[np.argmax(mean[end] >= mean[end].max() - TIE)])
    if best == 0:
        cut = float(np.nextafter(score[0], np.inf, dtype=score.dtype)) if len(score) else np.inf
    else:
        cut = between(score[min(best, len(score) - 1)], score[best - 1])
    n = len(tp)
    tp = tp + np.bincount(image[:best], right[:best], minlength=n)
    passed = passed + np.bincount(image[:best], minlength=n)
    return Best(truth.score(tp, passed), int(passed.sum()), cut)
