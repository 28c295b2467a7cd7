"""Which chain adapts a multi-label head to a new domain, and harms none?

Fitted on labelled rows of the source domain (validation) and of Stage 1; a third domain is known
by unlabelled images only. The steps, each of which can be switched off or replaced:

1. *alignment*: means (and spreads) of features are mapped to those of the validation rows, so that
   a head fitted on mapped Stage 1 rows serves every domain (:mod:`heads.alignment`);
2. *experts*: heads towards the network's own and towards zero, and the network's after a map of
   features that all labels share, for each alignment, on Stage 1 and a tenth as much validation;
   margins averaged, weights chosen out of fold (:mod:`heads.experts`);
3. *views*: how much the first view counts beside the mean over views is chosen by log-loss,
   out of fold for the experts, on validation for the source head;
4. *calibration*: the adapted head on out-of-fold Stage 1 rows, the source head on validation;
5. *source expert*: where the domain is away from home, or the source head expects more labels than
   Stage 1 has, that head goes a quarter of the way to its aligned form, half as far where labels
   were given differently, and not at all if that takes the number of labels further off. Half the
   way gained more where Stage 1 is far from the source, but lost 0.007 of F2 on far domains where
   it is near;
6. *share*: both are mixed in probability; the adapted head's share w has the least log-loss on
   out-of-fold Stage 1 rows. Where Stage 1 is hardly shifted the source head keeps a say;
7. *gate*: what is left of that share in another domain (:mod:`heads.gate`), g w;
8. *rates*: where a shifted domain is not Stage 1's and the adapted head expects fewer labels an
   image, heads go most of the way up to Stage 1's number; on demand, some of the way to the rates
   of every label (:mod:`heads.rates`), for those who know that labels are given alike everywhere;
9. *priors*: labelled rows of a domain, if there are any, move its label rates;
10. *decision*: label sets of the highest expected F-beta.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from heads.alignment import DomainMoments
from heads.calibration import PlattCalibration, fit_platt
from heads.chain import never_empty
from heads.decisions import Decision, ExpectedFBeta
from heads.domain_heads import AdaptedModel, DomainConfig, DomainHead
from heads.entry_losses import log_losses
from heads.experts import ExpertConfig, Linear, Rows, average, fit_experts
from heads.inputs import check_beta, check_missed, check_source
from heads.labelshift import label_shift_test
from heads.platt import logits
from heads.rates import labels_per_image, pooled_rates
from heads.steps import Step, table

_FIRST = (0.0, 0.5, 1.0)
_SAMPLE = 2000  # rows of a known domain that sureness is measured on
_SHARES = np.linspace(0, 1, 21)


class Adaptation(BaseEstimator):
    """Head for Stage 1, and for any other domain of which unlabelled images are known.

    ``Adaptation().fit(X, Y, source=(X_val, Y_val), coef_init=W0, intercept_init=b0)
    .for_domain(X_new).predict(X_new)``; see :mod:`heads.adaptation` for the steps.

    Parameters
    ----------
    beta : float
        Recall counts beta times as much as precision.
    experts : ExpertConfig, optional
        Steps 1 and 2.
    domain : DomainConfig, optional
        Steps 5 and 7 to 9; its beta is that of the chain.
    calibration : "platt", an estimator with fit, slope_ and intercept_, or None
        Step 4; "platt": :class:`heads.PlattCalibration`.
    decision : Decision, optional
        Step 10; fitted on out-of-fold Stage 1 rows. None: ``ExpectedFBeta(beta)``, with one label
        at least if every known image has one.
    share : float, optional
        Step 6 with a given w; None: chosen.
    first_view : float, optional
        Step 3 with a given weight; None: chosen.
    shift_bounds : (float, float)
        Of :func:`heads.labelshift.label_shift_test`.
    random_state : int
        Seed of folds, permutations and samples.

    Attributes
    ----------
    model_ : AdaptedModel
        All that `for_domain` needs.
    experts_ : list of Expert
    share_ : float
    label_shift_ : LabelShiftTest
    oof_predict_proba_ : (n, K)
        Of Stage 1, held out: what a blend is chosen on. The heads have not seen these rows, but
        a few numbers (the weights of experts, w, the rule) were chosen on them, so that a score
        of theirs is a little too good.
    source_predict_proba_ : (m, K)
        Of the validation rows, by the calibrated source head: the gate is 0 there.
    n_features_in_ : int

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> W0, b0 = rng.normal(size=(5, 8)), np.full(5, -1.0)
    >>> def images(n, shift):
    ...     X = rng.normal(size=(n, 8))
    ...     return X + shift, X @ W0.T + b0 + rng.normal(size=(n, 5)) > 0
    >>> home, (X, Y), (X_new, Y_new) = images(400, 0.0), images(200, 1.0), images(300, 1.2)
    >>> chain = Adaptation(beta=2).fit(X, Y, source=home, coef_init=W0, intercept_init=b0)
    >>> head = chain.for_domain(X_new)  # looks at all of its images, at no label
    >>> head.predict(X_new).shape
    (300, 5)
    >>> [step.step for step in head.steps]
    ['targets', 'alignment', 'gate', 'rates', 'prediction']
    >>> bool(0 <= head.gate_ <= 1)
    True
    """

    def __init__(
        self,
        beta: float = 2,
        experts: ExpertConfig | None = None,
        domain: DomainConfig | None = None,
        calibration: Any = "platt",
        decision: Decision | None = None,
        share: float | None = None,
        first_view: float | None = None,
        shift_bounds: tuple[float, float] = (1.5, 3.0),
        random_state: int = 0,
    ) -> None:
        self.beta = beta
        self.experts = experts
        self.domain = domain
        self.calibration = calibration
        self.decision = decision
        self.share = share
        self.first_view = first_view
        self.shift_bounds = shift_bounds
        self.random_state = random_state

    def fit(
        self,
        X: Any,
        Y: Any,
        source: tuple[Any, Any],
        coef_init: Any,
        intercept_init: Any,
        groups: Any = None,
        source_groups: Any = None,
        mask: Any = None,
        source_mask: Any = None,
        shared_groups: bool = False,
        missed: Any = None,
        source_missed: Any = None,
    ) -> Adaptation:
        """Fit everything that needs labels.

        Parameters
        ----------
        X, Y : Stage 1 features (n, d) or (n, v, d) and labels (n, K)
            Y dense or sparse, {0, 1}; NaN (dense) is unknown.
        source : (X_val, Y_val)
            The same for images of the source domain that the network was not trained on.
        coef_init, intercept_init : W0 (K, d), b0 (K,)
            The network's own last layer.
        groups, source_groups : (n,) and (m,), optional
            Images of equal value stay on one side of a fold, and count once in the test for
            label shift.
        mask, source_mask : optional
            True where a label is unknown.
        shared_groups : bool
            Whether equal values in both are one group.
        missed, source_missed : (n,) and (m,) counts, optional
            True labels outside the K: such an image is not without a label.

        Raises
        ------
        ValueError
            If the domains disagree in features or labels, or a parameter is out of range.
        """
        check_beta(self.beta)
        home = Rows.of(*check_source(source), source_groups, source_mask, self, "source_groups")
        shared = shared_groups and groups is not None and source_groups is not None
        target, home = Rows.of(X, Y, groups, mask, self).beside(home, shared)
        never_empty = _never_empty(target, missed) and _never_empty(home, source_missed)
        network = _network(coef_init, intercept_init, target, home)
        config = ExpertConfig() if self.experts is None else self.experts
        self.experts_ = fit_experts(target, home, network, config, self.random_state)
        domain = DomainConfig() if self.domain is None else self.domain
        domain = replace(domain, beta=float(self.beta), max_scale=config.max_scale)
        oof = sum((e.weight * e.oof for e in self.experts_), np.zeros_like(self.experts_[0].oof))
        target_first, margins = self._first_view(oof, target)
        calibrated, target_calibration = self._calibrated(margins, target)
        at_home = _margins_by_view(network, home.X)
        source_first, margins = self._first_view(at_home, home)
        source_proba, source_calibration = self._calibrated(margins, home)
        self.label_shift_ = label_shift_test(
            _hard(target),
            _hard(home),
            target.groups,
            home.groups,
            self.shift_bounds,
            random_state=self.random_state,
        )
        self.source_predict_proba_ = source_proba
        self.n_features_in_ = target.X.shape[-1]
        model = AdaptedModel(
            network=network,
            targets=self._targets(),
            source_moments=DomainMoments.of(home.X),
            target_moments=DomainMoments.of(target.X),
            source_calibration=source_calibration,
            target_calibration=target_calibration,
            source_first=source_first,
            target_first=target_first,
            share=1.0,
            sure_home=0.0,
            sure_target=0.0,
            labels_per_image=labels_per_image(target.Y),
            rates=pooled_rates(target.Y, home.Y),
            label_shift=self.label_shift_,
            decision=ExpectedFBeta(self.beta),
            config=domain,
        )
        source_expert = model.source_expert(model.target_moments, model.stage_1_signs())
        unadapted = expit(source_expert.margins(target.X))
        self.share_ = self._chosen_share(calibrated, unadapted, target)
        mixed = self.share_ * calibrated + (1 - self.share_) * unadapted
        self.oof_predict_proba_ = np.minimum(mixed, 1)  # rounding may exceed it
        sure = self._sureness(model, home), self._sureness(model, target)
        self.model_ = replace(
            model,
            share=self.share_,
            sure_home=sure[0],
            sure_target=sure[1],
            decision=self._decision(target, int(never_empty)),
        )
        return self

    def for_domain(self, X: Any = None, labelled: tuple[Any, Any] | None = None) -> DomainHead:
        """The head of a domain.

        Parameters
        ----------
        X : unlabelled rows of the domain, (n, d) or (n, v, d); None
            30 rows do, hundreds are better. None: Stage 1's own map and a gate of 1; no image of
            the domain is looked at.
        labelled : (X_d, Y_d), optional
            Some labelled rows of the domain, which correct its label rates. Drawn at random: 30 of
            the least sure images, or that cover most labels, gained no more.

        Raises
        ------
        ValueError
            If there are fewer than 2 rows, or of another width.
        """
        check_is_fitted(self, "model_")
        return self.model_.for_domain(X, labelled, self.random_state)

    def explain(self) -> str:
        """What each step learnt from the labelled rows, as a table in words."""
        check_is_fitted(self, "model_")
        model = self.model_
        rates = ", ".join(
            f"{e.pull}/{e.moments} {e.weight:.0%} {e.dropout:.2g}" for e in self.experts_
        )
        home, away = model.sure_home, model.sure_target
        unsure = "is less sure there" if home > away else "is not"
        steps = [
            Step("experts", f"{len(self.experts_)} heads", f"weight, dropout: {rates}"),
            Step(
                "views",
                f"first view {model.target_first:g} (source {model.source_first:g})",
                "beside the mean over views; least log-loss",
            ),
            Step("share", f"{self.share_:.2f}", "of the adapted head on Stage 1, out of fold"),
            Step("targets", f"shift {self.label_shift_.strength:.2f}", self.label_shift_.words),
            Step("gate", f"{home:.3f} -> {away:.3f}", f"the source head {unsure}: expected F"),
        ]
        return table(steps)

    # -- parts ----------------------------------------------------------------------------

    def _first_view(self, by_view: np.ndarray, rows: Rows) -> tuple[float, np.ndarray]:
        """Weight of the first view and the margins with it; by_view (2, n, K): mean and first."""
        candidates = _FIRST if self.first_view is None else (self.first_view,)
        if rows.X.shape[1] == 1:
            candidates = (0.0,)
        best: tuple[float, float, np.ndarray] | None = None
        for first in candidates:
            margins = (1 - first) * by_view[0] + first * by_view[1]
            loss = 0.0
            if len(candidates) > 1:
                hard, known = _hard_and_known(rows)
                shared = fit_platt(margins, hard, known, np.ones(len(margins)))
                loss = _loss(shared.transform(margins), rows)
            if best is None or loss < best[0]:
                best = loss, first, margins
        assert best is not None
        return best[1], best[2]

    def _calibrated(
        self, margins: np.ndarray, rows: Rows
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Probabilities (n, K), and slope and intercept (K,) of the margins."""
        K = margins.shape[1]
        if self.calibration is None:
            return expit(margins), (np.ones(K), np.zeros(K))
        if self.calibration == "platt":
            folds = min(5, len(np.unique(rows.groups)))
            few = {"strengths": ()} if folds < 2 else {"cv": folds}
            fitted: Any = PlattCalibration(random_state=self.random_state, **few)
        else:
            fitted = clone(self.calibration)
        P = expit(margins.astype(np.float64))
        hard, known = _hard_and_known(rows)
        fitted.fit(P, hard, mask=None if known is None else ~known, groups=rows.groups)
        slope = np.broadcast_to(fitted.slope_, K).astype(np.float64)
        intercept = np.broadcast_to(fitted.intercept_, K).astype(np.float64)
        return expit(logits(P) * slope + intercept), (slope, intercept)

    def _chosen_share(self, adapted: np.ndarray, unadapted: np.ndarray, rows: Rows) -> float:
        if self.share is not None:
            if not 0 <= self.share <= 1:
                raise ValueError(f"share is {self.share}; expected a number in [0, 1]")
            return float(self.share)
        losses = [_loss(w * adapted + (1 - w) * unadapted, rows) for w in _SHARES]
        return float(_SHARES[int(np.argmin(losses))])

    def _targets(self) -> dict[str, Linear]:
        """By map, the weighted average of the pulls' heads."""
        found = {}
        for moments in dict.fromkeys(e.moments for e in self.experts_):
            mine = [e for e in self.experts_ if e.moments == moments]
            total = sum(e.weight for e in mine)
            mean = average([e.head for e in mine], [e.weight / total for e in mine])
            found[moments] = Linear(mean.W.astype(np.float32), mean.b)
        return found

    def _decision(self, rows: Rows, min_labels: int) -> Decision:
        decision: Any = ExpectedFBeta(self.beta, min_labels=min_labels)
        if self.decision is not None:
            decision = clone(self.decision)
        hard, known = _hard_and_known(rows)
        mask = None if known is None else ~known
        fitted: Decision = decision.fit(
            self.oof_predict_proba_, hard, mask=mask, groups=rows.groups
        )
        return fitted

    def _sureness(self, model: AdaptedModel, rows: Rows) -> float:
        drawn = np.random.default_rng(self.random_state).permutation(len(rows.X))[:_SAMPLE]
        return model.sureness(rows.X[np.sort(drawn)])


