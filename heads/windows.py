"""Which scores decide between models that are alike, once one candidate is known to be good?

Of models that score an entry between `low` and `high`, all candidates pass at least the labels
that they would with `low`, and at most those that they would with `high`. Cuts at which not even
right labels at their highest and wrong ones at their lowest scores would make a candidate
good enough need not be looked at; nor do entries that are above all, or below all of the others.
With every model added the sum moves less, and fewer entries are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans

from heads.bounds import SLACK, Bounds, Grid, means, running
from heads.screening import Truth

_EACH = 30  # models of a group, about
_LOOK = 2000  # entries that models are grouped by


def groups_of(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Group of each of M models; those in one score entries (M, E) alike, of all domains."""
    M = len(scores[0])
    count = -(-M // _EACH)
    if count < 2:
        return np.zeros(M, dtype=np.intp)
    seen = []
    for score in scores:
        E = score.shape[1]
        seen.append(score[:, np.unique(np.linspace(0, E - 1, min(E, _LOOK)).astype(np.intp))])
    alike = KMeans(count, n_init=1, random_state=0)
    groups: np.ndarray = alike.fit_predict(np.concatenate(seen, axis=1).astype(np.float32))
    return groups


@dataclass(frozen=True)
class Scores:
    """Entries of one domain, true ones first: sums so far (E,), images, how many are true."""

    total: np.ndarray
    image: np.ndarray
    right: int


class Window:
    """The cuts that may be as good as `least` for some model of a group.

    Parameters
    ----------
    known : Scores
    low, high : (E,) arrays
        Least and highest score of the group's models.
    grid : Grid
        Of whatever candidate.
    bottom : bool
        Whether there are entries beside the known ones, all of them below the last bin.
    least : float
    truth : Truth
    """

    def __init__(
        self,
        known: Scores,
        low: np.ndarray,
        high: np.ndarray,
        grid: Grid,
        bottom: bool,
        least: float,
        truth: Truth,
    ) -> None:
        image, right, J = known.image, known.right, len(grid.edge)
        highest, lowest = grid.bins(known.total + high), grid.bins(known.total + low)
        none = np.zeros((2, len(truth.true)))
        place = np.concatenate([highest[:right], lowest[right:]])
        tp, wrong = running(image, place, right, J, none, truth)
        most = means(tp[1:], wrong[:-1], truth)
        most = np.append(most, means(truth.all, wrong[-1], truth) if bottom else -np.inf)
        beaten = most + SLACK < least
        self.closed = float(most[beaten].max(initial=-np.inf))
        still = np.flatnonzero(~beaten) + 1
        self.first, last = (int(still[0]), int(still[-1])) if len(still) else (J + 1, J)
        self._bottom, last = last > J, min(last, J)
        self.bins = max(0, last - self.first + 1)
        self.at = np.flatnonzero((highest <= last) & (lowest >= self.first))
        passed = lowest < self.first
        self._above = np.array(
            [
                np.bincount(part[sure], minlength=len(truth.true))
                for part, sure in ((image[:right], passed[:right]), (image[right:], passed[right:]))
            ]
        )
        table = np.clip(grid.table - (self.first - 1), 0, self.bins + 1)
        self._grid = Grid(grid.low, grid.scale, table, grid.edge[self.first - 1 : last])
        self._total, self._image = known.total[self.at], image[self.at]
        self._right = int(np.searchsorted(self.at, right))
        self._truth = truth

    def bounds(self, score: np.ndarray) -> Bounds:
        """Of the candidate with one more model, which scores the entries (E,) like this."""
        total = self._total + score.take(self.at)
        return Bounds(
            total,
            self._image,
            self._right,
            self._grid,
            self._above,
            self._truth,
            self._bottom,
            self.closed,
        )
