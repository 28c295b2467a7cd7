"""What does an adapted model predict in a domain, and why?

:class:`AdaptedModel` holds all that was learnt from labelled rows, as arrays; with unlabelled rows
of a domain it gives a :class:`DomainHead`: two linear heads and a mixing weight, frozen.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit

from heads import markup
from heads.alignment import DomainMoments, check_domain_rows
from heads.decisions import Decision
from heads.expected import expected_fbeta_sets
from heads.experts import Linear, average
from heads.gate import (
    ENOUGH,
    Gate,
    GateConfig,
    Sureness,
    distance,
    likeness,
    signs_of,
    trust,
    words,
)
from heads.inputs import check_truth
from heads.labelshift import LabelShiftTest
from heads.markup import in_notebook
from heads.platt import mapped
from heads.rates import count_bias, rates_bias
from heads.shift import PriorShift
from heads.steps import Step, table
from heads.training import check_features
from heads.viewed import ViewedHead

SAMPLE = 1000  # images of a domain that sureness is measured on
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class DomainConfig:
    """What is done for a new domain.

    Attributes
    ----------
    beta : float
    gate : GateConfig
    pseudo_count : float
        Images of Stage 1 that are added to a domain's moments: what a domain of few rows
        leans on.
    max_scale : float
        See :class:`heads.DomainAlignment`.
    prior_pseudo_count : float
        Images that the rates expected by the model are worth against labelled ones.
    aligned : float
        How far the source head of a shifted domain goes to its aligned form; half of that where
        labels were given differently, which moves features too; nowhere if the number of labels
        that it expects is then further from Stage 1's.
    counted : float
        How far the heads of a shifted domain that is not Stage 1's go up to as many labels an image
        as Stage 1 has if the adapted head expects fewer; nowhere where labels were given
        differently (:mod:`heads.rates`).
    matched : float
        How far the heads of a shifted domain that is not Stage 1's go to the label rates of the
        known domains; 0.5 if you know that labels are given alike everywhere (:mod:`heads.rates`).
    """

    beta: float = 2.0
    gate: GateConfig = field(default_factory=GateConfig)
    pseudo_count: float = 10.0
    max_scale: float = 10.0
    prior_pseudo_count: float = 300.0
    aligned: float = 0.25
    counted: float = 0.75
    matched: float = 0.0


@dataclass(frozen=True, repr=False)
class DomainHead:
    """The frozen head of one domain:  P = g w sigma(adapted) + (1 - g w) sigma(source), shifted.

    Predicts image by image: neither other images nor their order matter. In a
    :class:`heads.storage.Head` it is kept in a file, as fitted heads are.

    Attributes
    ----------
    adapted, source : ViewedHead
        Calibrated heads on the domain's raw features.
    gate_ : float
        g: 0 is the calibrated source head, 1 the head of Stage 1.
    share : float
        w: what the adapted head counts on Stage 1 itself.
    bias : (K,) or None
        Added to the logits of P, from labelled rows of the domain.
    decision : Decision
    signs : Gate
    steps : tuple of Step
        What was done, and why.
    """

    adapted: ViewedHead
    source: ViewedHead
    gate_: float
    share: float
    bias: np.ndarray | None
    decision: Decision
    signs: Gate
    steps: tuple[Step, ...] = ()

    @property
    def n_features_in_(self) -> int:
        """Number of features d."""
        return int(self.source.head.W.shape[1])

    def predict_proba(self, X: Any) -> np.ndarray:
        """(n, K) probabilities of X (n, d) or (n, v, d)."""
        X = self._checked(X)
        weight = self.gate_ * self.share
        blocks = []
        for start in range(0, max(1, len(X)), _ROWS_AT_ONCE):
            rows = X[start : start + _ROWS_AT_ONCE]
            P = np.zeros((len(rows), len(self.source.head.b)), np.float32)
            P = P.astype(np.promote_types(rows.dtype, np.float32), copy=False)
            for w, head in ((weight, self.adapted), (1 - weight, self.source)):
                if w:
                    P += P.dtype.type(w) * expit(head.margins(rows))
            blocks.append(P if self.bias is None else mapped(P, 1.0, self.bias))
        return np.minimum(np.concatenate(blocks), 1)

    def predict(self, X: Any) -> csr_matrix:
        """Label sets, bool CSR (n, K)."""
        return self.decision.predict(self.predict_proba(X))

    def explain(self) -> str:
        """What each step did to this domain, as a table in words."""
        return table(self.steps)

    def __repr__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        columns = {name: [getattr(s, name) for s in self.steps] for name in Step.__annotations__}
        return in_notebook(markup.table("The head of this domain", columns))

    def _checked(self, X: Any) -> np.ndarray:
        X = check_features(X, self)
        if X.shape[-1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[-1]} features, but the head was made for {self.n_features_in_}"
            )
        return X


@dataclass(frozen=True)
class AdaptedModel:
    """What :class:`heads.Adaptation` learnt: arrays and numbers, no data.

    Attributes
    ----------
    network : Linear
        W0, b0.
    targets : dict of Linear
        By the moments of the map: head on mapped features.
    source_moments, target_moments : DomainMoments
    source_calibration, target_calibration : Linear of W (1, K) slopes and b (K,)
        Margins to logits.
    source_first, target_first : float
        Weights of the first view.
    share : float
    sure_home, sure_target : float
        Expected F-beta of the source head.
    labels_per_image : float
        Of Stage 1, on average.
    rates : (K,)
        Of the labels in the known domains; NaN unknown.
    label_shift : LabelShiftTest
    decision : Decision
    config : DomainConfig
    """

    network: Linear
    targets: dict[str, Linear]
    source_moments: DomainMoments
    target_moments: DomainMoments
    source_calibration: tuple[np.ndarray, np.ndarray]
    target_calibration: tuple[np.ndarray, np.ndarray]
    source_first: float
    target_first: float
    share: float
    sure_home: float
    sure_target: float
    labels_per_image: float
    rates: np.ndarray
    label_shift: LabelShiftTest
    decision: Decision
    config: DomainConfig

    @property
    def n_features_in_(self) -> int:
        """Number of features d."""
        return int(self.network.W.shape[1])

    @property
    def source(self) -> ViewedHead:
        """The calibrated source head."""
        return ViewedHead(self.network.calibrated(*self.source_calibration), self.source_first)

    def adapted(self, domain: DomainMoments) -> ViewedHead:
        """The adapted head on the raw features of a domain."""
        own, home = domain.like(self.source_moments), self.source_moments.like(domain)
        heads = [
            head.after(own.map_to(home, moments, self.config.max_scale))
            for moments, head in self.targets.items()
        ]
        return ViewedHead(average(heads).calibrated(*self.target_calibration), self.target_first)

    def source_expert(
        self, domain: DomainMoments, signs: Gate, X: np.ndarray | None = None
    ) -> ViewedHead:
        """The calibrated source head, the more aligned the further from home the domain is.

        With images X (n, v, d) also the more the head expects more labels than Stage 1 has, and
        not at all where alignment takes the number of labels further off.
        """
        share = self.config.aligned * (1 - self.label_shift.strength / 2)
        over = 0.0 if X is None else float(np.clip(self._excess(self.source, X), 0, 1))
        share *= (1 - signs.home) * max(signs.unsure, over)
        if not share:
            return self.source
        own, home = domain.like(self.source_moments), self.source_moments.like(domain)
        maps = [own.map_to(home, moments, self.config.max_scale) for moments in self.targets]
        heads = [self.network, *(self.network.after(m) for m in maps)]
        mixed = average(heads, [1 - share, *[share / len(maps)] * len(maps)])
        aligned = ViewedHead(mixed.calibrated(*self.source_calibration), self.source_first)
        if X is not None and abs(self._excess(aligned, X)) > abs(self._excess(self.source, X)):
            return self.source
        return aligned

    def _excess(self, head: ViewedHead, X: np.ndarray) -> float:
        """log2 of how many times the labels of Stage 1 the head expects."""
        if self.labels_per_image <= 0:  # not told by files of old
            return 0.0
        expected = float(expit(head.margins(X)).sum(axis=1).mean())
        return float(np.log2(max(expected, 1e-6) / self.labels_per_image))

    def stage_1_signs(self) -> Gate:
        """Of Stage 1's own domain."""
        own, home = self.target_moments, self.source_moments
        away = distance(own.like(home), home.like(own))
        _, f_0 = likeness(1.0, away, own.every.images, self.config.gate)
        return Gate(0.0, 1.0, 1.0, f_0).opened(self.label_shift.strength, self.config.gate)

    def for_domain(
        self, X: Any = None, labelled: tuple[Any, Any] | None = None, random_state: int = 0
    ) -> DomainHead:
        """See :meth:`heads.Adaptation.for_domain`."""
        steps = [Step("targets", *self._shift_words())]
        if X is None:
            signs = self.stage_1_signs()
            adapted = self.adapted(self.target_moments)
            source = self.source_expert(self.target_moments, signs)
            steps += [
                Step("alignment", "Stage 1's own map", "no image of the domain was looked at"),
                Step("gate", f"{signs.value:.2f}", "the domain counts as Stage 1's"),
            ]
        else:
            check_domain_rows(len(X))
            X = self._checked(X)
            domain = DomainMoments.of(X)
            shrunk = self._shrunk(domain)
            sample = np.random.default_rng(random_state).permutation(len(X))[:SAMPLE]
            X = X[np.sort(sample)]
            signs, reason = self._signs(X, domain)
            adapted, source = self.adapted(shrunk), self.source_expert(shrunk, signs, X)
            signs, found = self._trusted(signs, reason, [h.margins(X) for h in (adapted, source)])
            steps += [self._alignment_step(domain), found]
            adapted, source, moved = self._at_known_rates(adapted, source, signs, X)
            steps += moved
        head = DomainHead(
            adapted, source, signs.value, self.share, None, self.decision, signs, tuple(steps)
        )
        if X is not None:
            steps.append(self._effect(head, X))
        bias = None
        if labelled is not None and len(labelled[0]):
            bias, step = self._priors(head, *labelled)
            steps.append(step)
        return replace(head, bias=bias, steps=tuple(steps))

    # -- parts ----------------------------------------------------------------------------

    def _checked(self, X: Any) -> np.ndarray:
        X = check_features(X, self)
        if X.shape[-1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[-1]} features, but Adaptation was fitted on {self.n_features_in_}"
            )
        return X

    def _shrunk(self, domain: DomainMoments) -> DomainMoments:
        own, count = domain.like(self.target_moments), self.config.pseudo_count
        own = own.shrunk(self.target_moments.like(domain), count)
        return DomainMoments(own, own, domain.views)

    def _at_known_rates(
        self, adapted: ViewedHead, source: ViewedHead, signs: Gate, X: np.ndarray
    ) -> tuple[ViewedHead, ViewedHead, list[Step]]:
        """Both heads with biases that bring them nearer to what is known of labels elsewhere."""
        strength = signs.elsewhere * (1 - self.label_shift.strength) * min(1.0, len(X) / ENOUGH)
        counted, matched = strength * self.config.counted, strength * self.config.matched
        moved, most, up = [], 0.0, np.inf
        for head in (adapted, source):
            margins = head.margins(X)
            bias = rates_bias(margins, self.rates, matched)
            # No further than the adapted head, which has learnt from shifted images: Stage 1.
            up = min(up, count_bias(margins + bias, self.labels_per_image, counted))
            bias += up
            moved.append(replace(head, head=Linear(head.head.W, head.head.b + bias)))
            most = max(most, float(np.abs(bias).max(initial=0)))
        reasons = []
        if counted:
            reasons.append(
                f"{counted:.0%} of the way up to Stage 1's {self.labels_per_image:.1f} labels"
            )
        if matched:
            reasons.append(f"{matched:.0%} of the way to the label rates of the known domains")
        step = Step("rates", f"logits moved by up to {most:.2f}", ", ".join(reasons))
        return moved[0], moved[1], [step] if most else []

    def _signs(self, X: np.ndarray, domain: DomainMoments) -> tuple[Gate, str]:
        config, shift = self.config.gate, self.label_shift.strength
        sure = Sureness(self.sure_home, self.sure_target, self.sureness(X))
        gate = signs_of(domain, self.target_moments, self.source_moments, sure, shift, config)
        return gate, words(gate, sure, self.config.beta, config)

    def _trusted(self, gate: Gate, reason: str, margins: list[np.ndarray]) -> tuple[Gate, Step]:
        """With what the adapted and the source head, of these margins, expect of themselves."""
        config, shift = self.config.gate, self.label_shift.strength
        if config.fixed is None and gate.elsewhere > 0:
            q = trust(self._expected(margins[0]), self._expected(margins[1]), shift, config)
            gate = replace(gate, trust=q).opened(shift, config)
            if q < 1:
                reason += f"; the adapted head doubts itself: {q:.0%} trusted"
        return gate, Step("gate", f"{gate.value:.2f}", reason)

    def _expected(self, margins: np.ndarray) -> float:
        return float(expected_fbeta_sets(expit(margins), self.config.beta).expected.mean())

    def sureness(self, X: np.ndarray) -> float:
        """Mean expected F-beta of the calibrated source head on first views."""
        first = X if X.ndim == 2 else X[:, 0]
        return self._expected(self.source.margins(first))

    def _shift_words(self) -> tuple[str, str]:
        return f"shift {self.label_shift.strength:.2f}", self.label_shift.words

    def _alignment_step(self, domain: DomainMoments) -> Step:
        own, home = domain.like(self.source_moments), self.source_moments.like(domain)
        std = np.where(home.std > 0, home.std, 1.0)
        moved = float(np.sqrt((((own.mean - home.mean) / std) ** 2).mean()))
        share = own.images / (own.images + self.config.pseudo_count)
        return Step(
            "alignment",
            f"features moved by {moved:.2f} sd",
            f"moments of {own.images:,} images, {share:.0%} their own and the rest Stage 1's",
        )

    def _effect(self, head: DomainHead, X: np.ndarray) -> Step:
        P, P_source = head.predict_proba(X), expit(self.source.margins(X))
        sets = [expected_fbeta_sets(p, self.config.beta) for p in (P_source, P)]
        counts = [head.decision.predict(p).nnz / len(X) for p in (P_source, P)]
        return Step(
            "prediction",
            f"{counts[0]:.2f} -> {counts[1]:.2f} labels an image",
            f"expected F{self.config.beta:g} {sets[0].expected.mean():.3f} with the source head, "
            f"{sets[1].expected.mean():.3f} now",
        )

    def _priors(self, head: DomainHead, X: Any, Y: Any) -> tuple[np.ndarray, Step]:
        P = head.predict_proba(X)
        check_truth(Y, None, P.shape)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            shift = PriorShift(pseudo_count=self.config.prior_pseudo_count).fit(P, Y)
        assert shift.diagnosis_ is not None
        reason = f"{len(P):,} labelled images hold {shift.diagnosis_.ratio:.2f} times the labels"
        if caught:
            reason += "; more than their frequencies differ"
        moved = float(np.abs(shift.bias_).max(initial=0))
        return shift.bias_, Step("priors", f"logits moved by up to {moved:.2f}", reason)
