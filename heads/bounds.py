"""How good is the best cut of a candidate, and when need that not be known?

The scores of a candidate above some floor are put into bins of descending score.
Above a bin w_i wrong labels of image i are passed, and below it tp_i right ones. As

    F_i = (1 + b^2) tp_i / (b^2 |y_i| + tp_i + w_i)

grows with tp_i and falls with w_i, no cut inside the bin has a higher mean F-beta than
these counts give. Cuts below the floor are bounded alike, with all known true labels
and the wrong ones above the floor.

Bins whose bound is not below what is to be beaten are looked at closer. From the exact mean
before a bin on, every right label raises it at most as much as the first one of its image in
that bin, and every wrong one lowers it at least as much as the last: one number a label, summed
up in thousands of steps of score. What is still not beaten is sorted, and swept cut by cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from heads.cuts import between
from heads.ordering import grouped
from heads.screening import Labels, Truth

TIE = 1e-12  # scores that are closer differ by rounding only
SLACK = 1e-5  # of bounds, which are summed in single precision
_FEWER = 0.5  # entries are copied where so few of them are above the floor
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
    bins : (S,) int64
        Bins of the steps, which have numbers from 1 to J; 0 above the first, J + 1 below the last.
    ends : (J + 1,) int64
        Bin j consists of the steps from ends[j] up to, but without, ends[j - 1].
    """

    low: float
    scale: float
    bins: np.ndarray
    ends: np.ndarray

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
            only = 1 if whole else 2
            return cls(floor, 0.0, np.full(1, only), np.array([1, only - 1]))
        scale = (_STEPS - 1) / (high - floor)
        step = _steps(score, floor, scale, _STEPS)
        passed = np.cumsum(np.bincount(step, minlength=_STEPS)[::-1])  # from the top
        last = np.unique(np.minimum(np.searchsorted(passed, _ENDS * near), _STEPS - 2))
        if whole:
            last = np.append(last, _STEPS - 1)
        bins = np.searchsorted(last, np.arange(_STEPS))[::-1] + 1
        return cls(floor, scale, bins, np.append(_STEPS, _STEPS - 1 - last))

    @property
    def size(self) -> int:
        """J."""
        return len(self.ends) - 1

    def edge(self, j: int) -> float:
        """Lower end of a bin."""
        return float(self.low + self.ends[j] / self.scale) if self.scale else self.low

    def steps(self, score: np.ndarray) -> np.ndarray:
        """Step (int64) of each score."""
        return _steps(score, self.low, self.scale, len(self.bins))

    def part(self, first: int, last: int) -> Grid:
        """Some of the bins."""
        bins = np.clip(self.bins - (first - 1), 0, max(0, last - first + 1) + 1)
        return Grid(self.low, self.scale, bins, self.ends[first - 1 : last + 1])


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
    labels : Labels
    place : (E,) int64
        `Labels.place`, which candidates have in common.
    grid : Grid
        Of J bins.
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
        labels: Labels,
        place: np.ndarray,
        grid: Grid,
        above: np.ndarray,
        truth: Truth,
        bottom: bool,
        closed: float = -np.inf,
    ) -> None:
        self._score, self._labels, self._grid, self._truth = score, labels, grid, truth
        self._step = grid.steps(score)
        self._cell = cells(grid, self._step, place, len(truth.true))
        self._tp, self._wrong = running(self._cell, grid.size, above, truth)
        self._least = -np.inf  # some cut has this score
        self.inside = means(self._tp[1:], self._wrong[:-1], truth)
        self.outside = closed
        if bottom:
            self.outside = max(closed, float(means(truth.all, self._wrong[-1], truth)))

    @classmethod
    def alone(
        cls, score: np.ndarray, labels: Labels, floor: float, truth: Truth, near: float
    ) -> Bounds:
        """Of all scores above `floor`, in bins of their own (see :meth:`Grid.of`)."""
        n, above = len(truth.true), score > floor
        if np.count_nonzero(above) < _FEWER * len(above):
            at = np.flatnonzero(above)
            score, labels = score[at], labels.take(at)
        grid, none = Grid.of(score, floor, near), np.zeros((2, n))
        return cls(score, labels, labels.place(n), grid, none, truth, bool(np.isfinite(floor)))

    @property
    def upper(self) -> float:
        """No cut has a higher mean F-beta."""
        return max(float(self.inside.max(initial=-np.inf)), self.outside) + SLACK

    def enough(self, score: float) -> float:
        """A floor below which no cut has a mean F-beta above `score`, as high as bins tell."""
        below = means(self._truth.all, self._wrong[1:], self._truth)
        sure = np.flatnonzero(below + SLACK <= score)
        return self._grid.edge(sure[0] + 1) if len(sure) else -np.inf

    def sharpen(self, least: float) -> float:
        """Bound bins more closely where that is not below `least`; no cut has a higher score.

        Within a bin the best case is that right labels count as much as the first of their image
        does, and wrong ones as little as the last.
        """
        if least == -np.inf:
            least = float(means(self._tp, self._wrong, self._truth).max()) - SLACK
        open_bins = np.flatnonzero(self.inside + SLACK >= least)
        if len(open_bins) and self._grid.ends[-1] < self._grid.ends[0]:  # else no step is in one
            first, end = int(open_bins[0]), int(open_bins[-1]) + 1
            start, change = self._changes(first, end)
            value = change.take(self._cell)  # 0 outside of these bins
            ends, right, count = self._grid.ends, self._labels.right, len(self._grid.bins)
            rise = np.bincount(self._step[:right], value[:right], minlength=count)
            fall = np.bincount(self._step[right:], value[right:], minlength=count)
            rise, fall = (x[ends[end] : ends[first]][::-1] for x in (rise, fall))  # from the top
            own = rise + fall
            before = np.cumsum(own) - own
            begins = ends[first] - ends[first:end]
            self._least = float(start.max()) - SLACK
            start += np.maximum.reduceat(before + rise, begins) - before[begins]
            inside = self.inside[first:end]
            np.minimum(inside, start, out=inside)
        return self.upper

    def _between(self, first: int, last: int) -> np.ndarray:
        """Entries in bins, which are counted from 0 here."""
        low, high = self._grid.ends[last + 1], self._grid.ends[first]
        return np.flatnonzero((self._step >= low) & (self._step < high))

    def _changes(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Means before some bins, and (J + 2, 2, n) most change by right and wrong labels in them.

        Changes are 0 in all others; the first row is of what is above, the last of what is below.

        With u = b^2 |y| + w the mean rises by f u / (u + tp) (u + tp + 1) and falls by
        f tp / (u + tp) (u + tp + 1). The former falls with tp, and with u from
        u^2 = tp (tp + 1) on; the latter falls with u, and first rises and then falls with tp.
        """
        _, weighted, factor = self._truth.single
        tp, u = self._tp[first : end + 1], self._wrong[first : end + 1] + weighted
        tp0, tp1, u0, u1 = tp[:-1], tp[1:], u[:-1], u[1:]
        above = tp0 + u0
        least = np.maximum(u1 - 1, u0)
        least += tp0
        changes = np.zeros((self._grid.size + 2, 2, len(factor)), np.float32)
        rise, fall = changes[first + 1 : end + 1, 0], changes[first + 1 : end + 1, 1]
        np.divide(-factor * tp0, least * (least + 1), out=fall)
        if self._truth.beta >= 1:  # u^2 >= |y|^2 >= tp (tp + 1) while there are labels to pass
            np.divide(factor * u0, above * (above + 1), out=rise)
        else:
            best = np.clip(np.sqrt(tp0 * (tp0 + 1)), u0, u1)
            np.divide(factor * best, (best + tp0) * (best + tp0 + 1), out=rise)
            least += tp1 - tp0
            other = -factor * tp1 / (least * (least + 1))
            np.maximum(fall, other, out=fall)
        return (tp0 / above) @ factor, changes

    def best(self, least: float) -> Best | None:
        """The best cut in the bins, or None if its score is below `least`."""
        open_bins = np.flatnonzero(self.inside + SLACK >= max(least, self._least))
        if not len(open_bins):
            return None
        first, last = open_bins[0], open_bins[-1]
        at = self._between(first, last)
        tp = np.floor(self._tp[first].astype(np.float64))
        return _swept(
            self._score[at],
            self._labels.image[at],
            at < self._labels.right,
            tp,
            tp + self._wrong[first],
            self._truth,
        )


def cells(grid: Grid, step: np.ndarray, place: np.ndarray, n: int) -> np.ndarray:
    """Where entries in steps are counted: by bin, right ones before wrong ones, by image."""
    cell = (grid.bins * (2 * n)).take(step)
    cell += place
    return cell


def running(
    cell: np.ndarray, J: int, above: np.ndarray, truth: Truth
) -> tuple[np.ndarray, np.ndarray]:
    """(J + 1, n) right and wrong labels of each image before each bin, and after all."""
    n = len(truth.true)
    own = np.bincount(cell, minlength=(J + 2) * 2 * n)[: (J + 1) * 2 * n].astype(np.float32)
    own[: 2 * n] += above.ravel()
    own[:n] += truth.single[0]
    # A product is faster than numpy.cumsum along this axis, and exact.
    counts = _ones_below(J + 1) @ own.reshape(J + 1, 2 * n)
    return counts[:, :n], counts[:, n:]


@lru_cache
def _ones_below(size: int) -> np.ndarray:
    """Square matrix of ones below and on the diagonal: a running sum."""
    return np.tri(size, dtype=np.float32)


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
