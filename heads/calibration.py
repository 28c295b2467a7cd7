"""How does a probability become a better one, and does it hold what it promises?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from heads.folds import check_folds
from heads.inputs import Matrix, check_labels, check_probabilities, check_rows
from heads.label_maps import Entries, LabelMaps, image_losses
from heads.platt import PlattScaling, fit_platt, logits, mapped
from heads.shrinkage import cautious, check_strengths

__all__ = ["PlattCalibration", "PlattScaling", "Reliability", "fit_platt", "reliability"]

_CELLS = 1 << 12  # of equal width in logits, from which bins are put together
_BLOCK = 1 << 20  # probabilities that are looked at at once


class PlattCalibration(BaseEstimator):
    """Probabilities from probabilities: p' = sigma(slope_k logit p + intercept_k).

    All labels share one map as far as images do not demand otherwise: label k's own slope and
    intercept minimise the log-loss plus strength / 2 (u^2 + v^2), u and v being the
    differences to the shared map in units in which a label with `strength` positives goes
    about half way. The strength is chosen by cross-validation on log-loss, the largest whose
    mean is within one standard error of the best one's; infinite strength is the shared map.

    Fit it on out-of-fold probabilities of the domain that it is to be used on.

    Parameters
    ----------
    kind : "platt" or "temperature"
        temperature: all intercepts are 0.
    strengths : iterable of float
        What is compared, >= 0; infinity is always added, and () is the shared map.
    cv : int, splitter or iterable of (train, test)
    random_state : int
        Seed of the folds.

    Attributes
    ----------
    slope_, intercept_ : (K,) arrays
    shared_ : PlattScaling
        The map of all labels together.
    strength_ : float
    cv_scores_ : dict of arrays
        "strength", descending, and the "score" of each: held-out log-loss of an image,
        summed over its known labels.
    n_features_in_ : int
        Number of labels K.

    Notes
    -----
    A slope may be negative: probabilities whose order the truth contradicts are turned round.
    A label without positives, and with fewer than 0.1 expected, has the shared map. O(n) a label
    and Newton step. Platt (1999); Guo, Pleiss, Sun and Weinberger (2017) for temperature.
    """

    slope_: np.ndarray
    intercept_: np.ndarray
    shared_: PlattScaling
    strength_: float
    cv_scores_: dict[str, np.ndarray]
    n_features_in_: int

    def __init__(
        self,
        kind: str = "platt",
        strengths: Iterable[float] = (1.0, 3.0, 10.0, 30.0, 100.0),
        cv: Any = 5,
        random_state: int = 0,
    ) -> None:
        self.kind = kind
        self.strengths = strengths
        self.cv = cv
        self.random_state = random_state

    def fit(
        self,
        P: np.ndarray,
        Y: Matrix,
        mask: Matrix | None = None,
        sample_weight: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> PlattCalibration:
        """Fit the maps.

        Parameters
        ----------
        P : (n, K) array
            Out-of-fold probabilities; never altered.
        Y : (n, K), dense or sparse, {0, 1}
            True labels; NaN (dense) is unknown.
        mask : (n, K), optional
            True where the label is unknown.
        sample_weight : (n,), optional
            Counts of images: a label's own map rests on the sum over its positives.
        groups : (n,), optional
            Images that folds keep together.

        Raises
        ------
        ValueError
            If a probability is outside [0, 1] or NaN, named by row and label.
        """
        if self.kind not in ("platt", "temperature"):
            raise ValueError(f"kind is {self.kind!r}; expected 'platt' or 'temperature'")
        strengths = check_strengths(self.strengths)
        rows = check_rows(P, Y, mask, sample_weight, probabilities=True)
        P, truth, weight, known = rows.P, rows.truth, rows.weight, rows.known()
        if not P.size:
            raise ValueError(f"P has shape {P.shape}; calibration needs images and labels")
        if known is not None and not (weight @ known).any():
            raise ValueError("no entry of Y is known; calibration needs at least one")
        intercept = self.kind == "platt"
        folds = []
        if len(strengths) > 1:
            folds = check_folds(self.cv, P, truth, groups, self.random_state)
        # Images that train in the same folds have the same code.
        trains = np.zeros((len(P), len(folds)), bool)
        for fold, (train, _) in enumerate(folds):
            trains[train, fold] = True
        codes, code = np.unique(trains, axis=0, return_inverse=True)
        entries = Entries(P, truth.toarray() > 0, known, weight, code.reshape(-1), intercept)
        data = entries.counted()
        losses = np.zeros((len(strengths), len(P)))
        for fold, (_, test) in enumerate(folds):
            some, maps = data.points(codes[:, fold]), []
            fitted = LabelMaps.shared_by_all(some, intercept)
            for strength in strengths:
                if np.isfinite(strength):
                    fitted.improve(some, strength)
                maps.append((fitted.slopes(), fitted.intercepts()))
            held = None if known is None else known[test]
            losses[:, test] = image_losses(P[test], truth[test], held, maps)
        self.strength_ = strengths[cautious(-losses, weight)]
        self.cv_scores_ = {
            "strength": np.array(strengths),
            "score": losses @ weight / weight.sum(),
        }
        everything = data.points(np.ones(len(codes), bool))
        fitted = LabelMaps.shared_by_all(everything, intercept)
        if np.isfinite(self.strength_):
            fitted.improve(everything, self.strength_)
        self.shared_ = fitted.shared
        self.slope_, self.intercept_ = fitted.slopes(), fitted.intercepts()
        self.n_features_in_ = P.shape[1]
        return self

    def transform(self, P: np.ndarray) -> np.ndarray:
        """Calibrated probabilities (n, K); float64 of float64, else float32."""
        check_is_fitted(self, "slope_")
        P = check_probabilities(P)
        check_labels(P, self.n_features_in_, type(self).__name__)
        return mapped(P, self.slope_, self.intercept_)


@dataclass(frozen=True)
class Reliability:
    """Probabilities against frequencies, bin by bin, for a plot.

    Attributes
    ----------
    predicted : (B,) array
        Mean probability of each bin, ascending.
    observed : (B,) array
        Share of its entries that are true.
    low, high : (B,) arrays
        Wilson interval of `observed` at 95 %, entries taken as independent.
    entries : (B,) array
        Weight of the entries of each bin.
    """

    predicted: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    entries: np.ndarray


def reliability(
    P: np.ndarray,
    Y: Matrix,
    n_bins: int = 10,
    mask: Matrix | None = None,
    sample_weight: np.ndarray | None = None,
) -> Reliability:
    """Are labels as frequent as their probabilities say?

    Bins hold about equal numbers of *expected positives*, since bins of equal width or of
    equally many entries would show little but the many labels that nobody expects.

    Parameters
    ----------
    P : (n, K) array of probabilities
    Y : (n, K), dense or sparse, {0, 1}
    n_bins : int
        At most; equal probabilities are never split.
    mask, sample_weight : optional
        Unknown entries; weights of rows.

    Returns
    -------
    Reliability
        What :class:`heads.plots.ReliabilityDisplay` draws.

    Raises
    ------
    ValueError
        If shapes disagree, P holds no probabilities, or `n_bins` is less than 1.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}; expected at least 1")
    rows = check_rows(P, Y, mask, sample_weight, probabilities=True)
    P = rows.P
    sums = np.zeros((4, _CELLS))  # weight, its square, expected and true positives
    step = max(1, _BLOCK // max(1, P.shape[1]))
    for start in range(0, len(P), step):
        at = slice(start, start + step)
        p = P[at].astype(np.float64)
        a = np.repeat(rows.weight[at, None], p.shape[1], axis=1)
        if (known := rows.known(at)) is not None:
            a *= known
        margin = logits(p).ravel()
        cell = np.clip((margin / 32.4 + 0.5) * _CELLS, 0, _CELLS - 1).astype(np.intp)
        for total, values in zip(sums, (a, a**2, a * p, a * rows.truth[at].toarray()), strict=True):
            total += np.bincount(cell, values.ravel(), minlength=_CELLS)
    sums = sums[:, sums[0] > 0]
    if not sums.shape[1]:
        raise ValueError("no entry of Y is known; reliability needs at least one")
    share = np.cumsum(sums[2]) / max(sums[2].sum(), 1e-300)
    bin_of = np.minimum((share - 1e-9) * n_bins, n_bins - 1).astype(np.intp)
    first = np.flatnonzero(np.diff(bin_of, prepend=-1))
    entries, squares, expected, true = np.add.reduceat(sums, first, axis=1)
    observed = true / entries
    low, high = _wilson(observed, entries**2 / squares)
    return Reliability(expected / entries, observed, low, high, entries)


def _wilson(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a share of n at 95 %."""
    z2 = 1.959964**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
