"""What does ``heads fit`` do, on files?"""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn
from sklearn.base import clone

from featcache import FeatureCache, layout
from featcache.console import command_line, option, required
from featcache.disk import hash_file
from heads.cacherows import (
    ALL_VIEWS,
    CacheRows,
    halves,
    hard,
    labelled_ids,
    open_rows,
    refuse_mismatch,
    sampled,
)
from heads.chain import NAMED, least_labels, named_decision, refuse_many
from heads.decisions import Decision, best_global_threshold
from heads.domains import TwoDomainCV
from heads.grouping import group_codes
from heads.logistic import PROBABILITIES, DropoutLogisticCV
from heads.nested import cross_val_fbeta
from heads.ridge import DropoutRidgeCV
from heads.storage import Head, OutOfFold, refuse_existing, save

METHODS = ("logistic", "ridge")
NOISES = ("quadratic", "gaussian")
DECISIONS = (
    "how scores become label sets: by the highest expected F-beta of calibrated probabilities, "
    "by one cut for all, or by a cut for each class; fitted on out-of-fold scores"
)
OF_SOURCE = ("source_rows", "source_weight", "max_source_loss")  # options that need --source
LEAST = (
    "labels that an image gets at least (default: 1 by expected F-beta if every labelled image has "
    "one, else 0)"
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
    source_rows: int = option(
        5000, "source images at most, chosen by --seed; as many more teach a ridge head's start"
    )
    source_weight: str = option(
        "0.1,0.3,1",
        "with --source: weights of the whole source domain to compare, each at every dropout rate; "
        "0 leaves it out",
    )
    max_source_loss: float = option(
        0.01,
        "with --source: F-beta that the source may lose against the unadapted head; with inf the "
        "target alone decides",
    )
    decision: str = option("expected", DECISIONS, choices=NAMED)
    min_labels: int | None = option(None, LEAST)
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


def decide(rule: Decision, scores: OutOfFold, cv: int) -> dict[str, float]:
    """Fit a rule on out-of-fold scores; how good it is on images that it has not seen.

    The figure is nested, the whole rule being fitted anew in every fold; there is none of
    fewer than 2 cv images, or groups of them.
    """
    rule.fit(scores.proba, scores.Y, **scores.known())
    if scores.units < 2 * cv:
        return {}
    found = cross_val_fbeta(rule, scores.proba, scores.Y, cv, **scores.known())
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
    refuse_negative(seed=config.seed, min_positives=config.min_positives)
    cache = FeatureCache(config.cache)
    caches = [cache]
    if config.source:
        source = FeatureCache(config.source)
        refuse_mismatch(cache, source, same_views=config.views == ALL_VIEWS)
        caches.append(sampled(source, config.source_rows, config.seed))
    rows, *home = open_rows(caches, config.views, config.groups)
    _check_options(config, rows)
    decision = named_decision(
        config.decision,
        config.beta,
        least_labels(config.min_labels, config.decision, hard(rows.fit["Y"]), rows.missed),
        config.max_labels,
        cv=config.cv,
        random_state=config.seed,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = _fit(config, rows, home[0] if home else None)
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
            "groups_hash": hash_file(config.groups) if config.groups else "",
            "method": config.method,
            "beta": config.beta,
            "threshold": threshold,
            "score": score,
            "decision": decide(decision, target, config.cv),
        },
    )
    save(config.out, head, config.overwrite)
    return head


def _fit(config: FitConfig, rows: CacheRows, source: CacheRows | None) -> _Fitted:
    """On the target alone, or on both domains."""
    estimator = _estimator(config)
    start = {key: rows.fit[key] for key in ("coef_init", "intercept_init")}
    if config.method == "ridge":
        start = {"coef_init": None, "intercept_init": None}
    if source is None:
        estimator.fit(**rows.fit | start, missed=rows.missed)
        return _Fitted(estimator, {"target": rows.held_out(estimator.oof_predict_proba_)}, {})
    if config.method == "ridge":
        start, source = _ridge_start(config, rows, source)
    both = TwoDomainCV(
        estimator,
        source_weights=parse_numbers(config.source_weight, "--source-weight"),
        max_source_loss=config.max_source_loss,
    ).fit(
        rows.fit["X"],
        rows.fit["Y"],
        source=(source.fit["X"], source.fit["Y"]),
        groups=rows.groups,
        source_groups=source.groups,
        mask=rows.fit["mask"],
        source_mask=source.fit["mask"],
        shared_groups=rows.grouped,
        missed=rows.missed,
        source_missed=source.missed,
        **start,
    )
    oof = {
        "target": rows.held_out(both.oof_predict_proba_),
        "source": source.held_out(both.source_oof_predict_proba_),
    }
    facts = {
        "source_hash": layout.read(source.cache.path).content_hash,
        "source_weight": both.source_weight_,
        "source_score": both.source_score_,
        "pareto": {key: value.tolist() for key, value in both.pareto_.items()},
    }
    return _Fitted(both.estimator_, oof, facts)


