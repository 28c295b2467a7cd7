"""How long does the whole chain take: hundreds of heads, their blend and its cut?"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import joblib
import numpy as np
from scipy.sparse import csr_matrix

from benchmarks.problems import Problem, problem
from heads import Blend, DropoutLogisticCV, DropoutRidgeCV

NETWORKS = 6  # heads of one network differ by their folds
# Four, the best of which is not at an end: beyond an end the search would go on to more.
RATES = {"ridge": (0.6, 0.8, 0.9, 0.95), "logistic": (0.8, 0.9, 0.95, 0.975)}


def fitted(p: Problem, kind: str, seed: int) -> tuple[np.ndarray, int]:
    """Out-of-fold probabilities of a head, float16, and how many rates it has tried."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the best rate at an end
        head: DropoutRidgeCV | DropoutLogisticCV
        if kind == "ridge":
            head = DropoutRidgeCV(RATES[kind], random_state=seed).fit(p.X, p.Y)
        else:
            head = DropoutLogisticCV(RATES[kind], random_state=seed)
            head.fit(p.X, p.Y, coef_init=p.W0, intercept_init=p.b0)
    oof = np.asarray(head.oof_predict_proba_, np.float16)
    return oof, len(head.cv_results_["dropout"])


def seen_by(network: int, first: Problem) -> Problem:
    """The images of a problem by another network: noise, and coordinates in another order."""
    rng = np.random.default_rng(network)
    order = rng.permutation(first.X.shape[1])
    noise = rng.normal(scale=0.1, size=first.X.shape).astype(np.float32)
    X = np.maximum(first.X + noise, 0)[:, order]
    return Problem(X, first.Y, np.ascontiguousarray(first.W0[:, order]), first.b0)


def chain(M: int, n: int, d: int, K: int, steps: int) -> list[dict[str, Any]]:
    """Seconds of M / 2 ridge heads, M / 2 logistic heads, and their blend with its cut.

    Heads are made side by side, a process for each core, as by ``heads sweep --jobs``.
    """
    first = problem(n=n, d=d, K=K)
    networks = [seen_by(network, first) for network in range(NETWORKS)]
    each = M // 2 // NETWORKS
    cores = joblib.cpu_count()
    size = f"{M} x {n:,} x {K}, {steps} steps"
    scores = []
    rows: list[dict[str, Any]] = []
    with joblib.Parallel(n_jobs=cores) as work:
        for kind in ("ridge", "logistic"):
            rates, start = 0, time.perf_counter()
            for network, p in enumerate(networks):
                for oof, tried in work(joblib.delayed(fitted)(p, kind, s) for s in range(each)):
                    scores.append(oof)
                    rates += tried
                seconds = time.perf_counter() - start
                told = f"{kind}: {(network + 1) * each} heads in {seconds:.0f} s"
                print(told, file=sys.stderr, flush=True)
            made = each * NETWORKS
            rows.append(
                {
                    "what": f"{made} {kind} heads by 5 folds, {cores} at once",
                    "size": f"{n:,} x {d:,} x {K}",
                    "seconds": seconds,
                    "seconds a head": seconds / made,
                    "rates a head": rates / made,
                }
            )
    start = time.perf_counter()
    blend = Blend(max_steps=steps, patience=steps).fit(np.stack(scores), csr_matrix(first.Y))
    seconds = time.perf_counter() - start
    rows.append({"what": "blend and cut", "size": size, "seconds": seconds, "F2": blend.score_})
    total = sum(row["seconds"] for row in rows)
    rows.append({"what": "the whole chain", "size": size, "seconds": total, "F2": blend.score_})
    return rows
