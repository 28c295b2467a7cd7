"""In which coordinates is the penalty plain and the problem small?

A penalty sum_j shape_j D_j^2 is plain in features divided by sqrt(shape_j).
Solutions lie in the span of the centred rows, so n < d rows need n coordinates;
principal axes make the Gram matrix diagonal, which solvers precondition by.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np

from heads.dropout import second_moments
from heads.lapack import eigh
from heads.training import TrainingSet

_CHEAP = 256  # features, of which any part of the rows has axes of its own


@dataclass(frozen=True)
class Coordinates:
    """z = basis (x - mean), and D = W basis.

    Attributes
    ----------
    mean : (d,)
    scale : (d,)
        Of the features, which may be 0.
    axes : (r, d) or None
        Orthonormal rows; None: the features themselves.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray | None = None

    @cached_property
    def basis(self) -> np.ndarray:
        """(r, d), or (d,) for a diagonal one."""
        return self.scale if self.axes is None else self.axes * self.scale

    def features(self, X: np.ndarray) -> np.ndarray:
        """Rows (n, r) of Z for rows (n, d) of X."""
        centred = X - self.mean
        if self.axes is None:
            centred *= self.scale
            return centred
        return centred @ self.basis.T

    def coefficients(self, W: np.ndarray) -> np.ndarray:
        """D (k, d) for W (k, r)."""
        return W * self.basis if self.axes is None else W @ self.basis

    def weights(self, D: np.ndarray) -> np.ndarray:
        """W (k, r) whose D is nearest in the scaled features."""
        scaled = np.divide(D, self.scale, out=np.zeros_like(D), where=self.scale > 0)
        return scaled if self.axes is None else scaled @ self.axes.T


def inverse_root(shape: np.ndarray) -> np.ndarray:
    """1 / sqrt(shape), and 0 where shape is 0: a feature that is always 0 gets no weight."""
    root = np.sqrt(shape)
    return np.divide(1, root, out=np.zeros_like(root), where=root > 0)


def feature_moments(data: TrainingSet, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and raw second moments m (d,) of the rows of `images`, float64 each.

    A few thousand rows at a time: X may be larger than memory.
    """
    total, m = np.zeros(data.n_features), np.zeros(data.n_features)
    for run in data.chunks(images):
        X, weight = data.rows(run), data.row_weight(run)
        total += weight.astype(X.dtype) @ X
        m += second_moments(X, weight)
    return total / data.weight[images].sum(), m


def scaled_coordinates(mean: np.ndarray, shape: np.ndarray, dtype: np.dtype[Any]) -> Coordinates:
    """Features divided by sqrt(shape), centred."""
    return Coordinates(mean.astype(dtype), inverse_root(shape).astype(dtype))


def features_of(data: TrainingSet, images: np.ndarray, at: Coordinates) -> np.ndarray:
    """Z (n, r) of the rows of `images`, made in runs that take little memory."""
    size = data.n_features if at.axes is None else len(at.axes)
    Z = np.empty((len(images) * data.n_views, size), data.dtype)
    done = 0
    for run in data.chunks(images):
        part = at.features(data.rows(run))
        Z[done : done + len(part)] = part
        done += len(part)
    return Z


def principal_axes(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Orthonormal principal axes (r, d) of centred rows (n, d), weighted.

    Directions in which rows do not vary, to rounding, are dropped. The Gram matrix is
    on the smaller side; O(n d min(n, d)).
    """
    weighted = rows * np.sqrt(weight).astype(rows.dtype)[:, None]
    by_rows = rows.shape[0] < rows.shape[1]
    gram = weighted @ weighted.T if by_rows else weighted.T @ weighted
    values, vectors = eigh(gram)
    kept = values > len(gram) * np.finfo(gram.dtype).eps * max(float(values[-1]), 0.0)
    axes = vectors[:, kept].T
    return (axes / np.sqrt(values[kept])[:, None]) @ weighted if by_rows else axes


class PrincipalAxes:
    """Principal axes of all rows of a training set, for folds and other parts of them.

    Where there are more rows than features these axes are nearly a fold's own, which
    is enough to precondition by, and are made once.
    """

    def __init__(self, data: TrainingSet) -> None:
        self.data = data
        self.made: dict[bool, np.ndarray] = {}
        self.lock = Lock()

    def turn(
        self, scaled: Coordinates, images: np.ndarray, divided: bool, precise: bool
    ) -> Coordinates:
        """Scaled coordinates of `images` turned to principal axes.

        Under a small penalty, or with features of unlike scale, directions count in
        which rows hardly vary: they must be `precise`, by products in float64.
        `divided` tells whether the features were divided by sqrt(m).
        """
        data = self.data
        n_rows = len(images) * data.n_views
        if n_rows >= data.n_features >= _CHEAP and not precise:
            axes = self._of_all(divided)
        else:
            rows = features_of(data, images, scaled)
            exact = rows.astype(np.float64) if precise else rows
            axes = principal_axes(exact, data.row_weight(images)).astype(rows.dtype, copy=False)
        return Coordinates(scaled.mean, scaled.scale, axes)

    def _of_all(self, divided: bool) -> np.ndarray:
        """A whole basis: the span of a fold's rows is not that of all, differently scaled."""
        with self.lock:
            if divided not in self.made:
                data = self.data
                images = np.flatnonzero(data.weight > 0)
                mean, m = feature_moments(data, images)
                shape = m if divided else np.ones_like(m)
                scaled = scaled_coordinates(mean, shape, data.dtype)
                gram = np.zeros((len(m), len(m)), data.dtype)
                for run in data.chunks(images):
                    rows = scaled.features(data.rows(run))
                    rows *= np.sqrt(data.row_weight(run)).astype(rows.dtype)[:, None]
                    gram += rows.T @ rows
                self.made[divided] = eigh(gram)[1].T
            return self.made[divided]
