"""Which scores of many models can a blend's best cut pass?

For every model m a floor f_m is chosen, so that only some of its scores are above. An entry
(image, label) that no model scores above its own floor stays, in any average
with weights w, at or below sum_m w_m f_m: cuts above that never pass it, and need
not know it. What the cuts below would give at best is bounded in `bounds`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import logit

from heads.cuts import best_global_threshold
from heads.inputs import Matrix
from heads.metrics import fbeta, weighted_mean
from heads.ordering import contains
from heads.stacks import Stack

TINY = 1e-6  # probabilities are kept this far from 0 and 1 before taking logits
_NONE = 1e-12  # labels of an image without any
_ROOM = 1 << 31  # bytes that scores may take in single precision
_LOOK = 256  # images that the floors are guessed from


@dataclass(frozen=True)
class Truth:
    """What label sets of the n images of a domain are scored against.

    Attributes
    ----------
    positive : (n,) float64
        Labels of each image that are known to be true.
    true : (n,) float64
        The same and those outside the K labels.
    share : (n,) float64
        Weights of the images; they add up to 1.
    beta : float
    """

    positive: np.ndarray
    true: np.ndarray
    share: np.ndarray
    beta: float

    @cached_property
    def none(self) -> np.ndarray:
        """(n,): added above and below the fraction, makes it 1 where an image has no label: 0/0."""
        return np.where(self.true > 0, 0, _NONE)

    @cached_property
    def factor(self) -> np.ndarray:
        """(n,): what (none_i + tp_i) / (none_i + b^2 |y_i| + passed_i) counts in the mean."""
        return self.share * np.where(self.true > 0, 1 + self.beta**2, 1)

    @cached_property
    def single(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`none`, b^2 |y_i| and `factor` in single precision."""
        parts = (self.none, self.beta**2 * self.true, self.factor)
        none, weighted, factor = (part.astype(np.float32) for part in parts)
        return none, weighted, factor

    @cached_property
    def all(self) -> np.ndarray:
        """(n,): known true labels and `none`, in single precision."""
        return self.positive.astype(np.float32) + self.single[0]

    def score(self, right: np.ndarray, predicted: np.ndarray) -> float:
        """Mean F-beta from the counts of each image."""
        return weighted_mean(fbeta(right, self.true, predicted, self.beta), self.share)


@dataclass(frozen=True)
class Labels:
    """Entries (image, label): of which image (E,) they are, and that the first `right` are true."""

    image: np.ndarray
    right: int

    def place(self, n: int) -> np.ndarray:
        """(E,): where right, and then wrong labels of n images are counted."""
        place = self.image.copy()
        place[self.right :] += n
        return place

    def take(self, at: np.ndarray) -> Labels:
        """Some of the entries, ascending."""
        return Labels(self.image[at], int(np.searchsorted(at, self.right)))


@dataclass(frozen=True)
class Entries:
    """Scores of one domain that can matter.

    Attributes
    ----------
    score : (M, E) array
        Probabilities or logits; entries that are true come first.
    image : (E,) int64
    right : int
        How many entries are true.
    floor : (M,) float
        No left-out entry has a higher score; -inf where nothing was left out.
    truth : Truth
    alone : callable
        Best cut and mean F-beta of a model on some of the images, read anew.
    """

    score: np.ndarray
    image: np.ndarray
    right: int
    floor: np.ndarray
    truth: Truth
    alone: Callable[[int, np.ndarray], tuple[float, float]]

    @property
    def labels(self) -> Labels:
        """Images, and how many entries are true."""
        return Labels(self.image, self.right)

    def single(self, model: int) -> tuple[float, float]:
        """Best cut and mean F-beta of a model alone, whatever was left out of it."""
        return self.alone(model, np.arange(len(self.truth.true)))

    def of_images(self, rows: np.ndarray) -> Entries:
        """Those of some images (ascending), which are numbered anew."""
        number = np.full(len(self.truth.true), -1)
        number[rows] = np.arange(len(rows))
        at = np.flatnonzero(number[self.image] >= 0)
        share = self.truth.share[rows]
        truth = replace(
            self.truth,
            positive=self.truth.positive[rows],
            true=self.truth.true[rows],
            share=share / share.sum(),
        )
        return Entries(
            self.score[:, at],
            number[self.image[at]],
            int(np.searchsorted(at, self.right)),
            self.floor,
            truth,
            lambda model, some: self.alone(model, rows[some]),
        )


