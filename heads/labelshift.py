"""Do two domains with known labels name things at different rates, more than chance explains?

Label frequencies of domain D are q_k = n_k(D) / sum_j n_j(D), a group of images counting as
one. Their Jensen-Shannon divergence

    JS = KL(q_1 | m) / 2 + KL(q_2 | m) / 2,   m = (q_1 + q_2) / 2   (nats)

is never zero on samples, so it is divided by its mean over random assignments of the images
(whole groups of them) to the two domains: r is about 1 where nothing but chance is at work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import rel_entr

from heads.inputs import Matrix, check_truth


@dataclass(frozen=True)
class LabelShiftTest:
    """What the labels of two domains say.

    Attributes
    ----------
    divergence : float
        JS of the label frequencies, in nats.
    by_chance : float
        Its mean over permutations.
    ratio : float
        r = divergence / by_chance; 1 where one domain has no labels.
    strength : float
        h in [0, 1]: 0 is no sign of label shift, 1 is certain.
    """

    divergence: float
    by_chance: float
    ratio: float
    strength: float

    @property
    def words(self) -> str:
        """The outcome, for a person."""
        if self.strength == 0:
            what = "no sign that labels were given differently"
        elif self.strength < 1:
            what = "some sign that labels were given differently"
        else:
            what = "labels were given differently"
        return f"label frequencies differ {self.ratio:.2f} times as much as by chance: {what}"


def label_shift_test(
    Y: Matrix,
    Y_source: Matrix,
    groups: Any = None,
    source_groups: Any = None,
    bounds: tuple[float, float] = (1.5, 3.0),
    n_permutations: int = 200,
    random_state: int = 0,
) -> LabelShiftTest:
    """Compare the label frequencies of two domains.

    Parameters
    ----------
    Y, Y_source : (n, K) and (m, K)
        {0, 1}; NaN (dense) is unknown and counts nowhere.
    groups, source_groups : (n,) and (m,), optional
        Images that permutations keep together: renderings of one thing share their labels.
    bounds : (float, float)
        Ratios r at which the strength begins to grow and is 1.
    n_permutations : int
    random_state : int

    Notes
    -----
    O((n + m) K) and n_permutations products with the groups' label counts (G, K).
    """
    first, second = _group_counts(Y, groups), _group_counts(Y_source, source_groups)
    counts = np.concatenate([first, second])
    mine = np.arange(len(counts)) < len(first)
    divergence = _divergences(mine[None], counts)[0]
    rng = np.random.default_rng(random_state)
    drawn = np.array([rng.permutation(mine) for _ in range(n_permutations)])
    by_chance = float(_divergences(drawn, counts).mean())
    empty = not first.any() or not second.any()
    ratio = divergence / by_chance if by_chance > 0 and not empty else 1.0
    low, high = bounds
    strength = float(np.clip((ratio - low) / (high - low), 0, 1))
    return LabelShiftTest(float(divergence), by_chance, float(ratio), strength)


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """JS (...) in nats of frequencies (..., K) that add up to 1 each."""
    middle = (first + second) / 2
    total: np.ndarray = (rel_entr(first, middle) + rel_entr(second, middle)).sum(axis=-1) / 2
    return total


def _divergences(mine: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """JS of each assignment (P, G) of the groups; 0 where one side has no labels."""
    first = mine.astype(np.float64) @ counts
    second = counts.sum(axis=0) - first
    sums = first.sum(axis=1), second.sum(axis=1)
    usable = (sums[0] > 0) & (sums[1] > 0)
    frequencies = [
        part / np.maximum(total, 1e-300)[:, None]
        for part, total in zip((first, second), sums, strict=True)
    ]
    return np.where(usable, jensen_shannon(*frequencies), 0.0)


def _group_counts(Y: Matrix, groups: Any) -> np.ndarray:
    """(G, K) positives of each group: the mean over its images, as it is one draw of the world."""
    truth, _ = check_truth(Y, None)
    if groups is None:
        return truth.toarray()
    groups = np.asarray(groups)
    if groups.shape != (truth.shape[0],):
        raise ValueError(f"groups has shape {groups.shape}; expected ({truth.shape[0]},)")
    values, codes = np.unique(groups, return_inverse=True)
    shape = len(values), len(codes)
    share = 1 / np.bincount(codes)[codes]
    together = csr_matrix((share, (codes, np.arange(len(codes)))), shape=shape)
    return np.asarray((together @ truth).todense())
