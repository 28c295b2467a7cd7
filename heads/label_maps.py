"""Which sigmoid has each label, near the one that all labels share?

The loss of a label is a sum over images, of which only few matter. So entries that the shared
map gives little are counted in cells, each at the margin of its mean probability, whereby what
is expected of a label stays what it is; all others, and all positives, are kept one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit, logit

from heads.ordering import log_products
from heads.platt import PlattScaling, best_platt, binned, fit_platt, logits

_BLOCK = 1 << 20  # probabilities that are looked at at once
_ALL = 1 << 16  # entries that are kept one by one in any case
_LITTLE = 0.02  # probability below which entries are counted in cells
_CELLS = 48  # of each label, evenly in the fourth root of the probability
_TINY = 1e-300
_RISING = 0.05  # slope of the shared map from which on margins can be told by probabilities
_MOVES = 0.1  # expected positives from which on a label without any has a map of its own
_STEPS = 50
_HALVINGS = 40
_TOL = 1e-10  # Newton decrement, in units of log-likelihood
_HIGHEST = 79.0  # margin whose exponential can be a factor


@dataclass(frozen=True)
class Points:
    """Entries of a loss, each of one label; arrays (N,).

    Attributes
    ----------
    margin : float64
        Logits of probabilities.
    label : int
        Place in `moving`; the number of these labels for all others together.
    y : float64
        0 or 1.
    weight : float64, > 0
    moving : (m,) int
        Labels that may have a map of their own.
    n_labels : int
        K.
    """

    margin: np.ndarray
    label: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    moving: np.ndarray
    n_labels: int

    def where(self, chosen: np.ndarray) -> Points:
        """Some of the points, by a bool array (N,)."""
        return replace(
            self,
            margin=self.margin[chosen],
            label=self.label[chosen],
            y=self.y[chosen],
            weight=self.weight[chosen],
        )


@dataclass(frozen=True)
class Entries:
    """Probabilities and truth of images, of which points are made.

    Attributes
    ----------
    P : (n, K)
        Of any floating type.
    Y : (n, K) bool
    known : (n, K) bool or None
    weight : (n,)
    code : (n,) int >= 0
        Images of equal code are fitted on together or not at all.
    intercept : bool
        Whether the shared map has one.
    """

    P: np.ndarray
    Y: np.ndarray
    known: np.ndarray | None
    weight: np.ndarray
    code: np.ndarray
    intercept: bool = True

    def blocks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Rows, their logits, and the weights of their entries."""
        step = max(1, _BLOCK // max(1, self.P.shape[1]))
        for start in range(0, len(self.P), step):
            at = slice(start, start + step)
            a = np.broadcast_to(self.weight[at, None], self.P[at].shape)
            yield at, logits(self.P[at]), a if self.known is None else a * self.known[at]

    def shared(self) -> PlattScaling:
        """The map of all labels together."""
        low, high = logits(np.array([0.0, 1.0]))
        parts = ((margin, self.Y[at], a) for at, margin, a in self.blocks())
        return best_platt(*binned(parts, low, high), self.intercept)

    def moving(self, shared: PlattScaling) -> np.ndarray:
        """Labels with a positive, or with 0.1 expected ones."""
        expected = np.zeros(self.P.shape[1])
        found = np.zeros(self.P.shape[1], bool)
        for at, margin, a in self.blocks():
            expected += np.einsum("ij,ij->j", a, shared.transform(margin))
            found |= ((a > 0) & self.Y[at]).any(axis=0)
        return np.flatnonzero(found | (expected >= _MOVES))

    def counted(self) -> Counted:
        """Keep the entries that matter, and count the others."""
        shared = self.shared()
        moving = self.moving(shared)
        place = np.full(self.P.shape[1], len(moving))
        place[moving] = np.arange(len(moving))
        n_codes, size = int(self.code.max(initial=0)) + 1, (len(moving) + 1) * _CELLS
        counting = shared.slope > _RISING and _ALL < self.P.size > 2 * n_codes * size
        # Cells lie evenly in the fourth root of the probability over the label's highest
        # one, so that they are narrow where the sum is made, however an own map may move it.
        top = shared.transform(logits(self.P.max(axis=0)))
        top = np.where(place < len(moving), np.clip(top, _TINY, _LITTLE), _LITTLE)
        sums = np.zeros((2, n_codes, size if counting else 0))
        parts: list[tuple[np.ndarray, ...]] = []
        for at, margin, a in self.blocks():
            one_by_one = a > 0
            if counting:
                p = shared.transform(margin)
                few = one_by_one & (p < _LITTLE) & ~self.Y[at]
                one_by_one &= ~few
                cell = (_CELLS * np.sqrt(np.sqrt(p / top))).astype(np.intp)
                cell = np.minimum(cell, _CELLS - 1) + place * _CELLS + self.code[at, None] * size
                for total, values in zip(sums.reshape(2, -1), (a, a * p), strict=True):
                    total += np.bincount(cell[few], values[few], minlength=len(total))
            here = np.nonzero(one_by_one)
            rows, labels = here
            y = self.Y[at][here].astype(np.float64)
            parts.append((margin[here], place[labels], y, a[here], self.code[at][rows]))
        margin, label, y, a, code = map(np.concatenate, zip(*parts, strict=True))
        kept = Points(margin, label, y, a, moving, self.P.shape[1])
        return Counted(kept, code, sums, shared)


@dataclass(frozen=True)
class Counted:
    """Points that were kept, with their codes, and sums over cells of all others."""

    kept: Points
    code: np.ndarray
    sums: np.ndarray  # (2, codes, cells) weight, and weight times probability
    shared: PlattScaling

    def points(self, codes: np.ndarray) -> Points:
        """All points of the images whose code is among the chosen ones; bool (codes,)."""
        weight, total = self.sums[:, codes].sum(axis=1)
        cells = np.flatnonzero(weight)
        weight, p = weight[cells], np.maximum(total[cells] / weight[cells], _TINY)
        margin = (logit(p) - self.shared.intercept) / max(self.shared.slope, _RISING)
        kept = self.kept.where(codes[self.code])
        return Points(
            np.concatenate([kept.margin, margin]),
            np.concatenate([kept.label, cells // _CELLS]),
            np.concatenate([kept.y, np.zeros(len(cells))]),
            np.concatenate([kept.weight, weight]),
            kept.moving,
            kept.n_labels,
        )


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
    moving: np.ndarray  # (m,) bool: which of the labels `moving` of the points do here
    own: np.ndarray  # (2, K)

    @classmethod
    def shared_by_all(cls, data: Points, intercept: bool) -> LabelMaps:
        """Fit the map of all labels together."""
        margin = data.margin
        shared = fit_platt(margin[:, None], data.y[:, None], None, data.weight, intercept)
        p = shared.transform(margin)
        information = p * (1 - p) * data.weight
        total = max(float(information.sum()), 1e-300)
        centre = float(information @ margin) / total if intercept else 0.0
        scale = float(np.sqrt(information @ (margin - centre) ** 2 / total))
        expected, positives = (
            np.bincount(data.label, data.weight * values, minlength=len(data.moving) + 1)[:-1]
            for values in (p, data.y)
        )
        moving = (positives > 0) | (expected >= _MOVES)
        own = np.zeros((2, data.n_labels))
        return cls(shared, intercept, centre, max(scale, 1e-6), moving, own)

    def slopes(self) -> np.ndarray:
        """(K,) of the logit."""
        return self.shared.slope + self.own[0] / self.scale

    def intercepts(self) -> np.ndarray:
        """(K,) to be added to slope times logit."""
        return self.shared.intercept + self.own[1] - self.own[0] * self.centre / self.scale

    def improve(self, data: Points, strength: float) -> None:
        """Minimise sum_i a_i loss + strength / 2 (own slope^2 + own offset^2), label by label.

        Newton's method for all labels at once, from where the maps are, each halving its step
        until its loss falls.
        """
        labels = data.moving[self.moving]
        some = data.where(np.append(self.moving, False)[data.label])
        problem = _Problem(
            x=(some.margin - self.centre) / self.scale,
            offset=self.shared.slope * some.margin + self.shared.intercept,
            y=some.y,
            weight=some.weight,
            label=(np.cumsum(self.moving) - 1)[some.label],
            n_labels=len(labels),
            strength=max(strength, 1e-9),  # a label without positives must not run away
            moves=2 if self.intercept else 1,
        )
        value = problem.loss(self.own[:, labels])
        for _ in range(_STEPS):
            step, decrement = problem.newton(self.own[:, labels])
            going = decrement > _TOL
            if not going.any():
                break
            labels, problem = labels[going], problem.only(going)
            step, decrement, value = step[:, going], decrement[going], value[going]
            enough = value + 1e-12 * (1 + np.abs(value))
            size = np.ones(len(labels))
            for _ in range(_HALVINGS):
                trial = self.own[:, labels] - size * step
                reached = problem.loss(trial)
                worse = reached > enough - 1e-4 * size * decrement
                if not worse.any():
                    break
                size[worse] /= 2
            self.own[:, labels], value = trial, reached


@dataclass(frozen=True)
class _Problem:
    """The loss of labels 0 ... n_labels - 1 as a function of their own parts (2, n_labels)."""

    x: np.ndarray
    offset: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    label: np.ndarray
    n_labels: int
    strength: float
    moves: int  # 1: the offset stays

    def only(self, labels: np.ndarray) -> _Problem:
        """That of some labels, by a bool array, with new numbers."""
        if labels.all():
            return self
        at = labels[self.label]
        return replace(
            self,
            x=self.x[at],
            offset=self.offset[at],
            y=self.y[at],
            weight=self.weight[at],
            label=(np.cumsum(labels) - 1)[self.label[at]],
            n_labels=int(labels.sum()),
        )

    def _sums(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.label, values, minlength=self.n_labels)

    def _margin(self, own: np.ndarray) -> np.ndarray:
        margin: np.ndarray = own[0][self.label] * self.x + self.offset
        return margin + own[1][self.label] if self.moves == 2 else margin

    def loss(self, own: np.ndarray) -> np.ndarray:
        """(n_labels,) penalised losses."""
        margin = self._margin(own)
        losses = self.weight * (np.logaddexp(0, margin) - self.y * margin)
        total: np.ndarray = self._sums(losses) + self.strength / 2 * (own**2).sum(axis=0)
        return total

    def newton(self, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Newton's steps (2, n_labels), to be subtracted, and their decrements."""
        p = expit(self._margin(own))
        residual = self.weight * (p - self.y)
        h = self.weight * p * (1 - p)
        hx = h * self.x
        slope = self._sums(residual * self.x) + self.strength * own[0]
        a = self._sums(hx * self.x) + self.strength
        if self.moves == 1:
            return np.stack([slope / a, np.zeros_like(a)]), slope**2 / a
        offset = self._sums(residual) + self.strength * own[1]
        b, c = self._sums(hx), self._sums(h) + self.strength
        determinant = np.maximum(a * c - b * b, 1e-14 * a * c)
        step = np.stack([c * slope - b * offset, a * offset - b * slope]) / determinant
        return step, slope * step[0] + offset * step[1]


def image_losses(
    P: np.ndarray,
    truth: csr_matrix,
    known: np.ndarray | None,
    maps: Sequence[tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """(S, n) log-loss of each image, summed over known labels, of S maps (slopes, intercepts).

    Each image by itself: probabilities (n, K), truth (n, K) and known (n, K) bool or None.
    """
    losses = np.empty((len(maps), len(P)))
    step = max(1, _BLOCK // max(1, P.shape[1]))
    for start in range(0, len(P), step):
        at = slice(start, start + step)
        logit_p = logits(P[at])
        rows, labels = truth[at].nonzero()
        for row, (slopes, intercepts) in zip(losses, maps, strict=True):
            margin = logit_p * slopes
            margin += intercepts
            true = np.bincount(rows, margin[rows, labels], minlength=len(margin))
            row[at] = _softplus_sums(margin, None if known is None else known[at]) - true
    return losses


def _softplus_sums(margin: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    """(n,) sums of log(1 + e^margin) over known labels; one logarithm of some factors each."""
    beyond = np.zeros(len(margin))
    if margin.max(initial=0) > _HIGHEST:
        excess = np.maximum(margin - _HIGHEST, 0)
        beyond = (excess if known is None else excess * known).sum(axis=1)
        margin = np.minimum(margin, _HIGHEST)
    factors = np.exp(margin)
    if known is not None:
        factors *= known
    factors += 1
    return log_products(factors) + beyond
