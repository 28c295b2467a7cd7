"""Calibration of probabilities: known maps, peers, shrinkage, unknown labels, reliability."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit, logit
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

from heads.calibration import PlattCalibration, fit_platt, reliability
from heads.label_maps import Entries, LabelMaps, image_losses
from heads.metrics import log_loss
from heads.platt import PlattScaling, logits, mapped, sigmoid


def case(seed: int, n: int = 400, K: int = 8, spread: float = 0.0):
    """Overconfident probabilities; with `spread`, labels differ in how much."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    slope, shift = np.exp(spread * fixed.normal(size=K) / 2), spread * fixed.normal(size=K)
    margin = rng.normal(-2, 2, (n, K))
    Y = (rng.random((n, K)) < expit(margin)).astype(float)
    return expit(2 * slope * margin + 1 + shift), Y, 1 / (2 * slope), -(1 + shift) / (2 * slope)


def every_entry(P, Y, known=None, weight=None):
    """The points of all images."""
    weight = np.ones(len(P)) if weight is None else weight
    code = np.arange(len(P)) % 2
    return Entries(P, Y > 0, known, weight, code).counted().points(np.ones(2, bool))


def test_known_maps_are_found_again():
    P, Y, slope, intercept = case(1, n=20_000, spread=0.7)
    found = PlattCalibration().fit(P, Y)
    np.testing.assert_allclose(found.slope_, slope, rtol=0.08)
    np.testing.assert_allclose(found.intercept_, intercept, atol=0.08)
    np.testing.assert_allclose(found.transform(P), expit(slope * logit(P) + intercept), atol=0.02)


def test_the_shared_map_is_logistic_regression_on_the_logit():
    P, Y, *_ = case(2, n=2000)
    found = PlattCalibration(strengths=()).fit(P, Y)
    peer = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(P).reshape(-1, 1), Y.ravel())
    assert found.slope_ == pytest.approx(peer.coef_[0, 0], rel=1e-3)
    assert found.intercept_ == pytest.approx(peer.intercept_[0], abs=2e-3)
    assert found.strength_ == np.inf


