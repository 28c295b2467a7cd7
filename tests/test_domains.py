"""Fitting on two domains: its limits, whole groups, and which weight it picks."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError

from heads import DropoutLogisticCV, DropoutRidge, DropoutRidgeCV, MultilabelGroupKFold, TwoDomainCV
from heads.decisions import best_global_threshold
from tests import synthetic

# Small problems, of which few keep the source's score; what is warned of has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:no source weight and dropout:UserWarning")

HEADS = (
    DropoutRidgeCV(dropouts=(0.2,), cv=3),
    DropoutLogisticCV(dropouts=(0.2,), cv=3, tol=1e-8),
)


class Domains:
    """Shifted target rows, source rows, and the last layer that is right for these."""

    def __init__(self, views: int = 1, n: int = 90, m: int = 120) -> None:
        target, source = synthetic.images(n, 1), synthetic.images(m, 2)
        self.X = synthetic.features(target, shifted=True, views=views)
        self.X_val = synthetic.features(source, views=views)
        self.Y, self.Y_val = target.Y, source.Y
        self.W0, self.b0 = synthetic.last_layer()

    def fit(self, estimator: TwoDomainCV, **more: Any) -> TwoDomainCV:
        return estimator.fit(self.X, self.Y, source=(self.X_val, self.Y_val), **more)


@pytest.fixture(scope="module")
def domains() -> Domains:
    return Domains()


class Dice(BaseEstimator):
    """A head whose scores depend on the weight of the source by chance alone.

    The scores of its first `tied` rows do not depend on it.
    """

    def __init__(self, seed: int = 0, tied: int = 0, beta: float = 2) -> None:
        self.seed = seed
        self.tied = tied
        self.beta = beta

    def fit(self, X: Any, Y: Any, sample_weight: Any = None, **ignored: Any) -> Dice:
        weight = 0.0 if sample_weight is None else float(sample_weight[-1])
        rng = np.random.default_rng([self.seed, int(1000 * weight)])
        strength = rng.choice([0.5, 1.0, 3.0])
        noise = strength * rng.normal(size=Y.shape)
        noise[: self.tied] = np.random.default_rng(self.seed).normal(size=noise[: self.tied].shape)
        self.oof_predict_proba_ = expit(2 * Y + noise)
        self.noise_, self.dropout_ = rng, weight / (1 + weight)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        proba: np.ndarray = expit(self.noise_.normal(size=(len(X), synthetic.K)))
        return proba


# ------------------------------------------------------------------- limits


@pytest.mark.parametrize("head", HEADS)
def test_weight_zero_is_a_fit_on_the_target_alone(head: Any, domains: Domains) -> None:
    start = {"coef_init": domains.W0, "intercept_init": domains.b0}
    alone = clone(head).fit(domains.X, domains.Y, **start)
    both = domains.fit(TwoDomainCV(head, source_weights=(0,)), **start)
    np.testing.assert_array_equal(both.estimator_.coef_, alone.coef_)
    np.testing.assert_array_equal(both.oof_predict_proba_, alone.oof_predict_proba_)
    np.testing.assert_array_equal(
        both.source_oof_predict_proba_, alone.predict_proba(domains.X_val)
    )
    np.testing.assert_array_equal(both.predict_proba(domains.X), alone.predict_proba(domains.X))
    np.testing.assert_array_equal(
        both.decision_function(domains.X), alone.decision_function(domains.X)
    )
    assert both.source_weight_ == 0


@pytest.mark.parametrize("head", HEADS)
def test_a_large_weight_comes_near_the_fit_on_the_source(head: Any, domains: Domains) -> None:
    alone = clone(head).fit(domains.X_val, domains.Y_val).coef_
    away = [
        np.abs(domains.fit(TwoDomainCV(head, source_weights=(w,))).estimator_.coef_ - alone).max()
        for w in (1, 100, 10_000)
    ]
    assert away[0] > 10 * away[1] > 100 * away[2]
    assert away[2] < 1e-3 * np.abs(alone).max()


@pytest.mark.parametrize("head", HEADS)
def test_the_weight_is_that_of_the_whole_source(head: Any, domains: Domains) -> None:
    once = domains.fit(TwoDomainCV(head, source_weights=(0.5,)))
    twice = TwoDomainCV(head, source_weights=(0.5,)).fit(
        domains.X,
        domains.Y,
        source=(np.tile(domains.X_val, (2, 1, 1)), np.tile(domains.Y_val, (2, 1))),
        source_groups=np.tile(np.arange(len(domains.X_val)), 2),
    )
    size = np.abs(once.estimator_.coef_).max()
    np.testing.assert_allclose(twice.estimator_.coef_, once.estimator_.coef_, atol=1e-4 * size)


# ------------------------------------------------------------------- groups


@pytest.mark.parametrize("given", ["both", "target", "source", "none"])
def test_groups_of_the_domains_never_meet(given: str, domains: Domains) -> None:
    seen: list[np.ndarray] = []

    class Watching(MultilabelGroupKFold):
        def split(self, X: Any, Y: Any = None, groups: Any = None) -> Iterator[Any]:
            seen.append(groups)
            return super().split(X, Y, groups)

    n, m = len(domains.X), len(domains.X_val)
    groups = np.array([f"g{i // 2}" for i in range(n)]) if given in ("both", "target") else None
    source_groups = np.arange(m) // 3 if given in ("both", "source") else None
    head = DropoutRidgeCV(dropouts=(0.2,), cv=Watching(3))
    domains.fit(
        TwoDomainCV(head, source_weights=(1.0,)), groups=groups, source_groups=source_groups
    )
    (joined,) = seen
    assert not set(joined[:n]) & set(joined[n:])
    for part, own in ((joined[:n], groups), (joined[n:], source_groups)):
        own = np.arange(len(part)) if own is None else np.unique(own, return_inverse=True)[1]
        np.testing.assert_array_equal(part[:, None] == part, own[:, None] == own)


# ----------------------------------------------------------- table and pick


def scores(domains: Domains, fitted: TwoDomainCV) -> tuple[float, float]:
    return (
        best_global_threshold(fitted.oof_predict_proba_, domains.Y)[1],
        best_global_threshold(fitted.source_oof_predict_proba_, domains.Y_val)[1],
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_efficient_is_what_nothing_dominates(seed: int, tied: bool, domains: Domains) -> None:
    weights = (0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
    dice = Dice(seed, tied=len(domains.X) if tied else 0)
    fitted = domains.fit(TwoDomainCV(dice, source_weights=weights, max_source_loss=None))
    table = fitted.pareto_
    points = list(zip(table["target_score"], table["source_score"], strict=True))
    expected = [
        not any(a[0] >= b[0] and a[1] >= b[1] and (a[0] > b[0] or a[1] > b[1]) for a in points)
        for b in points
    ]
    assert table["efficient"].tolist() == expected
    assert table["source_weight"].tolist() == list(weights)
    # The dice tell the weight of a source row as their rate.
    rows = np.array(weights) * len(domains.X) / len(domains.X_val)
    np.testing.assert_allclose(table["dropout"], rows / (1 + rows), atol=1e-12)
    picked = weights.index(fitted.source_weight_)
    assert points[picked] == (fitted.target_score_, fitted.source_score_)
    assert scores(domains, fitted) == points[picked]
    assert fitted.target_score_ == max(table["target_score"])
    assert len(set(table["target_score"])) == (1 if tied else len(weights))


def test_equal_scores_are_both_efficient(domains: Domains) -> None:
    table = domains.fit(TwoDomainCV(Dice(), source_weights=(1, 1, 1))).pareto_
    assert table["efficient"].all()


@pytest.mark.parametrize("allowed", [-1.0, 0.03, 0.1, 0.3, None])
def test_the_pick_keeps_the_source_within_the_allowed_loss(
    allowed: float | None, domains: Domains
) -> None:
    weights = (0, 0.03, 0.3, 3, 30)
    # At -1, which asks for a gain, nothing is good enough.
    expected_warning: AbstractContextManager[object] = nullcontext()
    if allowed == -1:
        expected_warning = pytest.warns(UserWarning, match="a larger max_source_loss")
    with expected_warning:
        fitted = domains.fit(
            TwoDomainCV(HEADS[1], source_weights=weights, max_source_loss=allowed),
            coef_init=domains.W0,
            intercept_init=domains.b0,
        )
    unadapted = domains.X_val.mean(1) @ domains.W0.T + domains.b0
    home = best_global_threshold(unadapted, domains.Y_val)[1]
    rows = list(
        zip(weights, fitted.pareto_["target_score"], fitted.pareto_["source_score"], strict=True)
    )
    good = [row for row in rows if allowed is None or row[2] >= home - allowed]
    expected = max(good, key=lambda row: row[1]) if good else max(rows, key=lambda row: row[2])
    assert (fitted.source_weight_, fitted.target_score_, fitted.source_score_) == expected
    assert bool(good) == (allowed != -1)


@pytest.mark.filterwarnings("ignore:the best dropout:UserWarning")  # of a few images
@pytest.mark.parametrize("allowed", [0.0, 0.05, None])
@pytest.mark.parametrize(
    "head",
    [
        DropoutRidgeCV(dropouts=(0.05, 0.2, 0.6), cv=3),
        DropoutLogisticCV(dropouts=(0.05, 0.2, 0.6), cv=3, tol=1e-8),
        DropoutLogisticCV(dropouts=(0.05, 0.2, 0.6), cv=3, tol=1e-8, probability="platt"),
    ],
)
def test_every_rate_of_every_weight_is_compared_on_both(
    head: Any, allowed: float | None, domains: Domains
) -> None:
    start = {"coef_init": domains.W0, "intercept_init": domains.b0}
    weights = (0.0, 0.1, 1.0)
    fitted = domains.fit(
        TwoDomainCV(head, source_weights=weights, max_source_loss=allowed), **start
    )
    table = fitted.pareto_
    alone = {
        (w, p): domains.fit(
            TwoDomainCV(clone(head).set_params(dropouts=(p,)), source_weights=(w,)), **start
        )
        for w, p in zip(table["source_weight"], table["dropout"], strict=True)
    }
    assert {w for w, _ in alone} == set(weights)
    assert {p for _, p in alone} >= {0.05, 0.2, 0.6}
    for row, one in enumerate(alone.values()):
        assert table["target_score"][row] == pytest.approx(one.target_score_, abs=1e-3)
        assert table["source_score"][row] == pytest.approx(one.source_score_, abs=1e-3)
    home = best_global_threshold(domains.X_val.mean(1) @ domains.W0.T + domains.b0, domains.Y_val)
    good = table["source_score"] >= (-np.inf if allowed is None else home[1] - allowed)
    chosen = np.flatnonzero(table["chosen"])
    assert len(chosen) == 1
    assert good[chosen[0]] == good.any()
    if good.any():
        assert fitted.target_score_ == table["target_score"][good].max()
    pick = alone[fitted.source_weight_, fitted.estimator_.dropout_]
    np.testing.assert_allclose(
        fitted.estimator_.coef_, pick.estimator_.coef_, atol=1e-4 * np.abs(domains.W0).max()
    )
    assert pickle.loads(pickle.dumps(fitted)).source_weight_ == fitted.source_weight_


@pytest.mark.parametrize("seed", range(6))
def test_a_flat_map_is_judged_as_it_will_predict(seed: int) -> None:
    rng = np.random.default_rng(seed)
    domains = Domains(n=40, m=20)
    domains.Y, domains.Y_val = rng.random((40, 1)) < 0.5, domains.Y_val[:, :1]
    start = {"coef_init": domains.W0[:1], "intercept_init": domains.b0[:1]}
    margin = domains.X_val.mean(1) @ domains.W0[:1].T + domains.b0[:1]
    least = best_global_threshold(margin, domains.Y_val)[1] - 0.02
    rates = (0.1, 0.5, 0.9)
    for head in (
        DropoutRidgeCV(dropouts=rates, cv=2),
        DropoutLogisticCV(dropouts=rates, cv=2, probability="platt"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted = domains.fit(
                TwoDomainCV(head, source_weights=(0,), max_source_loss=0.02), **start
            )
        warned = any("no source weight and dropout" in str(w.message) for w in caught)
        table = fitted.pareto_
        good = table["source_score"] >= least
        assert warned == (not good.any())
        assert table["target_score"][table["chosen"]] == pytest.approx(
            table["target_score"][good].max() if good.any() else fitted.target_score_
        )
        assert scores(domains, fitted) == (fitted.target_score_, fitted.source_score_)


@pytest.mark.parametrize("labels", ["few", "noise"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_chosen_is_beaten_by_nothing(labels: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    domains = Domains(n=16, m=20)
    domains.Y, domains.Y_val = domains.Y[:, :2], domains.Y_val[:, :2]
    if labels == "noise":
        domains.Y = rng.random(domains.Y.shape) < 0.5
    for head in (
        DropoutRidgeCV(dropouts=(0.1, 0.5, 0.9), cv=2),
        DropoutLogisticCV(dropouts=(0.1, 0.5, 0.9), cv=2, probability="platt"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = domains.fit(
                TwoDomainCV(head, source_weights=(0, 0.1, 1), max_source_loss=None)
            )
        table = fitted.pareto_
        assert table["efficient"][table["chosen"]].all()
        assert scores(domains, fitted) == (fitted.target_score_, fitted.source_score_)


def test_a_weight_at_which_no_rate_keeps_the_source_is_not_driven_to_the_strongest(
    domains: Domains,
) -> None:
    start = {"coef_init": domains.W0, "intercept_init": domains.b0}
    head = DropoutLogisticCV(dropouts=(0.05, 0.2, 0.6, 0.9), cv=3)
    fitted = domains.fit(TwoDomainCV(head, source_weights=(0.3,), max_source_loss=-1), **start)
    own = clone(head).fit(
        np.concatenate([domains.X, domains.X_val]),
        np.concatenate([domains.Y, domains.Y_val]),
        sample_weight=np.repeat([1, 0.3 * 0.75], [len(domains.X), len(domains.X_val)]),
        **start,
    )
    assert fitted.estimator_.dropout_ == own.dropout_
    assert len(fitted.pareto_["dropout"]) == len(own.cv_results_["dropout"])


def test_the_warning_is_about_what_was_chosen(domains: Domains) -> None:
    start = {"coef_init": domains.W0, "intercept_init": domains.b0}
    home = best_global_threshold(domains.X_val.mean(1) @ domains.W0.T + domains.b0, domains.Y_val)
    head = DropoutLogisticCV(dropouts=(0.05, 0.2, 0.6, 0.9), cv=3)
    for loss in np.linspace(-0.05, 0.4, 10):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted = domains.fit(
                TwoDomainCV(head, source_weights=(0, 0.3), max_source_loss=loss), **start
            )
        warned = any("no source weight and dropout" in str(w.message) for w in caught)
        assert warned == (fitted.source_score_ < home[1] - loss)
        assert warned == (fitted.pareto_["source_score"].max() < home[1] - loss)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"coef_init": np.zeros((3, 2))}, "coef_init has shape"),
        ({"intercept_init": np.zeros(3)}, "intercept_init has shape"),
    ],
)
def test_a_wrong_start_is_named(wrong: Any, words: str, domains: Domains) -> None:
    start = {"coef_init": domains.W0, "intercept_init": domains.b0} | wrong
    for weight in (0, 1):
        with pytest.raises(ValueError, match=words):
            domains.fit(TwoDomainCV(HEADS[1], source_weights=(weight,)), **start)


def test_a_rate_can_keep_the_source_that_a_weight_alone_would_not() -> None:
    domains = Domains(n=120, m=300)
    start = {"coef_init": domains.W0, "intercept_init": domains.b0}
    head = DropoutLogisticCV(dropouts=(0.02, 0.1, 0.3, 0.6, 0.9), cv=3)
    own = domains.fit(
        TwoDomainCV(head, source_weights=(0.03,), max_source_loss=None), **start
    ).pareto_
    free = own["chosen"]
    within = own["source_score"] > own["source_score"][free]
    assert within.any()
    home = best_global_threshold(domains.X_val.mean(1) @ domains.W0.T + domains.b0, domains.Y_val)
    loss = home[1] - own["source_score"].max()
    kept = domains.fit(TwoDomainCV(head, source_weights=(0.03,), max_source_loss=loss), **start)
    assert kept.source_score_ == own["source_score"].max() > own["source_score"][free][0]


@pytest.mark.parametrize("options", [{"scoring": "log_loss"}, {"per_label": True}])
def test_a_rate_that_the_head_prefers_by_another_score_stays(
    options: dict[str, Any], domains: Domains
) -> None:
    options = {"scoring": "log_loss"} | options
    head = DropoutLogisticCV(dropouts=(0.05, 0.2, 0.6), cv=3, **options)
    both = domains.fit(TwoDomainCV(head, source_weights=(0.1, 1.0), max_source_loss=None))
    assert both.pareto_["source_weight"].tolist() == [0.1, 1.0]
    own = clone(head).fit(
        np.concatenate([domains.X, domains.X_val]),
        np.concatenate([domains.Y, domains.Y_val]),
        sample_weight=np.repeat([1, 0.75], [len(domains.X), len(domains.X_val)]),
    )
    np.testing.assert_allclose(both.pareto_["dropout"][1], np.mean(own.dropout_))


def test_more_loss_allowed_never_costs_target_score(domains: Domains) -> None:
    start = {"coef_init": domains.W0, "intercept_init": domains.b0}
    picks = [
        domains.fit(
            TwoDomainCV(HEADS[1], source_weights=(0, 0.03, 0.3, 3), max_source_loss=loss), **start
        )
        for loss in (0.0, 0.05, 0.5)
    ]
    target = [pick.target_score_ for pick in picks]
    source = [pick.source_score_ for pick in picks]
    assert target == sorted(target)
    assert target[0] < target[-1]
    assert source[0] > source[-1]


def test_without_w0_the_target_decides(domains: Domains) -> None:
    fitted = domains.fit(TwoDomainCV(HEADS[0], source_weights=(0, 0.1, 1), max_source_loss=0.0))
    assert fitted.target_score_ == max(fitted.pareto_["target_score"])


# ------------------------------------------------- masks, soft targets, views


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("which", ["both", "target", "source"])
def test_unknown_targets_do_not_count(which: str, head: Any, domains: Domains) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random(len(domains.Y)) < 0.3
    mask = np.outer(mask, np.arange(synthetic.K) < 2)  # few patterns of what is unknown
    source_mask = np.zeros(domains.Y_val.shape, bool)
    source_mask[::4, 3] = True
    options: dict[str, Any] = {}
    if which != "source":
        options["mask"] = mask
    if which != "target":
        options["source_mask"] = source_mask
    flipped = np.where(mask, 1 - domains.Y, domains.Y) if "mask" in options else domains.Y
    source_flipped = domains.Y_val
    if "source_mask" in options:
        source_flipped = np.where(source_mask, 1 - domains.Y_val, domains.Y_val)
    one = domains.fit(TwoDomainCV(head, source_weights=(0, 1)), **options)
    other = TwoDomainCV(head, source_weights=(0, 1)).fit(
        domains.X,
        csr_matrix(flipped),
        source=(domains.X_val, csr_matrix(source_flipped)),
        **{key: csr_matrix(value) for key, value in options.items()},
    )
    masked = TwoDomainCV(head, source_weights=(0, 1)).fit(
        domains.X,
        np.ma.masked_array(domains.Y, options.get("mask", False)),
        source=(
            domains.X_val,
            np.ma.masked_array(domains.Y_val, options.get("source_mask", False)),
        ),
    )
    for again in (other, masked):
        np.testing.assert_array_equal(again.estimator_.coef_, one.estimator_.coef_)
        for key, values in one.pareto_.items():
            np.testing.assert_array_equal(again.pareto_[key], values)


def test_soft_targets_are_true_from_one_half_on(domains: Domains) -> None:
    soft = domains.Y_val * 0.7 + (1 - domains.Y_val) * 0.2
    fitted = TwoDomainCV(HEADS[1], source_weights=(0.5,)).fit(
        domains.X, domains.Y, source=(domains.X_val, soft)
    )
    assert fitted.source_score_ == scores(domains, fitted)[1]


def test_views_and_sparse_labels() -> None:
    domains = Domains(views=2)
    dense = domains.fit(TwoDomainCV(HEADS[0], source_weights=(1,)))
    sparse = TwoDomainCV(HEADS[0], source_weights=(1,)).fit(
        domains.X, csr_matrix(domains.Y), source=(domains.X_val, domains.Y_val)
    )
    assert dense.oof_predict_proba_.shape == domains.Y.shape
    assert dense.source_oof_predict_proba_.shape == domains.Y_val.shape
    np.testing.assert_array_equal(sparse.estimator_.coef_, dense.estimator_.coef_)


def test_both_domains_help_each_other() -> None:
    domains = Domains(n=120, m=300)
    fitted = domains.fit(
        TwoDomainCV(
            DropoutLogisticCV(dropouts=(0.05,)), source_weights=(0.1, 1), max_source_loss=1
        ),
        coef_init=domains.W0,
        intercept_init=domains.b0,
    )
    unadapted = domains.X.mean(1) @ domains.W0.T + domains.b0
    assert fitted.target_score_ > best_global_threshold(unadapted, domains.Y)[1] + 0.05
    assert fitted.source_score_ > 0.6


# ------------------------------------------------------------------- faults


def test_domains_that_do_not_fit_are_refused(domains: Domains) -> None:
    X, Y, X_val, Y_val = domains.X, domains.Y, domains.X_val, domains.Y_val
    cases = [
        (X[:, :, :5], Y, X_val, Y_val),
        (X, Y[:, :3], X_val, Y_val),
        (X, Y, X_val[:, 0], Y_val),
        (X, Y, np.repeat(X_val, 2, axis=1), Y_val),
        # As many rows in all, but of the wrong domain.
        (X[:-1], Y, X_val, Y_val[:-1]),
        (X, Y[:-1], X_val[:-1], Y_val),
    ]
    for X, Y, X_val, Y_val in cases:
        with pytest.raises(ValueError, match="must agree") as caught:
            TwoDomainCV(HEADS[0]).fit(X, Y, source=(X_val, Y_val))
        assert str(X.shape) in str(caught.value)
        assert str(Y_val.shape) in str(caught.value)


@pytest.mark.parametrize("weights", [(), (-0.1, 1), (np.nan,), (1, np.inf)])
def test_weights_that_are_none_are_refused(weights: tuple[float, ...], domains: Domains) -> None:
    with pytest.raises(ValueError, match=r"source_weights is .*expected numbers >= 0"):
        domains.fit(TwoDomainCV(HEADS[0], source_weights=weights))


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        (TwoDomainCV(DropoutRidge()), {}, r"estimator is DropoutRidge; give .* DropoutRidgeCV\(\)"),
        (TwoDomainCV(HEADS[0], source_weights=0.1), {}, "source_weights is 0.1; give a list"),
        (TwoDomainCV(HEADS[0]), {"source": None}, r"source is None; give a pair \(X_val, Y_val\)"),
        (TwoDomainCV(HEADS[0]), {"groups": [None] * 90}, "groups is None at row 0; give every row"),
        (
            TwoDomainCV(HEADS[0]),
            {"source_groups": [np.nan] * 120},
            "source_groups is nan at row 0; give every row",
        ),
    ],
)
def test_what_cannot_be_fitted_is_named(
    model: TwoDomainCV, change: dict[str, Any], words: str, domains: Domains
) -> None:
    arguments = {"source": (domains.X_val, domains.Y_val)} | change
    with pytest.raises(ValueError, match=f"^{words}"):
        model.fit(domains.X, domains.Y, **arguments)


def test_clone_forgets_what_was_fitted(domains: Domains) -> None:
    fitted = domains.fit(TwoDomainCV(HEADS[0], source_weights=(0.5,), max_source_loss=None))
    copy = clone(fitted)
    assert copy.get_params(deep=False)["source_weights"] == (0.5,)
    assert copy.max_source_loss is None
    with pytest.raises(NotFittedError):
        copy.predict_proba(domains.X)
    with pytest.raises(NotFittedError):
        copy.decision_function(domains.X)
    assert not hasattr(HEADS[0], "coef_")


def test_only_the_pick_warns(domains: Domains) -> None:
    class Grumbling(Dice):
        def fit(self, X: Any, Y: Any, sample_weight: Any = None, **known: Any) -> Any:
            weight = 0 if sample_weight is None else sample_weight[-1]
            warnings.warn(f"weighed {weight:.3f}", UserWarning, stacklevel=2)
            return super().fit(X, Y, sample_weight=sample_weight, **known)

    with pytest.warns(UserWarning, match="weighed") as heard:
        fitted = domains.fit(
            TwoDomainCV(Grumbling(), source_weights=(1, 0, 0.3), max_source_loss=None)
        )
    assert len(heard) == 1
    assert ("0.000" in str(heard[0].message)) is (fitted.source_weight_ == 0)


@pytest.mark.parametrize("head", HEADS)
def test_labels_outside_the_classes_are_misses_in_every_score(head: Any, domains: Domains) -> None:
    rng = np.random.default_rng(0)
    counts = [rng.integers(0, 4, len(Y)) for Y in (domains.Y, domains.Y_val)]
    alone = clone(head).set_params(scoring="fbeta").fit(domains.X, domains.Y, missed=counts[0])
    P = alone.oof_predict_proba_
    # Of a ridge head's margins the order is that of its probabilities.
    expected = best_global_threshold(P, domains.Y, 2, missed=counts[0])[1]
    assert alone.best_score_ == pytest.approx(expected)
    assert alone.best_score_ < best_global_threshold(P, domains.Y, 2)[1]
    folds = alone.cv_results_["fold_scores"][0]
    assert folds.mean() == pytest.approx(alone.best_score_, abs=0.03)
    both = TwoDomainCV(head, source_weights=(0, 1), max_source_loss=None)
    domains.fit(both, missed=counts[0], source_missed=counts[1])
    for name, P, Y, missed in (
        ("target_score", both.oof_predict_proba_, domains.Y, counts[0]),
        ("source_score", both.source_oof_predict_proba_, domains.Y_val, counts[1]),
    ):
        expected = best_global_threshold(P, Y, 2, missed=missed)[1]
        assert getattr(both, f"{name}_") == pytest.approx(expected)
        assert expected in both.pareto_[name]


@pytest.mark.parametrize("sparse", [0, 1])
def test_a_masked_array_beside_sparse_labels_keeps_its_mask(sparse: int, domains: Domains) -> None:
    hidden = np.random.default_rng(0).random(domains.Y.shape) < 0.2
    hidden_val = np.random.default_rng(1).random(domains.Y_val.shape) < 0.2
    both = TwoDomainCV(HEADS[1], source_weights=(1,), max_source_loss=None)
    fits = []
    for kind in ("masked", "mask"):
        parts: list[Any] = [domains.Y, domains.Y_val]
        masks: dict[str, Any] = {"mask": hidden, "source_mask": hidden_val}
        if kind == "masked":
            other = 1 - sparse
            parts[other] = np.ma.masked_array(parts[other], [hidden, hidden_val][other])
            del masks[("mask", "source_mask")[other]]
        parts[sparse] = csr_matrix(parts[sparse])
        both.fit(domains.X, parts[0], source=(domains.X_val, parts[1]), **masks)
        fits.append(both.estimator_.coef_)
    np.testing.assert_array_equal(*fits)


@pytest.mark.parametrize(("X", "words"), [(csr_matrix(np.eye(4)), "sparse"), (np.ones(4), "shape")])
def test_features_that_are_no_rows_are_refused(X: Any, words: str) -> None:
    pair = np.eye(4), np.eye(4)
    for given in ((X, np.eye(4), pair), (*pair, (X, np.eye(4)))):
        with pytest.raises(
            ValueError, match=rf"X (of the source )?is .*{words}.*give an array \(n, d\)"
        ):
            TwoDomainCV(DropoutRidgeCV()).fit(*given[:2], source=given[2])
