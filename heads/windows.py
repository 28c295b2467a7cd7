"""Which scores decide between models that are alike, once one candidate is known to be good?

Of models that score an entry between `low` and `high`, all candidates pass at least the labels
that they would with `low`, and at most those that they would with `high`. Cuts at which not even
right labels at their highest and wrong ones at their lowest scores would make a candidate
good enough need not be looked at; nor do entries that are above all, or below all of the others.
With every model added the sum moves less, and fewer entries are left.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from heads.bounds import SLACK, Bounds, Grid, cells, means, running
from heads.screening import Labels, Truth

_EACH = 30  # models of a group, about
_LOOK = 2000  # entries that models are grouped by


def groups_of(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Group of each of M models, from 0 up; those in one score entries (M, E) of domains alike."""
    M = len(scores[0])
    count = -(-M // _EACH)
    if count < 2 or not any(score.shape[1] for score in scores):
        return np.zeros(M, dtype=np.intp)
    seen = []
    for score in scores:
        E = score.shape[1]
        seen.append(score[:, np.unique(np.linspace(0, E - 1, min(E, _LOOK)).astype(np.intp))])
    alike = KMeans(count, n_init=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of models that are all but the same
        found = alike.fit_predict(np.concatenate(seen, axis=1).astype(np.float32))
    groups: np.ndarray = np.unique(found, return_inverse=True)[1]  # such may leave groups empty
    return groups


class Window:
    """The cuts that may be as good as `least` for some model of a group.

    Parameters
    ----------
    total : (E,) array
        Sum of the models chosen so far.
    labels : Labels
    low, high : (E,) arrays
        Least and highest score of the group's models.
    grid : Grid
        Of whatever candidate.
    bottom : bool
        Whether there are entries beside these, all of them below the last bin.
    least : float
    truth : Truth
    """

    def __init__(
        self,
        total: np.ndarray,
        labels: Labels,
        low: np.ndarray,
        high: np.ndarray,
        grid: Grid,
        bottom: bool,
        least: float,
        truth: Truth,
    ) -> None:
        n, right = len(truth.true), labels.right
        highest, lowest = grid.steps(total + high), grid.steps(total + low)
        at_best = np.concatenate([highest[:right], lowest[right:]])
        place = labels.place(n)
        tp, wrong = running(cells(grid, at_best, place, n), grid.size, np.zeros((2, n)), truth)
        most = means(tp[1:], wrong[:-1], truth)
        most = np.append(most, means(truth.all, wrong[-1], truth) if bottom else -np.inf)
        beaten = most + SLACK < least
        still = np.flatnonzero(~beaten) + 1
        first, last = (int(still[0]), int(still[-1])) if len(still) else (grid.size + 1, grid.size)
        self._closed = float(most[beaten].max(initial=-np.inf))
        self._bottom, last = last > grid.size, min(last, grid.size)
        self._grid = grid.part(first, last)
        passes = lowest >= grid.ends[first - 1]
        self._at = np.flatnonzero(~passes & (highest >= grid.ends[last]))
        self._above = np.bincount(place[passes], minlength=2 * n)
        self._total, self._labels = total[self._at], labels.take(self._at)
        self._place, self._truth = place[self._at], truth

    def bounds(self, score: np.ndarray) -> Bounds:
        """Of the candidate with one more model, which scores the entries (E,) like this."""
        return Bounds(
            self._total + score.take(self._at),
            self._labels,
            self._place,
            self._grid,
            self._above,
            self._truth,
            self._bottom,
            self._closed,
        )