def _network(coef_init: Any, intercept_init: Any, target: Rows, home: Rows) -> Linear:
    W, b = np.asarray(coef_init), np.asarray(intercept_init, np.float64)
    W = W.astype(np.promote_types(W.dtype, np.float32), copy=False)
    d, K = target.X.shape[-1], target.Y.shape[1]
    if home.X.shape[-1] != d or home.Y.shape[1] != K:
        raise ValueError(
            f"Stage 1 has {d} features and {K} labels, the source {home.X.shape[-1]} and "
            f"{home.Y.shape[1]}; both must be of one network and the same classes"
        )
    if W.shape != (K, d) or b.shape != (K,):
        raise ValueError(
            f"coef_init has shape {W.shape}, intercept_init {b.shape}; expected ({K}, {d}), ({K},)"
        )
    if not (np.isfinite(W).all() and np.isfinite(b).all()):
        raise ValueError("coef_init or intercept_init is not finite; give the network's last layer")
    return Linear(W, b)


def _never_empty(rows: Rows, missed: Any) -> bool:
    return never_empty((rows.Y >= 0.5).sum(axis=1) + check_missed(missed, len(rows.Y)))


def _hard(rows: Rows) -> np.ndarray:
    """Soft targets count as true from 1/2 on; NaN stays."""
    return np.where(np.isnan(rows.Y), np.nan, rows.Y >= 0.5)


def _hard_and_known(rows: Rows) -> tuple[np.ndarray, np.ndarray | None]:
    known = ~np.isnan(rows.Y)
    return rows.Y >= 0.5, None if known.all() else known


def _margins_by_view(head: Linear, X: np.ndarray) -> np.ndarray:
    return np.stack([head.margins(X), head.margins(X[:, 0])])


def _loss(P: np.ndarray, rows: Rows) -> float:
    """Log-loss summed over known entries."""
    known = ~np.isnan(rows.Y)
    losses = log_losses(np.where(known, rows.Y, 0), P)
    return float(losses[known].sum())
