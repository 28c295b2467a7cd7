"""Which label sets score best, and how long does it take to find them?

``--transfer`` answers the first half on the caches of the quickstart, the plain call the second
half on drawn probabilities; both beside a grid of 90 thresholds and xCOLUMNs.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.base import clone

from benchmarks.measure import peak_memory, peer, report, take_turns
from heads import (
    CalibratedDecision,
    DropoutLogisticCV,
    ExpectedFBeta,
    GlobalThreshold,
    PerClassThreshold,
    PlattCalibration,
    PriorShift,
    bootstrap_interval,
    fbeta_per_image,
    mean_fbeta,
)
from heads.cuts import apply_threshold, best_global_threshold
from heads.metrics import paired_bootstrap_interval

GRID = np.linspace(0.01, 0.9, 90)
TARGET, UNSEEN = "gyosho", ("sousyo", "soseki")


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
        "F2": score,
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
    """One threshold for float16 scores that are as many as memory allows."""
    P, Y = drawn(n, K, 4, seed=2, dtype=np.float16)
    before = peak_memory()
    found = take_turns({"exact cut": lambda: best_global_threshold(P, Y)}, 1)["exact cut"]
    more = (peak_memory() - before) / 2**30
    target = f"<= 8 s ({P.nbytes / 2**30:.2f} GiB of scores; {more:.2f} GiB more at the peak)"
    yield row(f"global cut, {n:,} x {K:,}, float16", "exact cut", found, found.result[1], target)


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


def speed(quick: bool) -> list[dict[str, Any]]:
    """All rows on drawn probabilities."""
    if quick:
        return [
            *global_rows(200, 700, 1),
            *large_rows(1000, 700),
            *expected_rows(500, 700, 1),
            *class_rows(200, 50, 1),
        ]
    return [
        *global_rows(1000, 7178, 5),
        *expected_rows(32_000, 7178, 3),
        *class_rows(1000, 500, 3),
        *large_rows(100_000, 7178),
    ]


# ------------------------------------------------------------------------ transfer


@dataclass
class Domain:
    """Probabilities of one head on the images of one domain, and their labels."""

    P: np.ndarray
    Y: csr_matrix
    missed: np.ndarray


def network_domains(caches: Path, network: str) -> dict[str, dict[str, Domain]]:
    """For the source head and the adapted one: validation, labelled Stage 1, and scored domains."""
    from featcache import FeatureCache
    from featcache.annotations import read_labels

    def cache(image_set: str) -> FeatureCache:
        return FeatureCache(caches / image_set / f"{network}.h5")

    stage_1, validation = cache(f"{TARGET}_stage_1"), cache("validation")
    rows = stage_1.training()
    adapted = DropoutLogisticCV(dropouts=(0.02, 0.05, 0.1, 0.2, 0.35)).fit(**rows)
    tuning, held = stage_1.labels, validation.labels
    weight, bias = stage_1.weight, stage_1.bias
    assert tuning is not None and held is not None  # noqa: PT018
    assert weight is not None and bias is not None  # noqa: PT018
    heads: dict[str, Callable[[FeatureCache], np.ndarray]] = {
        "source": lambda c: expit(c.x("eval") @ weight.T + bias),
        "adapted": lambda c: adapted.predict_proba(c.features),
    }
    result: dict[str, dict[str, Domain]] = {}
    known = tuning.known & stage_1.valid
    for head, proba in heads.items():
        P = proba(stage_1)[known] if head == "source" else adapted.oof_predict_proba_
        result[head] = {
            "validation": Domain(proba(validation), held.positives, held.outside),
            "labelled": Domain(P, tuning.positives[known], tuning.outside[known]),
        }
        for font, stage in ((TARGET, "stage_1"), *((font, "stage_2") for font in UNSEEN)):
            some = cache(f"{font}_{stage}")
            file = caches.parent / "data" / font / f"{stage}_solution.csv"
            labels = read_labels(file).restrict(some.classes).select(some.ids)
            at = np.flatnonzero(labels.known & some.valid)
            result[head][f"{font} {stage}"] = Domain(
                proba(some)[at], labels.positives[at], labels.outside[at]
            )
    return result


SCORED = (f"{TARGET} stage_1", *(f"{font} stage_2" for font in UNSEEN))
DECISIONS: dict[str, Any] = {
    "global": GlobalThreshold(),
    "per class": PerClassThreshold(),
    "expected F2": ExpectedFBeta(),
}
Transform = Callable[[np.ndarray], np.ndarray]


def steps(labelled: Domain, validation: Domain) -> Iterator[tuple[str, Transform, bool]]:
    """What may come before the decision: its name, the map, and whether a bias follows.

    The bias gives each domain, whose labels it does not see, Stage 1's mean number of labels.
    """
    P, Y = labelled.P, labelled.Y
    yield "none", lambda p: p, False
    own = PlattCalibration().fit(P, Y)
    yield "calibration", own.transform, False
    yield "calibration, one for all", PlattCalibration(strengths=()).fit(P, Y).transform, False
    yield "shift", PriorShift().fit(P, Y).transform, False
    source = PlattCalibration().fit(validation.P, validation.Y).transform
    yield "calibration on validation", source, False
    counts = np.asarray(validation.Y.sum(axis=0)).ravel()
    rates = (counts + 0.5) / (validation.Y.shape[0] + 1)
    shift = PriorShift().fit(source(P), Y, prior=rates)
    yield "the same + shift", lambda p: shift.transform(source(p)), False
    yield "calibration + bias of domain", own.transform, True


def rule_scores(domains: dict[str, Domain]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """F2 of each image of the scored domains, by (steps before, decision)."""
    labelled, validation = domains["labelled"], domains["validation"]
    source_cut = best_global_threshold(validation.P, validation.Y, missed=validation.missed)[0]
    scores: dict[tuple[str, str], dict[str, np.ndarray]] = {}

    def keep(key: tuple[str, str], predict: Callable[[np.ndarray], csr_matrix]) -> None:
        scores[key] = {
            name: fbeta_per_image(some.Y, predict(some.P), missed=some.missed)
            for name, some in domains.items()
            if name in SCORED
        }

    keep(("none", "fixed 0.5"), lambda P: apply_threshold(P, 0.5))
    keep(("none", "threshold of the source"), lambda P: apply_threshold(P, source_cut))
    images = float(labelled.Y.sum()) / labelled.Y.shape[0]
    for before, transform, biased in steps(labelled, validation):
        moved = transform(labelled.P)
        for name, decision in DECISIONS.items():
            rule = clone(decision).fit(moved, labelled.Y, missed=labelled.missed)

            def predict(
                P: np.ndarray,
                rule: Any = rule,
                transform: Transform = transform,
                biased: bool = biased,
            ) -> csr_matrix:
                P = transform(P)
                if biased:
                    P = PriorShift("bias", mean_labels=images).fit(P).transform(P)
                sets: csr_matrix = rule.predict(P)
                return sets

            keep((before, name), predict)
    return scores


def transfer(caches: Path, quick: bool) -> list[dict[str, Any]]:
    """A row for each head and rule: F2 averaged over networks, interval over images."""
    networks = sorted(path.stem for path in (caches / "validation").glob("*.h5"))
    if not networks:
        raise SystemExit(
            f"--caches {caches}: no validation/*.h5 there; run `make quickstart` first"
        )
    found: dict[str, list[dict[tuple[str, str], dict[str, np.ndarray]]]] = {}
    for network in networks[:1] if quick else networks:
        for head, domains in network_domains(caches, network).items():
            found.setdefault(head, []).append(rule_scores(domains))
    rows = []
    for head, scores in found.items():
        mean = {
            key: {d: np.mean([one[key][d] for one in scores], axis=0) for d in SCORED}
            for key in scores[0]
        }
        base = mean["none", "global"]
        for (before, decision), values in mean.items():
            line: dict[str, Any] = {"head": head, "before": before, "decision": decision}
            for domain in SCORED:
                low, high = bootstrap_interval(values[domain])
                line[domain] = f"{values[domain].mean():.4f} [{low:.4f}, {high:.4f}]"
            own, plain = (np.concatenate([v[d] for d in SCORED]) for v in (values, base))
            low, high = paired_bootstrap_interval(own, plain)
            line["minus global"] = f"{(own - plain).mean():+.4f} [{low:+.4f}, {high:+.4f}]"
            rows.append(line)
    return rows


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
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
        report(f"decisions_transfer{quick}", rows, title)
    else:
        threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
        title = f"Time to find label sets; BLAS threads: {threads}"
        report(f"decisions{quick}", speed(arguments.quick), title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
