"""How long do 300 heads take to predict 100,000 images, and does it matter what they average?

Sizes are those of the challenge: 300 heads (150 ridge, 150 logistic) on 6 networks of 2,048
features, 500 labels. Heads have random weights, which cost what fitted ones do. A part of the rows
is timed, all of them are, or the figure for 100,000 is multiplied and says so. The peer asks
every estimator for its probabilities and averages them, on fewer rows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import memory_beyond, report
from featcache import FeatureCache
from heads import Blend, DropoutLogisticCV, DropoutRidgeCV
from heads.platt import PlattScaling
from heads.prediction import Predictor
from heads.storage import Head, StoredBlend

NETWORKS, WHOLE = 6, 100_000
WAYS = {
    "averaged probabilities": ("probability", "noise"),
    "averaged logits": ("logit", "noise"),
    "averaged logits, all Platt-scaled": ("logit", "platt"),
}


def head(number: int, d: int, K: int, probability: str, cache: FeatureCache) -> Head:
    """Half are ridge heads, half logistic ones towards nothing."""
    rng = np.random.default_rng(number)
    ridge = number % 2 == 0
    estimator: Any = DropoutRidgeCV() if ridge else DropoutLogisticCV(probability=probability)
    estimator.coef_ = rng.normal(0, 0.3 / np.sqrt(d), (K, d)).astype(np.float32)
    estimator.intercept_ = rng.normal(-2, 1, K).astype(np.float32)
    estimator.coef_init_, estimator.dropout_, estimator.n_features_in_ = None, 0.3, d
    estimator.classes_, estimator._binary = np.arange(K), False
    if ridge or probability == "platt":
        estimator.calibration_ = PlattScaling(1.5, -0.5)
    return Head(estimator, cache.classes, cache.class_names, cache.network_id)


def caches(folder: Path, rows: int, d: int, K: int) -> list[FeatureCache]:
    """One for each network."""
    ids = [f"{row:07d}" for row in range(rows)]
    classes = [f"/m/{k}" for k in range(K)]
    made = []
    for network in range(NETWORKS):
        X = np.random.default_rng(network).normal(size=(rows, d)).astype(np.float16)
        path = folder / f"{network}.h5"
        name = {"network": f"net{network}"}
        made.append(FeatureCache.write(path, X, ids, classes=classes, provenance=name))
    return made


def predictor(found: list[FeatureCache], M: int, d: int, K: int, way: str) -> Predictor:
    """A blend of M heads, ready to predict."""
    average, probability = WAYS[way]
    heads = [head(m, d, K, probability, found[m // 2 % NETWORKS]) for m in range(M)]
    blend = Blend(average=average, method="uniform")
    blend.fit(np.full((M, 1, K), 0.5, np.float16), np.ones((1, K)))
    return Predictor.of(StoredBlend(blend, heads, [str(m) for m in range(M)]), found)


def one_by_one(asked: Predictor, rows: int) -> np.ndarray:
    """What a loop over estimators gives."""
    features = {cache.network_id: cache.features[:rows] for cache in asked.caches}
    P = [m.estimator.predict_proba(features[m.network_id]) for m in asked.models]
    assert isinstance(asked.content, StoredBlend)
    return asked.content.blend.predict_proba(P)


def main() -> None:
    """Time every way, and a loop over estimators on few rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--rows", type=int, default=8192, help="that are timed")
    options = parser.parse_args()
    M, d, K, rows = (12, 32, 10, 300) if options.quick else (300, 2048, 500, options.rows)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        found = caches(Path(folder), rows, d, K)
        for way in WAYS:
            asked = predictor(found, M, d, K, way)
            first: list[np.ndarray] = []

            def run(asked: Predictor = asked, first: list[np.ndarray] = first) -> None:
                for P in asked.chunks():
                    if not first:
                        first.append(P[:256])

            start = time.perf_counter()
            beyond = memory_beyond(run)
            seconds = time.perf_counter() - start
            few = min(rows, 256)
            start = time.perf_counter()
            expected = one_by_one(asked, few)
            loop = (time.perf_counter() - start) * rows / few
            table.append(
                {
                    "way": way,
                    "heads": M,
                    "products": sum(1 + ("squares" in t.needs) for t in asked.terms),
                    "rows timed": rows,
                    "seconds": seconds,
                    f"minutes for {WHOLE:,} (part)": seconds * WHOLE / rows / 60,
                    "a loop takes (part)": f"{loop / seconds:.1f} times as long",
                    "memory beyond the heads, MB": "" if beyond is None else beyond / 1e6,
                    "largest difference": float(np.abs(first[0][:few] - expected).max()),
                }
            )
    name = "prediction_quick" if options.quick else "prediction"
    report(name, table, f"{M} heads of {d:,} features and {K} labels, no views")


if __name__ == "__main__":
    main()
