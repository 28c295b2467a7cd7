"""How much should each of some heads count in their average, by held-out margins?"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit


def stacked_weights(margins: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """(M,) weights >= 0 that add up to 1 and have the least log-loss after one sigmoid map.

    Minimises sum over known entries of loss(y, sum_m c_m margin_m + intercept) over c >= 0, and
    gives c / sum c: what c adds up to is left to the calibration that follows. Equal weights where
    no c > 0 is better than none.

    Parameters
    ----------
    margins : (M, n, K)
        Held-out: of rows that the heads were not fitted on.
    Y : (n, K)
        In [0, 1]; NaN is unknown.

    Notes
    -----
    Stacked generalisation with weights >= 0 (Wolpert 1992; Breiman 1996). O(M n K) a step.
    """
    M = len(margins)
    known = ~np.isnan(Y)
    y = Y[known].astype(np.float64)
    X = margins[:, known].astype(np.float64)
    if not len(y):
        return np.full(M, 1 / M)
    spread = float(np.sqrt((X**2).mean())) or 1.0
    X /= spread

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        z = at[:M] @ X + at[M]
        r = expit(z) - y
        gradient = np.append(X @ r, r.sum())
        return float((np.logaddexp(0, z) - y * z).mean()), gradient / len(y)

    start = np.append(np.full(M, 1 / M), 0.0)
    bounds = [(0.0, None)] * M + [(None, None)]
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-10}
    )
    c = found.x[:M]
    return c / c.sum() if c.sum() > 0 else np.full(M, 1 / M)
