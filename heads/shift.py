"""How do probabilities change where labels are more or less frequent than they were?

Label shift: images of a label look the same, P(x | label k), but labels come at other
rates. Then logits move by logit(new rate) - logit(old rate).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit, logit
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from heads.inputs import Matrix, check_labels, check_probabilities, check_rows
from heads.platt import logits, mapped

_RATE = 1e-7  # rates are kept this far from 0 and 1
_BLOCK = 1 << 20  # probabilities that are looked at at once
_CELLS = 1 << 16  # that more logits than that are counted in
_STEPS = 200
_STRETCH = 0.2  # by which slope or number of labels are off where it matters
_ERRORS = 3.0  # standard errors beyond which that is no chance


@dataclass(frozen=True)
class ShiftDiagnosis:
    """Do shifted probabilities hold on labelled rows of the new domain?

    If P(x | label) is as it was, they are calibrated: the slope of the truth on their
    logits is 1, and labels are as many as expected.

    Attributes
    ----------
    slope : float
        One Newton step from 1, within labels and images together; below 1: overconfident.
    slope_z : float
        Its distance from 1 in standard errors, images being independent of each other.
    ratio : float
        Labels there are over labels expected.
    ratio_z : float
        Its distance from 1 in standard errors.
    violated : bool
        Slope or ratio is off by more than 0.2 and by more than 3 standard errors.
    """

    slope: float
    slope_z: float
    ratio: float
    ratio_z: float
    violated: bool


class PriorShift(BaseEstimator):
    """Moves logits by one number a label, for a domain with other label frequencies.

    Parameters
    ----------
    form : "labels" or "bias"
        labels: each label's new rate is counted on labelled rows of the new domain and
        shrunk towards its old one, pi' = (n_k + c pi_k) / (n + c).
        bias: one number for all labels, such that the expected number of labels of an
        image is right; it needs no labelled rows if `mean_labels` is given.
    pseudo_count : float
        c, in images: labelled rows that the old rates are worth.
    mean_labels : float, optional
        Labels of an image on average, with form "bias"; None: counted on labelled rows.

    Attributes
    ----------
    bias_ : (K,) array
        What is added to the logits.
    rate_ : (K,) array
        pi', or with form "bias" the rates that are expected now.
    diagnosis_ : ShiftDiagnosis or None
        None without labelled rows, which nothing can be told from. A warning is given where
        it says that the assumption is violated.
    n_features_in_ : int
        Number of labels K.

    Notes
    -----
    Probabilities must be calibrated on the old domain. Saerens, Latinne and Decaestecker
    (2002). Their estimate of the rates from unlabelled rows is left out: it drives those of
    rare labels to zero.
    """

    bias_: np.ndarray
    rate_: np.ndarray
    diagnosis_: ShiftDiagnosis | None
    n_features_in_: int

    def __init__(
        self, form: str = "labels", pseudo_count: float = 100.0, mean_labels: float | None = None
    ) -> None:
        self.form = form
        self.pseudo_count = pseudo_count
        self.mean_labels = mean_labels

    def fit(
        self,
        P: np.ndarray,
        Y: Matrix | None = None,
        mask: Matrix | None = None,
        sample_weight: np.ndarray | None = None,
        prior: np.ndarray | None = None,
    ) -> PriorShift:
        """Find the biases on rows of the new domain.

        Parameters
        ----------
        P : (n, K) array
            Probabilities that were calibrated on the old domain.
        Y : (n, K), dense or sparse, {0, 1}, optional
            True labels; NaN (dense) is unknown. Needed unless `mean_labels` is given.
        mask : (n, K), optional
            True where the label is unknown.
        sample_weight : (n,), optional
        prior : (K,), optional
            The old rates pi, within (0, 1), for form "labels": the bias is logit pi' - logit pi.
            Smooth counted ones, (n_k + 1/2) / (n + 1). None: the
            rates that P expects on these rows take their place, and the bias is what
            makes P expect pi' there.

        Raises
        ------
        ValueError
            If labels are missing that the form needs, or a value is out of range.
        """
        self._check(Y, prior)
        given = check_rows(P, Y, mask, sample_weight, probabilities=True, unlabelled=True)
        P, truth, weight = given.P, given.truth, given.weight
        if not P.size:
            raise ValueError(f"P has shape {P.shape}; a shift needs images and labels")
        rows = _Rows(P, given.known(), weight)
        if not rows.counts().any():
            raise ValueError("no entry of Y is known; a shift needs at least one")
        positives = truth.T @ weight
        if self.mean_labels is not None:  # of all labels, whether their truth is known or not
            every, wanted = replace(rows, known=None), self.mean_labels * float(weight.sum())
            self.bias_ = np.full(P.shape[1], _shared_bias(every, wanted))
        elif self.form == "bias":
            self.bias_ = np.full(P.shape[1], _shared_bias(rows, float(positives.sum())))
        else:
            old = prior if prior is None else _checked_prior(prior, P.shape[1])
            self.bias_ = self._label_biases(rows, positives, old)
        self.rate_ = rows.expected(self.bias_) / np.maximum(rows.counts(), 1e-300)
        self.n_features_in_ = P.shape[1]
        self.diagnosis_ = None
        if Y is not None:
            self.diagnosis_ = found = _diagnosis(rows, truth.toarray() > 0, self.bias_)
            if found.violated:
                warnings.warn(
                    f"label shift does not explain these rows: after it, the slope of the truth on "
                    f"the logits is {found.slope:.2f} and there are {found.ratio:.2f} times the "
                    "expected labels, both of which should be 1; calibrate on the new domain",
                    UserWarning,
                    stacklevel=2,
                )
        return self

    def _check(self, Y: Matrix | None, prior: np.ndarray | None) -> None:
        if self.form not in ("labels", "bias"):
            raise ValueError(f"form is {self.form!r}; expected 'labels' or 'bias'")
        if self.form == "labels" and (Y is None or self.mean_labels is not None):
            raise ValueError(
                "form 'labels' counts labels, so it needs Y and takes no mean_labels; "
                "form 'bias' can do with mean_labels"
            )
        if self.form == "bias" and prior is not None:
            raise ValueError("prior has no effect with form 'bias'; leave it out")
        if self.form == "bias" and self.mean_labels is None and Y is None:
            raise ValueError("form 'bias' needs labels Y or mean_labels; give either")
        if self.mean_labels is not None and not 0 < self.mean_labels < np.inf:
            raise ValueError(f"mean_labels is {self.mean_labels}; expected a number > 0")
        if not 0 <= self.pseudo_count < np.inf:
            raise ValueError(f"pseudo_count is {self.pseudo_count}; expected a number >= 0")

    def _label_biases(
        self, rows: _Rows, positives: np.ndarray, prior: np.ndarray | None
    ) -> np.ndarray:
        counts = rows.counts()
        n = np.maximum(counts, 1e-300)
        old = rows.expected(np.zeros(len(n))) / n if prior is None else prior
        new = (positives + self.pseudo_count * old) / np.maximum(n + self.pseudo_count, 1e-300)
        new = np.clip(np.where(counts > 0, new, old), _RATE, 1 - _RATE)
        if prior is not None:
            moved: np.ndarray = logit(new) - logit(prior)
            return moved
        bias = np.zeros(len(n))
        for labels in rows.blocks():
            margin, a = logits(rows.P[:, labels]), rows.entry_weights(labels)
            bias[labels] = matching_bias(margin, a, new[labels] * n[labels])
        return np.where(counts > 0, bias, 0.0)

    def transform(self, P: np.ndarray) -> np.ndarray:
        """Shifted probabilities (n, K); float64 of float64, else float32."""
        check_is_fitted(self, "bias_")
        P = check_probabilities(P)
        check_labels(P, self.n_features_in_, type(self).__name__)
        return mapped(P, 1.0, self.bias_)


def _checked_prior(prior: np.ndarray, K: int) -> np.ndarray:
    prior = np.asarray(prior, dtype=np.float64)
    if prior.shape != (K,):
        raise ValueError(f"prior has shape {prior.shape}; expected ({K},), a rate for each label")
    bad = ~((prior > 0) & (prior < 1))
    if bad.any():
        raise ValueError(
            f"prior is {prior[bad][0]} at label {bad.argmax()}; expected between 0 and 1 (smooth "
            "counted rates: (n_k + 1/2) / (n + 1), since 0 says that the label cannot occur)"
        )
    return prior


@dataclass(frozen=True)
class _Rows:
    """Probabilities of the new domain; (n, K), (n, K) bool or None, (n,)."""

    P: np.ndarray
    known: np.ndarray | None
    weight: np.ndarray

    def blocks(self) -> list[slice]:
        step = max(1, _BLOCK // len(self.P))
        return [slice(k, k + step) for k in range(0, self.P.shape[1], step)]

    def entry_weights(self, labels: slice) -> np.ndarray:
        if self.known is None:
            shape = len(self.P), len(range(*labels.indices(self.P.shape[1])))
            return np.broadcast_to(self.weight[:, None], shape)
        return self.weight[:, None] * self.known[:, labels]

    def counts(self) -> np.ndarray:
        """(K,) weight of the rows in which each label is known."""
        if self.known is None:
            return np.full(self.P.shape[1], self.weight.sum())
        return self.weight @ self.known

    def expected(self, bias: np.ndarray) -> np.ndarray:
        """(K,) expected positives."""
        total = np.zeros(self.P.shape[1])
        for labels in self.blocks():
            p = expit(logits(self.P[:, labels]) + bias[labels])
            total[labels] = (self.entry_weights(labels) * p).sum(axis=0)
        return total


def matching_bias(margin: np.ndarray, a: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(K,) biases b such that sum_i a_ik sigma(margin_ik + b_k) = wanted_k.

    Newton's method inside a bracket that shrinks at every step.
    """
    low, high = np.full(len(wanted), -80.0), np.full(len(wanted), 80.0)
    bias = np.zeros(len(wanted))
    for _ in range(_STEPS):
        p = expit(margin + bias)
        excess = (a * p).sum(axis=0) - wanted
        if np.all(np.abs(excess) <= 1e-12 * wanted + 1e-300):
            break
        low, high = np.where(excess < 0, bias, low), np.where(excess > 0, bias, high)
        slope = (a * p * (1 - p)).sum(axis=0)
        following = bias - excess / np.maximum(slope, 1e-300)
        inside = (low < following) & (following < high)
        following = np.where(inside, following, (low + high) / 2)
        following = np.where(excess == 0, bias, following)
        if np.array_equal(following, bias):
            break
        bias = following
    return bias


