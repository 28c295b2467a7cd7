"""What is a selection worth on images that it has not seen?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heads.folds import Fold
from heads.metrics import bootstrap_interval
from heads.screening import Entries
from heads.selecting import Rule, best_cut, choose, merged, scored, without


@dataclass(frozen=True)
class Nested:
    """F-beta of each image by weights and cut that were chosen on the other folds.

    Attributes
    ----------
    blend, uniform : (n,) arrays
        By the selection, and by the mean of all models with a cut chosen likewise.
    share : (n,) array
        Weights of the images; they add up to 1.
    groups : (n,) array or None
        Images that are drawn together.
    """

    blend: np.ndarray
    uniform: np.ndarray
    share: np.ndarray
    groups: np.ndarray | None = None

    def results(self) -> dict[str, float]:
        """Means and their intervals at 95 % over images, or groups of them.

        Alone, and against the uniform mean.
        """
        share, groups = self.share, self.groups
        low, high = bootstrap_interval(self.blend, sample_weight=share, groups=groups)
        gain = self.blend - self.uniform
        gain_low, gain_high = bootstrap_interval(gain, sample_weight=share, groups=groups)
        return {
            "score": float(self.share @ self.blend),
            "low": low,
            "high": high,
            "uniform": float(self.share @ self.uniform),
            "gain": float(self.share @ gain),
            "gain_low": gain_low,
            "gain_high": gain_high,
        }


def nested(
    domains: Sequence[Entries],
    rows: Sequence[np.ndarray],
    folds: Sequence[Fold],
    rule: Rule,
    parts: Sequence[np.ndarray] | None = None,
    groups: np.ndarray | None = None,
) -> Nested:
    """Repeat the whole selection in each fold and score the images that it left out.

    Parameters
    ----------
    domains, rows
        Entries of each domain, and the numbers of its images in the folds, ascending.
    folds : sequence of (train, test)
    parts
        As of `choose`.
    groups : (n,), optional
        Of all rows: images that the folds keep together.

    Raises
    ------
    ValueError
        If a fold has no image of some domain to choose on.
    TooShallow
        As of `choose`.
    """
    weights = rule.domain_weights
    whole = merged(domains, weights)
    place = np.concatenate(rows)
    blend, uniform = np.zeros(len(place)), np.zeros(len(place))
    for train, test in folds:
        kept = [np.flatnonzero(np.isin(own, train)) for own in rows]
        chosen = without(domains, kept)
        inner = None
        if parts is not None:
            inner = [own[at] for own, at in zip(parts, kept, strict=True)]
        left_out = np.flatnonzero(np.isin(place, test))
        seen, unseen = merged(chosen, weights), whole.of_images(left_out)
        M = len(seen.score)
        for into, w in ((blend, choose(chosen, rule, inner).weights), (uniform, np.full(M, 1 / M))):
            into[left_out] = scored(unseen, w, best_cut(seen, w).cut)
    own = None if groups is None else np.asarray(groups)[place]
    return Nested(blend, uniform, whole.truth.share, own)
