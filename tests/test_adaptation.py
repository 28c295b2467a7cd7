"""The chain for new domains: what it must do, what it must not depend on, and its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import expit, logit
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from heads import Adaptation, ExpectedFBeta, GlobalThreshold, PlattCalibration, mean_fbeta
from heads.alignment import DomainMoments
from heads.domain_heads import DomainConfig, DomainHead
from heads.experts import ExpertConfig, Rows
from heads.gate import (
    Gate,
    GateConfig,
    Sureness,
    apart,
    distance,
    familiarity,
    likeness,
    signs_of,
    trust,
    unsureness,
    words,
)
from tests import synthetic

QUICK = ExpertConfig(dropouts=(0.2,), cv=3)
SHARED = PlattCalibration(strengths=())
STAGE_1, SOURCE, TEST = (synthetic.images(n, seed) for seed, n in enumerate((300, 320, 400), 10))
X = synthetic.features(STAGE_1, shifted=True, views=2)
X_VAL = synthetic.features(SOURCE, views=2)
X_TEST = synthetic.features(TEST, shifted=True, views=2)
W0, B0 = synthetic.last_layer()


def fitted(Y: Any = STAGE_1.Y, **parameters: Any) -> Adaptation:
    """A chain of few, quick heads."""
    options = {"experts": QUICK, "calibration": SHARED} | parameters
    return Adaptation(**options).fit(
        X, Y, source=(X_VAL, SOURCE.Y), coef_init=W0, intercept_init=B0
    )


@pytest.fixture(scope="module")
def chain() -> Adaptation:
    """Fitted once."""
    return fitted()


def with_domain(chain: Adaptation, **domain: Any) -> Adaptation:
    """The same fit, with other constants of what is done for a domain."""
    other = clone(chain)
    other.__dict__.update(vars(chain))
    config = replace(chain.model_.config, **domain)
    other.model_ = replace(chain.model_, config=config)
    return other


CLOSED = GateConfig(fixed=0.0)
PLAIN = {"aligned": 0.0}


def unadapted(chain: Adaptation) -> ExpectedFBeta:
    return ExpectedFBeta().fit(chain.oof_predict_proba_)


# --------------------------------------------------------------------- what it is for


def test_it_gains_on_the_shifted_domain_and_keeps_the_source_head_at_home(
    chain: Adaptation,
) -> None:
    source = chain.model_.source
    rule = unadapted(chain)
    for head in (chain.for_domain(X_TEST), chain.for_domain()):
        gained = mean_fbeta(TEST.Y, head.predict(X_TEST))
        assert gained > mean_fbeta(TEST.Y, rule.predict(expit(source.margins(X_TEST)))) + 0.05
    home = synthetic.features(TEST, views=2)
    at_home = chain.for_domain(home)
    assert at_home.gate_ < 0.15
    kept = mean_fbeta(TEST.Y, rule.predict(expit(source.margins(home))))
    assert mean_fbeta(TEST.Y, at_home.predict(home)) > kept - 0.01


def test_other_images_of_stage_1s_domain_open_the_gate(chain: Adaptation) -> None:
    assert chain.for_domain().gate_ == 1
    assert chain.for_domain(X_TEST).gate_ > 0.9
    elsewhere = chain.for_domain(X_TEST + np.linspace(-2, 2, X_TEST.shape[-1]))
    assert elsewhere.gate_ <= GateConfig().cap
    assert "another domain" in elsewhere.explain()


# --------------------------------------------------------- what it must not depend on


def test_images_are_predicted_one_by_one(chain: Adaptation) -> None:
    head = chain.for_domain(X_TEST)
    P = head.predict_proba(X_TEST)
    alone = np.concatenate([head.predict_proba(X_TEST[i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(alone, P[:20], rtol=1e-12)
    order = np.random.default_rng(0).permutation(len(P))
    np.testing.assert_allclose(head.predict_proba(X_TEST[order]), P[order], rtol=1e-12)


def test_the_order_of_a_domains_rows_does_not_matter(chain: Adaptation) -> None:
    order = np.random.default_rng(0).permutation(len(X_TEST))
    heads = chain.for_domain(X_TEST), chain.for_domain(X_TEST[order])
    np.testing.assert_allclose(*(h.predict_proba(X_TEST) for h in heads), rtol=1e-9)


def test_features_that_are_moved_and_scaled_are_mapped_back(chain: Adaptation) -> None:
    """The adapted head undoes what its map can; the source head, not aligned, cannot."""
    config = replace(QUICK, moments=("mean_std",))
    domain = DomainConfig(pseudo_count=0, gate=GateConfig(fixed=1), aligned=0, counted=0)
    only = fitted(experts=config, domain=domain, share=1.0)
    rng = np.random.default_rng(0)
    moved = X_TEST * rng.uniform(0.5, 2, X.shape[-1]) + rng.normal(size=X.shape[-1])
    first, second = only.for_domain(X_TEST), only.for_domain(moved)
    np.testing.assert_allclose(second.predict_proba(moved), first.predict_proba(X_TEST), rtol=1e-6)
    assert np.abs(first.source.margins(moved) - first.source.margins(X_TEST)).max() > 1


def test_labels_and_features_may_come_in_any_form(chain: Adaptation) -> None:
    P = chain.for_domain(X_TEST).predict_proba(X_TEST)
    sparse = fitted(csr_matrix(STAGE_1.Y))
    np.testing.assert_array_equal(sparse.for_domain(X_TEST).predict_proba(X_TEST), P)


def test_unknown_labels_may_be_nan_or_masked() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random(STAGE_1.Y.shape) < 0.1
    missing = np.where(mask, np.nan, STAGE_1.Y)
    heads = [
        fitted(missing),
        Adaptation(experts=QUICK, calibration=SHARED).fit(
            X, STAGE_1.Y, (X_VAL, SOURCE.Y), W0, B0, mask=mask
        ),
        fitted(np.ma.masked_array(STAGE_1.Y, mask)),
    ]
    proba = [h.for_domain(X_TEST).predict_proba(X_TEST) for h in heads]
    np.testing.assert_array_equal(proba[0], proba[1])
    np.testing.assert_array_equal(proba[0], proba[2])
    assert np.isfinite(proba[0]).all()
    # What is unknown must not be known after all.
    other = fitted(np.where(mask, np.nan, STAGE_1.Y))
    assert np.array_equal(other.oof_predict_proba_, heads[0].oof_predict_proba_)


# ------------------------------------------------------------------------- limits


def test_gate_0_is_the_calibrated_source_head(chain: Adaptation) -> None:
    head = with_domain(chain, gate=CLOSED, **PLAIN).for_domain(X_TEST)
    margins = X_VAL[:, 0] @ W0.T + B0
    if chain.model_.source_first < 1:
        first = chain.model_.source_first
        margins = first * margins + (1 - first) * (X_VAL.mean(1) @ W0.T + B0)
    platt = PlattCalibration(strengths=()).fit(expit(margins), SOURCE.Y)
    first = chain.model_.source_first
    seen = first * X_TEST[:, 0] + (1 - first) * X_TEST.mean(1)
    expected = platt.transform(expit(seen @ W0.T + B0))
    np.testing.assert_allclose(head.predict_proba(X_TEST), expected, atol=1e-5)


def test_a_share_of_0_leaves_nothing_but_the_source_head(chain: Adaptation) -> None:
    none = fitted(share=0.0).for_domain(X_TEST).predict_proba(X_TEST)
    closed = with_domain(chain, gate=CLOSED).for_domain(X_TEST).predict_proba(X_TEST)
    np.testing.assert_allclose(none, closed, rtol=1e-9)


def test_the_share_is_the_best_of_all_shares_out_of_fold(chain: Adaptation) -> None:
    def loss(P: np.ndarray) -> float:
        P = np.clip(P, 1e-7, 1 - 1e-7)
        return float(-(STAGE_1.Y * np.log(P) + (1 - STAGE_1.Y) * np.log(1 - P)).sum())

    chosen = loss(chain.oof_predict_proba_)
    for share in (0.0, 0.3, 0.7, 1.0):
        assert chosen <= loss(fitted(share=share).oof_predict_proba_) + 1e-3


def test_stage_1s_own_rows_as_a_domain_are_the_strict_map(chain: Adaptation) -> None:
    """Moments of the domain are then those of Stage 1, whatever the pseudo-count."""
    looked, strict = chain.for_domain(X), chain.for_domain()
    assert looked.gate_ == strict.gate_ == 1
    np.testing.assert_allclose(looked.predict_proba(X), strict.predict_proba(X), rtol=1e-9)


@pytest.mark.parametrize("n", [2, 30])
def test_few_rows_of_a_domain_do(chain: Adaptation, n: int) -> None:
    head = chain.for_domain(X_TEST[:n])
    whole = mean_fbeta(TEST.Y, chain.for_domain(X_TEST).predict(X_TEST))
    assert mean_fbeta(TEST.Y, head.predict(X_TEST)) > whole - 0.08
    share = n / (n + chain.model_.config.pseudo_count)
    assert f"{share:.0%} their own" in head.explain()


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_rows_are_too_few(chain: Adaptation, n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} unlabelled row"):
        chain.for_domain(X_TEST[:n])


def test_a_class_without_positives_keeps_the_networks_weights() -> None:
    Y = STAGE_1.Y.copy()
    Y[:, 0] = 0
    chain = fitted(Y, calibration=None)
    head = chain.for_domain(X)
    assert np.isfinite(head.predict_proba(X_TEST)).all()
    for model in chain.model_.targets.values():
        np.testing.assert_allclose(model.W[0], W0[0], rtol=1e-5)
        assert np.abs(model.W[1] - W0[1]).max() > 0.01
    # Its rate is that of Stage 1, where it is never seen.
    assert expit(head.adapted.margins(X)[:, 0]).sum() < 2


def test_a_class_that_stage_1_knows_nothing_of_keeps_the_network_whole() -> None:
    Y = STAGE_1.Y.astype(float)
    Y[:, 2] = np.nan
    chain = fitted(Y, calibration=None)
    assert np.isfinite(chain.for_domain(X).predict_proba(X_TEST)).all()
    for model in chain.model_.targets.values():
        np.testing.assert_allclose(model.W[2], W0[2], rtol=1e-5)
        assert model.b[2] == pytest.approx(B0[2])


def test_nothing_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="no positive label"):
        fitted(np.zeros_like(STAGE_1.Y))


def test_the_source_head_is_aligned_as_far_as_the_domain_is_away(chain: Adaptation) -> None:
    moved = X_TEST + np.linspace(-2, 2, X_TEST.shape[-1])
    head = chain.for_domain(moved)
    away = DomainConfig().aligned * head.signs.away * (1 - chain.label_shift_.strength / 2)
    assert 0 < away <= 0.5
    parts = []
    for moments in ("mean", "mean_std"):
        own, home = chain.model_._shrunk(DomainMoments.of(moved)), chain.model_.source_moments
        there = own.every.map_to(home.every, moments, 10.0).transform(moved)
        parts.append(chain.model_.source.margins(there))
    expected = away * np.mean(parts, axis=0) + (1 - away) * chain.model_.source.margins(moved)
    np.testing.assert_allclose(head.source.margins(moved), expected, atol=1e-4)
    at_home = synthetic.features(TEST, views=2)
    kept = chain.for_domain(at_home)
    assert kept.signs.away < 0.2


def test_rates_are_half_way_to_those_of_the_known_domains_where_labels_did_not_shift(
    chain: Adaptation,
) -> None:
    moved = X_TEST + np.linspace(-2, 2, X_TEST.shape[-1])
    matched = with_domain(chain, matched=0.5, counted=0)
    plain, head = with_domain(chain, counted=0).for_domain(moved), matched.for_domain(moved)
    known = np.concatenate([STAGE_1.Y, SOURCE.Y]).mean(axis=0)
    apart = [
        np.abs(logit(expit(h.adapted.margins(moved)).mean(axis=0)) - logit(known)).mean()
        for h in (plain, head)
    ]
    assert apart[1] < apart[0]
    np.testing.assert_array_equal(plain.adapted.head.W, head.adapted.head.W)
    # Where annotators differ, known rates say nothing about others.
    shifted = replace(matched.model_, label_shift=replace(chain.label_shift_, strength=1.0))
    rates = [shifted.for_domain(moved), plain]
    np.testing.assert_array_equal(rates[0].adapted.head.b, rates[1].adapted.head.b)
    # Nor do they on Stage 1's own domain.
    np.testing.assert_allclose(
        matched.for_domain(X_TEST).adapted.head.b,
        chain.for_domain(X_TEST).adapted.head.b,
        atol=0.05,
    )


@pytest.mark.parametrize("n", [5, 30])
def test_a_handful_of_stage_1_rows_do(n: int) -> None:
    few = Adaptation(experts=QUICK).fit(
        X[:n], STAGE_1.Y[:n], source=(X_VAL, SOURCE.Y), coef_init=W0, intercept_init=B0
    )
    assert np.isfinite(few.for_domain(X_TEST).predict_proba(X_TEST)).all()


def test_one_group_of_stage_1_images_cannot_be_held_out_in_part() -> None:
    one = Adaptation(experts=QUICK).fit(
        *(X, STAGE_1.Y, (X_VAL, SOURCE.Y), W0, B0), groups=np.zeros(len(X))
    )
    assert np.isfinite(one.oof_predict_proba_).all()


# ------------------------------------------------------------------ labelled rows


def test_labelled_rows_move_rates_towards_theirs(chain: Adaptation) -> None:
    Y_d = TEST.Y[:100].copy()
    Y_d[:, 3], Y_d[:, 4] = 0, 1
    before, after = chain.for_domain(X_TEST), chain.for_domain(X_TEST, (X_TEST[:100], Y_d))
    P, Q = before.predict_proba(X_TEST), after.predict_proba(X_TEST)
    assert Q[:, 3].mean() < P[:, 3].mean()
    assert Q[:, 4].mean() > P[:, 4].mean()
    assert after.bias is not None
    inside = (P > 1e-3) & (P < 1 - 1e-3)
    moved = (logit(Q) - logit(P) - after.bias)[inside]
    np.testing.assert_allclose(moved, 0, atol=1e-4)
    assert "priors" in after.explain()


def test_labelled_rows_that_agree_change_little(chain: Adaptation) -> None:
    head = chain.for_domain(X_TEST, (X_TEST[:30], TEST.Y[:30]))
    plain = chain.for_domain(X_TEST)
    scores = [mean_fbeta(TEST.Y[30:], h.predict(X_TEST[30:])) for h in (head, plain)]
    assert scores[0] > scores[1] - 0.02
    assert chain.for_domain(X_TEST, (X_TEST[:0], TEST.Y[:0])).bias is None


# --------------------------------------------------------- steps, replaced and off


def test_steps_can_be_replaced() -> None:
    rule = GlobalThreshold()
    other = fitted(
        calibration=None,
        decision=rule,
        first_view=0.0,
        experts=replace(QUICK, pulls=("network",), moments=("mean",)),
    )
    assert [e.pull for e in other.experts_] == ["network"]
    assert not hasattr(rule, "threshold_")
    head = other.for_domain(X_TEST)
    assert isinstance(head.decision, GlobalThreshold)
    chosen = head.predict_proba(X_TEST) >= head.decision.threshold_
    assert (head.predict(X_TEST) != csr_matrix(chosen)).nnz == 0
    np.testing.assert_allclose(other.model_.source_calibration[0], 1)


def test_without_maps_the_adapted_head_is_the_same_everywhere() -> None:
    other = fitted(experts=replace(QUICK, moments=("none",)))
    first, second = (other.for_domain(domain).adapted for domain in (X_TEST, X_TEST + 3))
    np.testing.assert_array_equal(first.head.W, second.head.W)
    np.testing.assert_array_equal(first.head.b, second.head.b)


@pytest.mark.parametrize(
    ("config", "words"),
    [({"moments": ("mode",)}, "moments is 'mode'"), ({"pulls": ("home",)}, "pulls are network")],
)
def test_unknown_steps_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fitted(experts=replace(QUICK, **config))


def test_domains_may_have_fewer_views(chain: Adaptation) -> None:
    head = chain.for_domain(X_TEST[:, 0])
    assert isinstance(head, DomainHead)
    assert head.gate_ > 0.5
    assert mean_fbeta(TEST.Y, head.predict(X_TEST[:, 0])) > 0.3


def test_explanations_name_every_step(chain: Adaptation) -> None:
    text = chain.for_domain(X_TEST).explain()
    for step in ("targets", "alignment", "gate", "prediction"):
        assert step in text
    learnt = chain.explain()
    for step in ("experts", "views", "share", "targets", "gate"):
        assert step in learnt


def test_the_gate_follows_its_signs() -> None:
    config = GateConfig(cap=0.6, drop=0.1)
    for signs, expected in {
        (1.0, 0.0, 0.0, 0.0): 0.6,
        (1.0, 0.0, 0.0, 1.0): 0.5,
        (0.0, 0.0, 0.0, 0.0): 0.0,
        (1.0, 0.0, 1.0, 0.0): 0.0,  # as at home
        (0.0, 1.0, 0.0, 1.0): 1.0,  # Stage 1's own domain
        (0.5, 0.5, 0.0, 0.0): 0.5 + 0.5 * 0.3,
    }.items():
        *own, shift = signs
        assert Gate(0.0, *own).opened(shift, config).value == pytest.approx(expected)
    assert Gate(0.0, 0.5, 0.5, 0.0).opened(0.0, GateConfig(fixed=0.2)).value == 0.2
    near = Gate(0.0, 1.0, 0.0, 0.0, near=0.5, aim=0.5).opened(0.0, config)
    beside = 0.5 * 0.6 / 0.7  # in proportion to the cap
    assert near.value == pytest.approx(beside + (1 - beside) * 0.5 * 0.6)
    assert near.opened(0.0, GateConfig(cap=0.0)).value == 0
    assert unsureness(0.6, 0.4, 0.5) == pytest.approx(0.5)
    assert unsureness(0.6, 0.4, 0.9) == 0
    assert unsureness(0.6, 0.4, 0.1) == 1
    # Where the source head is no less sure on Stage 1 its sureness says little.
    assert unsureness(0.6, 0.7, 0.6) == 1
    assert unsureness(0.6, 0.7, 0.6, moved=0.3) == pytest.approx(0.3)
    assert unsureness(0.6, 0.7, 0.52, moved=0.3) == pytest.approx(0.8)
    assert unsureness(0.6, 0.575, 0.6, moved=0.4) == pytest.approx(0.2)
    assert familiarity(1.0, (1.5, 3.0)) == 1
    assert familiarity(9.0, (1.5, 3.0)) == 0
    assert likeness(1.0, 50.0, 500, config) == (1.0, 0.0)  # Stage 1's
    assert likeness(50.0, 1.0, 500, config) == (0.0, 1.0)  # the source's
    assert likeness(1.4, 1.0, 500, config) == (0.0, 1.0)  # either's, but nearer to the source
    assert likeness(1.0, 1.4, 500, config) == (1.0, 1.0)
    assert likeness(1.0, 50.0, 20, config) == (0.2, 0.0)  # too few to be certain


def drawn(mean: np.ndarray, seed: int, n: int = 600) -> DomainMoments:
    return DomainMoments.of(np.random.default_rng(seed).normal(size=(n, len(mean))) + mean)


def test_other_images_of_a_domain_are_at_distance_one_whatever_their_scales() -> None:
    rng = np.random.default_rng(0)
    scales = np.exp(3 * rng.normal(size=200)) * (rng.random(200) < 0.7)  # some are dead
    first, second = (rng.normal(size=(n, 200)) * scales for n in (400, 900))
    ours, theirs = (DomainMoments.of(part).every for part in (first, second))
    assert distance(ours, theirs) == pytest.approx(1.0, abs=0.3)
    assert distance(theirs, ours) == pytest.approx(distance(ours, theirs))
    assert apart(ours, theirs) < 0.002
    # Features that only one of the domains has are no reason to call it familiar.
    first[:, scales == 0] = rng.normal(size=(400, (scales == 0).sum()))
    assert distance(DomainMoments.of(first + 0.5 * (scales == 0)).every, theirs) > 10


def test_a_domain_beside_stage_1_is_opened_beyond_the_cap() -> None:
    zero, way = np.zeros(30), np.r_[np.ones(15), np.zeros(15)]
    home, stage_1 = drawn(zero, 0), drawn(2 * way, 1)
    sure, config = Sureness(0.6, 0.4, 0.4), GateConfig()

    def gate(mean: np.ndarray, shift: float = 0.0) -> Gate:
        return signs_of(drawn(mean, 2), stage_1, home, sure, shift, config)

    beside = gate(2 * way + 0.2)
    assert (beside.familiar, beside.home) == (0, 0)
    assert beside.near == 1 == beside.value
    assert gate(2 * way + 0.2, shift=1.0).near == pytest.approx(0.5)
    further = gate(3 * way)  # the same way, half as far again
    assert 0 < further.near < 1
    assert further.aim == 1
    assert further.value > config.cap
    elsewhere = gate(2 * way[::-1])
    assert elsewhere.near == 0
    assert elsewhere.aim == pytest.approx(0.5, abs=0.05)
    assert elsewhere.value == pytest.approx(config.cap * elsewhere.aim)
    assert gate(zero).home == 1
    assert gate(zero).value < 0.1
    for found in (beside, further, elsewhere, gate(zero)):
        assert f"F2 {sure.domain:.3f} here" in words(found, sure, 2, config)


@pytest.mark.parametrize("empty", ["no image", "stage 1", "source"])
def test_sets_are_never_empty_where_no_known_image_is(empty: str) -> None:
    Y, Y_val = (np.where(part.Y.any(axis=1)[:, None], part.Y, 1) for part in (STAGE_1, SOURCE))
    if empty != "no image":
        (Y if empty == "stage 1" else Y_val)[7] = 0
    chain = Adaptation(experts=QUICK, calibration=SHARED).fit(
        X, Y, source=(X_VAL, Y_val), coef_init=W0, intercept_init=B0
    )
    sizes = np.asarray(chain.for_domain(X_TEST).predict(X_TEST).sum(axis=1))
    assert chain.model_.decision.min_labels == int(empty == "no image")
    assert sizes.min() >= int(empty == "no image")


def test_an_image_whose_labels_are_all_outside_the_classes_is_not_empty() -> None:
    Y, Y_val = (np.where(part.Y.any(axis=1)[:, None], part.Y, 1) for part in (STAGE_1, SOURCE))
    Y[7] = 0
    chain = Adaptation(experts=QUICK, calibration=SHARED).fit(
        X,
        Y,
        source=(X_VAL, Y_val),
        coef_init=W0,
        intercept_init=B0,
        missed=np.arange(len(Y)) == 7,
    )
    assert chain.model_.decision.min_labels == 1


def test_groups_of_one_domain_alone_are_shared_with_none() -> None:
    rows = [Rows.of(X, STAGE_1.Y, np.arange(300), None, Adaptation())]
    given = {"coef_init": W0, "intercept_init": B0, "shared_groups": True}
    seen: list[np.ndarray] = []

    def noted(target: Rows, home: Rows, *_: Any) -> Any:
        seen.append(np.intersect1d(target.groups, home.groups))
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("heads.adaptation.fit_experts", noted)
        for groups in ({}, {"groups": rows[0].groups}, {"source_groups": np.arange(320)}):
            with pytest.raises(StopIteration):
                Adaptation().fit(X, STAGE_1.Y, source=(X_VAL, SOURCE.Y), **given, **groups)
    assert [len(common) for common in seen] == [0, 0, 0]


# ------------------------------------------------------------------------- faults


def test_it_says_when_it_is_not_fitted() -> None:
    with pytest.raises(NotFittedError):
        Adaptation().for_domain(X_TEST)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coef_init": W0[:, 1:]}, "coef_init has shape"),
        ({"coef_init": W0 * np.nan}, "not finite"),
        ({"source": (X_VAL[:, :, 1:], SOURCE.Y)}, "both must be of one network"),
        ({"Y": STAGE_1.Y[1:]}, "Y has 299 rows"),
        ({"groups": np.arange(3)}, "groups has shape"),
        ({"source_groups": np.arange(3)}, "source_groups has shape"),
        ({"source": None}, "source is None; give a pair"),
    ],
)
def test_data_that_do_not_fit_together_are_refused(change: dict[str, Any], words: str) -> None:
    arguments = {
        "X": X,
        "Y": STAGE_1.Y,
        "source": (X_VAL, SOURCE.Y),
        "coef_init": W0,
        "intercept_init": B0,
    }
    with pytest.raises(ValueError, match=words):
        Adaptation(experts=QUICK).fit(**(arguments | change))


def test_rows_of_another_width_are_refused(chain: Adaptation) -> None:
    with pytest.raises(ValueError, match="X has 15 features"):
        chain.for_domain(X_TEST[:, :, 1:])
    with pytest.raises(ValueError, match="X has 15 features"):
        chain.for_domain(X_TEST).predict(X_TEST[:, :, 1:])


def test_far_from_home_heads_expect_more_of_the_labels_that_stage_1_has(chain: Adaptation) -> None:
    weak = X_TEST + np.linspace(-2, 2, X_TEST.shape[-1])
    model = replace(chain.model_, labels_per_image=STAGE_1.Y.shape[1] - 0.5)
    counted = [
        replace(model, config=replace(model.config, counted=c)).for_domain(weak)
        for c in (0, 0.5, 1)
    ]
    labels = [head.predict_proba(weak).sum(axis=1).mean() for head in counted]
    assert labels[0] < labels[1] < labels[2]
    few = replace(model, labels_per_image=0.0)  # which alignment heeds too, counted or not
    uncounted = replace(few, config=replace(few.config, counted=0)).for_domain(weak)
    np.testing.assert_array_equal(
        few.for_domain(weak).predict_proba(weak), uncounted.predict_proba(weak)
    )


def test_pulls_are_weighted_by_what_they_are_worth_out_of_fold(chain: Adaptation) -> None:
    assert sum(e.weight for e in chain.experts_) == pytest.approx(1)
    by_pull: dict[str, set[float]] = {}
    for expert in chain.experts_:
        by_pull.setdefault(expert.pull, set()).add(expert.weight)
    assert all(len(weights) == 1 for weights in by_pull.values())
    equal = fitted(experts=replace(QUICK, weights="equal"))
    assert {e.weight for e in equal.experts_} == {1 / len(equal.experts_)}
    with pytest.raises(ValueError, match="weights is 'none'; expected chosen or equal"):
        fitted(experts=replace(QUICK, weights="none"))


def test_a_head_that_promises_less_than_the_source_head_is_trusted_less() -> None:
    config = GateConfig(cap=0.8, doubt=2.0)
    assert trust(0.5, 0.4, 0.0, config) == 1
    assert trust(0.3, 0.4, 0.0, config) == pytest.approx(0.5)
    assert trust(0.1, 0.4, 0.0, config) == 0
    assert trust(0.1, 0.4, 1.0, config) == 1  # where targets differ that says nothing
    assert trust(0.1, 0.0, 0.0, config) == 1
    gates = [Gate(0.0, 1.0, 0.2, 0.0, q).opened(0.0, config).value for q in (0.0, 0.5, 1.0)]
    assert gates == pytest.approx([0.2, 0.2 + 0.8 * 0.4, 0.2 + 0.8 * 0.8])
