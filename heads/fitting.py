"""What does ``heads fit`` do, on files?"""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn
from scipy.sparse import csr_matrix

from featcache import FeatureCache, layout
from featcache.console import command_line, option, required
from heads.chain import NAMED, named_decision, refuse_many
from heads.decisions import Decision, best_global_threshold
from heads.domains import TwoDomainCV
from heads.grouping import group_codes
from heads.logistic import PROBABILITIES, DropoutLogisticCV
from heads.nested import cross_val_fbeta
from heads.ridge import DropoutRidgeCV
from heads.storage import Head, OutOfFold, refuse_existing, save

METHODS = ("logistic", "ridge")
NOISES = ("quadratic", "gaussian")
ALL_VIEWS = "all"
DECISIONS = (
    "how scores become label sets: by the highest expected F-beta of calibrated probabilities, "
    "by one cut for all, or by a cut for each class; fitted on out-of-fold scores"
)

GROUPS = "image_id,group: images of a group stay together in folds (default: each by itself)"


@dataclass(frozen=True)
class FitConfig:
    """What a head is fitted on and how; every field is an option of ``heads fit``."""

    cache: str
    out: str = required("file of the head", metavar="HEAD.h5")
    source: str = option(
        "",
        "cache of the validation images: fit on both domains, comparing how much the source counts",
        metavar="VALIDATION.h5",
    )
    method: str = option("logistic", "kind of head", choices=METHODS)
    noise: str = option(
        "quadratic", "of logistic heads: how dropout is marginalised", choices=NOISES
    )
    probability: str = option(
        "noise",
        "of logistic heads: averaged over the noise, or Platt-scaled margins, of which many heads "
        "are one matrix at prediction if logits are averaged",
        choices=PROBABILITIES,
    )
    dropout: str = option("", "rates to compare, such as 0.1,0.5,0.9 (default: a grid)")
    views: str = option(ALL_VIEWS, "views to train on: all, or names such as eval,view1")
    cv: int = option(5, "folds; the views of an image stay together")
    groups: str = option("", GROUPS, metavar="CSV")
    beta: float = option(2.0, "of F-beta")
    min_positives: int = option(1, "labels with fewer positives keep the network's own weights")
    source_rows: int = option(5000, "source images at most, chosen by --seed")
    source_weight: str = option(
        "0.1,0.3,1", "with --source: weights of the whole source domain to compare; 0 leaves it out"
    )
    decision: str = option("expected", DECISIONS, choices=NAMED)
    min_labels: int = option(0, "labels that an image gets at least")
    max_labels: int | None = option(None, "labels that an image gets at most (default: any number)")
    seed: int = option(0, "of the folds and of the choice of source images")
    overwrite: bool = option(False, "replace an existing file")


def versions() -> dict[str, str]:
    """Of what decides a result."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
    }


def parse_numbers(text: str, flag: str) -> tuple[float, ...]:
    """``0.1,0.5`` -> (0.1, 0.5).

    Raises
    ------
    ValueError
        Naming the flag and the value.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{flag} {text!r}: expected numbers separated by commas") from None


def held_out(cache: FeatureCache, proba: np.ndarray, rows: dict[str, Any]) -> OutOfFold:
    """Out-of-fold probabilities of the rows that ``cache.training()`` gives."""
    labels = cache.labels
    if labels is None:
        raise ValueError(f"{cache.path}: has no labels; extract it with --labels")
    used = cache.valid & labels.known
    return OutOfFold(cache.ids[used], proba, hard(rows["Y"]), labels.outside[used], rows["mask"])


def _labelled_ids(cache: FeatureCache) -> np.ndarray:
    """Of the rows that ``cache.training()`` gives, and of all where there are no labels."""
    return cache.ids if cache.labels is None else cache.ids[cache.valid & cache.labels.known]


def sampled(cache: FeatureCache, rows: int, seed: int) -> FeatureCache:
    """At most that many labelled, readable rows, in their order."""
    if rows < 1:
        raise ValueError(f"--source-rows {rows}: expected at least 1")
    ids = _labelled_ids(cache)
    if len(ids) > rows:
        chosen = np.random.default_rng(seed).choice(len(ids), rows, replace=False)
        ids = ids[np.sort(chosen)]
    return cache.select(ids)


