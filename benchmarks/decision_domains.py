"""Which label sets score best in new domains?  F2 of every chain of steps, for ``decisions.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.base import clone

from heads import (
    DropoutLogisticCV,
    ExpectedFBeta,
    GlobalThreshold,
    PerClassThreshold,
    PlattCalibration,
    PriorShift,
    bootstrap_interval,
    fbeta_per_image,
)
from heads.cuts import apply_threshold, best_global_threshold
from heads.metrics import paired_bootstrap_interval

TARGET, UNSEEN = "gyosho", ("sousyo", "soseki")


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
