"""What the verbs of ``heads`` do, on files; each is a function of a dataclass."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from featcache.annotations import read_labels, read_submission, write_labels
from featcache.console import Interrupted, Progress, StopRequest, command_line, option, required
from featcache.disk import hash_file
from heads.blending import Blend
from heads.chain import NAMED, named_decision
from heads.fitting import DECISIONS, FitConfig, decide, fit, hard, versions
from heads.given import named_files
from heads.members import open_members, order
from heads.metrics import bootstrap_interval, fbeta_per_image
from heads.prediction import Predictor, named
from heads.resuming import ChosenSets, job_of, refuse_repeats
from heads.storage import StoredBlend, refuse_existing, save

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
    Out-of-fold scores of other people's models take part as files (:mod:`heads.given`).

    Raises
    ------
    ValueError
        If the heads disagree, naming the file.
    """
    refuse_existing(config.out, config.overwrite)
    models = open_members(config.heads)
    first, target = models[0], models[0].oof["target"]
    cv = min(5, len(target.ids))
    decision = named_decision(
        config.decision, config.beta, config.min_labels, config.max_labels, cv=cv
    )
    scores = []
    for path, model in zip(config.heads, models, strict=True):
        if not np.array_equal(model.classes, first.classes):
            raise ValueError(f"{path}: its classes are not those of {config.heads[0]}")
        rows = order(path, model.oof["target"].ids, target.ids, config.heads[0])
        scores.append(model.oof["target"].proba[rows])
        if (model.oof["target"].Y[rows] != target.Y).nnz:
            raise ValueError(
                f"{path}: was fitted on other labels of these images than {config.heads[0]}; "
                "fit all heads on the same labels"
            )
    fitted = Blend(
        beta=config.beta,
        method=config.method,
        average=config.average,
        cv=None if min(config.cv, cv) < 2 else min(config.cv, cv),
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
            "sha256": [hash_file(path) for path in config.heads],
            "weights": weights,
            "score": fitted.score_,
            "nested": fitted.nested_ | {"optimism": fitted.optimism_} if fitted.cv else None,
            "decision": decide(decision, blended, cv),
        },
    )
    save(config.out, stored, config.overwrite)
    return stored


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
    scores: Sequence[str] = (),
) -> Prediction:
    """Write ``image_id,labels`` for every image of the caches.

    Label sets are kept beside `out` as they are chosen, so that the same call goes on where a
    killed one was; `out` appears whole.

    Parameters
    ----------
    strict : bool
        Adapted models do not look at the images that they predict, but one by one.
    scores : sequence of str
        Files of scores of members that are known by these alone; see :mod:`heads.given`.

    Raises
    ------
    ValueError
        If the caches or scores do not fit, naming the file.
    Interrupted
        If it was asked to stop.
    """
    refuse_existing(out, overwrite)
    predictor = Predictor.open(content, caches, strict, scores)
    ids = predictor.ids
    refuse_repeats(predictor.caches[0].path, ids)
    files: list[str | os.PathLike[str]] = [content, *(c.path for c in predictor.caches)]
    job = job_of([*files, *named_files(scores).values()], strict)
    with ChosenSets(out, job, len(predictor.classes)) as chosen:
        _choose(predictor, chosen)
        sets = named(chosen.sets(), predictor.classes)
        write_labels(out, ids, sets)
        chosen.discard()
    empty = sum(not labels for labels in sets)
    return Prediction(len(sets), empty, predictor.explanations())


def _choose(predictor: Predictor, chosen: ChosenSets) -> None:
    """Label sets of all images that have none yet, with progress."""
    total = len(predictor.ids)
    progress = Progress(total, "images", done=chosen.rows)
    with StopRequest() as stop:
        for part in predictor.sets(start=chosen.rows):
            chosen.append(part)
            progress.advance(part.shape[0])
            if stop.asked and chosen.rows < total:
                progress.clear()
                raise Interrupted(
                    f"{chosen.rows:,} of {total:,} images are predicted; the same command goes on"
                )
    progress.clear()


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
