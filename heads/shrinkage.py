"""How far is a label's own estimate to be trusted, against one shared by all labels?"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from heads.inputs import refuse_no_list


def check_strengths(strengths: Iterable[float]) -> list[float]:
    """Strengths of shrinkage to compare: descending, from infinity (the shared estimate alone)."""
    refuse_no_list(strengths, "strengths")
    ordered = sorted({float(s) for s in strengths} | {np.inf}, reverse=True)
    for strength in ordered:
        if not strength >= 0:  # true of NaN, which has no place in an order
            raise ValueError(f"strengths has {strength}; expected numbers >= 0")
    return ordered


def cautious(values: np.ndarray, weight: np.ndarray, errors: float = 1) -> int:
    """First row whose mean is within so many standard errors of the difference to the best row's.

    Rows are in order of caution. Where differences are chance, this is the first row.
    """
    share = weight / weight.sum()
    means = values @ share
    best = values[int(means.argmax())]
    for row, value in enumerate(values):
        difference = best - value
        mean = float(share @ difference)
        error = np.sqrt(np.sum((share * (difference - mean)) ** 2))
        if mean <= errors * error:
            return row
    return int(means.argmax())
