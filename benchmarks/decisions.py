"""Which label sets score best, and how long does it take to find them?

``--transfer`` answers the first half on the caches of the quickstart, the plain call the second
half on drawn probabilities; beside a grid of 90 thresholds, xCOLUMNs and scikit-learn.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit

from benchmarks.decision_domains import SCORED, transfer
from benchmarks.measure import Timing, memory_beyond, peer, report, take_turns, timed
from heads import (
    CalibratedDecision,
    ExpectedFBeta,
    GlobalThreshold,
    PerClassThreshold,
    fbeta_per_image,
    mean_fbeta,
)
from heads.cuts import apply_threshold, best_global_threshold
from heads.metrics import average_precision, log_loss, macro_fbeta, micro_fbeta

GRID = np.linspace(0.01, 0.9, 90)


# --------------------------------------------------------------------------- speed


def drawn(
    n: int, K: int, labels: float, seed: int, spread: float = 0.0, dtype: Any = np.float32
) -> tuple[np.ndarray, csr_matrix]:
    """Probabilities, and truth drawn from them, with about that many labels an image.

    Labels have long-tailed rates; with `spread`, the scores of a label are biased by a
    normal number of that deviation, so that labels need thresholds of their own.
    """
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    base, bias = 2 * fixed.normal(size=K), spread * fixed.normal(size=K)
    low, high = -30.0, 10.0
    sample = base + 2 * fixed.normal(size=(200, K))
    for _ in range(60):  # the mean number of labels sets the level
        middle = (low + high) / 2
        too_many = expit(sample + middle).sum(axis=1).mean() > labels
        low, high = (low, middle) if too_many else (middle, high)
    P, rows, columns = np.empty((n, K), dtype), [], []
    step = max(1, (1 << 18) // K)  # larger blocks spend their time on pages
    for start in range(0, n, step):
        size = min(step, n - start)
        margin = rng.standard_normal((size, K), np.float32) * 2 + (base + low).astype(np.float32)
        chance = 1 / (1 + np.exp(-margin))  # in single precision many times as fast as expit
        true = np.nonzero(rng.random((size, K), np.float32) < chance)
        rows.append(true[0] + start)
        columns.append(true[1])
        P[start : start + size] = 1 / (1 + np.exp(-margin - bias.astype(np.float32)))
    at = np.concatenate(rows), np.concatenate(columns)
    return P, csr_matrix((np.ones(len(at[0])), at), shape=(n, K))


def grid_search(P: np.ndarray, Y: csr_matrix) -> tuple[float, float]:
    """The best of 90 thresholds, each scored by numpy on dense arrays; (threshold, F2)."""
    truth = Y.toarray() > 0
    true = truth.sum(axis=1)
    scores = []
    for threshold in GRID:
        chosen = threshold <= P
        below = 4 * true + chosen.sum(axis=1)
        right = (chosen & truth).sum(axis=1)
        scores.append(np.where(below > 0, 5 * right / np.maximum(below, 1), 1.0).mean())
    best = int(np.argmax(scores))
    return float(GRID[best]), float(scores[best])


def row(question: str, name: str, timing: Any, score: float, target: str = "") -> dict[str, Any]:
    """A line of the table."""
    return {
        "question": question,
        "method": name,
        "seconds": timing.median,
        "spread": timing.spread,
        "score": score,  # F2, where the method does not say otherwise
        "target": target,
    }


def global_rows(n: int, K: int, repeats: int) -> Iterator[dict[str, Any]]:
    """One threshold for all labels, where scikit-learn scores a single one in comparison."""
    from sklearn.metrics import fbeta_score

    P, Y = drawn(n, K, 4, seed=1)
    truth, chosen = Y.toarray() > 0, P >= 0.2
    times = take_turns(
        {
            "exact cut": lambda: best_global_threshold(P, Y),
            "grid of 90": lambda: grid_search(P, Y),
            "scikit-learn, one cut": lambda: fbeta_score(
                truth, chosen, beta=2, average="samples", zero_division=1.0
            ),
        },
        repeats,
    )
    question = f"global cut, {n:,} x {K:,}"
    exact, grid = times["exact cut"], times["grid of 90"]
    single = times["scikit-learn, one cut"]
    ratio = f"<= 0.07 s, <= .25 of scikit-learn (is {exact.median / single.median:.3f})"
    yield row(question, "exact cut", exact, exact.result[1], ratio)
    yield row(question, "grid of 90", grid, grid.result[1])
    yield row(question, "scikit-learn, one cut", single, float(single.result))


def large_rows(n: int, K: int) -> Iterator[dict[str, Any]]:
    """float16 scores that are as many as memory allows: the best cut, and how good they are."""
    P, Y = drawn(n, K, 4, seed=2, dtype=np.float16)
    threshold, sets = 0.0, Y

    def cut() -> float:
        nonlocal threshold
        threshold, score = best_global_threshold(P, Y)
        return score

    def decide() -> float:
        nonlocal sets
        sets = apply_threshold(P, threshold)
        return mean_fbeta(Y, sets)

    calls: dict[str, tuple[Callable[[], float], str]] = {
        "exact cut": (cut, "<= 8 s"),
        "label sets of that cut": (decide, ""),
        "F2 per image": (lambda: float(fbeta_per_image(Y, sets).mean()), "seconds, 1 GB"),
        "macro F2": (lambda: macro_fbeta(Y, sets), "seconds, 1 GB"),
        "micro F2": (lambda: micro_fbeta(Y, sets), "seconds, 1 GB"),
        "macro average precision": (lambda: float(average_precision(Y, P)), "seconds, 1 GB"),
        "micro average precision": (
            lambda: float(average_precision(Y, P, "micro")),
            "seconds, 1 GB",
        ),
        "log-loss": (lambda: log_loss(Y, P), "seconds, 1 GB"),
    }
    for name, (call, target) in calls.items():
        timing, more = measured(call)
        held = "" if more is None else f"{more / 2**20:.0f} MiB beyond {P.nbytes / 2**20:.0f}"
        yield row(f"{n:,} x {K:,}, float16", name, timing, timing.result, f"{target} ({held})")


def measured(call: Callable[[], float]) -> tuple[Timing, int | None]:
    """Time of one call, and bytes that it held at most beyond before."""
    times: list[Timing] = []
    more = memory_beyond(lambda: times.append(timed(call, 1)))
    return times[0], more


def expected_rows(n: int, K: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Label sets of the highest expected F2."""
    P, Y = drawn(n, K, 4, seed=3)
    rules = {
        "expected F2, exact": ExpectedFBeta().fit(P),
        "expected F2, tail_tol 1e-4": ExpectedFBeta(tail_tol=1e-4).fit(P),
    }
    threshold = best_global_threshold(*drawn(1000, K, 4, seed=4))[0]
    calls: dict[str, Callable[[], csr_matrix]] = {
        name: partial(rule.predict, P) for name, rule in rules.items()
    }
    calls["tuned global threshold"] = lambda: apply_threshold(P, threshold)
    weighted = peer("xcolumns.weighted_prediction")
    if weighted is not None:
        k = round(float(np.diff(calls["expected F2, exact"]().indptr).mean()))
        calls[f"xCOLUMNs top {k}"] = lambda: csr_matrix(
            weighted.predict_optimizing_instance_precision(P, k=k)
        )
    times = take_turns(calls, repeats)
    for name, timing in times.items():
        target = "<= 4 s" if name in rules else ""
        if name in rules:
            rule = rules[name]
            target += f"; promises {rule.expected_.mean():.5f}, bound {rule.bound_:.1g}"
        score = mean_fbeta(Y, timing.result)
        yield row(f"expected F2, {n:,} x {K:,}", name, timing, score, target)


