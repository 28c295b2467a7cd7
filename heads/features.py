"""In which coordinates is the penalty plain and the problem small?

A penalty sum_j shape_j D_j^2 is plain in features divided by sqrt(shape_j).
Solutions lie in the span of the centred rows, so n < d rows need n coordinates;
principal axes make the Gram matrix diagonal, which solvers precondition by.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


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


def scaled_coordinates(X: np.ndarray, weight: np.ndarray, shape: np.ndarray) -> Coordinates:
    """Features divided by sqrt(shape), centred about their weighted mean."""
    mean = (weight @ X / weight.sum()).astype(X.dtype)
    return Coordinates(mean, inverse_root(shape).astype(X.dtype))


def principal_coordinates(
    X: np.ndarray, weight: np.ndarray, shape: np.ndarray
) -> tuple[Coordinates, np.ndarray]:
    """Principal axes of the scaled, centred, weighted rows, and their rows Z (n, r).

    Directions in which rows do not vary, to rounding, are dropped. The Gram
    matrix is on the smaller side; O(n d min(n, d)).
    """
    scaled = scaled_coordinates(X, weight, shape)
    rows = scaled.features(X)
    weighted = rows * np.sqrt(weight).astype(X.dtype)[:, None]
    by_rows = len(X) < X.shape[1]
    gram = weighted @ weighted.T if by_rows else weighted.T @ weighted
    values, vectors = np.linalg.eigh(gram)
    kept = values > len(gram) * np.finfo(gram.dtype).eps * max(float(values[-1]), 0.0)
    axes = vectors[:, kept].T
    if by_rows:
        axes = (axes / np.sqrt(values[kept])[:, None]) @ weighted
    return Coordinates(scaled.mean, scaled.scale, axes), rows @ axes.T