def decide(rule: Decision, scores: OutOfFold, cv: int) -> dict[str, float]:
    """Fit a rule on out-of-fold scores; how good it is on images that it has not seen.

    The figure is nested, the whole rule being fitted anew in every fold; there is none of
    fewer than 2 cv images.
    """
    known: dict[str, Any] = {"mask": scores.mask, "missed": scores.missed}
    rule.fit(scores.proba, scores.Y, **known)
    if len(scores.ids) < 2 * cv:
        return {}
    found = cross_val_fbeta(rule, scores.proba, scores.Y, cv, **known)
    return {"score": found.score, "low": found.low, "high": found.high}


def _estimator(config: FitConfig) -> Any:
    common: dict[str, Any] = {
        "cv": config.cv,
        "beta": config.beta,
        "min_positives": config.min_positives,
        "random_state": config.seed,
    }
    if config.dropout:
        common["dropouts"] = parse_numbers(config.dropout, "--dropout")
    if config.method == "ridge":
        return DropoutRidgeCV(**common)
    return DropoutLogisticCV(noise=config.noise, probability=config.probability, **common)


@dataclass
class _Fitted:
    """An estimator with what is held out of each domain, and what is told of it."""

    estimator: Any
    oof: dict[str, OutOfFold]
    facts: dict[str, Any]


