"""Which weights should several models have in one blend?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit, logit
from sklearn.utils.validation import check_is_fitted

from heads.decisions import GlobalThreshold, best_global_threshold
from heads.inputs import Matrix, check_scores, check_truth
from heads.markup import Markup
from heads.results import ShowsResults, weights_table

_TINY = 1e-6  # probabilities are kept this far from 0 and 1 before taking logits
_SIMPLEX_STEPS = 300
_SIMPLEX_TOL = 1e-6  # of the loss
_SMALLEST_RATE = 1e-6  # of the first one; steps that short drown in rounding


class Blend(ShowsResults):
    """A weighted average of models' probabilities, cut at its best global threshold.

    Parameters
    ----------
    beta : float
        Of the F-beta score that the blend is chosen by.
    method : "greedy", "simplex" or "uniform"
        greedy: start from the best model and add, again and again, the model (any
        number of times) that gives the best mean F-beta per image, each candidate at
        *its own* best global threshold (Caruana et al. 2004); keep the best step.
        simplex: the weights on the simplex with the least log-loss.
        uniform: all models alike.
    average : "probability" or "logit"
        What is averaged.
    max_steps : int
        Additions of the greedy method at most.
    patience : int
        Additions without a better score after which the greedy method stops.

    Attributes
    ----------
    weights_ : (M,) array
        Not negative, adding up to 1.
    threshold_ : float
        On the scale of the blended probabilities.
    score_ : float
        Mean F-beta of the rows that it was fitted on.
    path_ : dict of arrays
        For each step of the greedy method (else one step): "model" that was added and
        "score" after it.
    """

    weights_: np.ndarray
    threshold_: float
    score_: float
    path_: dict[str, np.ndarray]

    def __init__(
        self,
        beta: float = 2,
        method: str = "greedy",
        average: str = "probability",
        max_steps: int = 50,
        patience: int = 10,
    ) -> None:
        self.beta = beta
        self.method = method
        self.average = average
        self.max_steps = max_steps
        self.patience = patience

    def fit(
        self,
        P: np.ndarray | Sequence[np.ndarray],
        Y: Matrix,
        domains: np.ndarray | Sequence[str] | None = None,
        mask: Matrix | None = None,
        missed: np.ndarray | None = None,
    ) -> Blend:
        """Choose weights and threshold.

        Parameters
        ----------
        P : (M, n, K) array or list of M arrays (n, K)
            Out-of-fold probabilities of each model on the same rows and labels.
        Y : (n, K) dense or sparse
            True labels.
        domains : (n,), optional
            Domain of each row. Each domain then counts alike, whatever its number of rows.
        mask : (n, K), optional
            True where a label is unknown.
        missed : (n,) counts, optional
            True labels outside the K classes; they count as misses.

        Raises
        ------
        ValueError
            If shapes differ, or a model's score is not finite (named by its number).
        """
        if self.method not in ("greedy", "simplex", "uniform"):
            raise ValueError(f"method is {self.method!r}; expected greedy, simplex or uniform")
        scores = [self._space(p) for p in _check_models(P)]
        truth, unknown = check_truth(Y, mask, scores[0].shape)
        weight = _alike(domains, len(scores[0]))

        def cut(average: np.ndarray) -> tuple[float, float]:
            P = self._probability(average)
            return best_global_threshold(P, truth, self.beta, unknown, weight, missed)

        if self.method == "greedy":
            counts, path = _greedy(scores, lambda s: cut(s)[1], self.max_steps, self.patience)
            self.weights_ = counts / counts.sum()
            self.path_ = path
        else:
            self.weights_ = np.full(len(scores), 1 / len(scores))
            if self.method == "simplex":
                self.weights_ = _simplex(scores, truth, unknown, weight, self.average == "logit")
        self.threshold_, self.score_ = cut(_combine(scores, self.weights_))
        if self.method != "greedy":
            self.path_ = {"model": np.array([-1]), "score": np.array([self.score_])}
        self.n_features_in_ = scores[0].shape[1]
        return self

    def predict_proba(self, P: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Blended probabilities (n, K) of the models' probabilities (M, n, K)."""
        check_is_fitted(self, "weights_")
        models = _check_models(P)
        if len(models) != len(self.weights_):
            raise ValueError(
                f"P has {len(models)} models, the blend was fitted on {len(self.weights_)}"
            )
        return self._probability(_combine([self._space(p) for p in models], self.weights_))

    def predict(self, P: np.ndarray | Sequence[np.ndarray]) -> csr_matrix:
        """Label sets of the blended probabilities; bool CSR (n, K)."""
        cut = GlobalThreshold.at(self.threshold_, self.n_features_in_)
        return cut.predict(self.predict_proba(P))

    def _results(self) -> list[Markup]:
        return weights_table(self)

    def _space(self, p: np.ndarray) -> np.ndarray:
        if self.average == "probability":
            return p
        if self.average == "logit":
            # float16 has no number between 1 - _TINY and 1.
            p = p.astype(np.promote_types(p.dtype, np.float32), copy=False)
            clipped: np.ndarray = logit(np.clip(p, _TINY, 1 - _TINY))
            return clipped
        raise ValueError(f"average is {self.average!r}; expected probability or logit")

    def _probability(self, average: np.ndarray) -> np.ndarray:
        if self.average == "probability":
            return np.minimum(average, 1)  # rounded weights may add up to a little more
        probability: np.ndarray = expit(average)
        return probability


