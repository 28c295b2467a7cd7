"""Where on a path of rates is the solution at the next one foretold?

A solution moves along a smooth curve as rho falls, so that the polynomial through
the last few points is a start that takes a third off the iterations. What is linear in
the weights, such as margins, is foretold with them, at no product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_POINTS = 3  # that foretell the next
_AHEAD = 2.5  # steps, at most, that they foretell
_POWERS = {1: 0.75, 2: 0.15}  # of 1 / rho, along which one or two points and 0 are followed


@dataclass(frozen=True)
class Point:
    """Weights (k, r), intercepts (k,) and margins (k, n), or None where not known, at a rate."""

    rho: float
    W: np.ndarray
    b: np.ndarray
    margin: np.ndarray | None


class Path:
    """Solutions of some labels at falling rates.

    Parameters
    ----------
    noise : "quadratic" or "gaussian"
    start : Point
        With infinite rho: the solution there, without weights. Else one from
        which the path begins and of which nothing else is known.
    """

    def __init__(self, noise: str, start: Point) -> None:
        self.noise = noise
        self.start = start
        self.points: list[Point] = []
        self.moved = np.zeros(len(start.b), bool)

    def follows(self, rho: float) -> bool:
        """Whether a rate comes after those so far."""
        return not self.points or rho < self.points[-1].rho

    def add(self, point: Point, moved: np.ndarray) -> None:
        """Go on; `moved` (k,) tells for which labels this is another point than was foretold."""
        self.points = [*self.points[1 - _POINTS :], point]
        self.moved = moved

    def foretell(self, rho: float) -> Point:
        """The solution at `rho`, nearly.

        Only one step ahead, and labels that have not moved at the last rate stay
        where they were: they would run away.
        """
        last = self.points[-1] if self.points else self.start
        near, places, at = self._curve(rho)
        if len(near) < 2 or at - places[-1] > _AHEAD * (places[-1] - places[-2]):
            return Point(rho, last.W, last.b, last.margin)
        shares = [
            float(np.prod([(at - x) / (place - x) for x in places if x != place]))
            for place in places
        ]
        W = _combined([point.W for point in near], shares)
        b = _combined([point.b for point in near], shares)
        margins = [point.margin for point in near if point.margin is not None]
        margin = _combined(margins, shares) if len(margins) == len(near) else None
        still = ~self.moved
        if still.any():
            W[still], b[still] = last.W[still], last.b[still]
            if margin is not None and last.margin is not None:
                margin[still] = last.margin[still]
        return Point(rho, W, b, margin)

    def _curve(self, rho: float) -> tuple[list[Point], list[float], float]:
        """Points, their places, and the place of `rho`, where solutions are nearly polynomials.

        Weights under Gaussian noise grow from 0, at infinite rho, about as rho^-1/2.
        Those of a ridge penalty first grow faster, then slower, then as log 1 / rho.
        """
        ends = np.isinf(self.start.rho)
        if self.noise == "gaussian":
            power: float | None = 0.5
        else:
            power = _POWERS.get(len(self.points)) if ends else None
        near = self.points
        if ends and power is not None and len(near) < _POINTS:
            near = [self.start, *near]

        def place(rate: float) -> float:
            rate = max(rate, 1e-300)
            return float(-np.log(rate) if power is None else rate**-power)

        return near, [place(point.rho) for point in near], place(rho)


def _combined(values: list[np.ndarray], shares: list[float]) -> np.ndarray:
    total: np.ndarray = values[0] * values[0].dtype.type(shares[0])
    for value, share in zip(values[1:], shares[1:], strict=True):
        total += value * value.dtype.type(share)
    return total
