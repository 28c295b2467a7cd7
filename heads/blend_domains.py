"""Which rows are of which domain, and what does each domain count in a blend?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def rows_by_domain(
    domains: np.ndarray | Sequence[str] | None, n: int
) -> tuple[list[Any], list[np.ndarray]]:
    """Domains in the order of their first rows, and the rows of each."""
    if domains is None:
        return [None], [np.arange(n)]
    if len(domains) != n:
        raise ValueError(f"domains has length {len(domains)}, but the models score {n} rows")
    names, first, code = np.unique(np.asarray(domains), return_index=True, return_inverse=True)
    order = np.argsort(first)
    rows = [np.flatnonzero(code.reshape(-1) == c) for c in order]
    return names[order].tolist(), rows


def weights_of(
    names: list[Any],
    given: Mapping[Any, float] | None,
    max_source_loss: float | None,
    greedy: bool,
) -> np.ndarray:
    """(D,) of sum 1; with a largest loss on the source the target alone counts.

    Raises
    ------
    ValueError
        If weights are wrong, or the options do not go together.
    """
    if max_source_loss is not None:
        if len(names) < 2 or not greedy or given is not None:
            raise ValueError(
                "max_source_loss needs method='greedy', at least two domains and no domain_weights"
            )
        return np.eye(len(names))[0]
    if given is None:
        return np.full(len(names), 1 / len(names))
    if set(given) != set(names):
        raise ValueError(f"domain_weights has {sorted(given)}, but the domains are {names}")
    weights = np.array([given[name] for name in names], dtype=np.float64)
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise ValueError(f"domain_weights is {dict(given)}; expected numbers >= 0, one above 0")
    return weights / weights.sum()