def class_rows(n: int, K: int, repeats: int) -> Iterator[dict[str, Any]]:
    """A threshold for each label; F2 is that of 10,000 new images."""
    P, Y = drawn(n, K, 4, seed=5, spread=0.7, dtype=np.float64)
    new_P, new_Y = drawn(10_000, K, 4, seed=6, spread=0.7, dtype=np.float64)
    calls: dict[str, Callable[[], Any]] = {
        "per class, shrunk by CV": lambda: PerClassThreshold().fit(P, Y),
        "global": lambda: GlobalThreshold().fit(P, Y),
        "grid of 90": lambda: grid_search(P, Y)[0],
        "Platt + expected F2": lambda: CalibratedDecision().fit(P, Y),
    }
    frank_wolfe, metrics = peer("xcolumns.frank_wolfe"), peer("xcolumns.metrics")
    if frank_wolfe is not None and metrics is not None:
        # Its beta squared counts false positives, where F-beta counts what was missed.
        calls["xCOLUMNs, macro F2"] = lambda: frank_wolfe.find_classifier_using_fw(
            Y.toarray(),
            P,
            lambda tp, fp, fn, tn: metrics.binary_fbeta_score_on_conf_matrix(
                tp, fn, fp, tn, beta=2
            ).mean(),
            k=0,
            max_iters=20,
            init_classifier="top",
            skip_tn=True,
            seed=0,
        )
    for name, timing in take_turns(calls, repeats).items():
        fitted = timing.result
        if name == "grid of 90":
            sets = apply_threshold(new_P, fitted)
        elif name.startswith("xCOLUMNs"):
            sets = csr_matrix(fitted.predict(new_P, seed=0))
        else:
            sets = fitted.predict(new_P)
        target = "<= 1 s" if name.startswith("per class") else ""
        score = mean_fbeta(new_Y, sets)
        yield row(f"label by label, {n:,} x {K:,}, new images", name, timing, score, target)


PARTS: dict[str, tuple[Callable[..., Iterator[dict[str, Any]]], tuple[int, ...], tuple[int, ...]]]
PARTS = {  # what is measured, its sizes, and quick ones
    "cut": (global_rows, (1000, 7178, 5), (200, 700, 1)),
    "expected": (expected_rows, (32_000, 7178, 3), (500, 700, 1)),
    "classes": (class_rows, (1000, 500, 3), (200, 50, 1)),
    "large": (large_rows, (100_000, 7178), (1000, 700)),
}


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--only", choices=PARTS, help="one part; each has a table of its own")
    parser.add_argument("--transfer", action="store_true", help="F2 on the quickstart's domains")
    parser.add_argument(
        "--caches",
        type=Path,
        default=Path("quickstart/caches"),
        help="with --transfer: caches of a finished quickstart (default: %(default)s)",
    )
    arguments = parser.parse_args()
    quick = "_quick" if arguments.quick else ""
    if arguments.transfer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a shift that does not hold is the point
            rows = transfer(arguments.caches, arguments.quick)
        title = "F2 of label sets in new domains, mean of the networks, 95 % bootstrap over images"
        report(f"decisions_transfer{quick}", rows, title, SCORED)
        return 0
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    for name in [arguments.only] if arguments.only else PARTS:
        measure, sizes, few = PARTS[name]
        title = f"Time to find and score label sets; BLAS threads: {threads}"
        report(f"decisions_{name}{quick}", list(measure(*(few if quick else sizes))), title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
