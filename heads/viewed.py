"""How does a linear head read an image of several views?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heads.experts import Linear


@dataclass(frozen=True)
class ViewedHead:
    """A linear head that reads the mean over the views and the first view.

    Attributes
    ----------
    head : Linear
    first : float
        Weight of the first view beside the mean over all, in [0, 1].
    """

    head: Linear
    first: float = 0.0

    def margins(self, X: np.ndarray) -> np.ndarray:
        """(n, K) of (n, d) or (n, v, d)."""
        return self.head.margins(viewed(X, self.first))


def viewed(X: np.ndarray, first: float) -> np.ndarray:
    """(n, d) of X (n, v, d): the mean over the views and the first one, mixed."""
    dtype = np.float64 if X.dtype == np.float64 else np.float32
    if X.ndim == 2:
        return X.astype(dtype, copy=False)
    means: np.ndarray = X.mean(axis=1, dtype=dtype)
    if first and X.shape[1] > 1:
        means = (1 - first) * means + first * X[:, 0].astype(dtype)
    return means