def _ridge_start(
    config: FitConfig, rows: CacheRows, source: CacheRows
) -> tuple[dict[str, Any], CacheRows]:
    """A ridge head of source rows that are not scored later, and the source rows without those.

    Source images beyond the sample teach it or, where these are few, half of the sample.
    """
    spare = _spare(config, rows, source)
    rest = source
    if len(spare) >= len(source) / 2:
        caches = [rows.cache, source.cache, spare]
        teachers = open_rows(caches, config.views, config.groups)[2]
    else:
        teachers, rest = halves(source, config.seed)
        if rows.grouped:
            teachers = teachers.take(np.flatnonzero(~np.isin(teachers.groups, rows.groups)))
    folds = min(config.cv, len(np.unique(teachers.groups)))
    if folds < 2:
        warnings.warn(
            f"{config.source}: no images are left to teach a ridge head that this one starts from "
            "(none that shares a group with others may); it shrinks towards zero",
            stacklevel=2,
        )
        return {"coef_init": None, "intercept_init": None}, source
    fit = {key: teachers.fit[key] for key in ("X", "Y", "groups", "mask")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its rates are in no table
        first = clone(_estimator(config)).set_params(cv=folds).fit(**fit, missed=teachers.missed)
    return {"coef_init": first.coef_, "intercept_init": first.intercept_}, rest


def _spare(config: FitConfig, rows: CacheRows, source: CacheRows) -> FeatureCache:
    """Source images beyond the sample that share no group with an image that is scored."""
    every = FeatureCache(config.source)
    ids = np.setdiff1d(labelled_ids(every), source.ids)
    if rows.grouped and len(ids):
        scored = np.concatenate([rows.ids, source.ids])
        codes = group_codes(config.groups, np.concatenate([scored, ids]))
        ids = ids[~np.isin(codes[len(scored) :], codes[: len(scored)])]
    return sampled(every.select(ids), config.source_rows, config.seed)


def check_folds(cv: int, rows: CacheRows, groups: str = "") -> None:
    """Refuse a number of folds that the labelled images, or a file of groups, do not allow."""
    units, path = len(np.unique(rows.groups)), rows.cache.path
    if 2 <= cv <= units:
        return
    images = _counted(len(np.unique(rows.ids)), "labelled image")
    what, where = "image", f"{path}: {images}"
    if groups:
        what, where = "group", f"{groups}: {_counted(units, 'group')} of {images} of {path}"
    if units < 2:
        raise ValueError(f"{where}; folds need at least 2 {what}s: give labels of more {what}s")
    raise ValueError(f"{where}, --cv {cv}; give 2 folds at least and no more than {what}s")


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _check_options(config: FitConfig, rows: CacheRows) -> None:
    """Say what cannot work in the words of the command line."""
    for name in () if config.source else OF_SOURCE:
        if getattr(config, name) != getattr(FitConfig, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} has no effect without --source; give both or neither")
    if not config.max_source_loss >= 0:
        raise ValueError(f"--max-source-loss {config.max_source_loss:g}: expected a number >= 0")
    for name in ("noise", "probability") if config.method == "ridge" else ():
        if getattr(config, name) != getattr(FitConfig, name):
            raise ValueError(f"--{name} has no effect on ridge heads; leave it out")
    unadapted = config.method == "ridge" or rows.fit["coef_init"] is not None
    if config.max_source_loss != FitConfig.max_source_loss and not unadapted:
        raise ValueError(
            f"--max-source-loss: {rows.cache.path} has no last layer to compare with; leave it out"
        )
    check_folds(config.cv, rows, config.groups)
    refuse_many(config.min_labels, len(rows.cache.classes), rows.cache.path)


def refuse_negative(**options: int) -> None:
    """Refuse a count or a seed below 0, by the name of its option."""
    for name, value in options.items():
        if value < 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 0")
