"""What the verbs of ``heads`` do, on files; each is a function of a dataclass."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sklearn
from scipy.sparse import csr_matrix

from featcache import FeatureCache
from featcache.annotations import read_labels, read_submission, write_labels
from featcache.console import command_line, option, required
from heads.blending import Blend
from heads.chain import NAMED, named_decision
from heads.decisions import Decision, best_global_threshold
from heads.domains import TwoDomainCV
from heads.dropout import default_dropouts
from heads.logistic import DropoutLogisticCV
from heads.metrics import bootstrap_interval, fbeta_per_image
from heads.nested import cross_val_fbeta
from heads.prediction import Predictor
from heads.ridge import DropoutRidgeCV
from heads.storage import Head, OutOfFold, StoredBlend, load, refuse_existing, save

METHODS = ("logistic", "ridge")
DECISIONS = (
    "how scores become label sets: by the highest expected F-beta of calibrated probabilities, "
    "by one cut for all, or by a cut for each class; fitted on out-of-fold scores"
)


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
    dropout: str = option("", "rates to compare, such as 0.1,0.5,0.9 (default: a grid)")
    cv: int = option(5, "folds; the views of an image stay together")
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


@dataclass(frozen=True)
class BlendConfig:
    """What is blended and how; every field is an option of ``heads blend``."""

    heads: list[str]
    out: str = required("file of the blend", metavar="BLEND.h5")
    beta: float = option(2.0, "of F-beta")
    method: str = option(
        "greedy", "how the weights are chosen", choices=("greedy", "simplex", "uniform")
    )
    average: str = option("probability", "what is averaged", choices=("probability", "logit"))
    decision: str = option("expected", DECISIONS, choices=NAMED)
    min_labels: int = option(0, "labels that an image gets at least")
    max_labels: int | None = option(None, "labels that an image gets at most (default: any number)")
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


# -------------------------------------------------------------------------- fit


def held_out(cache: FeatureCache, proba: np.ndarray, rows: dict[str, Any]) -> OutOfFold:
    """Out-of-fold probabilities of the rows that ``cache.training()`` gives."""
    labels = cache.labels
    if labels is None:
        raise ValueError(f"{cache.path}: has no labels; extract it with --labels")
    used = cache.valid & labels.known
    return OutOfFold(cache.ids[used], proba, _hard(rows["Y"]), labels.outside[used], rows["mask"])


def sampled(cache: FeatureCache, rows: int, seed: int) -> FeatureCache:
    """At most that many labelled, readable rows, in their order."""
    if rows < 1:
        raise ValueError(f"--source-rows {rows}: expected at least 1")
    ids = cache.ids if cache.labels is None else cache.ids[cache.valid & cache.labels.known]
    if len(ids) > rows:
        chosen = np.random.default_rng(seed).choice(len(ids), rows, replace=False)
        ids = ids[np.sort(chosen)]
    return cache.select(ids)


def _decision(config: FitConfig | BlendConfig, **folds: int) -> Decision:
    """The rule that is asked for, not yet fitted."""
    return named_decision(
        config.decision, config.beta, config.min_labels, config.max_labels, **folds
    )


def _decide(rule: Decision, scores: OutOfFold, cv: int) -> dict[str, float]:
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
    dropouts = parse_numbers(config.dropout, "--dropout") if config.dropout else default_dropouts()
    kind = DropoutLogisticCV if config.method == "logistic" else DropoutRidgeCV
    return kind(
        dropouts=dropouts,
        cv=config.cv,
        beta=config.beta,
        min_positives=config.min_positives,
        random_state=config.seed,
    )


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
    refuse_existing(config.out, config.overwrite)
    cache = FeatureCache(config.cache)
    rows = cache.training()
    _check_options(config, cache, len(np.unique(rows["groups"])))
    estimator = _estimator(config)
    decision = _decision(config, cv=config.cv, random_state=config.seed)
    if config.method == "ridge":
        rows |= {"coef_init": None, "intercept_init": None}
    oof: dict[str, OutOfFold] = {}
    facts: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if config.source:
            source = FeatureCache(config.source)
            refuse_mismatch(cache, source)
            source = sampled(source, config.source_rows, config.seed)
            source_rows = source.training()
            fitted = _fit_both(config, estimator, rows, source_rows)
            estimator = fitted.estimator_
            scores = fitted.oof_predict_proba_
            oof["source"] = held_out(source, fitted.source_oof_predict_proba_, source_rows)
            facts = {
                "source_weight": fitted.source_weight_,
                "source_score": fitted.source_score_,
                "pareto": {key: value.tolist() for key, value in fitted.pareto_.items()},
            }
        else:
            estimator.fit(**rows)
            scores = estimator.oof_predict_proba_
    notes = sorted({str(warning.message) for warning in caught})
    target = oof["target"] = held_out(cache, scores, rows)
    threshold, score = best_global_threshold(
        scores, target.Y, config.beta, target.mask, missed=target.missed
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
        oof=oof,
        decision=decision,
        provenance=facts
        | {
            "warnings": notes,
            "command": command_line("heads fit", config, config.cache),
            "versions": versions(),
            "cache": str(config.cache),
            "source": config.source,
            "method": config.method,
            "beta": config.beta,
            "threshold": threshold,
            "score": score,
            "decision": _decide(decision, target, config.cv),
        },
    )
    save(config.out, head, config.overwrite)
    return head


def check_folds(cv: int, cache: FeatureCache, images: int) -> None:
    """Refuse a number of folds that the labelled images do not allow."""
    if not 2 <= cv <= images:
        raise ValueError(
            f"{cache.path}: {images:,} labelled images, --cv {cv}; "
            f"give 2 folds at least and no more than images"
        )


def _check_options(config: FitConfig, cache: FeatureCache, images: int) -> None:
    """Say what cannot work in the words of the command line."""
    if not config.source and config.source_weight != FitConfig.source_weight:
        raise ValueError("--source-weight has no effect without --source; give both or neither")
    check_folds(config.cv, cache, images)


def refuse_mismatch(cache: FeatureCache, source: FeatureCache) -> None:
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
    if not np.array_equal(cache.views, source.views):
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


def _hard(Y: csr_matrix) -> csr_matrix:
    """Soft targets count as true from 1/2 on."""
    return csr_matrix(Y >= 0.5, dtype=np.float32)


# ------------------------------------------------------------------------ blend


def blend(config: BlendConfig) -> StoredBlend:
    """Choose the weights of stored heads on their out-of-fold scores, and store the blend.

    Heads are joined by image id; images and classes that not all of them scored are refused.

    Raises
    ------
    ValueError
        If the heads disagree, naming the file.
    """
    refuse_existing(config.out, config.overwrite)
    models = [_load_head(path) for path in config.heads]
    first, target = models[0], models[0].oof["target"]
    cv = min(5, len(target.ids))
    decision = _decision(config, cv=cv)
    scores = []
    for path, model in zip(config.heads, models, strict=True):
        if not np.array_equal(model.classes, first.classes):
            raise ValueError(f"{path}: its classes are not those of {config.heads[0]}")
        order = _order(path, model.oof["target"].ids, target.ids, config.heads[0])
        scores.append(model.oof["target"].proba[order])
        if (model.oof["target"].Y[order] != target.Y).nnz:
            raise ValueError(
                f"{path}: was fitted on other labels of these images than {config.heads[0]}; "
                "fit all heads on the same labels"
            )
    fitted = Blend(beta=config.beta, method=config.method, average=config.average)
    fitted.fit(scores, target.Y, mask=target.mask, missed=target.missed)
    P = fitted.predict_proba(scores)
    blended = replace(target, proba=P)
    used = np.flatnonzero(fitted.weights_ > 0)
    weights = fitted.weights_.tolist()
    # Models of weight 0 are not needed at prediction, nor are their caches.
    fitted.weights_ = fitted.weights_[used]
    for m in used:
        models[m].oof, models[m].decision = {}, None
    stored = StoredBlend(
        blend=fitted,
        models=[models[m] for m in used],
        model_names=[str(config.heads[m]) for m in used],
        oof={"target": blended},
        decision=decision,
        provenance={
            "command": command_line("heads blend", config, *config.heads),
            "versions": versions(),
            "heads": [str(path) for path in config.heads],
            "weights": weights,
            "score": fitted.score_,
            "decision": _decide(decision, blended, cv),
        },
    )
    save(config.out, stored, config.overwrite)
    return stored


def _load_head(path: str) -> Head:
    content = load(path)
    if not isinstance(content, Head):
        raise ValueError(f"{path}: is a blend; give heads")
    if "target" not in content.oof:
        raise ValueError(f"{path}: has no out-of-fold scores; make it with `heads fit` or `adapt`")
    return content


def _order(path: str, own: np.ndarray, ids: np.ndarray, first: str) -> np.ndarray:
    """Rows of a head's images in the order of another's."""
    if np.array_equal(own, ids):
        return np.arange(len(ids))
    for have, lack, there, here in ((ids, own, first, path), (own, ids, path, first)):
        missing = np.setdiff1d(have, lack)
        if len(missing):
            raise ValueError(
                f"{here}: has no out-of-fold score of {str(missing[0])!r}, which {there} has; "
                "fit all heads on the same images"
            )
    row = {image_id: r for r, image_id in enumerate(own.tolist())}
    return np.array([row[i] for i in ids.tolist()])


# -------------------------------------------------------------- predict and score


@dataclass(frozen=True)
class Prediction:
    """What was written: images, how many of them without a label, what adapted models say."""

    images: int
    empty: int
    explanations: dict[str, str]


def predict(
    content: str,
    caches: Sequence[str],
    out: str,
    overwrite: bool = False,
    strict: bool = False,
) -> Prediction:
    """Write ``image_id,labels`` for every image of the caches.

    Parameters
    ----------
    strict : bool
        Adapted models do not look at the images that they predict, but one by one.
    """
    refuse_existing(out, overwrite)
    predictor = Predictor.open(content, caches, strict)
    sets = predictor.label_sets()
    write_labels(out, predictor.ids, sets)
    empty = sum(not labels for labels in sets)
    return Prediction(len(sets), empty, predictor.explanations())


def score_submission(submission: str, labels: Sequence[str], beta: float = 2.0) -> np.ndarray:
    """F-beta of each image of the label files.

    Raises
    ------
    ValueError
        If an image of the label files is missing in the submission.
    """
    truth = read_labels(labels)
    predicted = read_submission(submission)
    chosen = predicted.select(truth.ids)
    if not chosen.known.all():
        missing = truth.ids[~chosen.known]
        raise ValueError(
            f"{submission}: has no row for {len(missing):,} of the {len(truth.ids):,} images of "
            f"{labels[0]} (the first is {str(missing[0])!r}); predict all of them"
        )
    classes = np.union1d(truth.classes, predicted.classes)
    return fbeta_per_image(
        _hard(truth.restrict(classes).positives), _hard(chosen.restrict(classes).positives), beta
    )


def score(submission: str, labels: Sequence[str], beta: float = 2.0) -> dict[str, float]:
    """Mean F-beta with its 95 % bootstrap interval over images."""
    values = score_submission(submission, labels, beta)
    low, high = bootstrap_interval(values)
    return {"fbeta": float(values.mean()), "low": low, "high": high, "images": len(values)}
