"""On what are heads measured?  Embeddings and labels of the size and traits of the challenge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Problem:
    """Embeddings of n images and their labels.

    Attributes
    ----------
    X : (n, d) or (n, v, d) float32
        Not negative, many of them small, as after a ReLU and an average over positions.
    Y : (n, K) float32, zeros and ones
    W0 : (K, d), b0 : (K,) float32
        A last layer that is right up to noise of the size of what it knows.
    """

    X: np.ndarray
    Y: np.ndarray
    W0: np.ndarray
    b0: np.ndarray


def problem(
    n: int = 1000,
    d: int = 2048,
    K: int = 500,
    views: int = 1,
    present: int | None = None,
    seed: int = 0,
) -> Problem:
    """Make a problem.

    The spectrum of X falls as j^-1/2 over some hundred directions, and label k holds in
    a share of images that falls as 1 / k, three labels an image on average: most labels
    have a few positives. Only `present` labels have any (all: None).
    """
    rng = np.random.default_rng(seed)
    present = K if present is None else present
    rank = min(256, d)
    latent = rng.normal(size=(n, rank)) * np.arange(1, rank + 1) ** -0.5
    mixing = rng.normal(size=(rank, d))
    seen = latent[:, None, :] + 0.1 * rng.normal(size=(n, views, rank))
    X = seen.reshape(n * views, rank) @ mixing + 0.5 * rng.normal(size=(n * views, d))
    X = np.maximum(X - 1, 0).astype(np.float32).reshape(n, views, d) / 4
    directions = rng.normal(size=(rank, K)) * np.arange(1, rank + 1)[:, None] ** -0.25
    score = latent @ directions
    score = 3 * (score - score.mean(axis=0)) / score.std(axis=0) + rng.logistic(size=(n, K))
    share = 1 / np.arange(1, present + 1)
    counts = np.clip(np.round(3 * n * share / share.sum()), 1, n // 2).astype(int)
    Y = np.zeros((n, K), np.float32)
    for k, count in enumerate(counts.tolist()):
        Y[np.argpartition(-score[:, k], count)[:count], k] = 1
    W0 = (mixing.T @ directions) / d
    W0 += W0.std() * rng.normal(size=W0.shape)
    rate = np.clip(Y.mean(axis=0), 1 / (2 * n), None)
    margin = X[:, 0] @ W0
    b0 = np.log(rate / (1 - rate)) - margin.mean(axis=0)
    return Problem(X if views > 1 else X[:, 0], Y, W0.T.astype(np.float32), b0.astype(np.float32))
