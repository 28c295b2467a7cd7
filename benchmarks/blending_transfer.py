"""What are blends of the quickstart's networks worth on domains that chose nothing?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from heads import (
    Blend,
    DropoutLogisticCV,
    DropoutRidgeCV,
    TwoDomainCV,
    bootstrap_interval,
    fbeta_per_image,
)
from heads.metrics import paired_bootstrap_interval

TARGET, UNSEEN = "gyosho", ("sousyo", "soseki")
SCORED = (f"{TARGET} stage_1 rest", *(f"{font} stage_2" for font in UNSEEN), "validation, half")
METHODS = {"ridge": DropoutRidgeCV, "logistic": DropoutLogisticCV}
RATES = {"ridge": (0.1, 0.3, 0.6), "logistic": (0.02, 0.1, 0.3)}
VIEWS = (1, 4)
SOURCE_WEIGHT = 0.3


@dataclass(frozen=True)
class Labelled:
    """Labels of the images of a domain, in the order of their scores."""

    Y: csr_matrix
    missed: np.ndarray


@dataclass(frozen=True)
class Model:
    """A head: its name, and scores by domain; of the domains that it learnt from, out of fold."""

    name: str
    scores: dict[str, np.ndarray]


def truths(caches: Path, network: str) -> dict[str, tuple[np.ndarray, Labelled]]:
    """Rows and labels of each domain: Stage 1 and validation to choose on, and what is scored."""
    from featcache import FeatureCache
    from featcache.annotations import read_labels

    found = {}
    for name, folder in (("target", f"{TARGET}_stage_1"), ("source", "validation")):
        cache = FeatureCache(caches / folder / f"{network}.h5")
        labels = cache.labels
        assert labels is not None
        at = np.flatnonzero(labels.known & cache.valid)
        found[name] = at, Labelled(csr_matrix(labels.positives[at] >= 0.5), labels.outside[at])
    for font, stage in ((TARGET, "stage_1"), *((font, "stage_2") for font in UNSEEN)):
        cache = FeatureCache(caches / f"{font}_{stage}" / f"{network}.h5")
        file = caches.parent / "data" / font / f"{stage}_solution.csv"
        labels = read_labels(file).restrict(cache.classes).select(cache.ids)
        new = labels.known & cache.valid
        if cache.labels is not None:
            new &= ~cache.labels.known
        at = np.flatnonzero(new)
        title = f"{font} {stage}" + (" rest" if font == TARGET else "")
        found[title] = at, Labelled(csr_matrix(labels.positives[at] >= 0.5), labels.outside[at])
    return found


def models(caches: Path, network: str, quick: bool) -> Iterator[Model]:
    """Heads of a network: methods x rates x views x learning from Stage 1 alone or from both."""
    from featcache import FeatureCache

    def cache(image_set: str) -> FeatureCache:
        return FeatureCache(caches / image_set / f"{network}.h5")

    stage_1, validation = cache(f"{TARGET}_stage_1"), cache("validation")
    rows, held = stage_1.training(), validation.training()
    known = truths(caches, network)
    sets = {
        name: cache(name.replace(" rest", "").replace(" ", "_")) for name in SCORED if name in known
    }
    for method, views in product(METHODS, VIEWS[:1] if quick else VIEWS):
        start = {} if method == "ridge" else {k: rows[k] for k in ("coef_init", "intercept_init")}
        X, X_source = rows["X"][:, :views], held["X"][:, :views]
        for rate, both in product(RATES[method][: 1 if quick else None], (False, True)):
            estimator = METHODS[method](dropouts=(rate,))
            weights = (SOURCE_WEIGHT,) if both else (0.0,)
            head = TwoDomainCV(estimator, source_weights=weights, max_source_loss=None)
            head.fit(
                X,
                rows["Y"],
                source=(X_source, held["Y"]),
                groups=rows["groups"],
                source_groups=held["groups"],
                mask=rows["mask"],
                source_mask=held["mask"],
                **start,
            )
            scores = {"target": head.oof_predict_proba_, "source": head.source_oof_predict_proba_}
            for name, some in sets.items():
                scores[name] = head.predict_proba(some.features[:, :views][known[name][0]])
            yield Model(f"{network} {method} {rate} {views} {both}", scores)


def transfer(caches: Path, quick: bool) -> list[dict[str, Any]]:
    """A row for each choice and domain."""
    networks = sorted(path.stem for path in (caches / "validation").glob("*.h5"))
    if not networks:
        raise SystemExit(f"--caches {caches}: no validation/*.h5 there; run `make quickstart`")
    networks = networks[:1] if quick else networks
    found = [model for network in networks for model in models(caches, network, quick)]
    labelled = {name: labels for name, (_, labels) in truths(caches, networks[0]).items()}
    half = np.arange(labelled["source"].Y.shape[0]) % 2 == 0  # chooses; the rest is scored
    source, n = labelled["source"], labelled["target"].Y.shape[0]
    labelled["validation, half"] = Labelled(source.Y[~half], source.missed[~half])
    scores = {name: np.array([m.scores[name] for m in found]) for name in found[0].scores}
    scores["validation, half"] = scores["source"][:, ~half]
    P = np.concatenate([scores["target"], scores["source"][:, half]], axis=1)
    both = Labelled(
        csr_matrix(vstack([labelled["target"].Y, source.Y[half]]), dtype=np.float64),
        np.concatenate([labelled["target"].missed, source.missed[half]]),
    )
    domains = np.repeat(["target", "source"], [n, int(half.sum())])
    rows: list[dict[str, Any]] = []
    best: dict[str, np.ndarray] = {}
    for choice, blend, two in choices():
        at = np.arange(len(domains) if two else n)
        blend.fit(P[:, at], both.Y[at], domains if two else None, missed=both.missed[at])
        for name in SCORED:
            labels = labelled[name]
            values = fbeta_per_image(labels.Y, blend.predict(scores[name]), missed=labels.missed)
            best.setdefault(name, values)
            low, high = bootstrap_interval(values)
            gain_low, gain_high = paired_bootstrap_interval(values, best[name])
            rows.append(
                {
                    "choice": choice,
                    "models": f"{np.count_nonzero(blend.weights_)} of {len(found)}",
                    "domain": name,
                    "F2": float(values.mean()),
                    "low": low,
                    "high": high,
                    "against single": float((values - best[name]).mean()),
                    "gain low": gain_low,
                    "gain high": gain_high,
                    "in sample": blend.score_,
                    "nested": blend.nested_score_,
                    "optimism": blend.optimism_,
                }
            )
    return rows


def choices() -> Iterator[tuple[str, Blend, bool]]:
    """Name, method, and whether validation takes part; the first is compared against."""
    yield "best single", Blend(max_steps=1, cv=5), False
    for average in ("probability", "logit"):
        options: dict[str, Any] = {"average": average, "cv": 5}
        yield f"uniform, {average}", Blend(method="uniform", **options), False
        yield f"simplex, {average}", Blend(method="simplex", **options), False
        yield f"greedy, {average}", Blend(**options), False
        yield f"greedy, two domains, {average}", Blend(**options), True
        kept = Blend(max_source_loss=0.0, **options)
        yield f"greedy, source loss <= 0, {average}", kept, True