def screened(
    stack: Stack,
    rows: np.ndarray,
    truth: Truth,
    positives: csr_matrix,
    unknown: Matrix | None,
    logits: bool,
    depth: float,
) -> Entries:
    """Read all models once and keep the entries of some rows that can matter.

    Parameters
    ----------
    rows : (n,) ascending
        Of one domain.
    positives, unknown : of all rows
    depth : float
        How many scores of a model are above its floor, as a multiple of images and true labels.
    """

    def alone(model: int, some: np.ndarray) -> tuple[float, float]:
        at = rows[some]
        P = space(np.asarray(stack.models[model][at]), logits)
        mask = None if unknown is None else unknown[at]
        missed = truth.true[some] - truth.positive[some]
        return best_global_threshold(P, positives[at], truth.beta, mask, missed=missed)

    floor = _floors(stack, rows, truth, depth)
    rights: list[tuple[np.ndarray, np.ndarray]] = []
    wrongs: list[tuple[np.ndarray, np.ndarray]] = []
    done = 0
    for some, block in stack.blocks(rows):
        at = _above(block, floor)
        if unknown is not None:
            hidden = unknown[some]
            hidden = hidden if isinstance(hidden, np.ndarray) else hidden.toarray()
            at = at[~hidden.ravel()[at]]
        here = positives[some]
        entries = np.repeat(np.arange(len(some)), np.diff(here.indptr)) * stack.shape[1]
        hit = contains(entries + here.indices, at)
        for found, own in ((rights, at[hit]), (wrongs, at[~hit])):
            score = np.stack([space(p.reshape(-1)[own], logits) for p in block])
            found.append((score, done + own // stack.shape[1]))
        done += len(some)
    score, image = _joined(rights + wrongs)
    right = sum(len(own) for _, own in rights)
    return Entries(score, image, right, space(floor, logits), truth, alone)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores (M, E) and images (E,) of all parts."""
    scores, images = [score for score, _ in parts], [image for _, image in parts]
    dtype = scores[0].dtype
    if dtype == np.float16 and 4 * sum(score.size for score in scores) <= _ROOM:
        dtype = np.dtype(np.float32)  # numpy is slow to compute in float16
    return np.concatenate(scores, axis=1, dtype=dtype), np.concatenate(images)


def _floors(stack: Stack, rows: np.ndarray, truth: Truth, depth: float) -> np.ndarray:
    """Floor of each model, of the dtype of all; guessed from some images at even distances."""
    look = np.unique(np.linspace(0, len(rows) - 1, _LOOK).astype(np.intp))
    most = len(look) * stack.shape[1]
    wanted = int(min(most, depth * (truth.positive[look].sum() + len(look))))
    floor = np.full(len(stack), -np.inf, stack.dtype)
    if 2 * wanted < most:
        for m, p in enumerate(stack.models):
            sample = p[rows[look]].ravel()
            floor[m] = np.partition(sample, len(sample) - wanted)[len(sample) - wanted]
            stack.release()
    return floor


def _above(block: list[np.ndarray], floor: np.ndarray) -> np.ndarray:
    """Entries, ascending, that are above the floor of any model."""
    kept = np.zeros(block[0].size, dtype=bool)
    for p, least in zip(block, floor, strict=True):
        if p.dtype == np.float16 and least >= 0:
            # The bits of floats, read as integers, are in the order of the positive ones.
            bits = np.float16(least + np.float16(0)).view(np.uint16)
            kept |= p.reshape(-1).view(np.uint16) > bits
        else:
            kept |= p.reshape(-1) > least
    return np.flatnonzero(kept)


def space(p: np.ndarray, logits: bool) -> np.ndarray:
    """What is averaged of probabilities p: they, or their logits."""
    if not logits:
        return p
    # float16 has no number between 1 - TINY and 1.
    p = p.astype(np.promote_types(p.dtype, np.float32), copy=False)
    averaged: np.ndarray = np.where(p == -np.inf, p, logit(np.clip(p, TINY, 1 - TINY)))
    return averaged