@pytest.mark.parametrize("shape", [(300_000,), (2, 150_001), (0, 3), (40, 5, 2000)])
def test_probabilities_are_made_in_blocks(shape):
    scores = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    P = PlattScaling(0.5, -1.0).transform(scores)
    assert P.dtype == np.float32
    np.testing.assert_array_equal(P, sigmoid(scores * np.float32(0.5) - np.float32(1)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_sigmoid_keeps_its_digits(dtype):
    few = {np.float16: 9, np.float32: 80, np.float64: 700}[dtype]
    t = np.linspace(-few, few, 100_001).astype(dtype)
    expected = expit(t.astype(np.float64))
    np.testing.assert_allclose(
        sigmoid(t.copy()), expected, rtol=4 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny
    )
    ends = np.array([-np.inf, -1e4, 0, 1e4, np.inf, np.nan], dtype)
    np.testing.assert_array_equal(sigmoid(ends), [0, 0, 0.5, 1, 1, np.nan])


def test_a_temperature_has_no_intercept_and_is_the_best_one():
    P, Y, *_ = case(3, n=1000)
    found = PlattCalibration("temperature").fit(P, Y)
    np.testing.assert_array_equal(found.intercept_, 0)
    shared = PlattCalibration("temperature", strengths=()).fit(P, Y)
    margin = logit(P)
    losses = [log_loss(Y, expit(margin * s)) for s in shared.slope_[0] * np.array([0.98, 1, 1.02])]
    assert np.argmin(losses) == 1
    own = PlattCalibration("temperature", strengths=(0,), cv=3).fit(P, Y)
    assert np.ptp(own.slope_) > 0 or own.strength_ == np.inf


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("strength", [0.5, 30])
def test_own_maps_minimise_the_penalised_loss(strength, intercept):
    P, Y, *_ = case(4, n=120, K=4, spread=1)
    rng = np.random.default_rng(0)
    known, weight = rng.random(P.shape) < 0.8, rng.integers(1, 3, len(P)).astype(float)
    data = every_entry(P, Y, known, weight)
    maps = LabelMaps.shared_by_all(data, intercept)
    maps.improve(data, strength)
    margin = logits(P)
    x = (margin - maps.centre) / maps.scale
    offset = maps.shared.slope * margin + maps.shared.intercept
    for k in range(4):

        def objective(at, k=k):
            own = at[0] * x[:, k] + (at[1] if intercept else 0) + offset[:, k]
            loss = weight * known[:, k] * (np.logaddexp(0, own) - Y[:, k] * own)
            return loss.sum() + strength / 2 * at @ at

        best = minimize(objective, np.zeros(1 + intercept), tol=1e-10)
        np.testing.assert_allclose(maps.own[: 1 + intercept, k], best.x, atol=1e-4)


def rare(seed: int, n: int = 600, K: int = 200):
    """Many labels, most of them rare, calibrated up to a map of their own; and codes of images."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    margin = fixed.normal(-6, 2, K) + 2 * rng.normal(size=(n, K))
    Y = rng.random((n, K)) < expit(margin)
    return expit(1.3 * margin + fixed.normal(0, 0.7, K)), Y, np.arange(n) % 3


@pytest.mark.parametrize("intercept", [True, False])
def test_counting_what_matters_little_changes_little(intercept, monkeypatch):
    P, Y, code = rare(1)
    rng = np.random.default_rng(3)
    known, weight = rng.random(P.shape) < 0.9, rng.integers(0, 3, len(P)).astype(float)
    entries = Entries(P, Y, known, weight, code, intercept)
    monkeypatch.setattr("heads.label_maps._ALL", P.size)
    every = entries.counted()
    monkeypatch.setattr("heads.label_maps._ALL", 0)
    some = entries.counted()
    assert some.sums.size > 0 == every.sums.size
    for codes in (np.ones(3, bool), np.array([True, False, True])):
        exact, found = every.points(codes), some.points(codes)
        assert len(found.margin) < len(exact.margin) / 2
        used = (weight[:, None] * known)[codes[code]]
        for data in (exact, found):
            assert data.weight.sum() == pytest.approx(used.sum())
            assert data.weight @ data.y == pytest.approx((used * Y[codes[code]]).sum())
        # What is expected of each label stays.
        expected = [
            np.bincount(data.label, data.weight * some.shared.transform(data.margin))
            for data in (exact, found)
        ]
        np.testing.assert_allclose(*expected, rtol=1e-9)
        for strength in (100, 1):
            maps = [LabelMaps.shared_by_all(data, intercept) for data in (exact, found)]
            for data, own in zip((exact, found), maps, strict=True):
                own.improve(data, strength)
            np.testing.assert_allclose(maps[1].slopes(), maps[0].slopes(), atol=2e-3)
            np.testing.assert_allclose(maps[1].intercepts(), maps[0].intercepts(), atol=1e-2)
            mapped_P = [mapped(P, m.slopes(), m.intercepts()) for m in maps]
            np.testing.assert_allclose(mapped_P[1], mapped_P[0], rtol=2e-2, atol=1e-12)


def test_scores_that_say_nothing_are_kept_one_by_one(monkeypatch):
    monkeypatch.setattr("heads.label_maps._ALL", 0)
    P, Y, code = rare(2)
    for useless in (np.full(P.shape, 0.01), 1 - P):
        data = Entries(useless, Y, None, np.ones(len(P)), code).counted()
        assert data.sums.size == 0
        assert len(data.kept.margin) == P.size


def test_probabilities_that_are_zero_after_the_shared_map(monkeypatch):
    monkeypatch.setattr("heads.label_maps._ALL", 0)
    rng = np.random.default_rng(4)
    Y = rng.random((400, 60)) < 0.1
    P = np.where(Y, 0.52, 0.48)
    P[:, ::2] = np.where(Y[:, ::2], 0.52, 0)
    found = PlattCalibration(cv=3).fit(P, Y)
    assert found.shared_.slope * -16 < -745
    out = found.transform(P)
    assert np.isfinite(found.slope_).all()
    assert out[Y].min() > 0.9
    assert out[~Y].max() < 0.1


def test_counted_and_kept_entries_score_alike(monkeypatch):
    P, Y, _ = rare(3)
    exact = PlattCalibration(cv=3).fit(P[:300], Y[:300])
    assert P[:300].size < 1 << 16
    monkeypatch.setattr("heads.label_maps._ALL", 0)
    found = PlattCalibration(cv=3).fit(P[:300], Y[:300])
    assert found.strength_ == exact.strength_
    np.testing.assert_allclose(found.cv_scores_["score"], exact.cv_scores_["score"], rtol=1e-4)


def test_held_out_losses_are_those_of_the_other_images():
    """Also where a fold trains on fewer images than it could."""
    P, Y, *_ = case(16, n=60, spread=1)
    rows = np.arange(60)
    folds = [(rows[20:50], rows[:20]), (rows[:20], rows[20:40]), (rows[:40], rows[40:])]
    found = PlattCalibration(cv=folds, strengths=(2,)).fit(P, Y)
    for strength, score in zip([np.inf, 2], found.cv_scores_["score"], strict=True):
        total = 0.0
        for train, test in folds:
            data = every_entry(P[train], Y[train])
            maps = LabelMaps.shared_by_all(data, True)
            if np.isfinite(strength):
                maps.improve(data, strength)
            calibrated = mapped(P[test], maps.slopes(), maps.intercepts())
            total += log_loss(Y[test], calibrated) * len(test) * P.shape[1]
        assert score == pytest.approx(total / 60, rel=1e-9)


@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_of_images_at_any_margin(scale, masked, monkeypatch):
    P, Y, *_ = case(17, n=50, K=21)
    known = np.random.default_rng(0).random(P.shape) < 0.7 if masked else None
    slopes, intercepts = scale * np.linspace(0.5, 1.5, 21), scale * np.linspace(-1, 1, 21)
    margin = logit(P) * slopes + intercepts
    losses = np.logaddexp(0, margin) - Y * margin
    expected = (losses if known is None else losses * known).sum(axis=1)
    truth = csr_matrix(Y if known is None else Y * known)
    monkeypatch.setattr("heads.label_maps._BLOCK", 100)
    maps = [(slopes, intercepts), (np.zeros(21), np.zeros(21))]
    found = image_losses(P, truth, known, maps)
    np.testing.assert_allclose(found[0], expected, rtol=1e-10, atol=1e-13)
    counts = np.full(50, 21) if known is None else known.sum(axis=1)
    np.testing.assert_allclose(found[1], counts * np.log(2), rtol=1e-12)


@pytest.mark.parametrize("spread", [0, 0.5, 1])
def test_labels_get_maps_of_their_own_where_they_differ(spread):
    new_P, new_Y, *_ = case(100, n=5000, K=40, spread=spread)
    P, Y, *_ = case(5, n=300, K=40, spread=spread)
    own = log_loss(new_Y, PlattCalibration().fit(P, Y).transform(new_P))
    shared = log_loss(new_Y, PlattCalibration(strengths=()).fit(P, Y).transform(new_P))
    raw = log_loss(new_Y, new_P)
    assert own < 1.005 * shared < raw
    if spread:
        assert own < 0.985 * shared


def test_calibrated_probabilities_stay_what_they_are():
    rng = np.random.default_rng(6)
    P = rng.random((3000, 20)) ** 3
    Y = (rng.random(P.shape) < P).astype(float)
    found = PlattCalibration().fit(P, Y)
    np.testing.assert_allclose(found.transform(P), P, atol=0.03)


def test_a_label_that_nobody_expects_has_the_shared_map():
    P, Y, *_ = case(7, spread=1)
    P = expit(logit(P) / 2)
    P[:, 3], Y[:, 3] = 1e-6, 0
    found = PlattCalibration().fit(P, Y)
    assert np.isfinite(found.strength_)
    assert found.slope_[3] == found.shared_.slope
    assert found.intercept_[3] == found.shared_.intercept


def test_a_label_without_positives_does_not_run_away():
    P, Y, *_ = case(8, spread=1)
    Y[:, 2] = 0
    found = PlattCalibration(strengths=(0,)).fit(P, Y)
    assert np.isfinite([found.slope_, found.intercept_]).all()
    assert found.transform(P)[:, 2].max() < 0.5


@pytest.mark.parametrize("mask_kind", [np.asarray, csr_matrix])
def test_unknown_labels_do_not_matter(mask_kind):
    P, Y, *_ = case(9, spread=1)
    mask = np.random.default_rng(1).random(P.shape) < 0.3
    # The folds look at what is known alone.
    found = PlattCalibration(cv=3).fit(P, Y, mask=mask_kind(mask))
    other = PlattCalibration(cv=3).fit(P, np.where(mask, 1 - Y, Y), mask=mask_kind(mask))
    missing = PlattCalibration(cv=3).fit(P, np.where(mask, np.nan, Y))
    for same in (other, missing):
        np.testing.assert_allclose(same.slope_, found.slope_, rtol=1e-12)
        np.testing.assert_allclose(same.intercept_, found.intercept_, rtol=1e-12)


def test_weights_are_repeated_rows():
    P, Y, *_ = case(10, spread=1)
    times = np.random.default_rng(2).integers(0, 3, len(P))
    rows = np.repeat(np.arange(len(P)), times)
    weighted = PlattCalibration(strengths=()).fit(P, Y, sample_weight=times)
    repeated = PlattCalibration(strengths=()).fit(P[rows], csr_matrix(Y[rows]))
    np.testing.assert_allclose(weighted.slope_, repeated.slope_, rtol=1e-9)
    np.testing.assert_allclose(weighted.intercept_, repeated.intercept_, rtol=1e-9)


def test_folds_in_which_nothing_is_known():
    """Their maps are the identity, which loses to any other in the held-out loss or not at all."""
    P, Y, *_ = case(16, n=20)
    known = np.zeros(P.shape, bool)
    known[3] = True
    calibrated = PlattCalibration().fit(P, np.where(known, Y, np.nan))
    assert np.isfinite(calibrated.transform(P)).all()
    assert calibrated.strength_ == np.inf
    weight = np.zeros(20)
    weight[3] = 1
    weighted = PlattCalibration().fit(P, Y, sample_weight=weight)
    np.testing.assert_allclose(weighted.transform(P), calibrated.transform(P), atol=1e-12)


def test_extreme_and_constant_probabilities():
    P, Y, *_ = case(11)
    P[:5], P[5:10] = 0, 1
    found = PlattCalibration().fit(P, Y)
    out = found.transform(P)
    assert np.isfinite(out).all()
    assert 0 <= out.min() <= out.max() <= 1
    constant = PlattCalibration(strengths=()).fit(np.full(Y.shape, 0.3), Y).transform(P)
    np.testing.assert_allclose(constant, Y.mean(), atol=1e-3)
    zeros = PlattCalibration(cv=2).fit(np.zeros((4, 3)), np.zeros((4, 3)))
    assert zeros.transform(np.zeros((2, 3))).max() < 0.1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_types_and_blocks(dtype, monkeypatch):
    P, Y, *_ = case(12)
    P = P.astype(dtype)
    P.flags.writeable = False
    found = PlattCalibration(cv=3).fit(P, Y)
    whole = found.transform(P)
    assert whole.dtype == (np.float64 if dtype == np.float64 else np.float32)
    monkeypatch.setattr("heads.platt._BLOCK", 50)
    monkeypatch.setattr("heads.label_maps._BLOCK", 50)
    np.testing.assert_array_equal(found.transform(P), whole)
    again = PlattCalibration(cv=3).fit(P, Y)
    np.testing.assert_allclose(again.slope_, found.slope_, rtol=1e-9)
    assert mapped(P[:0], 1.0, 0.0).shape == (0, 8)


def test_a_temperature_of_raw_logits_is_the_best_one():
    rng = np.random.default_rng(13)
    margin = rng.normal(-1, 2, 3000)
    Y = (rng.random(3000) < expit(margin)).astype(float)
    found = fit_platt(3 * margin[:, None], Y[:, None], None, np.ones(3000), intercept=False)
    assert found.intercept == 0
    assert found.slope == pytest.approx(1 / 3, rel=0.06)


@pytest.mark.parametrize("labels", [2, 700])  # each score by itself, and counted in bins
@pytest.mark.parametrize("turn", [1, -1])
def test_a_rising_map_is_the_best_of_those_that_do_not_fall(labels, turn):
    rng = np.random.default_rng(14)
    margin = rng.normal(-1, 2, (100, labels))
    Y = (rng.random(margin.shape) < expit(margin)).astype(float)
    weight = rng.uniform(0.5, 2, len(Y))
    free = fit_platt(turn * margin, Y, None, weight)
    found = fit_platt(turn * margin, Y, None, weight, rising=True)
    assert free.slope * turn > 0.5
    if turn == 1:
        assert found == free
        return
    positives, total = weight @ Y.sum(axis=1), weight.sum() * labels
    high, low = (positives + 1) / (positives + 2), 1 / (total - positives + 2)
    rate = (positives * high + (total - positives) * low) / total
    assert found.slope == 0
    assert expit(found.intercept) == pytest.approx(rate, rel=1e-9)
    target = np.where(Y, high, low)

    def loss(slope, intercept):
        t = slope * turn * margin + intercept
        return weight @ (np.logaddexp(0, t) - target * t).sum(axis=1)

    best = loss(found.slope, found.intercept)
    for slope in (0, 1e-3, 0.1):
        for shift in (-0.1, -1e-3, 0, 1e-3, 0.1):
            assert loss(slope, found.intercept + shift) >= best - 1e-9 * best


def test_it_is_an_estimator():
    calibration = PlattCalibration("temperature", (1, 2), cv=3, random_state=4)
    assert clone(calibration).get_params() == {
        "kind": "temperature",
        "strengths": (1, 2),
        "cv": 3,
        "random_state": 4,
    }
    P, Y, *_ = case(14)
    with pytest.raises(NotFittedError):
        calibration.transform(P)
    assert calibration.fit(P, Y) is calibration
    assert calibration.cv_scores_["strength"].tolist() == [np.inf, 2, 1]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda P, Y: PlattCalibration("isotonic").fit(P, Y), "kind is 'isotonic'"),
        (lambda P, Y: PlattCalibration(strengths=(1, np.nan)).fit(P, Y), "strengths has nan"),
        (lambda P, Y: PlattCalibration().fit(P, Y * np.nan), "no entry of Y is known"),
        (lambda P, Y: PlattCalibration().fit(P, None), "Y is None"),
        (lambda P, Y: PlattCalibration(strengths=(-1,)).fit(P, Y), "strengths has -1"),
        (lambda P, Y: PlattCalibration().fit(P * 2, Y), r"P is 1.* at row \d+, label"),
        (lambda P, Y: PlattCalibration().fit(P * np.nan, Y), "P is nan at row 0, label 0"),
        (lambda P, Y: PlattCalibration().fit(P[:0], Y[:0]), r"P has shape \(0, 8\)"),
        (lambda P, Y: PlattCalibration().fit(P, Y[:, 1:]), "Y has shape"),
        (lambda P, Y: PlattCalibration().fit(P, Y).transform(P[:, 1:]), "P has 7 labels"),
        (lambda P, Y: reliability(P, Y, n_bins=0), "n_bins is 0"),
        (lambda P, Y: reliability(P, Y * np.nan), "no entry of Y is known"),
    ],
)
def test_wrong_arguments_are_named(call, expected):
    P, Y, *_ = case(15, n=30)
    with pytest.raises(ValueError, match=expected):
        call(P, Y)


# ---------------------------------------------------------------- reliability


def test_calibrated_probabilities_are_reliable_and_others_not():
    rng = np.random.default_rng(16)
    P = rng.random((4000, 20)) ** 5
    Y = csr_matrix(rng.random(P.shape) < P)
    good = reliability(P, Y)
    assert len(good.predicted) == 10
    assert np.mean((good.low <= good.predicted) & (good.predicted <= good.high)) >= 0.8
    assert np.all(np.diff(good.predicted) > 0)
    bad = reliability(P**2, Y)
    assert np.mean((bad.low <= bad.predicted) & (bad.predicted <= bad.high)) < 0.3


def test_bins_hold_equal_numbers_of_expected_positives():
    P = np.random.default_rng(17).random((3000, 10)) ** 3
    found = reliability(P, P > 2, n_bins=5)
    np.testing.assert_allclose(found.predicted * found.entries, P.sum() / 5, rtol=0.02)
    assert found.entries.sum() == P.size


def test_one_bin_is_the_mean_over_known_and_weighted_entries():
    rng = np.random.default_rng(18)
    P, Y = rng.random((50, 4)), (rng.random((50, 4)) < 0.4).astype(float)
    mask, weight = rng.random((50, 4)) < 0.3, rng.random(50)
    a = weight[:, None] * ~mask
    for given_mask in (mask, csr_matrix(mask)):
        found = reliability(P, Y, 1, given_mask, weight)
        assert found.predicted[0] == pytest.approx((a * P).sum() / a.sum())
        assert found.observed[0] == pytest.approx((a * Y).sum() / a.sum())
        assert found.entries[0] == pytest.approx(a.sum())


def test_the_interval_of_a_share_is_that_of_wilson():
    found = reliability(np.full((100, 1), 0.5), np.arange(100)[:, None] < 30, n_bins=3)
    np.testing.assert_allclose([found.low[0], found.high[0]], [0.2189, 0.3958], atol=1e-4)