def fit(config: FitConfig) -> Head:
    """Fit a head on a cache of Stage 1 (and on one of validation images) and store it.

    Without ``source`` a logistic head shrinks towards the network's own last layer, a ridge head
    towards zero; with it both domains train (see :class:`heads.TwoDomainCV`), and a ridge head
    shrinks towards a ridge head of the source rows, which lives on the scale of 0 and 1.

    Raises
    ------
    ValueError
        If the caches do not fit together, or have no labels.
    """
    refuse_existing(config.out, config.overwrite, [config.cache, config.source, config.groups])
    cache = FeatureCache(config.cache)
    rows = training_rows(cache, config.views, config.groups)
    _check_options(config, cache, len(np.unique(rows["groups"])))
    decision = named_decision(
        config.decision,
        config.beta,
        config.min_labels,
        config.max_labels,
        cv=config.cv,
        random_state=config.seed,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = _fit(config, cache, rows)
    notes = sorted({str(warning.message) for warning in caught})
    target, estimator = fitted.oof["target"], fitted.estimator
    threshold, score = best_global_threshold(
        target.proba, target.Y, config.beta, target.mask, missed=target.missed
    )
    if not np.isfinite(threshold):
        what = "no label" if threshold > 0 else "every label"
        notes.append(f"the best cut gives every image {what}: these labels teach the head nothing")
    head = Head(
        estimator=estimator,
        classes=cache.classes,
        names=cache.class_names,
        network_id=cache.network_id,
        by_reference=config.method == "logistic" and estimator.coef_init_ is not None,
        oof=fitted.oof,
        decision=decision,
        provenance=fitted.facts
        | {
            "warnings": notes,
            "command": command_line("heads fit", config, config.cache),
            "versions": versions(),
            "cache": str(config.cache),
            "cache_hash": layout.read(cache.path).content_hash,
            "network": cache.network_name,
            "source": config.source,
            "method": config.method,
            "beta": config.beta,
            "threshold": threshold,
            "score": score,
            "decision": decide(decision, target, config.cv),
        },
    )
    save(config.out, head, config.overwrite)
    return head


def training_rows(cache: FeatureCache, views: str = ALL_VIEWS, groups: str = "") -> dict[str, Any]:
    """``cache.training()`` of some views, with the groups of a file.

    Raises
    ------
    ValueError
        Naming the cache and a view that it has not, or the file of groups.
    """
    rows = cache.training()
    if groups:
        rows["groups"] = group_codes(groups, _labelled_ids(cache))
    if views != ALL_VIEWS:
        names, wanted = cache.views.tolist(), views.split(",")
        for view in wanted:
            if view not in names:
                raise ValueError(
                    f"{cache.path}: has no view {view!r} (--views {views}); choose from "
                    f"{', '.join(names)}, or {ALL_VIEWS}"
                )
        rows["X"] = rows["X"][:, [names.index(view) for view in wanted]]
    return rows


def _fit(config: FitConfig, cache: FeatureCache, rows: dict[str, Any]) -> _Fitted:
    """On the target alone, or on both domains."""
    estimator = _estimator(config)
    if config.method == "ridge":
        rows = rows | {"coef_init": None, "intercept_init": None}
    if not config.source:
        estimator.fit(**rows)
        oof = {"target": held_out(cache, estimator.oof_predict_proba_, rows)}
        return _Fitted(estimator, oof, {})
    source = FeatureCache(config.source)
    refuse_mismatch(cache, source, same_views=config.views == ALL_VIEWS)
    source = sampled(source, config.source_rows, config.seed)
    source_rows = training_rows(source, config.views, config.groups)
    both = _fit_both(config, estimator, rows, source_rows)
    oof = {
        "target": held_out(cache, both.oof_predict_proba_, rows),
        "source": held_out(source, both.source_oof_predict_proba_, source_rows),
    }
    facts = {
        "source_hash": layout.read(source.path).content_hash,
        "source_weight": both.source_weight_,
        "source_score": both.source_score_,
        "pareto": {key: value.tolist() for key, value in both.pareto_.items()},
    }
    return _Fitted(both.estimator_, oof, facts)


def check_folds(cv: int, cache: FeatureCache, images: int) -> None:
    """Refuse a number of folds that the labelled images do not allow."""
    if not 2 <= cv <= images:
        raise ValueError(
            f"{cache.path}: {images:,} labelled images, --cv {cv}; "
            f"give 2 folds at least and no more than images (with --groups: than groups)"
        )


def _check_options(config: FitConfig, cache: FeatureCache, images: int) -> None:
    """Say what cannot work in the words of the command line."""
    if not config.source and config.source_weight != FitConfig.source_weight:
        raise ValueError("--source-weight has no effect without --source; give both or neither")
    check_folds(config.cv, cache, images)
    refuse_many(config.min_labels, len(cache.classes), cache.path)


def refuse_mismatch(cache: FeatureCache, source: FeatureCache, same_views: bool = True) -> None:
    """Refuse a source that is of other views, classes or networks, or of the same images."""
    if len(shared := np.intersect1d(cache.ids, source.ids)):
        raise ValueError(
            f"{source.path}: holds image {str(shared[0])!r}, which {cache.path} holds too; "
            "--source must be of other images, or the out-of-fold scores would know their labels"
        )
    if cache.network_id != source.network_id:
        raise ValueError(
            f"{source.path}: is of network {str(source.network_id)[:12]}, but {cache.path} of "
            f"{str(cache.network_id)[:12]}; both must be of one network"
        )
    if same_views and not np.array_equal(cache.views, source.views):
        raise ValueError(
            f"{source.path}: has the views {source.views.tolist()}, but {cache.path} has "
            f"{cache.views.tolist()}; extract both with the same --views"
        )
    if not np.array_equal(cache.classes, source.classes):
        raise ValueError(
            f"{source.path}: its {len(source.classes)} classes are not the "
            f"{len(cache.classes)} of {cache.path}, in their order; make both with the same classes"
        )


def _fit_both(
    config: FitConfig, estimator: Any, rows: dict[str, Any], source: dict[str, Any]
) -> TwoDomainCV:
    start = {key: rows[key] for key in ("coef_init", "intercept_init")}
    if config.method == "ridge":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # its rates are in no table
            first = _estimator(config).fit(
                source["X"], source["Y"], groups=source["groups"], mask=source["mask"]
            )
        start = {"coef_init": first.coef_, "intercept_init": first.intercept_}
    weights = parse_numbers(config.source_weight, "--source-weight")
    both = TwoDomainCV(estimator, source_weights=weights)
    return both.fit(
        rows["X"],
        rows["Y"],
        source=(source["X"], source["Y"]),
        groups=rows["groups"],
        source_groups=source["groups"],
        mask=rows["mask"],
        source_mask=source["mask"],
        **start,
    )


def hard(Y: csr_matrix) -> csr_matrix:
    """Soft targets count as true from 1/2 on."""
    return csr_matrix(Y >= 0.5, dtype=np.float32)
