"""Which biases bring a head, on images without labels, to label rates known from elsewhere?

Where images shift and labels do not, a domain has the rates of the domains with labels, and
what a head expects there shows by how much the shift has moved its margins.

*Rates* of every label are for those who know that much: half the way gained 0.02 to 0.1 of the gap
on shifted typefaces, but lost 0.06 of F2 where the labels of a third domain alone shift, so that
nobody goes it unasked. The *number* of labels, one bias for all and only upwards, moves less:
where Stage 1 is near the source, both heads expect too few labels far from it. Three quarters of
the way gained 0.08 of the gap there. The source head follows the adapted one: by itself it expects
few labels on all shifted images, and raising it lost where the adapted head counts well. Where the
annotators of the third domain alone leave out half of its labels this cost up to 0.002 of F2.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from heads.shift import PriorShift, matching_bias

_MOST = 3.0  # logits; beyond that a label's margins say nothing about its rate


def pooled_rates(*domains: np.ndarray) -> np.ndarray:
    """(K,) rates over all rows of (n, K) label matrices, half a positive and half a negative added.

    NaN is unknown, and the rate of a label that is known nowhere.
    """
    known = sum(((~np.isnan(Y)).sum(axis=0) for Y in domains), np.zeros(domains[0].shape[1]))
    positives = sum((np.nansum(Y, axis=0) for Y in domains), np.zeros(domains[0].shape[1]))
    rates: np.ndarray = np.where(known > 0, (positives + 0.5) / (known + 1), np.nan)
    return rates


def rates_bias(margins: np.ndarray, rates: np.ndarray, strength: float) -> np.ndarray:
    """(K,) what to add to margins (n, K): `strength` of the way to the rates (K,); 0 where NaN."""
    bias = np.zeros(len(rates))
    known = np.flatnonzero(~np.isnan(rates))
    if strength and len(known):
        M = np.clip(margins[:, known].astype(np.float64), -50, 50)
        found = matching_bias(M, np.ones_like(M), rates[known] * len(M))
        bias[known] = strength * np.clip(found, -_MOST, _MOST)
    return bias


def labels_per_image(Y: np.ndarray) -> float:
    """Mean number of labels of rows (n, K), from the known ones of each label; NaN is unknown."""
    known = (~np.isnan(Y)).sum(axis=0)
    return float((np.nansum(Y, axis=0) / np.maximum(known, 1)).sum())


def count_bias(margins: np.ndarray, labels: float, strength: float) -> float:
    """What to add to all margins (n, K): `strength` of the way up to `labels` an image, or 0."""
    P = expit(np.clip(margins.astype(np.float64), -50, 50))
    if not strength or P.sum() >= labels * len(P):
        return 0.0
    shift = PriorShift(form="bias", mean_labels=min(labels, 0.99 * P.shape[1])).fit(P)
    return strength * float(np.clip(shift.bias_[0], 0, _MOST))
