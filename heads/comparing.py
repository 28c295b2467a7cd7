"""Is one stored head or blend better than another, on images that both have held out?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from sklearn.base import clone

from heads.grouping import united
from heads.metrics import paired_bootstrap_interval
from heads.nested import cross_val_fbeta, images_needed
from heads.prediction import rule_of
from heads.storage import Head, OutOfFold, StoredBlend, load

_FOLDS = 5


@dataclass(frozen=True)
class Comparison:
    """Mean F-beta of two contents on the images of one domain that both have scored.

    Attributes
    ----------
    domain : str
    images : int
    beta : float
    first, second : float
    low, high : float
        95 % interval of first - second, by a bootstrap over images (or groups), paired.
    chosen_here : bool
        Whether one is a blend, whose weights were chosen on these images.
    """

    domain: str
    images: int
    beta: float
    first: float
    second: float
    low: float
    high: float
    chosen_here: bool = False

    @property
    def difference(self) -> float:
        """first - second."""
        return self.first - self.second

    def verdict(self, first: str, second: str) -> str:
        """Which is better, if one can tell."""
        if self.low <= 0 <= self.high:
            return "no difference can be told"
        return f"{first if self.difference > 0 else second} is better"


def compare(first: str, second: str) -> list[Comparison]:
    """Compare out-of-fold scores of two files on every domain that both have scored.

    Each is decided by its own kind of rule (expected F-beta, a cut ...), which is fitted anew in
    folds of the common images, the same folds for both, so that neither has seen what it is
    scored on. The weights of a blend were chosen on these images: its score is a little high.

    Raises
    ------
    ValueError
        If the files have other classes, labels or betas, or too few images in common.
    """
    contents = [load(first), load(second)]
    classes = [_classes(content) for content in contents]
    if not np.array_equal(classes[0], classes[1]):
        raise ValueError(
            f"{second}: its {len(classes[1]):,} classes are not the {len(classes[0]):,} of "
            f"{first}, in their order; compare heads of the same classes"
        )
    rules = [clone(rule_of(content)) for content in contents]
    betas = [float(getattr(rule, "beta", 2.0)) for rule in rules]
    if betas[0] != betas[1]:
        raise ValueError(
            f"{second}: decides for F{betas[1]:g}, but {first} for F{betas[0]:g}; fit one again"
        )
    blends = any(isinstance(content, StoredBlend) for content in contents)
    least = max(images_needed(rule, _FOLDS) for rule in rules)
    found, few = [], 0
    for domain, own in contents[0].oof.items():
        if domain not in contents[1].oof:
            continue
        other = contents[1].oof[domain]
        _, rows, other_rows = np.intersect1d(own.ids, other.ids, return_indices=True)
        pair = [own.take(rows), other.take(other_rows)]
        groups = united([part.groups for part in pair])
        pair = [replace(part, groups=groups) for part in pair]
        if pair[0].units < least:
            few = max(few, pair[0].units)
            continue
        if pair[0].differs(pair[1]):
            raise ValueError(
                f"{second}: was fitted on other labels of these {domain} images than {first}; "
                "fit both on the same labels"
            )
        ours, theirs = (_held_out(rule, part) for rule, part in zip(rules, pair, strict=True))
        low, high = paired_bootstrap_interval(ours, theirs, groups=groups)
        means = float(ours.mean()), float(theirs.mean())
        found.append(Comparison(domain, len(rows), betas[0], *means, low, high, blends))
    if few and not found:
        raise ValueError(
            f"{second}: {few} held-out images (or groups) that {first} has, too, are too few to "
            f"compare; {least} or more are needed"
        )
    if not found:
        raise ValueError(
            f"{second}: has no out-of-fold scores of the images that {first} has scored; "
            "fit both on the same images"
        )
    return found


def _classes(content: Head | StoredBlend) -> np.ndarray:
    return content.models[0].classes if isinstance(content, StoredBlend) else content.classes


def _held_out(rule: object, scores: OutOfFold) -> np.ndarray:
    """(n,) F-beta of each image."""
    return cross_val_fbeta(rule, scores.proba, scores.Y, _FOLDS, **scores.known()).fbeta
