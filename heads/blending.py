"""Which weights should several models have in one blend?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.utils.validation import check_is_fitted

from heads.blend_domains import rows_by_domain, weights_of
from heads.decisions import GlobalThreshold, best_global_threshold
from heads.folds import Fold, check_folds
from heads.greedy import TooShallow
from heads.honest import nested
from heads.inputs import Matrix, check_beta, check_missed, check_truth, refuse_no_list
from heads.markup import Markup
from heads.pareto import pareto_front
from heads.results import ShowsResults, weights_table
from heads.screening import Entries, Truth, screened, space
from heads.selecting import Choice, Rule, choose
from heads.simplex import LOSSES
from heads.stacks import Models, Stack

METHODS = ("greedy", "simplex", "uniform")
AVERAGES = ("probability", "logit")
_DEPTH = 8.0  # scores of each model that are kept at first, per image and true label
_DEEPER = 4.0
_ALL = 10**8  # scores of all models that simplex weights still take as they are


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
        simplex: the weights on the simplex with the least `loss`.
        uniform: all models alike.
    average : "probability" or "logit"
        What is averaged.
    max_steps : int
        Additions of the greedy method at most.
    patience : int
        Additions without a better score after which the greedy method stops.
    stop_cv : int, optional
        The number of additions whose blend is kept is the one with the best score on images left
        out, when the greedy method is repeated in that many folds, which keep groups together.
        Takes as long again for each fold. Default: the one with the best score here.
    start : int
        The greedy method starts from that many of the best models at most: as many, best
        first, as make the best mean.
    loss : "log" or "squared"
        Of the simplex method; "squared" for averaged probabilities only.
    domain_weights : mapping of domain to weight, optional
        What the score of each domain counts; default: all alike.
    max_source_loss : float, optional
        With domains: the first one (of the first row) is the target and decides alone, among
        blends whose score on each other domain is at most this much below that
        of the best single model there. Greedy only.
    trade_offs : iterable of float, optional
        With domains: weights of the first one, from 0 to 1, at which the greedy method is
        repeated to fill `pareto_`; each takes as long again.
    source_rows : int or None
        With domains: of each but the first at most that many rows choose the weights, drawn by
        `random_state`; None: all. Threshold and `score_` are of all rows.
    cv : int, splitter or iterable of (train, test), optional
        Repeat the whole selection in these folds, which keep groups together, and score
        it on the images left out. Takes as long again for each fold. Default: do not.
    random_state : int

    Attributes
    ----------
    weights_ : (M,) array
        Not negative, adding up to 1.
    threshold_ : float
        On the scale of the blended probabilities; one for all domains, weighted as
        they are (with `max_source_loss`: the target's).
    score_ : float
        Mean F-beta at `threshold_` of the rows that it was fitted on.
    path_ : dict of arrays
        For each step of the greedy method (else one step): "model" that was added,
        "score" after it (of the objective) and "domain_score" (S, D), of each domain at its own
        best threshold; with `stop_cv` "held_out", the score of images that were left out.
    domains_ : list of D
        Domains in the order of `path_`; one, None, if none were given.
    pareto_ : dict of arrays
        With several domains, a row a blend, all that :class:`heads.plots.ParetoDisplay` draws:
        each model alone, each step, and the best step for each of `trade_offs`. "weights"
        (R, M), "score" (R, D), "target_score" (of the first domain) and "source_score" (mean of
        the others), whether no other row beats it ("efficient"), and which one this is ("chosen").
    nested_ : dict
        With `cv`: "score" of images left out with its 95 % interval "low" and "high", that of
        the "uniform" mean of all models, and the "gain" over it with "gain_low", "gain_high".
    nested_score_, optimism_ : float
        With `cv`: the score of images left out, and by how much `score_` is above it.

    Notes
    -----
    Files are read once, block by block; kept are scores that a cut can pass
    (:mod:`heads.screening`), M times some ten for each image and true label. A step of the greedy
    method takes O(M) times a count of those that decide between the candidates, the fewer the
    more models are in (:mod:`heads.windows`), and a sort of some near the best cut for the few
    that might be best (:mod:`heads.bounds`). The result is that of scoring all in full.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> Y = rng.random((200, 5)) < 0.3
    >>> models = [np.clip(0.3 * Y + rng.uniform(0, 0.7, Y.shape), 0, 1) for _ in range(3)]
    >>> blend = Blend(beta=2).fit(models, Y)
    >>> blend.weights_.round(2)
    array([0.31, 0.38, 0.31])
    >>> best = max(Blend().fit([P], Y).score_ for P in models)
    >>> bool(blend.score_ > best)
    True
    """

    weights_: np.ndarray
    threshold_: float
    score_: float
    path_: dict[str, np.ndarray]
    domains_: list[Any]
    pareto_: dict[str, np.ndarray]
    nested_: dict[str, float]
    nested_score_: float
    optimism_: float

    def __init__(
        self,
        beta: float = 2,
        method: str = "greedy",
        average: str = "probability",
        max_steps: int = 50,
        patience: int = 10,
        stop_cv: int | None = None,
        start: int = 1,
        loss: str = "log",
        domain_weights: Mapping[Any, float] | None = None,
        max_source_loss: float | None = None,
        trade_offs: Iterable[float] | None = None,
        source_rows: int | None = 2000,
        cv: Any = None,
        random_state: int = 0,
    ) -> None:
        self.beta = beta
        self.method = method
        self.average = average
        self.max_steps = max_steps
        self.patience = patience
        self.stop_cv = stop_cv
        self.start = start
        self.loss = loss
        self.domain_weights = domain_weights
        self.max_source_loss = max_source_loss
        self.trade_offs = trade_offs
        self.source_rows = source_rows
        self.cv = cv
        self.random_state = random_state

    def fit(
        self,
        P: Models,
        Y: Matrix,
        domains: np.ndarray | Sequence[str] | None = None,
        mask: Matrix | None = None,
        missed: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        names: Sequence[str] | None = None,
    ) -> Blend:
        """Choose weights and threshold.

        Parameters
        ----------
        P : (M, n, K) array, or list of M arrays (n, K) or of names of .npy files
            Out-of-fold probabilities of each model on the same rows and labels. Mapped files
            are read in blocks.
        Y : (n, K) dense or sparse
            True labels.
        domains : (n,), optional
            Domain of each row. Each domain then counts alike, whatever its number of rows.
        mask : (n, K), optional
            True where a label is unknown.
        missed : (n,) counts, optional
            True labels outside the K classes; they count as misses.
        groups : (n,), optional
            Images that folds keep together, and intervals draw together.
        names : (M,), optional
            What models are called where they are refused.

        Raises
        ------
        ValueError
            If shapes differ, or a model's score is no probability (by the model's name).
        """
        self._check()
        data = _Data.of(self, P, Y, domains, mask, missed, groups, names)
        folds = None if self.cv is None else data.folds(self.cv, self.random_state)
        parts = None
        if self.stop_cv is not None:
            # Another draw than of `cv`, each of whose folds then trains on images of all parts.
            parts = data.parts(data.folds(self.stop_cv, self.random_state + 1))
        found = self._selected(data, folds, parts)
        self.weights_ = found.choice.weights
        self.domains_ = data.names
        self.n_features_in_ = data.stack.shape[1]
        used = data.used()
        self.threshold_, self.score_ = best_global_threshold(
            self._blended(data.stack, used),
            data.truth[used],
            self.beta,
            None if data.unknown is None else data.unknown[used],
            data.weight[used],
            data.missed[used],
        )
        path = found.choice.path
        if path is None:
            self.path_ = {"model": np.array([-1]), "score": np.array([self.score_])}
        else:
            self.path_ = {"model": path.model, "score": path.value, "domain_score": path.score}
            if found.choice.held_out is not None:
                self.path_["held_out"] = found.choice.held_out
        if found.front is not None:
            self.pareto_ = found.front
        if found.nested is not None:
            self.nested_ = found.nested
            self.nested_score_ = found.nested["score"]
            self.optimism_ = self.score_ - self.nested_score_
        return self

    def predict_proba(self, P: Models) -> np.ndarray:
        """Blended probabilities (n, K) of the models' probabilities (M, n, K)."""
        check_is_fitted(self, "weights_")
        stack = Stack.of(P)
        if len(stack) != len(self.weights_):
            raise ValueError(
                f"P has {len(stack)} models, the blend was fitted on {len(self.weights_)}"
            )
        return self._blended(stack, np.arange(stack.shape[0]))

    def predict(self, P: Models) -> csr_matrix:
        """Label sets of the blended probabilities; bool CSR (n, K)."""
        cut = GlobalThreshold.at(self.threshold_, self.n_features_in_)
        return cut.predict(self.predict_proba(P))

    def _results(self) -> list[Markup]:
        return weights_table(self)

    def _check(self) -> None:
        check_beta(self.beta)
        if self.trade_offs is not None:
            refuse_no_list(self.trade_offs, "trade_offs")
        for name, allowed in (("method", METHODS), ("average", AVERAGES), ("loss", LOSSES)):
            if getattr(self, name) not in allowed:
                expected = ", ".join(allowed[:-1]) + f" or {allowed[-1]}"
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")
        if self.loss == "squared" and self.average == "logit":
            raise ValueError("loss='squared' needs average='probability', where it is convex")
        for name in ("max_steps", "patience", "start"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.stop_cv is not None and self.method != "greedy":
            raise ValueError("stop_cv needs method='greedy', which alone takes steps")

    def _selected(
        self, data: _Data, folds: list[Fold] | None, parts: list[np.ndarray] | None
    ) -> _Selected:
        """What is chosen on the entries that can matter; deeper ones are read where needed."""
        logits, depth = self.average == "logit", _DEPTH
        if self.method == "simplex" and len(data.stack) * np.prod(data.stack.shape) <= _ALL:
            depth = np.inf
        rule = Rule(
            method=self.method,
            logits=logits,
            loss=self.loss,
            max_steps=self.max_steps,
            patience=self.patience,
            start=self.start,
            domain_weights=data.domain_weights,
            max_source_loss=self.max_source_loss,
        )
        while True:
            kept = [data.entries(d, self.beta, logits, depth) for d in range(len(data.rows))]
            try:
                choice = choose(kept, rule, parts)
                front = held_out = None
                if len(kept) > 1 and choice.path is not None:
                    front = pareto_front(kept, choice, rule, self.trade_offs or (), parts)
                if folds is not None:
                    held_out = nested(kept, data.rows, folds, rule, parts, data.groups).results()
                return _Selected(choice, front, held_out)
            except TooShallow:
                depth *= _DEEPER

    def _blended(self, stack: Stack, rows: np.ndarray) -> np.ndarray:
        """Blended probabilities of some rows, of which no more than a block is read at once."""
        dtype = np.promote_types(stack.dtype, np.float32)
        used = np.flatnonzero(self.weights_)
        total = np.zeros((len(rows), stack.shape[1]), dtype)
        done = 0
        for some, block in stack.take(used).blocks(rows):
            part = total[done : done + len(some)]
            for m, p in zip(used, block, strict=True):
                part += dtype.type(self.weights_[m]) * space(p, self.average == "logit")
            done += len(some)
        if self.average == "logit":
            return np.asarray(expit(total))
        return np.minimum(total, 1, out=total)  # rounded weights may add up to a little more


@dataclass(frozen=True)
class _Selected:
    """The choice, the front of several domains, and the honest score, where asked for."""

    choice: Choice
    front: dict[str, np.ndarray] | None
    nested: dict[str, float] | None


@dataclass(frozen=True)
class _Data:
    """Everything that a blend is fitted on.

    `rows` are the numbers of the rows of each domain that choose the weights, ascending;
    `weight` (n,) gives all rows of each domain together its weight.
    """

    stack: Stack
    truth: csr_matrix
    unknown: Matrix | None
    missed: np.ndarray
    groups: np.ndarray | None
    names: list[Any]
    rows: list[np.ndarray]
    domain_weights: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(
        cls,
        blend: Blend,
        P: Models,
        Y: Matrix,
        domains: np.ndarray | Sequence[str] | None,
        mask: Matrix | None,
        missed: np.ndarray | None,
        groups: np.ndarray | None,
        names: Sequence[str] | None,
    ) -> _Data:
        stack = Stack.of(P, names)
        n = stack.shape[0]
        if not n:
            raise ValueError("P has no rows; a blend needs at least one image")
        truth, unknown = check_truth(Y, mask, stack.shape, learns=True)
        found, rows = rows_by_domain(domains, n)
        greedy = blend.method == "greedy"
        shares = weights_of(found, blend.domain_weights, blend.max_source_loss, greedy)
        weight = np.zeros(n)
        for own, share in zip(rows, shares, strict=True):
            weight[own] = share * n / len(own)
        rng = np.random.default_rng(blend.random_state)
        most = blend.source_rows
        rows[1:] = [np.sort(rng.permutation(own)[:most]) for own in rows[1:]]
        outside = check_missed(missed, n)
        return cls(stack, truth, unknown, outside, groups, found, rows, shares, weight)

    def used(self) -> np.ndarray:
        """Rows with weight, ascending."""
        return np.flatnonzero(self.weight)

    def entries(self, domain: int, beta: float, logits: bool, depth: float) -> Entries:
        """Entries of a domain that can matter."""
        rows = self.rows[domain]
        positive = np.diff(self.truth.indptr)[rows].astype(np.float64)
        share = np.full(len(rows), 1 / len(rows))
        truth = Truth(positive, positive + self.missed[rows], share, beta)
        return screened(self.stack, rows, truth, self.truth, self.unknown, logits, depth)

    def folds(self, cv: Any, random_state: int) -> list[Fold]:
        """Folds over all rows."""
        rows = np.empty((self.stack.shape[0], 0))
        return check_folds(cv, rows, self.truth, self.groups, random_state)

    def parts(self, folds: list[Fold]) -> list[np.ndarray]:
        """By domain, in which fold each of its rows is left out."""
        part = np.zeros(self.stack.shape[0], dtype=np.intp)
        for f, (_, test) in enumerate(folds):
            part[test] = f
        return [part[rows] for rows in self.rows]
