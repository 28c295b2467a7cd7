"""What does dropout on the features of a linear head do to margins and losses?

Inverted dropout: x~ = x xi / (1 - p), xi ~ Bernoulli(1 - p) for each feature
apart, so that E x~ = x and Var x~_j = rho x_j^2 with rho = p / (1 - p).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.special import expit

from heads.inputs import refuse_no_list


def rho_from_dropout(dropout: np.ndarray | float) -> np.ndarray:
    """rho = p / (1 - p), the variance of a feature's noise over its square."""
    p = np.asarray(dropout, dtype=np.float64)
    return p / (1 - p)


def dropout_from_rho(rho: np.ndarray | float) -> np.ndarray:
    """p = rho / (1 + rho)."""
    rho = np.asarray(rho, dtype=np.float64)
    return rho / (1 + rho)


def check_dropout(dropout: float) -> float:
    """`dropout` if it is a rate p in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; expected a rate in [0, 1)")
    return float(dropout)


def check_l2(l2: float) -> float:
    """`l2` if it is a finite number >= 0."""
    if not 0 <= l2 < np.inf:
        raise ValueError(f"l2 is {l2}; expected a finite number >= 0")
    return float(l2)


def check_dropouts(dropouts: Iterable[float]) -> np.ndarray:
    """Rates as an ascending array without repeats."""
    refuse_no_list(dropouts, "dropouts")
    rates = np.unique([check_dropout(p) for p in np.ravel(np.asarray(list(dropouts), np.float64))])
    if not len(rates):
        raise ValueError("dropouts is empty; give at least one rate in [0, 1)")
    return rates


def default_dropouts(weakest: float = 0.125) -> tuple[float, ...]:
    """Ten rates p with rho = 1, 2, ..., 512 times the weakest."""
    return tuple(dropout_from_rho(weakest * 2.0 ** np.arange(10)).tolist())


def second_moments(X: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """m_j = sum_i a_i x_ij^2, raw: dropout acts on x, not on x minus its mean; (d,) float64."""
    moments = np.zeros(X.shape[1])
    step = 1024  # rows whose float32 sum is still accurate
    for start in range(0, len(X), step):
        part = X[start : start + step]
        moments += (part * part).T @ weight[start : start + step].astype(X.dtype)
    return moments


def margin_variance(X: np.ndarray, D: np.ndarray, rho: np.ndarray | float) -> np.ndarray:
    """v_ik = rho_k sum_j x_ij^2 D_kj^2, the variance of the margin; (n, K).

    Parameters
    ----------
    X : (n, d)
    D : (K, d)
        The part of the weights that sees the noise.
    rho : float or (K,)
    """
    rho = np.broadcast_to(np.asarray(rho, dtype=np.float64), len(D))
    scaled = D * np.sqrt(rho)[:, None].astype(D.dtype)
    return (X * X) @ (scaled * scaled).T


def noise_averaged_probability(margin: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """E sigma(t) for t ~ Normal(margin, variance), nearly: sigma(mu / sqrt(1 + pi v / 8)).

    The plain sigma(mu) is overconfident for weights that were trained under
    noise. Source: MacKay (1992), "The evidence framework applied to
    classification networks".
    """
    return expit(margin / np.sqrt(1 + (np.pi / 8) * variance))