def _shared_bias(rows: _Rows, wanted: float) -> float:
    """One bias for all labels; many logits are counted in cells, each at its mean."""
    total = float(rows.counts().sum())
    if not wanted < total:
        raise ValueError(
            f"{wanted:.6g} labels are to be expected of {total:.6g} known entries, which no bias "
            "gives; lower mean_labels, or use form 'labels'"
        )
    wanted = max(wanted, 0.5)  # none at all would need a bias of minus infinity
    if rows.P.size <= _CELLS:
        margin, a = logits(rows.P), rows.entry_weights(slice(None))
        return float(matching_bias(margin.reshape(-1, 1), a.reshape(-1, 1), np.array([wanted]))[0])
    sums = np.zeros((2, _CELLS))
    for labels in rows.blocks():
        margin, a = logits(rows.P[:, labels]).ravel(), rows.entry_weights(labels).ravel()
        cell = ((margin / 32.4 + 0.5) * _CELLS).astype(np.intp)
        for cells, values in zip(sums, (a, a * margin), strict=True):
            cells += np.bincount(cell, values, minlength=_CELLS)
    used = sums[0] > 0
    a, margin = sums[0, used, None], (sums[1, used] / sums[0, used])[:, None]
    return float(matching_bias(margin, a, np.array([wanted]))[0])


