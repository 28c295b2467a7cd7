"""What is a blend worth that has several scores, one on each domain?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Objective(Protocol):
    """Makes one value of the scores of the domains, and tells what it needs to know of them."""

    def value(self, scores: np.ndarray) -> float:
        """Of the scores (D,); minus infinity where they are not allowed."""

    def least(self, domain: int, upper: np.ndarray, leader: float) -> float:
        """The least score on a domain with which the value can reach that of the leader.

        `upper` (D,) bounds the scores.
        """


@dataclass(frozen=True)
class WeightedSum:
    """sum_d w_d score_d.

    Attributes
    ----------
    weights : (D,) array, not negative
    """

    weights: np.ndarray

    def value(self, scores: np.ndarray) -> float:
        """The sum."""
        return float(self.weights @ scores)

    def least(self, domain: int, upper: np.ndarray, leader: float) -> float:
        """What the other domains cannot give."""
        weight = self.weights[domain]
        if weight == 0:
            return -np.inf
        rest = self.weights @ upper - weight * upper[domain]
        return float((leader - rest) / weight)


@dataclass(frozen=True)
class Constrained:
    """The score on the target, where no other domain's score is below its floor.

    Attributes
    ----------
    target : int
    floors : (D,) array
    """

    target: int
    floors: np.ndarray

    def value(self, scores: np.ndarray) -> float:
        """The target's score, if allowed."""
        allowed = np.delete(scores >= self.floors, self.target).all()
        return float(scores[self.target]) if allowed else -np.inf

    def least(self, domain: int, upper: np.ndarray, leader: float) -> float:
        """The leader's score on the target, and the floors elsewhere."""
        return leader if domain == self.target else float(self.floors[domain])
