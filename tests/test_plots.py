"""Displays draw the numbers they are given, on the axes they are given."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib import pyplot
from sklearn.exceptions import NotFittedError

from heads import (
    Blend,
    DropoutLogisticCV,
    DropoutRidgeCV,
    GlobalThreshold,
    TwoDomainCV,
    mean_fbeta,
    plots,
)
from heads.cuts import apply_threshold
from heads.labeltable import label_table
from heads.plots import (
    BlendPathDisplay,
    BlendWeightsDisplay,
    DropoutDisplay,
    GapDisplay,
    LabelChangeDisplay,
    LabelShiftDisplay,
    ParetoDisplay,
    ReliabilityDisplay,
    ThresholdDisplay,
)

pyplot.switch_backend("agg")


@pytest.fixture
def ax():
    figure, axes = pyplot.subplots()
    yield axes
    pyplot.close(figure)


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


def data(n=60, d=8, K=4, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    Y = (X @ rng.normal(size=(d, K)) + rng.normal(size=(n, K)) > 0.5).astype(float)
    return X, Y


def text_of(axes):
    figure = axes.figure
    figure.canvas.draw()
    return [t.get_text() for t in axes.texts]


# ---------------------------------------------------------------- all displays


def fitted_displays():
    X, Y = data()
    head = DropoutLogisticCV([0.1, 0.5], cv=3).fit(X, Y)
    both = TwoDomainCV(DropoutRidgeCV([0.2, 0.5], cv=3), source_weights=(0.0, 1.0))
    X2, Y2 = data(seed=0, n=40)
    both.fit(X, Y, source=(X2[::-1], Y2[::-1]))
    P = head.oof_predict_proba_
    blend = Blend().fit([P, both.oof_predict_proba_], Y)
    rule = GlobalThreshold().fit(P, Y)
    scores = {"a": {"x": 0.2}, "b": {"x": 0.3}, "c": {"x": 0.6}}
    return {
        "dropout": lambda ax: DropoutDisplay.from_estimator(head, ax=ax),
        "dropout of two domains": lambda ax: DropoutDisplay.from_estimator(both, ax=ax),
        "threshold": lambda ax: ThresholdDisplay.from_predictions(Y, P, ax=ax),
        "threshold of a rule": lambda ax: ThresholdDisplay.from_estimator(rule, P, Y, ax=ax),
        "change": lambda ax: LabelChangeDisplay.from_predictions(Y, P[:, ::-1], P, ax=ax),
        "shift": lambda ax: LabelShiftDisplay.from_labels(Y, Y2, ax=ax),
        "reliability": lambda ax: ReliabilityDisplay.from_predictions(Y, P, ax=ax),
        "reliability of X": lambda ax: ReliabilityDisplay.from_estimator(head, X, Y, ax=ax),
        "pareto": lambda ax: ParetoDisplay.from_estimator(both, ax=ax),
        "path": lambda ax: BlendPathDisplay.from_estimator(blend, ax=ax),
        "weights": lambda ax: BlendWeightsDisplay.from_estimator(blend, ax=ax),
        "gap": lambda ax: GapDisplay.from_scores(scores, lower="a", upper="c", ax=ax),
    }


@pytest.fixture(scope="module")
def makers():
    return fitted_displays()


def test_every_display_draws_on_given_axes_and_on_new_ones_and_again(makers):
    displays = {name for name in plots.__all__ if name.endswith("Display")}
    assert {type(make(None)).__name__ for make in makers.values()} == displays
    for name, make in makers.items():
        given = pyplot.figure().subplots()
        display = make(given)
        assert display.ax_ is given, name
        assert display.figure_ is given.figure, name
        assert given.get_xlabel(), name
        pyplot.close("all")
        assert make(None).ax_ is not given, name
        other = pyplot.figure().subplots()
        assert display.plot(ax=other) is display
        assert display.ax_ is other, name
        assert other.get_xlabel() == given.get_xlabel(), name
        pyplot.close("all")


def test_importing_the_displays_does_not_load_matplotlib():
    code = "import sys, heads.plots; print('matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"featcache-heads\[report\]"):
        BlendPathDisplay(np.array([0.1])).plot()


def test_long_names_leave_room_for_the_picture(makers):
    long = "a$b$" * 75
    Y = np.eye(4)[[0, 0, 1, 2, 3, 3, 3]]
    for draw in (
        lambda ax: LabelShiftDisplay.from_labels(Y, Y[1:5], [long] * 4, ax=ax),
        lambda ax: GapDisplay(np.full((1, 1), 0.5), [long], [long]).plot(ax),
        lambda ax: makers["dropout"](ax).plot(ax, name=long),
        lambda ax: makers["threshold"](ax).plot(ax, name=long),
        lambda ax: makers["reliability"](ax).plot(ax, name=long),
    ):
        figure = pyplot.figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.canvas.draw()
        legend = axes.get_legend()
        drawn = [*text_of(axes), *(text.get_text() for text in legend.get_texts())]
        assert max(map(len, drawn)) < 60
        assert any("…" in text for text in drawn)


# ------------------------------------------------------------- rates and cuts


def test_dropout_curve_has_scores_spread_of_folds_and_the_choice(ax):
    folds = np.array([[0.1, 0.3], [0.4, 0.4], [0.0, 0.6]])
    display = DropoutDisplay(
        np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.41, 0.3]), folds, chosen=0.5, measure="F2"
    ).plot(ax)
    assert display.line_.get_xydata().tolist() == [[0.1, 0.2], [0.5, 0.41], [0.9, 0.3]]
    assert display.marker_.get_xydata().tolist() == [[0.5, 0.41]]
    corners = display.band_.get_paths()[0].vertices
    at_first, at_last = corners[corners[:, 0] == 0.1, 1], corners[corners[:, 0] == 0.9, 1]
    np.testing.assert_allclose([at_first.min(), at_first.max()], [0.1, 0.3])
    np.testing.assert_allclose([at_last.min(), at_last.max()], [0.0, 0.6])
    assert ax.get_xlabel() == "dropout rate"
    assert ax.get_ylabel() == "out-of-fold F2"


@pytest.mark.parametrize(
    ("scoring", "label"),
    [("fbeta", "mean F1 per image"), ("log_loss", "log-loss (less is better)")],
)
def test_dropout_curve_of_an_estimator(ax, scoring, label):
    X, Y = data()
    head = DropoutRidgeCV([0.2, 0.5, 0.7], cv=3, scoring=scoring, beta=1).fit(X, Y)
    display = DropoutDisplay.from_estimator(head, ax=ax, color="black")
    np.testing.assert_array_equal(display.line_.get_xdata(), head.cv_results_["dropout"])
    np.testing.assert_array_equal(display.line_.get_ydata(), head.cv_results_["score"])
    assert display.marker_.get_xdata()[0] == head.dropout_
    assert display.line_.get_color() == "black"
    assert ax.get_ylabel() == f"out-of-fold {label}"


def test_rates_of_each_label_have_no_common_choice(ax):
    X, Y = data()
    head = DropoutRidgeCV([0.2, 0.5], cv=3, scoring="log_loss", per_label=True).fit(X, Y)
    assert DropoutDisplay.from_estimator(head, ax=ax).marker_ is None


def test_threshold_curve_by_hand(ax):
    Y = np.array([[1, 0], [0, 1]])
    P = np.array([[0.9, 0.2], [0.6, 0.4]])
    display = ThresholdDisplay.from_predictions(Y, P, beta=1, ax=ax)
    # At 0.9: F 1 and 0. At 0.6: 1 and 0. At 0.4: 1 and 2/3. At 0.2: 2/3 and 2/3.
    x, y = display.line_.get_data()
    np.testing.assert_allclose(x, [0.2, 0.4, 0.6, 0.9])
    np.testing.assert_allclose(y, [2 / 3, 5 / 6, 1 / 2, 1 / 2])
    np.testing.assert_allclose(display.marker_.get_xydata(), [[0.4, 5 / 6]])
    assert ax.get_ylabel() == "mean F1 per image"
    assert ax.get_xlabel() == "cut"


@pytest.mark.parametrize("threshold", [0.05, 0.31, 0.6, 2.0])
def test_score_at_a_given_cut_is_that_of_its_label_sets(ax, threshold):
    _, Y = data()
    P = np.random.default_rng(1).random(Y.shape)
    display = ThresholdDisplay.from_predictions(Y, P, threshold=threshold, ax=ax)
    expected = mean_fbeta(Y, apply_threshold(P, threshold))
    np.testing.assert_allclose(display.marker_.get_xydata(), [[threshold, expected]])


def test_of_many_cuts_some_are_drawn_and_the_best_is_among_them(ax):
    rng = np.random.default_rng(0)
    P = rng.random((400, 10))
    Y = (rng.random(P.shape) < P).astype(int)
    rule = GlobalThreshold().fit(P, Y)
    x, y = ThresholdDisplay.from_predictions(Y, P, ax=ax).line_.get_data()
    assert len(x) < 1100
    assert (np.diff(x) > 0).all()
    assert y.max() == pytest.approx(rule.score_)
    for cut, score in list(zip(x, y, strict=True))[::100]:
        assert score == pytest.approx(mean_fbeta(Y, apply_threshold(P, cut)))


def test_cut_of_a_rule_and_of_a_blend(ax):
    _, Y = data()
    rng = np.random.default_rng(2)
    models = [np.clip(0.5 * Y + 0.5 * rng.random(Y.shape), 0, 1) for _ in range(2)]
    rule = GlobalThreshold(beta=1).fit(models[0], Y)
    drawn = ThresholdDisplay.from_estimator(rule, models[0], Y, ax=ax)
    np.testing.assert_allclose(drawn.marker_.get_xydata(), [[rule.threshold_, rule.score_]])
    blend = Blend(method="uniform").fit(models, Y)
    drawn = ThresholdDisplay.from_estimator(blend, models, Y, ax=ax)
    np.testing.assert_allclose(drawn.marker_.get_xydata(), [[blend.threshold_, blend.score_]])


# ------------------------------------------------------------------- labels


def test_change_of_labels_is_drawn_from_the_greatest_gain_to_the_greatest_loss(ax):
    Y = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    after = Y.astype(float)
    before = after.copy()
    before[:, 1] = [0.9, 0.8, 0.7]  # the positive is second: average precision 1/2
    before[:, 2], after[:, 2] = after[:, 2], [0.9, 0.8, 0.7]  # third: 1 becomes 1/3
    display = LabelChangeDisplay.from_predictions(
        Y, before, after, names=["same", "$better", "worse$"], ax=ax
    )
    np.testing.assert_allclose(display.before_.get_xydata(), [[1 / 2, 0], [1, 1], [1, 2]])
    np.testing.assert_allclose(display.after_.get_xydata(), [[1, 0], [1, 1], [1 / 3, 2]])
    ax.figure.canvas.draw()
    names = [label.get_text().replace("\\", "") for label in ax.get_yticklabels()]
    assert names == ["$better (1)", "same (1)", "worse$ (1)"]
    assert ax.get_xlabel() == "average precision"


def test_of_many_labels_both_ends_are_drawn(ax):
    rng = np.random.default_rng(0)
    Y = (rng.random((50, 40)) < 0.3).astype(int)
    table = label_table(Y, rng.random(Y.shape), rng.random(Y.shape))
    display = LabelChangeDisplay(table, measure="F", max_labels=5).plot(ax)
    change = np.sort(table.columns["F change"])[::-1]
    drawn = display.after_.get_xdata() - display.before_.get_xdata()
    np.testing.assert_allclose(drawn, np.r_[change[:3], change[-2:]])


def test_labels_of_few_images_can_be_left_out(ax):
    Y = np.array([[1, 1], [1, 0], [0, 0]])
    display = LabelChangeDisplay.from_predictions(Y, -Y, 1.0 * Y, min_count=2, ax=ax)
    assert display.shown_.columns["label"].tolist() == [0]


def test_change_needs_both_sides_and_a_known_measure(ax):
    Y = np.eye(3)
    with pytest.raises(ValueError, match="before and after"):
        LabelChangeDisplay(label_table(Y, Y)).plot(ax)
    with pytest.raises(ValueError, match="'AP' or 'F'"):
        LabelChangeDisplay(label_table(Y, Y, Y), measure="x").plot(ax)


def test_frequencies_of_both_domains_unknown_entries_left_out(ax):
    source = np.array([[1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0.0]])
    target = np.array([[1, 1, 0, 0], [np.nan, 0, 0, 0]])
    display = LabelShiftDisplay.from_labels(source, target, list("abcd"), ax=ax)
    np.testing.assert_allclose(display.source, [0.5, 0, 0.25, 0])
    np.testing.assert_allclose(display.target, [1, 0.5, 0, 0])
    # In neither domain: not drawn. In one only: at half the smallest share of the other.
    np.testing.assert_allclose(
        display.points_.get_offsets(), [[0.5, 1], [0.125, 0.5], [0.25, 0.25]]
    )
    assert display.named_.tolist() == [1, 2, 0]
    assert sorted(text_of(ax)) == ["a", "b", "c"]
    assert "source" in ax.get_xlabel()
    assert "target" in ax.get_ylabel()


def test_frequencies_of_other_labels_are_refused():
    with pytest.raises(ValueError, match="3 labels"):
        LabelShiftDisplay.from_labels(np.eye(3), np.eye(2))


def test_no_positive_at_all_is_an_empty_picture(ax):
    display = LabelShiftDisplay.from_labels(np.zeros((2, 3)), np.zeros((4, 3)), ax=ax)
    assert len(display.points_.get_offsets()) == 0


# -------------------------------------------------- reliability, trade, blends


def test_reliability_of_two_levels(ax):
    P = np.r_[np.full(50, 0.2), np.full(50, 0.8)][:, None]
    Y = np.r_[np.arange(50) < 10, np.arange(50) < 45][:, None].astype(int)
    display = ReliabilityDisplay.from_predictions(Y, P, n_bins=5, ax=ax, name="head")
    points = display.line_[0].get_xydata()
    np.testing.assert_allclose(points, [[0.2, 0.2], [0.8, 0.9]])
    assert display.ideal_.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert ax.get_xlim() == (0, 1)
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert "head" in labels


def test_front_joins_what_no_other_setting_beats(ax):
    table = {
        "source_score": np.array([0.9, 0.5, 0.7, 0.6]),
        "target_score": np.array([0.1, 0.8, 0.5, 0.3]),
        "efficient": np.array([True, True, True, False]),
    }
    display = ParetoDisplay.from_table(table, chosen=2, labels=[0, 0.1, 0.3, 1], ax=ax)
    assert display.front_.get_xydata().tolist() == [[0.5, 0.8], [0.7, 0.5], [0.9, 0.1]]
    assert display.points_.get_offsets().tolist() == [
        [0.9, 0.1],
        [0.5, 0.8],
        [0.7, 0.5],
        [0.6, 0.3],
    ]
    assert display.marker_.get_xydata().tolist() == [[0.7, 0.5]]
    assert text_of(ax) == ["0", "0.1", "0.3", "1"]


def test_front_of_an_estimator_marks_its_weight(ax):
    X, Y = data()
    both = TwoDomainCV(DropoutRidgeCV([0.2, 0.5], cv=3), source_weights=(0.0, 0.5))
    both.fit(X, Y, source=data(seed=0, n=30))
    display = ParetoDisplay.from_estimator(both, ax=ax)
    assert display.marker_.get_xydata().tolist() == [[both.source_score_, both.target_score_]]
    table = both.pareto_  # at 0 the rate that the target prefers; at 0.5 both rates, or more
    assert np.sum(table["source_weight"] == 0.5) >= 2
    told = zip(table["source_weight"], table["efficient"], strict=True)
    assert text_of(ax) == [f"{weight:g}" if efficient else "" for weight, efficient in told]


def test_front_of_a_blend_marks_its_step(ax):
    rng = np.random.default_rng(0)
    Y = rng.random((40, 5)) < 0.4
    P = np.clip(0.3 * Y + 0.7 * rng.random((3, 40, 5)), 0, 1)
    blend = Blend(max_steps=4).fit(P, Y, domains=np.repeat(["target", "source"], 20))
    display = ParetoDisplay.from_estimator(blend, ax=ax)
    best = blend.path_["domain_score"][np.argmax(blend.path_["score"])]
    assert display.marker_.get_xydata().tolist() == [[best[1], best[0]]]
    assert len(display.points_.get_offsets()) == 3 + len(blend.path_["model"])


def test_gap_by_hand(ax):
    scores = {
        "unadapted": {"one": 0.2, "two": np.array([0.1, 0.3])},
        "adapted": {"one": 0.3, "two": 0.2},
        "only one": {"one": 0.1},
        "oracle": {"one": 0.4, "two": 0.7, "three": 1.0},
    }
    display = GapDisplay.from_scores(scores, lower="unadapted", upper="oracle", ax=ax)
    np.testing.assert_allclose(display.gap, [[0.5, 0.0], [-0.5, np.nan]])
    first = [bar.get_width() for bar in display.bars_[0]]
    np.testing.assert_allclose(first, [0.5, -0.5])
    assert display.models == ["adapted", "only one"]
    assert display.domains == ["one", "two"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["one", "two"]


def test_a_gap_of_nothing_and_unknown_models_are_refused():
    with pytest.raises(ValueError, match="no model 'x'"):
        GapDisplay.from_scores({"a": {}}, lower="a", upper="x")
    with pytest.raises(ValueError, match="no gap"):
        GapDisplay.from_scores({"a": {"d": 1}, "b": {"d": 1}}, lower="a", upper="b")


def test_path_and_weights_of_a_blend(ax):
    display = BlendPathDisplay(np.array([0.3, 0.5, 0.4])).plot(ax)
    assert display.line_.get_xydata().tolist() == [[1, 0.3], [2, 0.5], [3, 0.4]]
    assert display.marker_.get_xydata().tolist() == [[2, 0.5]]
    bars = BlendWeightsDisplay(np.array([0.1, 0.6, 0.3]), ["x", "y", "z"]).plot()
    assert [bar.get_width() for bar in bars.bars_] == [0.6, 0.3, 0.1]
    assert [t.get_text() for t in bars.ax_.get_yticklabels()] == ["y", "z", "x"]
    assert bars.order_.tolist() == [1, 2, 0]


def test_of_300_models_the_heaviest_are_shown():
    weights = np.random.default_rng(0).dirichlet(np.ones(300))
    display = BlendWeightsDisplay(weights).plot()
    widths = [bar.get_width() for bar in display.bars_]
    np.testing.assert_array_equal(widths, np.sort(weights)[::-1][:30])


@pytest.mark.parametrize(
    ("display", "shown"),
    [
        (DropoutDisplay, "DropoutLogisticCV, DropoutRidgeCV or TwoDomainCV; this Blend has no"),
        (ParetoDisplay, "TwoDomainCV, or a Blend of two domains; this DropoutRidgeCV has no"),
        (ParetoDisplay, "TwoDomainCV, or a Blend of two domains; this Blend has no pareto_"),
        (BlendPathDisplay, "Blend; this DropoutRidgeCV has no path_"),
        (BlendWeightsDisplay, "Blend; this DropoutRidgeCV has no weights_"),
        (ThresholdDisplay, "GlobalThreshold or Blend; this DropoutRidgeCV has no threshold_"),
    ],
)
def test_an_estimator_of_another_kind_is_told_from_one_that_is_not_fitted(display, shown):
    X, Y = data()
    head = DropoutRidgeCV([0.2, 0.5], cv=3)
    blend = Blend()
    other = blend if "this Blend" in shown else head
    arguments = (X, Y) if display is ThresholdDisplay else ()
    with pytest.raises(NotFittedError):
        display.from_estimator(other, *arguments)
    head.fit(X, Y)
    blend.fit([head.oof_predict_proba_], Y)
    with pytest.raises(TypeError, match=f"^{display.__name__} shows a fitted {shown}"):
        display.from_estimator(other, *arguments)


def test_names_must_be_those_of_all_models():
    blend = Blend(method="uniform").fit([np.full((2, 1), 0.5)], np.array([[1], [0]]))
    with pytest.raises(ValueError, match="2 names"):
        BlendWeightsDisplay.from_estimator(blend, ["a", "b"])
