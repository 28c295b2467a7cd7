"""What does each entry of held-out scores cost?"""

from __future__ import annotations

import numpy as np


def log_losses(Y: np.ndarray, P: np.ndarray) -> np.ndarray:
    """-y log p - (1 - y) log(1 - p) of each entry, p clipped by the rounding error of float32."""
    eps = np.finfo(np.float32).eps
    P = np.clip(P, eps, 1 - eps)
    losses = -np.log1p(-P)
    losses -= Y * (np.log(P) + losses)
    return losses


def squared_errors(Y: np.ndarray, P: np.ndarray) -> np.ndarray:
    """(y - p)^2 of each entry."""
    error = Y - P
    error *= error
    return error
