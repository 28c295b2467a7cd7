"""What do logistic heads score out of fold, at every rate of a path?

Rows in a fold's coordinates take about as much memory as X. So all rates of two folds are gone
through before the next two, and what they say is kept by rate: coefficients where the images
are many, from which scores follow by one product, else the scores themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from heads.dropout import margin_variance, noise_averaged_probability, rho_from_dropout
from heads.features import PrincipalAxes
from heads.folds import Fold
from heads.logistic_fit import Chunk, Fitted, LogisticFit
from heads.logistic_rows import Objective
from heads.parallel import Map
from heads.selection import OutOfFold, Start
from heads.training import TrainingSet

_TOGETHER = 2  # folds whose chunks take turns: each thread makes rows, none waits for them
_AVERAGED = 1 << 20  # scores that are made at once


@dataclass(frozen=True)
class _HeldOut:
    """Some labels of one fold at one rate: margins and variances, or D and b they follow from."""

    fold: int
    labels: np.ndarray
    scores: tuple[np.ndarray, np.ndarray] | None = None
    weights: tuple[np.ndarray, np.ndarray] | None = None


class Paths:
    """Held-out scores of all folds along the path of rates.

    Parameters
    ----------
    data : TrainingSet
    folds : list of (train, test)
    objective : Objective
    run : Map
        In whose threads chunks are fitted.
    """

    def __init__(
        self, data: TrainingSet, folds: list[Fold], objective: Objective, run: Map
    ) -> None:
        self.data, self.folds, self.objective, self.run = data, folds, objective, run
        self.axes = PrincipalAxes(data)
        self.fits: list[LogisticFit] = []
        self.held: dict[float, list[_HeldOut]] = {}
        self.starts: dict[float, Start] = {}
        self.weakest: tuple[float, Start] | None = None
        self.failed: list[np.ndarray] = []
        # Numbers a label: weights of each fold, or margins, variances and the sum of weights.
        self.keep_weights = len(folds) * data.n_features < 2 * data.n_images + data.n_features

    def follow(self, dropouts: np.ndarray) -> None:
        """Go through falling rates, from the weakest so far if they are weaker still."""
        rho = rho_from_dropout(dropouts)
        start = None
        if self.weakest is not None and rho[0] < self.weakest[0]:
            start = self.weakest[1]
        for rate in dropouts.tolist():
            self.held[rate] = []
            if not self.keep_weights:
                self.starts[rate] = Start.zero(self.data)
        self.fits = []
        described: list[tuple[int, np.ndarray]] = []

        def chunks() -> Iterator[Chunk]:
            for first in range(0, len(self.folds), _TOGETHER):
                several = range(first, min(first + _TOGETHER, len(self.folds)))
                fits = [self._fit(fold) for fold in several]
                self.fits += fits
                for turn in zip_longest(*(fit.chunks for fit in fits)):
                    for fold, chunk in zip(several, turn, strict=True):
                        if chunk is not None:
                            described.append((fold, chunk.labels))
                            yield chunk

        def fit(chunk: Chunk) -> list[Fitted]:
            return chunk.fit(np.repeat(rho[:, None], len(chunk.labels), axis=1), start)

        for number, path in enumerate(self.run(fit, chunks())):
            fold, labels = described[number]
            for rate, fitted in zip(dropouts.tolist(), path, strict=True):
                self.failed.append(labels[~fitted.converged])
                self.held[rate].append(self._kept(fold, labels, fitted))
                if not self.keep_weights:
                    self.starts[rate].add(labels, fitted.D, fitted.b)
        if self.weakest is None or rho[-1] < self.weakest[0]:
            self.weakest = float(rho[-1]), self._start(float(dropouts[-1]))

    def _fit(self, fold: int) -> LogisticFit:
        """Of the training images of a fold."""
        train, test = self.folds[fold]
        scored = None if self.keep_weights else test
        return LogisticFit(self.data, train, self.objective, self.axes, scored)

    def take(self, dropout: float) -> OutOfFold:
        """What is kept of a rate, which is forgotten; it is gone through if it was not."""
        if dropout not in self.held:
            self.follow(np.array([dropout]))
        start = self._start(dropout)
        self.starts.pop(dropout, None)
        if self.weakest is not None and start is self.weakest[1]:
            start = start.copy()  # what is given away may be changed
        margin, variance = self._scores(self.held.pop(dropout), float(rho_from_dropout(dropout)))
        return OutOfFold(margin, self._probability(margin, variance), start)

    def _probability(self, margin: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """Noise-averaged ones, some rows at a time."""
        P = np.empty_like(margin)

        def average(rows: slice) -> None:
            P[rows] = noise_averaged_probability(margin[rows], variance[rows])

        step = max(1, _AVERAGED // max(1, margin.shape[1]))
        for _ in self.run(average, (slice(at, at + step) for at in range(0, len(P), step))):
            pass
        return P

    def _kept(self, fold: int, labels: np.ndarray, fitted: Fitted) -> _HeldOut:
        if fitted.margin is None or fitted.variance is None:
            return _HeldOut(fold, labels, weights=(fitted.D, fitted.b))
        return _HeldOut(fold, labels, scores=(fitted.margin, fitted.variance))

    def _scores(self, parts: list[_HeldOut], rho: float) -> tuple[np.ndarray, np.ndarray]:
        """Margins and variances (n, K) of what is kept of a rate."""
        data = self.data
        margin = np.empty((data.n_images, data.n_labels), data.dtype)
        variance = np.zeros_like(margin)
        for fit, (_, test) in zip(self.fits, self.folds, strict=True):
            margin[test] = self._untrained(fit)
        for part in parts:
            if part.scores is not None:
                at = np.ix_(self.folds[part.fold][1], part.labels)
                margin[at], variance[at] = part.scores

        def multiply(fold: int) -> None:  # rows of its own
            mine = [(p.labels, *p.weights) for p in parts if p.fold == fold and p.weights]
            for run in data.chunks(self.folds[fold][1]) if mine else ():
                X = data.view_means(run)
                for labels, D, b in mine:
                    at = np.ix_(run, labels)
                    margin[at] = X @ D.T + b
                    variance[at] = margin_variance(X, D, rho)

        for _ in self.run(multiply, range(len(self.folds))):
            pass
        for _, test in self.folds:
            base = data.base_means(test)
            if base is not None:
                margin[test] += base
        return margin, variance

    def _untrained(self, fit: LogisticFit) -> np.ndarray:
        """(K,) margins of labels that a fold does not train, W0 apart; 0 of the others."""
        margin = np.zeros(self.data.n_labels, self.data.dtype)
        margin[fit.rare] = fit.rare_bias
        if self.data.intercept_init is not None:  # b0 is in the base margins
            margin[fit.rare] -= self.data.intercept_init[fit.rare]
        return margin

    def _start(self, dropout: float) -> Start:
        """The weights of the folds at a rate."""
        if not self.keep_weights:
            return self.starts[dropout]
        start = Start.zero(self.data)
        for part in self.held[dropout]:
            assert part.weights is not None
            start.add(part.labels, *part.weights)
        return start
