"""What do ridge heads score at every rate, in every fold?

All labels of a fold share one system, unless they are known on different images;
it is solved on the side of rows or of features, whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from heads.dropout import rho_from_dropout
from heads.folds import Fold
from heads.moments import Block, Moments
from heads.parallel import Map
from heads.rare import squared_rare_bias, trainable
from heads.selection import OutOfFold
from heads.systems import FeatureSystem, RowSystem
from heads.training import TrainingSet, label_patterns

_PIECES = 4  # of a fold, whose moments are made side by side
_READY_BYTES = 1 << 28  # held-out scores that wait at once


class _Part:
    """Trained labels that are known on the same training images."""

    def __init__(
        self,
        data: TrainingSet,
        labels: np.ndarray,
        images: np.ndarray,
        l2: float,
        test: np.ndarray | None,
        moments: Moments | None,
    ) -> None:
        self.data, self.labels, self.images, self.l2, self.test = data, labels, images, l2, test
        self.system: RowSystem | FeatureSystem
        if len(images) * data.n_views < data.n_features:
            X, weight = data.rows(images), data.row_weight(images)
            held = None if test is None else data.view_means(test)
            self.system = RowSystem(X, residual_targets(data, images, labels), weight, l2, held)
        else:
            moments = moments or image_moments(data, images, labels, data.dtype)
            self.system = FeatureSystem(moments, l2, data.dtype)

    def _safe(self, rho: float) -> RowSystem | FeatureSystem:
        """The system, its moments made again in float64 if float32 is too coarse."""
        system = self.system
        if (
            isinstance(system, FeatureSystem)
            and system.dtype == np.float32
            and system.rounds_badly(rho)
        ):
            double = np.dtype(np.float64)
            moments = image_moments(self.data, self.images, self.labels, double)
            self.system = system = FeatureSystem(moments, self.l2, double)
        return system

    def coefficients(self, rho: float) -> tuple[np.ndarray, np.ndarray]:
        D, b = self._safe(rho).coefficients(rho)
        return D.astype(self.data.dtype), b.astype(self.data.dtype)

    def predict(self, rho: float) -> Iterator[np.ndarray]:
        """Scores of the test images, W0 apart, some rows at a time."""
        assert self.test is not None
        if isinstance(self.system, RowSystem):
            yield self.system.predict(rho)
            return
        D, b = self.coefficients(rho)
        for run in self.data.chunks(self.test):
            scores = self.data.view_means(run) @ D.T
            scores += b
            yield scores

    def held_out(self, rho: float, blocks: list[np.ndarray]) -> np.ndarray:
        """(m v, k) scores of training rows without their block, W0 apart."""
        system = self._safe(rho)
        if isinstance(system, RowSystem):
            return system.held_out(rho, blocks)
        X, weight = self.data.rows(self.images), self.data.row_weight(self.images)
        T = residual_targets(self.data, self.images, self.labels)
        return system.held_out(rho, X, T, weight, blocks)


def residual_targets(data: TrainingSet, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(m v, k) what W0, b0 leave of the targets."""
    T = data.row_targets(images, labels)
    base = data.row_base(images, labels)
    return T if base is None else T - base


def image_moments(
    data: TrainingSet, images: np.ndarray, labels: np.ndarray, dtype: np.dtype[Any]
) -> Moments:
    """Moments of the rows of `images`, chunk by chunk, with products in `dtype`."""

    def blocks() -> Iterator[Block]:
        for run in data.chunks(images):
            X = data.rows(run).astype(dtype, copy=False)
            T = residual_targets(data, run, labels).astype(dtype, copy=False)
            yield X, T, data.row_weight(run)

    return Moments.of_blocks(blocks(), _origin(data), len(labels))


