"""What the verbs of ``heads`` do, on files; each is a function of a dataclass."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featcache.annotations import read_labels, read_submission, write_labels
from featcache.console import Interrupted, Progress, StopRequest
from featcache.labelfiles import refuse_unwritable_names
from heads.cacherows import hard
from heads.fitting import FitConfig, fit
from heads.given import named_files
from heads.metrics import bootstrap_interval, fbeta_per_image
from heads.mixing import BlendConfig, blend
from heads.prediction import Predictor, named
from heads.resuming import ChosenSets, job_of, refuse_repeats
from heads.storage import refuse_existing

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
    refuse_existing(out, overwrite, [content, *caches, *named_files(scores).values()])
    predictor = Predictor.open(content, caches, strict, scores)
    refuse_existing(out, overwrite, [str(cache.path) for cache in predictor.caches])
    ids = predictor.ids
    _refuse_unwritable(content, predictor)
    files: list[str | os.PathLike[str]] = [content, *(c.path for c in predictor.caches)]
    job = job_of(files, strict, named_files(scores))
    with ChosenSets(out, job, len(predictor.classes)) as chosen:
        _choose(predictor, chosen)
        sets = named(chosen.sets(), predictor.classes)
        write_labels(out, ids, sets)
        chosen.discard()
    empty = sum(not labels for labels in sets)
    return Prediction(len(sets), empty, predictor.explanations())


def _refuse_unwritable(content: str, predictor: Predictor) -> None:
    """Refuse ids of which a submission could not be written once all is predicted."""
    cache = predictor.caches[0].path
    refuse_repeats(cache, predictor.ids)
    refuse_unwritable_names(
        cache, "an image id", predictor.ids.tolist(), "write the cache with such ids"
    )
    refuse_unwritable_names(
        content,
        "a class id",
        predictor.classes.tolist(),
        "fit on caches with such class ids; words belong in class_names of FeatureCache.write",
        spaces=False,
    )


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
