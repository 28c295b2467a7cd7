"""How long does the whole chain take: hundreds of heads, their blend and its cut?"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from benchmarks.problems import Problem, problem
from heads import Blend, DropoutLogisticCV, DropoutRidgeCV

NETWORKS = 6  # heads of one network differ by their folds
RATES = (0.1, 0.3, 0.5, 0.7)


def fitted_heads(p: Problem, kind: str, seeds: range) -> list[DropoutRidgeCV | DropoutLogisticCV]:
    """A head for each seed of the folds, four rates each."""
    heads: list[DropoutRidgeCV | DropoutLogisticCV] = []
    for seed in seeds:
        if kind == "ridge":
            heads.append(DropoutRidgeCV(RATES, random_state=seed).fit(p.X, p.Y))
        else:
            head = DropoutLogisticCV(RATES, random_state=seed)
            heads.append(head.fit(p.X, p.Y, coef_init=p.W0, intercept_init=p.b0))
    return heads


def chain(M: int, n: int, d: int, K: int, steps: int) -> list[dict[str, Any]]:
    """Seconds of M / 2 ridge heads, M / 2 logistic heads, and their blend with its cut.

    The features of the networks are one problem in differently turned coordinates, so that
    all have one truth.
    """
    first = problem(n=n, d=d, K=K)
    rng = np.random.default_rng(0)
    each = M // 2 // NETWORKS
    scores = np.empty((M, n, K), np.float16)
    rows: list[dict[str, Any]] = []
    filled = 0
    size = f"{M} x {n:,} x {K}, {steps} steps"
    for kind in ("ridge", "logistic"):
        seconds = 0.0
        for network in range(NETWORKS):
            order = rng.permutation(d)
            noise = rng.normal(scale=0.1, size=first.X.shape).astype(np.float32)
            p = Problem(
                np.maximum(first.X + noise, 0)[:, order], first.Y, first.W0[:, order], first.b0
            )
            seeds = range(network * each, (network + 1) * each)
            start = time.perf_counter()
            heads = fitted_heads(p, kind, seeds)
            seconds += time.perf_counter() - start
            for head in heads:
                scores[filled] = head.oof_predict_proba_
                filled += 1
        rows.append({"what": f"{M // 2} {kind} heads, 5 x 4", "size": size, "seconds": seconds})
    start = time.perf_counter()
    blend = Blend(max_steps=steps, patience=steps).fit(scores, csr_matrix(first.Y))
    seconds = time.perf_counter() - start
    rows.append({"what": "blend and cut", "size": size, "seconds": seconds, "F2": blend.score_})
    total = sum(row["seconds"] for row in rows)
    rows.append({"what": "the whole chain", "size": size, "seconds": total, "F2": blend.score_})
    return rows