def _diagnosis(rows: _Rows, Y: np.ndarray, bias: np.ndarray) -> ShiftDiagnosis:
    """Score tests of slope 1 and ratio 1 with the variance over images."""
    n = len(Y)
    information, weighted = 0.0, 0.0
    for labels in rows.blocks():
        margin = logits(rows.P[:, labels]) + bias[labels]
        p = expit(margin)
        h = rows.entry_weights(labels) * p * (1 - p)
        information += h.sum()
        weighted += np.vdot(h, margin)
    centre = weighted / max(information, 1e-300)
    slopes, levels, expected, curvature = np.zeros(n), np.zeros(n), 0.0, 0.0
    for labels in rows.blocks():
        margin = logits(rows.P[:, labels]) + bias[labels]
        p, a = expit(margin), rows.entry_weights(labels)
        residual, margin = a * (Y[:, labels] - p), margin - centre
        slopes += (residual * margin).sum(axis=1)
        levels += residual.sum(axis=1)
        expected += float((a * p).sum())
        curvature += float((a * p * (1 - p) * margin**2).sum())
    slope = 1 + slopes.sum() / max(curvature, 1e-300)
    ratio = max(0.0, 1 + levels.sum() / max(expected, 1e-300))
    slope_z, ratio_z = _z(slopes), _z(levels)
    violated = any(
        abs(value - 1) > _STRETCH and abs(z) > _ERRORS
        for value, z in ((slope, slope_z), (ratio, ratio_z))
    )
    return ShiftDiagnosis(float(slope), slope_z, float(ratio), ratio_z, violated)


def _z(values: np.ndarray) -> float:
    return float(values.sum() / max(np.sqrt((values**2).sum()), 1e-300))