def _origin(data: TrainingSet) -> np.ndarray:
    """The mean row of a few hundred images, near enough to the mean of any fold."""
    sample = np.arange(0, data.n_images, max(1, data.n_images // 512))
    return data.view_means(sample).mean(axis=0, dtype=np.float64)


@dataclass(frozen=True)
class FoldMoments:
    """Moments of a fold's training and test rows for some labels."""

    labels: np.ndarray
    train: Moments
    test: Moments


def fold_moments(
    data: TrainingSet, folds: list[Fold], labels: np.ndarray, run: Map
) -> list[FoldMoments | None]:
    """Moments of each fold's test rows, and of its training rows as sums over other folds.

    None for each fold if some fold trains among rows, on other rows than all but
    its test rows, or if labels are known on different rows.
    """
    whole = all(
        len(train) + len(test) == data.n_images and len(train) * data.n_views >= data.n_features
        for train, test in folds
    )
    if not whole or len(folds) < 2 or data.known is not None:
        return [None] * len(folds)
    # In pieces, since folds alone would not keep all cores busy.
    pieces = [piece for _, test in folds for piece in np.array_split(test, _PIECES) if len(piece)]
    made = run(lambda piece: image_moments(data, piece, labels, data.dtype), pieces)
    parts = [Moments.sum(islice(made, min(_PIECES, len(test)))) for _, test in folds]

    def of_fold(fold: int) -> FoldMoments:
        others = Moments.sum(parts[:fold] + parts[fold + 1 :])
        return FoldMoments(labels, others, parts[fold])

    return list(run(of_fold, range(len(folds))))


class RidgeFit:
    """All labels fitted on some images, at any rate.

    Parameters
    ----------
    data : TrainingSet
    images : (m,) int
        Training images.
    l2 : float
    min_positives : int
    test : (r,) int, optional
        Images that `predict` scores.
    moments : FoldMoments, optional
        Of these images and test images, for all labels that may be trained.
    """

    def __init__(
        self,
        data: TrainingSet,
        images: np.ndarray,
        l2: float,
        min_positives: int,
        test: np.ndarray | None = None,
        moments: FoldMoments | None = None,
    ) -> None:
        self.data, self.test, self.moments = data, test, moments
        trained = trainable(data, images, min_positives)
        self.rare = np.flatnonzero(~trained)
        self.rare_bias = squared_rare_bias(data, images, self.rare)
        self.parts = []
        for labels, known in label_patterns(data.known, images, np.flatnonzero(trained)):
            shared = None
            if moments is not None:
                shared = moments.train.targets(np.searchsorted(moments.labels, labels))
            self.parts.append(_Part(data, labels, known, l2, test, shared))

    def squared_error(self, rho: float) -> np.ndarray:
        """(K,) weighted sum over the test rows, from moments alone; needs one view."""
        moments, data = self.moments, self.data
        assert moments is not None
        assert self.test is not None
        errors = np.empty(data.n_labels)
        for part in self.parts:
            D, b = part.coefficients(rho)
            at = np.searchsorted(moments.labels, part.labels)
            errors[part.labels] = moments.test.targets(at).squared_error(D, b)
        scores = np.zeros((len(self.test), data.n_labels), data.dtype)
        self._score_rare(scores, data.base_means(self.test))
        left = scores[:, self.rare] - data.Y[np.ix_(self.test, self.rare)]
        errors[self.rare] = data.weight[self.test] @ (left * left)
        return errors

    def predict(self, rho: float, scores: np.ndarray) -> None:
        """Set the rows of the test images in the scores (n, K) of all images, zeros before."""
        data, test = self.data, self.test
        assert test is not None
        for part in self.parts:
            done = 0
            for some in part.predict(rho):
                images = test[done : done + len(some)]
                done += len(some)
                if len(part.labels) == data.n_labels:
                    scores[images] = some
                else:
                    scores[np.ix_(images, part.labels)] = some
        base = data.base_means(test)
        if base is None and not len(self.rare):
            return
        rows = scores[test]
        if base is not None:
            rows += base
        self._score_rare(rows, base)
        scores[test] = rows

    def _score_rare(self, scores: np.ndarray, base: np.ndarray | None) -> None:
        scores[:, self.rare] = self.rare_bias
        if base is not None:
            assert self.data.intercept_init is not None
            scores[:, self.rare] += base[:, self.rare] - self.data.intercept_init[self.rare]

    def held_out(self, rho: float) -> np.ndarray:
        """(n, K) scores of every image without its group, m held fixed.

        An image that a label did not train on has the score of the whole fit.
        """
        data = self.data
        every = np.arange(data.n_images)
        base = data.base_means(every)
        scores = np.zeros((data.n_images, data.n_labels), data.dtype)
        for part in self.parts:
            if len(part.images) < data.n_images:
                D, b = part.coefficients(rho)
                scores[:, part.labels] = data.view_means(every) @ D.T + b
            rows = part.held_out(rho, _blocks(data, part.images))
            means = rows.reshape(len(part.images), data.n_views, -1).mean(axis=1)
            scores[np.ix_(part.images, part.labels)] = means
        if base is not None:
            scores += base
        self._score_rare(scores, base)
        return scores

    def coefficients(self, rho: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """W (K, d) and b (K,) at one rate, or at one a label."""
        data = self.data
        rates = np.broadcast_to(rho, data.n_labels)
        W = np.zeros((data.n_labels, data.n_features), data.dtype)
        b = np.zeros(data.n_labels, data.dtype)
        for part in self.parts:
            for rate in np.unique(rates[part.labels]):
                D, bias = part.coefficients(float(rate))
                here = rates[part.labels] == rate
                W[part.labels[here]], b[part.labels[here]] = D[here], bias[here]
        if data.coef_init is not None and data.intercept_init is not None:
            W += data.coef_init
            b += data.intercept_init
        b[self.rare] = self.rare_bias
        return W, b


def fit_folds(
    data: TrainingSet, folds: list[Fold], l2: float, min_positives: int, run: Map
) -> list[RidgeFit]:
    """A fit on the training images of each fold that predicts its test images."""
    labels = np.flatnonzero(trainable(data, np.arange(data.n_images), min_positives))
    shared = fold_moments(data, folds, labels, run)

    def fit(index: int) -> RidgeFit:
        train, test = folds[index]
        return RidgeFit(data, train, l2, min_positives, test, shared[index])

    return list(run(fit, range(len(folds))))


def fit_whole(
    data: TrainingSet, l2: float, min_positives: int, folds: list[RidgeFit] | None = None
) -> RidgeFit:
    """A fit on all rows, from the moments of the `folds` of all rows if they have any."""
    images = np.flatnonzero(data.weight > 0)
    moments = folds[0].moments if folds else None
    if moments is not None:
        none = Moments.zero(moments.test.origin, len(moments.labels))
        moments = FoldMoments(moments.labels, moments.train + moments.test, none)
    return RidgeFit(data, images, l2, min_positives, None, moments)


class FoldScores:
    """Held-out scores of all images at a rate; rates of the grid are made several at a time.

    Folds alone would not keep all cores busy.
    """

    def __init__(
        self, data: TrainingSet, fits: list[RidgeFit], dropouts: np.ndarray, run: Map
    ) -> None:
        self.data, self.fits, self.run = data, fits, run
        self.waiting = dropouts[::-1].tolist()
        self.ready: dict[float, np.ndarray] = {}
        self.errors: dict[float, np.ndarray] = {}
        scores = data.n_images * data.n_labels * data.dtype.itemsize
        self.at_once = max(1, _READY_BYTES // max(1, scores))

    def __call__(self, dropout: float) -> OutOfFold:
        if dropout not in self.ready:
            rates = [dropout, *(p for p in self.waiting if p < dropout)][: self.at_once]
            self._make(rates if dropout in self.waiting else [dropout])
        return OutOfFold(self.ready.pop(dropout), None)

    @property
    def has_moments(self) -> bool:
        """Whether `squared_errors` can be had: the score of an image is that of its row."""
        return self.data.n_views == 1 and all(fit.moments is not None for fit in self.fits)

    def squared_errors(self, dropout: float) -> np.ndarray:
        """(folds, K) weighted sums of squared errors of held-out scores, without the scores."""
        if dropout not in self.errors:
            rates = [dropout, *(p for p in self.waiting if p < dropout)]
            self.waiting = []  # scores, if any are asked for, are those of one rate
            tasks = [(float(rho_from_dropout(p)), fit) for p in rates for fit in self.fits]
            made = self.run(lambda task: task[1].squared_error(task[0]), tasks)
            self.errors |= {p: np.stack(list(islice(made, len(self.fits)))) for p in rates}
        return self.errors[dropout]

    def _make(self, rates: list[float]) -> None:
        shape = (self.data.n_images, self.data.n_labels)
        for rate in rates:
            self.ready[rate] = np.zeros(shape, self.data.dtype)

        def predict(task: tuple[float, RidgeFit]) -> None:
            rate, fit = task
            fit.predict(float(rho_from_dropout(rate)), self.ready[rate])

        # Folds have rows of their own in the scores.
        for _ in self.run(predict, ((rate, fit) for rate in rates for fit in self.fits)):
            pass


def _blocks(data: TrainingSet, images: np.ndarray) -> list[np.ndarray]:
    """Rows of the training set `images` that are held out together."""
    rows = np.arange(len(images) * data.n_views).reshape(len(images), data.n_views)
    if data.groups is None:
        return list(rows)
    _, code = np.unique(data.groups[images], return_inverse=True)
    order = np.argsort(code, kind="stable")
    ends = np.flatnonzero(np.diff(code[order])) + 1
    return [rows[some].ravel() for some in np.split(order, ends)]
