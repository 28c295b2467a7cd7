"""What does a fitted estimator show of its results in a notebook?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from heads.markup import Markup, in_notebook, joined, table

_ROWS = 100


class ShowsResults(BaseEstimator):
    """Adds tables of results to scikit-learn's diagram of an estimator; subclasses give them."""

    def _results(self) -> list[Markup]:
        """Tables of the fitted estimator; none before it is fitted."""
        return []

    def _with_results(self, diagram: str) -> str:
        tables = self._results()
        return diagram + in_notebook(joined(tables)) if tables else diagram

    @property
    def _repr_html_(self) -> Any:
        diagram = super()._repr_html_  # raises AttributeError where diagrams are switched off
        return lambda: self._with_results(diagram())

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        bundle: dict[str, str] = super()._repr_mimebundle_(**kwargs)
        if "text/html" in bundle:
            bundle["text/html"] = self._with_results(bundle["text/html"])
        return bundle


def rates_table(estimator: Any) -> list[Markup]:
    """Rates and out-of-fold scores of a cross-validated head."""
    if not hasattr(estimator, "cv_results_"):
        return []
    found = estimator.cv_results_
    rate = np.asarray(estimator.dropout_)
    columns: dict[str, Any] = {
        "dropout": found["dropout"],
        "out-of-fold score": found["score"],
        "mean of folds": found["mean_score"],
        "standard deviation": found["std_score"],
    }
    if rate.ndim == 0:
        # A stored rate may differ from the table's in its last bits.
        columns["chosen"] = np.arange(len(found["dropout"])) == np.argmin(
            np.abs(found["dropout"] - rate)
        )
    return [table(f"Dropout rates by {estimator.scoring}", columns)]


def pareto_table(estimator: Any) -> list[Markup]:
    """Scores on both domains at each weight of the source and rate."""
    if not hasattr(estimator, "pareto_"):
        return []
    columns = {key.replace("_", " "): values for key, values in estimator.pareto_.items()}
    return [table("Weight of the source, dropout, scores on both domains", columns)]


def weights_table(blend: Any) -> list[Markup]:
    """Weights of the models of a blend, the heaviest first."""
    if not hasattr(blend, "weights_"):
        return []
    order = np.argsort(-blend.weights_, kind="stable")[:_ROWS]
    used = int(np.count_nonzero(blend.weights_))
    caption = (
        f"{used:,} of {len(blend.weights_):,} models have a weight; F{blend.beta:g} "
        f"{blend.score_:.4f} at cut {blend.threshold_:.4g} on the rows that chose them"
    )
    caption += _honest(blend)
    return [table(caption, {"model": order, "weight": blend.weights_[order]})]


def _honest(blend: Any) -> str:
    if not hasattr(blend, "nested_"):
        return ""
    return f"; {honest_text(blend.nested_, blend.optimism_)}"


def honest_text(nested: Mapping[str, float], optimism: float) -> str:
    """What a blend is worth on images that it was not chosen on, and whether the mean is too."""
    text = (
        f"{nested['score']:.4f} [{nested['low']:.4f}, {nested['high']:.4f}] on images left out "
        f"of the whole choice (optimism {optimism:+.4f}), "
    )
    gain = f"{nested['gain']:+.4f} [{nested['gain_low']:+.4f}, {nested['gain_high']:+.4f}]"
    if nested["gain_low"] > 0:
        return text + f"better than the mean of all models by {gain}"
    return text + f"no better than the mean of all models beyond chance: {gain}"