def _check_models(P: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
    models = [check_scores(p, f"P[{m}]") for m, p in enumerate(P)]
    if not models:
        raise ValueError("P holds no models; give (M, n, K) scores with M >= 1")
    for m, p in enumerate(models):
        if p.shape != models[0].shape:
            raise ValueError(f"P[{m}] has shape {p.shape}, but P[0] has shape {models[0].shape}")
        if p.size and not 0 <= p.min() <= p.max() <= 1:
            raise ValueError(f"P[{m}] reaches from {p.min()} to {p.max()}; give probabilities")
    return models


def _combine(scores: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """sum_m w_m s_m without a copy of all models at once."""
    total = np.zeros_like(scores[0], dtype=np.promote_types(scores[0].dtype, np.float32))
    for weight, score in zip(weights, scores, strict=True):
        if weight:
            total += total.dtype.type(weight) * score
    return total


def _greedy(
    scores: Sequence[np.ndarray],
    evaluate: Callable[[np.ndarray], float],
    max_steps: int,
    patience: int,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """How often each model was added by the best step, and the path up to it and beyond.

    A step costs M evaluations. Of equally good candidates the first one is taken.
    """
    total = np.zeros_like(scores[0], dtype=np.promote_types(scores[0].dtype, np.float32))
    added: list[int] = []
    reached: list[float] = []
    while len(added) < max_steps:
        size = total.dtype.type(len(added) + 1)
        candidates = [evaluate((total + score) / size) for score in scores]
        best = int(np.argmax(candidates))
        added.append(best)
        reached.append(candidates[best])
        total += scores[best]
        if len(scores) == 1 or len(added) - int(np.argmax(reached)) > patience:
            break
    length = int(np.argmax(reached)) + 1
    counts = np.bincount(added[:length], minlength=len(scores)).astype(np.float64)
    return counts, {"model": np.array(added), "score": np.array(reached)}


def _alike(domains: np.ndarray | Sequence[str] | None, n: int) -> np.ndarray | None:
    """Row weights (n,) with mean 1 that give every domain the same sum."""
    if domains is None:
        return None
    if len(domains) != n:
        raise ValueError(f"domains has length {len(domains)}, but the models score {n} rows")
    _, code, count = np.unique(np.asarray(domains), return_inverse=True, return_counts=True)
    weight: np.ndarray = (n / len(count) / count)[code.reshape(-1)]
    return weight


def _simplex(
    scores: Sequence[np.ndarray],
    truth: csr_matrix,
    unknown: Matrix | None,
    weight: np.ndarray | None,
    logits: bool,
) -> np.ndarray:
    """Weights on the simplex that minimise the mean log-loss, by exponentiated gradient.

    d loss / d w_m = mean (p - y) / (p (1 - p)) dp/ds s_m, where dp/ds is 1 for averaged
    probabilities and p (1 - p) for logits. Kivinen and Warmuth (1997); the step is
    halved whenever the loss would rise. The loss is convex, hence at most
    max_m g' (w - e_m) above its minimum, which tells when to stop.
    """
    y = truth.toarray()
    known = np.ones(y.shape)
    if unknown is not None:
        known -= unknown if isinstance(unknown, np.ndarray) else unknown.toarray()
    if weight is not None:
        known *= weight[:, None]
    count = known.sum()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        s = _combine(scores, weights).astype(np.float64)
        p = np.clip(expit(s) if logits else s, _TINY, 1 - _TINY)
        value = -(np.log(np.where(y > 0.5, p, 1 - p)) * known).sum() / count
        slope = (p - y) * known / count
        if not logits:
            slope /= p * (1 - p)
        return float(value), np.array([np.vdot(slope, score) for score in scores])

    weights = np.full(len(scores), 1 / len(scores))
    value, gradient = loss(weights)
    # What all models have in common in the gradient does not matter, however large it is.
    rate = 1.0 / max(float(np.ptp(gradient)), 1e-12)
    smallest = _SMALLEST_RATE * rate
    for _ in range(_SIMPLEX_STEPS):
        if rate < smallest or weights @ gradient - gradient.min() <= _SIMPLEX_TOL * value:
            break
        candidate = weights * np.exp(-rate * (gradient - gradient.min()))
        candidate /= candidate.sum()
        new_value, new_gradient = loss(candidate)
        if new_value > value:
            rate /= 2
            continue
        weights, value, gradient = candidate, new_value, new_gradient
        rate *= 1.2
    weights[weights < 1e-4] = 0.0
    return weights / weights.sum()
