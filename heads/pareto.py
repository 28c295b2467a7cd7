"""Which of several choices are worse than another on every domain?"""

from __future__ import annotations

import numpy as np


def efficient(scores: np.ndarray) -> np.ndarray:
    """Choices (R,) that no other equals or beats on all domains and beats on one.

    Parameters
    ----------
    scores : (R, D) array
        Higher is better. Takes O(R^2 D).
    """
    free = np.ones(len(scores), dtype=bool)
    for row, score in enumerate(scores):
        free[row] = not np.any((scores >= score).all(axis=1) & (scores > score).any(axis=1))
    return free
