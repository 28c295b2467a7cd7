"""Which blends are beaten by no other on every domain?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from heads.greedy import Path
from heads.screening import Entries
from heads.selecting import Choice, Rule, choose, single_scores


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


def pareto_front(
    domains: Sequence[Entries],
    choice: Choice,
    rule: Rule,
    trade_offs: Iterable[float],
    parts: Sequence[np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The table ``Blend.pareto_``: models alone, steps, and the best of each trade-off.

    Raises
    ------
    ValueError
        If a trade-off is not in [0, 1].
    """
    M, D, path = len(domains[0].score), len(domains), choice.path
    assert path is not None  # the method is greedy
    rest = np.full(D, 1 / (D - 1))
    rest[0] = 0
    weights, scores = [np.eye(M), _weights(path, M)], [single_scores(domains), path.score]
    for share in trade_offs:
        if not 0 <= share <= 1:
            raise ValueError(f"trade_offs has {share}; expected numbers from 0 to 1")
        traded = replace(
            rule,
            domain_weights=share * np.eye(D)[0] + (1 - share) * rest,
            max_source_loss=None,
        )
        other = choose(domains, traded, parts)
        assert other.path is not None
        weights.append(other.weights[None])
        scores.append(other.path.score[[other.steps - 1]])
    score = np.concatenate(scores)
    return {
        "weights": np.concatenate(weights),
        "score": score,
        "target_score": score[:, 0],
        "source_score": score[:, 1:].mean(axis=1),
        "efficient": efficient(score),
        "chosen": np.arange(len(score)) == M + choice.steps - 1,
    }


def _weights(path: Path, M: int) -> np.ndarray:
    """(S, M) after each step."""
    counts = np.cumsum(np.eye(M)[path.model], axis=0)
    result: np.ndarray = counts / counts.sum(axis=1, keepdims=True)
    return result
