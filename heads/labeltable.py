"""Which labels gained by the adaptation, which lost, and what does each contribute?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from heads.cuts import apply_threshold, best_global_threshold
from heads.inputs import Matrix, check_beta, check_missed, check_scores, check_truth, without
from heads.markup import in_notebook, table
from heads.metrics import average_precision

_SHOWN = 500  # rows in a notebook


@dataclass(frozen=True)
class LabelTable:
    """A row a label.

    Attributes
    ----------
    columns : dict of (K,) arrays
        "label", its number; "name"; "source" and "target", known positives; "AP before",
        "AP after", "AP change"; "F before", "F after", "F change": what the label contributes
        to the mean F-beta per image. What was not given is not there.
    beta : float

    Examples
    --------
    >>> import numpy as np
    >>> Y = np.array([[1, 0], [1, 1]])
    >>> before = np.array([[0.1, 0.8], [0.9, 0.4]])
    >>> found = label_table(Y, before, Y.astype(float), names=["dog", "cat"])
    >>> found.columns["AP change"].tolist()
    [0.0, 0.5]
    >>> found.sort("AP change").columns["name"].tolist()
    ['cat', 'dog']
    """

    columns: dict[str, np.ndarray]
    beta: float = 2

    def __len__(self) -> int:
        return len(self.columns["label"])

    def sort(self, by: str, ascending: bool = False) -> LabelTable:
        """The rows in the order of a column; those without a value last.

        Raises
        ------
        ValueError
            If there is no such column.
        """
        if by not in self.columns:
            raise ValueError(f"no column {by!r}; there are {', '.join(self.columns)}")
        values = self.columns[by]
        if values.dtype.kind in "iuf":
            order = np.argsort(values if ascending else -values, kind="stable")  # NaN comes last
        else:
            order = np.argsort(values, kind="stable")[:: 1 if ascending else -1]
        return LabelTable({key: value[order] for key, value in self.columns.items()}, self.beta)

    def __repr__(self) -> str:
        return f"LabelTable of {len(self):,} labels: {', '.join(self.columns)}"

    def _repr_html_(self) -> str:
        top = {key: values[:_SHOWN] for key, values in self.columns.items()}
        more = f", the first {_SHOWN:,} shown" if len(self) > _SHOWN else ""
        caption = f"{len(self):,} labels{more}; F is F{self.beta:g}"
        return in_notebook(table(caption, top))


def label_table(
    Y: Matrix,
    P_before: np.ndarray,
    P_after: np.ndarray | None = None,
    *,
    names: Sequence[str] | np.ndarray | None = None,
    Y_source: Matrix | None = None,
    beta: float = 2,
    cuts: tuple[float | None, float | None] = (None, None),
    mask: Matrix | None = None,
    missed: np.ndarray | None = None,
) -> LabelTable:
    """Counts, average precision and contribution to F-beta of every label.

    A label's contribution is mean_i (1 + b^2) [y_ik and yhat_ik] / (b^2 |y_i| + |yhat_i|).
    Contributions add up to the mean F-beta of the images that have a true or predicted label.

    Parameters
    ----------
    Y : (n, K), dense or sparse, {0, 1}
        True labels of the target; NaN (dense) is unknown.
    P_before, P_after : (n, K)
        Scores without and with adaptation, out of fold; only one is fine, too.
    names : (K,), optional
    Y_source : (m, K), optional
        True labels of the source, to be counted.
    beta : float
    cuts : pair
        Labels with score >= cut are predicted; None: the best cut of these rows.
    mask : (n, K), optional
        True where a label is unknown.
    missed : (n,), optional
        True labels of each image outside the K classes; they count as misses.

    Returns
    -------
    LabelTable

    Raises
    ------
    ValueError
        If shapes disagree.
    """
    P_before = check_scores(P_before, "P_before")
    truth, unknown = check_truth(Y, mask, P_before.shape)
    K = truth.shape[1]
    columns: dict[str, np.ndarray] = {"label": np.arange(K)}
    if names is not None:
        if len(names) != K:
            raise ValueError(f"names has length {len(names)}, but the scores have {K} labels")
        columns["name"] = np.asarray(names, dtype=str)
    if Y_source is not None:
        source = check_truth(Y_source, None, (Y_source.shape[0], K))[0]
        columns["source"] = _positives(source)
    columns["target"] = _positives(truth)
    found = {"before": P_before}
    if P_after is not None:
        found["after"] = check_scores(P_after, "P_after")
        if P_after.shape != P_before.shape:
            raise ValueError(f"P_after has shape {P_after.shape}, P_before {P_before.shape}")
    for (when, P), cut in zip(found.items(), cuts, strict=False):
        precision = average_precision(truth, P, None, unknown)
        columns[f"AP {when}"] = np.asarray(precision)
        if cut is None:
            cut = best_global_threshold(P, truth, beta, unknown, missed=missed)[0]
        chosen = without(csr_matrix(apply_threshold(P, cut), dtype=np.float64), unknown)
        columns[f"F {when}"] = _contributions(truth, chosen, beta, missed)
    if P_after is not None:
        for what in ("AP", "F"):
            columns[f"{what} change"] = columns[f"{what} after"] - columns[f"{what} before"]
    order = ["label", "name", "source", "target"]
    order += [f"{what} {when}" for what in ("AP", "F") for when in ("before", "after", "change")]
    return LabelTable({key: columns[key] for key in order if key in columns}, beta)


def _positives(truth: csr_matrix) -> np.ndarray:
    return np.bincount(truth.indices, minlength=truth.shape[1])


def _contributions(
    truth: csr_matrix, chosen: csr_matrix, beta: float, missed: np.ndarray | None
) -> np.ndarray:
    b2, n = check_beta(beta) ** 2, truth.shape[0]
    true = np.diff(truth.indptr) + check_missed(missed, n)
    predicted = np.asarray(chosen.sum(axis=1)).ravel()
    right = csr_matrix(truth.multiply(chosen))
    share = (1 + b2) / np.maximum(b2 * true + predicted, 1) / n
    return np.asarray(right.T @ share).ravel()
