"""Which weights on the simplex give the least loss?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from heads.screening import TINY, Entries

LOSSES = ("log", "squared")
_STEPS = 300
_TOL = 1e-6  # of the loss
_SMALLEST_RATE = 1e-6  # of the first one; steps that short drown in rounding
_NEGLIGIBLE = 1e-4  # weights below are none

Loss = Callable[[np.ndarray], tuple[float, np.ndarray]]


def simplex_weights(
    domains: Sequence[Entries], weights: np.ndarray, loss: str, logits: bool
) -> np.ndarray:
    """Weights (M,) of the least mean loss over entries; convex.

    Parameters
    ----------
    domains : sequence of Entries
    weights : (D,) array
        Of the domains.
    loss : "log" or "squared"
        Of the averaged probabilities; squared for averaged probabilities only.
    logits : bool
        Whether the scores are logits.
    """
    parts = [
        _Part.of(entries, weight)
        for entries, weight in zip(domains, weights, strict=True)
        if weight > 0
    ]
    if loss == "squared":
        return _descend(_squared(parts), len(parts[0].score))
    return _descend(_log(parts, logits), len(parts[0].score))


@dataclass(frozen=True)
class _Part:
    """Scores (M, E) of a domain, how many of them are true, and weights of the entries."""

    score: np.ndarray
    right: int
    weight: np.ndarray

    @classmethod
    def of(cls, entries: Entries, weight: float) -> _Part:
        score = entries.score.astype(np.promote_types(entries.score.dtype, np.float32), copy=False)
        share = entries.truth.share[entries.image]
        return cls(score, entries.right, weight * share / share.sum())


def _log(parts: Sequence[_Part], logits: bool) -> Loss:
    """Mean log-loss.

    d loss / d w_m = mean (p - y) / (p (1 - p)) dp/ds s_m, where dp/ds is 1 for averaged
    probabilities and p (1 - p) for logits.
    """

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = 0.0, np.zeros(len(weights))
        for part in parts:
            s = (weights.astype(part.score.dtype) @ part.score).astype(np.float64)
            p = np.clip(expit(s) if logits else s, TINY, 1 - TINY)
            true = slice(0, part.right)
            slope = p.copy()
            slope[true] -= 1
            if not logits:
                slope /= p * (1 - p)
            p[part.right :] = 1 - p[part.right :]
            value -= float(part.weight @ np.log(p))
            slope *= part.weight
            gradient += part.score @ slope.astype(part.score.dtype)
        return value, gradient

    return loss


def _squared(parts: Sequence[_Part]) -> Loss:
    """Mean squared error: w' G w - 2 w' c + t, all known after one pass."""
    M = len(parts[0].score)
    G, c, t = np.zeros((M, M)), np.zeros(M), 0.0
    for part in parts:
        root = np.sqrt(part.weight).astype(part.score.dtype)
        scaled = part.score * root
        G += scaled @ scaled.T
        c += scaled[:, : part.right] @ root[: part.right]
        t += float(part.weight[: part.right].sum())

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        Gw = G @ weights
        return float(weights @ Gw - 2 * weights @ c + t), 2 * (Gw - c)

    return loss


def _descend(loss: Loss, M: int) -> np.ndarray:
    """Exponentiated gradient, Kivinen and Warmuth (1997).

    The step is halved whenever the loss would rise. The loss is convex, hence at most
    max_m g' (w - e_m) above its minimum, which tells when to stop.
    """
    weights = np.full(M, 1 / M)
    value, gradient = loss(weights)
    # What all models have in common in the gradient does not matter, however large it is.
    rate = 1.0 / max(float(np.ptp(gradient)), 1e-12)
    smallest = _SMALLEST_RATE * rate
    for _ in range(_STEPS):
        if rate < smallest or weights @ gradient - gradient.min() <= _TOL * value:
            break
        candidate = weights * np.exp(-rate * (gradient - gradient.min()))
        candidate /= candidate.sum()
        new_value, new_gradient = loss(candidate)
        if new_value > value:
            rate /= 2
            continue
        weights, value, gradient = candidate, new_value, new_gradient
        rate *= 1.2
    weights[weights < _NEGLIGIBLE] = 0.0
    result: np.ndarray = weights / weights.sum()
    return result
