"""What the verbs of ``heads`` do, on files; each is a function of a dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from featcache.annotations import read_labels, read_submission, write_labels
from featcache.console import command_line, option, required
from heads.blending import Blend
from heads.chain import NAMED, named_decision
from heads.fitting import DECISIONS, FitConfig, decide, fit, hard, versions
from heads.metrics import bootstrap_interval, fbeta_per_image
from heads.prediction import Predictor
from heads.storage import Head, StoredBlend, load, refuse_existing, save

__all__ = [
    "BlendConfig",
    "FitConfig",
    "Prediction",
    "blend",
    "fit",
    "predict",
    "score",
    "score_submission",
]


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
    cv: int = option(5, "folds in which the whole choice is repeated for an honest score; 0: none")
    decision: str = option("expected", DECISIONS, choices=NAMED)
    min_labels: int = option(0, "labels that an image gets at least")
    max_labels: int | None = option(None, "labels that an image gets at most (default: any number)")
    overwrite: bool = option(False, "replace an existing file")


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
    decision = named_decision(
        config.decision, config.beta, config.min_labels, config.max_labels, cv=cv
    )
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
    fitted = Blend(
        beta=config.beta,
        method=config.method,
        average=config.average,
        cv=min(config.cv, cv) or None,
    )
    names = [str(path) for path in config.heads]
    fitted.fit(scores, target.Y, mask=target.mask, missed=target.missed, names=names)
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
            "nested": fitted.nested_ | {"optimism": fitted.optimism_} if fitted.cv else None,
            "decision": decide(decision, blended, cv),
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
        hard(truth.restrict(classes).positives), hard(chosen.restrict(classes).positives), beta
    )


def score(submission: str, labels: Sequence[str], beta: float = 2.0) -> dict[str, float]:
    """Mean F-beta with its 95 % bootstrap interval over images."""
    values = score_submission(submission, labels, beta)
    low, high = bootstrap_interval(values)
    return {"fbeta": float(values.mean()), "low": low, "high": high, "images": len(values)}
