"""Which biases bring a head, on images without labels, to label rates known from elsewhere?

Where images shift and labels do not, a domain has the rates of the domains with labels, and
what a head expects there shows by how much the shift has moved its margins. For those who know that
much: half the way gained 0.02 to 0.1 of the gap on shifted typefaces, but lost 0.06 of F2
where the labels of a third domain alone shift, so that nobody goes it unasked.
"""

from __future__ import annotations

import numpy as np

from heads.shift import matching_bias

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
