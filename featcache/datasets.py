"""Which images train, which are held out, and what are their labels?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.annotations import Labels
from featcache.errors import InputError
from featcache.hashing import id_hashes
from featcache.images import ImageSet, find_images, read_ids
from featcache.labelcache import read_labels_cached
from featcache.settings import TrainingConfig


@dataclass
class Data:
    """Training and validation images with their labels."""

    train: ImageSet
    validation: ImageSet
    train_labels: Labels
    validation_labels: Labels
    missing: list[str]

    def digest(self) -> str:
        """sha256 of ids, classes and labels on both sides: what a run is about."""
        digest = hashlib.sha256()
        for labels in (self.train_labels, self.validation_labels):
            digest.update("\n".join([*labels.classes.tolist(), *labels.ids.tolist()]).encode())
            for matrix in (labels.positives, labels.negatives):
                if matrix is not None:
                    for part in (matrix.indptr, matrix.indices, matrix.data):
                        digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


def hold_out(ids: np.ndarray, validation: str) -> np.ndarray:
    """(n,) bool: which images are held out.

    ``validation`` is a file of ids, a number, or a share below 1. Numbers take the images
    with the smallest hashes of their ids, so that adding files hardly changes the choice.

    Raises
    ------
    InputError
        If ``validation`` is none of these, or nothing or everything would be held out.
    """
    if Path(validation).is_file():
        held = np.isin(ids, read_ids(validation))
        if not held.any():
            raise InputError(f"{validation}: none of its ids is a labelled image")
    else:
        try:
            amount = float(validation)
        except ValueError:
            raise InputError(
                f"--validation {validation!r} is neither a number nor an existing file of ids"
            ) from None
        whole = amount >= 0 and amount.is_integer()
        if not (whole or 0 < amount < 1):
            raise InputError(
                f"--validation {validation}: give a whole number of images, a share below 1, "
                "or a file of ids"
            )
        count = round(amount * len(ids)) if amount < 1 else int(amount)
        hashes = id_hashes("hold-out", ids.tolist())
        held = np.zeros(len(ids), bool)
        held[np.argsort(hashes, kind="stable")[:count]] = True
    if held.all() or not held.any():
        raise InputError(
            f"--validation {validation}: {held.sum():,} of {len(ids):,} labelled images would be "
            "held out; at least one must be on either side"
        )
    return held


def load_data(config: TrainingConfig) -> Data:
    """Match images and labels and split them.

    Raises
    ------
    InputError
        If nothing matches.
    """
    labels = read_labels_cached(
        config.labels,
        classes=config.classes or None,
        descriptions=config.descriptions or None,
        unlisted="unknown" if config.unlisted == "unknown" else "negative",
        folder=config.label_cache or None,
    )
    if not labels.positives.nnz:
        raise InputError(
            f"{config.labels[0]}: no positive label of a class to train; "
            "check --labels and --classes"
        )
    images, missing = find_images(config.images).select(labels.ids)
    if not len(images):
        raise InputError(
            f"{config.images}: none of the {len(labels.ids):,} labelled images is there "
            f"(the first label is of {str(labels.ids[0])!r}); files must be named by their ids"
        )
    held = hold_out(images.ids, config.validation)
    train = ImageSet(images.directory, images.ids[~held], images.files[~held])
    validation = ImageSet(images.directory, images.ids[held], images.files[held])
    return Data(train, validation, labels.select(train.ids), labels.select(validation.ids), missing)
