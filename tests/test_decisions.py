"""The global threshold against trying every cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from heads import cuts
from heads.cuts import apply_threshold, best_global_threshold, threshold_curve
from heads.decisions import GlobalThreshold
from heads.metrics import mean_fbeta
from heads.ordering import descending, grouped

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=150)


def label_sets(P, threshold, min_labels=0, max_labels=None):
    """The rule, one image after the other."""
    sets = np.zeros(P.shape, dtype=bool)
    for i, row in enumerate(P.astype(float)):
        ranking = sorted(range(len(row)), key=lambda k: (-row[k], k))
        for rank, k in enumerate(ranking):
            allowed = max_labels is None or rank < max_labels
            sets[i, k] = rank < min_labels or (row[k] >= threshold and allowed)
    return sets


def every_cut(P, Y, limits, **options):
    """(score, number of labels) of each cut there is."""
    for threshold in (np.inf, -np.inf, *np.unique(P)):
        sets = label_sets(P, threshold, *limits)
        yield mean_fbeta(Y, sets, **options), sets.sum()


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**9)))
    n, K = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    P = (rng.integers(levels, size=(n, K)) / levels - draw(st.sampled_from([0, 0.5]))).astype(dtype)
    Y = (rng.random((n, K)) < draw(st.sampled_from([0, 0.3, 0.8]))).astype(float)
    options = {
        "beta": draw(st.sampled_from([0.5, 1, 2])),
        "mask": draw(st.sampled_from([None, rng.random((n, K)) < 0.3])),
        "missed": draw(st.sampled_from([None, rng.integers(0, 3, size=n)])),
        "sample_weight": draw(st.sampled_from([None, rng.integers(1, 4, size=n)])),
    }
    least = draw(st.sampled_from([0, 0, 1, 2]))
    most = draw(st.sampled_from([None, None, 1, 2, 3]))
    return P, Y, options, (least, None if most is None else max(most, least))


@SETTINGS
@given(case=cases(), sparse=st.booleans())
def test_no_cut_is_better_and_none_as_good_takes_fewer_labels(case, sparse):
    P, Y, options, limits = case
    known_as = csr_matrix if sparse else np.asarray
    given_options = dict(options)
    if options["mask"] is not None:
        given_options["mask"] = known_as(options["mask"])
    min_labels, max_labels = limits
    threshold, score = best_global_threshold(
        P, known_as(Y), min_labels=min_labels, max_labels=max_labels, **given_options
    )
    results = list(every_cut(P, Y, limits, **options))
    best = max(result for result, _ in results)
    assert score == pytest.approx(best, abs=1e-12)
    sets = apply_threshold(P, threshold, *limits)
    assert sets.dtype == bool
    np.testing.assert_array_equal(sets.toarray(), label_sets(P, threshold, *limits))
    assert mean_fbeta(Y, sets, **options) == score
    if options["mask"] is None:
        assert sets.nnz == min(size for result, size in results if result > best - 1e-12)


@SETTINGS
@given(case=cases())
def test_the_curve_is_the_mean_at_each_of_its_cuts(case):
    P, Y, options, limits = case
    min_labels, max_labels = limits
    levels, means = threshold_curve(P, Y, min_labels=min_labels, max_labels=max_labels, **options)
    assert levels[0] == np.inf
    assert np.all(np.diff(levels) < 0)
    for level, mean in zip(levels, means, strict=True):
        sets = label_sets(P, float(level), *limits)
        assert mean == pytest.approx(mean_fbeta(Y, sets, **options), abs=1e-12)


@SETTINGS
@given(case=cases(), seed=st.integers(0, 100))
def test_the_order_of_rows_does_not_matter(case, seed):
    P, Y, options, limits = case
    min_labels, max_labels = limits
    order = np.random.default_rng(seed).permutation(len(P))
    turned = {
        name: value[order] if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    first = best_global_threshold(P, Y, min_labels=min_labels, max_labels=max_labels, **options)
    second = best_global_threshold(
        P[order], Y[order], min_labels=min_labels, max_labels=max_labels, **turned
    )
    assert first[0] == second[0]
    assert first[1] == pytest.approx(second[1], abs=1e-12)


@SETTINGS
@given(case=cases(), seed=st.integers(0, 100))
def test_the_order_of_labels_does_not_matter(case, seed):
    P, Y, options, _ = case
    order = np.random.default_rng(seed).permutation(P.shape[1])
    mask = None if options["mask"] is None else options["mask"][:, order]
    first = best_global_threshold(P, Y, **options)
    second = best_global_threshold(P[:, order], Y[:, order], **(options | {"mask": mask}))
    assert first[0] == second[0]


@SETTINGS
@given(case=cases(), seed=st.integers(0, 100))
def test_weights_are_repeated_rows_and_zero_is_no_row(case, seed):
    P, Y, options, limits = case
    min_labels, max_labels = limits
    times = np.random.default_rng(seed).integers(0, 3, size=len(P))
    times[0] = 1
    rows = np.repeat(np.arange(len(P)), times)
    repeated = {
        name: value[rows] if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    } | {"sample_weight": None}
    first = best_global_threshold(
        P,
        csr_matrix(Y),
        min_labels=min_labels,
        max_labels=max_labels,
        **(options | {"sample_weight": times}),
    )
    second = best_global_threshold(
        P[rows], Y[rows], min_labels=min_labels, max_labels=max_labels, **repeated
    )
    assert first[0] == second[0]
    assert first[1] == pytest.approx(second[1], abs=1e-12)


# ------------------------------------------------------------- where the cut is


def test_the_cut_is_half_way_between_its_neighbours():
    P = np.array([[0.9, 0.5, 0.1], [0.8, 0.2, 0.1]])
    Y = np.array([[1, 1, 0], [1, 0, 0]])
    threshold, score = best_global_threshold(P, Y)
    assert threshold == pytest.approx(0.35)
    assert score == 1
    shaken = P + np.random.default_rng(0).uniform(-0.14, 0.14, P.shape)
    np.testing.assert_array_equal(apply_threshold(shaken, threshold).toarray(), Y)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("low", [0.3, 1e-7, 0.0, -2.5])
def test_neighbouring_floats_are_told_apart(dtype, low):
    low = dtype(low)
    high = np.nextafter(low, dtype(1))
    P = np.array([[high, low], [low, high]])
    Y = np.eye(2)
    rule = GlobalThreshold().fit(P, Y)
    assert rule.score_ == 1
    assert dtype(rule.threshold_) == rule.threshold_
    for same in (P, P.astype(np.float64)):
        np.testing.assert_array_equal(rule.predict(same).toarray(), Y)


def test_scores_of_another_precision_are_compared_exactly():
    """0.1 in single precision is above 0.1 in double; the threshold must not be rounded."""
    threshold = float(np.nextafter(np.float64(np.float32(0.1)), 1))
    assert apply_threshold(np.full((1, 1), 0.1, np.float32), threshold).nnz == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_cut_between_two_floats_takes_the_upper_one(dtype):
    low = np.array([-70000.0, -1, -1e-9, 0, 1e-9, 1e-4, 0.3, 1, 60000]).clip(
        np.finfo(dtype).min, None
    )
    low = low.astype(dtype)
    high = np.nextafter(low, dtype(np.inf))
    for a, b in zip(low, high, strict=True):
        P = np.array([[a, b, -b, -a]])
        for cut in (float(a) + (float(b) - float(a)) / 3, float(a), float(b), 1e6, -1e6):
            expected = P.astype(np.float64) >= cut
            np.testing.assert_array_equal(apply_threshold(P, cut).toarray(), expected)
            own = apply_threshold(P, np.array([cut, cut, -cut, -cut])).toarray()
            np.testing.assert_array_equal(own[:, :2], expected[:, :2])
            np.testing.assert_array_equal(own[:, 2:], P[:, 2:].astype(np.float64) >= -cut)


def test_huge_scores_have_a_middle():
    P = np.array([[1.7e308, -1.7e308]])
    assert best_global_threshold(P, np.array([[1, 0]]))[0] == 0


def test_nothing_true_takes_nothing():
    P = np.random.default_rng(0).random((5, 4))
    assert best_global_threshold(P, np.zeros((5, 4))) == (np.inf, 1)
    rule = GlobalThreshold(min_labels=1).fit(P, np.zeros((5, 4)))
    assert (rule.threshold_, rule.score_) == (np.inf, 0)
    np.testing.assert_array_equal(rule.predict(P).toarray().argmax(axis=1), P.argmax(axis=1))


def test_constant_scores_take_all_or_nothing():
    P = np.full((3, 4), 0.25)
    assert best_global_threshold(P, np.ones((3, 4))) == (-np.inf, 1)
    one = np.zeros((3, 4))
    one[0, 0] = 1
    assert best_global_threshold(P, one) == (np.inf, pytest.approx(2 / 3))


def test_nothing_known_and_no_labels():
    P = np.random.default_rng(0).random((3, 4))
    assert best_global_threshold(P, P > 0.5, mask=np.ones((3, 4), bool)) == (np.inf, 1)
    assert best_global_threshold(P[:, :0], P[:, :0] > 0) == (np.inf, 1)


@SETTINGS
@given(case=cases(), eighths=st.integers(-800, 800))
def test_a_constant_added_to_all_scores_and_the_threshold_changes_nothing(case, eighths):
    P, Y, options, limits = case
    scores, constant = np.round(8 * P.astype(np.float64)) / 8, eighths / 8  # sums are exact
    first, score = best_global_threshold(scores, Y, **options)
    second, same = best_global_threshold(scores + constant, Y, **options)
    assert (first + constant, score) == (second, same)
    sets, moved = apply_threshold(scores, first, *limits), scores + constant
    assert (sets != apply_threshold(moved, first + constant, *limits)).nnz == 0


def test_only_the_order_of_scores_decides_the_label_sets():
    rng = np.random.default_rng(1)
    Y = rng.random((40, 10)) < 0.2
    P = rng.random((40, 10)) * 0.6 + 0.3 * Y
    expected = GlobalThreshold().fit(P, Y).predict(P).toarray()
    for change in (np.log, lambda p: p**3, lambda p: 1e6 * p - 7):
        sets = GlobalThreshold().fit(change(P), Y).predict(change(P)).toarray()
        np.testing.assert_array_equal(sets, expected)


def test_a_larger_beta_takes_no_fewer_labels():
    rng = np.random.default_rng(2)
    Y = rng.random((100, 20)) < 0.15
    P = rng.random((100, 20)) + 0.5 * Y
    sizes = [GlobalThreshold(beta).fit(P, Y).predict(P).nnz for beta in (0.25, 0.5, 1, 2, 4)]
    assert sizes == sorted(sizes)


# ------------------------------------------------- not sorting what cannot matter


@pytest.fixture
def falls(monkeypatch):
    """Record (number of scores that were sorted, whether these were all)."""
    seen = []
    original = cuts._fall

    def record(P, truth, always, passed, complete):
        seen.append((len(passed), complete))
        return original(P, truth, always, passed, complete)

    monkeypatch.setattr(cuts, "_fall", record)
    return seen


def wide(seed: int, signal: float, n: int = 60, K: int = 3000):
    rng = np.random.default_rng(seed)
    Y = csr_matrix(rng.random((n, K)) < 1e-3)
    P = rng.normal(size=(n, K)).astype(np.float32) + np.float32(signal) * Y.toarray()
    return P, Y


@pytest.mark.parametrize("min_labels", [0, 1, 3])
@pytest.mark.parametrize("signal", [8, 4, 3])
def test_sorting_a_part_finds_the_optimum_of_all(falls, signal, min_labels):
    for seed in range(3):
        P, Y = wide(seed, signal)
        mask = csr_matrix(np.random.default_rng(seed).random(P.shape) < 0.1)
        missed = np.arange(len(P)) % 2
        for options in (
            {},
            {"mask": mask, "missed": missed, "beta": 0.5},
            {"mask": mask.toarray()},
        ):
            falls.clear()
            threshold, score = best_global_threshold(P, Y, min_labels=min_labels, **options)
            assert not falls[-1][1], "the case is too small: all scores were sorted"
            assert falls[-1][0] < P.size / 4
            levels, means = threshold_curve(P, Y, min_labels=min_labels, **options)
            best = np.flatnonzero(means >= means.max() - 1e-12)[0]
            assert score == pytest.approx(means[best], abs=1e-12)
            if best == 0:
                assert threshold == np.inf
            else:
                assert levels[best + 1] < threshold <= levels[best]


def test_useless_scores_are_sorted_further_down_until_it_is_certain(falls):
    P, Y = wide(0, 0)
    P = -np.abs(P)  # and all negative
    P[Y.toarray()] -= 10
    threshold, score = best_global_threshold(P, Y)
    assert len(falls) > 1
    levels, means = threshold_curve(P, Y)
    assert score == pytest.approx(means.max(), abs=1e-12)
    assert threshold == np.inf or threshold < levels[1]


@pytest.mark.parametrize("shift", [0, -20, 20])
def test_half_precision_is_compared_like_any_other(falls, shift):
    P, Y = wide(2, 4)
    half = (P + shift).astype(np.float16)
    assert best_global_threshold(half.astype(np.float64), Y)[1] == pytest.approx(
        best_global_threshold(half, Y)[1], abs=1e-12
    )
    assert [size for size, _ in falls[: len(falls) // 2]] == [
        size for size, _ in falls[len(falls) // 2 :]
    ]
    turned = np.asfortranarray(half)
    assert best_global_threshold(turned, Y) == best_global_threshold(half, Y)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_half_precision_must_be_finite(bad):
    P = np.full((4, 3), -65504, dtype=np.float16)
    best_global_threshold(P, np.zeros((4, 3)))
    P[2, 1] = bad
    with pytest.raises(ValueError, match=f"P is {bad} at row 2, label 1"):
        best_global_threshold(P, np.zeros((4, 3)))


def test_scores_with_ties_everywhere_and_a_wide_matrix(falls):
    P, Y = wide(1, 3)
    P = np.round(P * 2) / 2
    threshold, score = best_global_threshold(P, Y)
    means = threshold_curve(P, Y)[1]
    assert score == pytest.approx(means.max(), abs=1e-12)
    assert threshold * 4 == round(threshold * 4)


def test_the_optimum_may_lie_below_what_is_sorted_first(falls):
    """One image is worth losing: a thousand wrong labels of it stand above true ones of others."""
    n, K = 60, 3000
    P = np.full((n, K), -1.0) - np.arange(K) / K
    P[0, :1000] = np.linspace(1, 9, 1000)
    Y = np.zeros((n, K))
    Y[:, -1] = 1
    P[:54, -1] = 10
    P[54:, -1] = np.linspace(0, 0.5, 6)
    threshold, score = best_global_threshold(P, Y)
    assert not falls[0][1]
    assert -1 < threshold <= 0
    assert score == pytest.approx((59 + 5 / 1005) / 60)


def test_the_lowest_score_that_was_sorted_first_still_has_a_lower_neighbour(falls):
    """A third of all scores are equal and worth taking, so the first part ends right there."""
    P, Y = np.zeros((60, 3000)), np.zeros((60, 3000))
    P[:, :1000] = 1
    Y[:, :3] = 1
    assert best_global_threshold(P, csr_matrix(Y)) == (0.5, pytest.approx(15 / 1012))
    assert not falls[0][1]


@pytest.mark.parametrize("seed", [869, 1638])
def test_cuts_that_only_rounding_tells_apart_are_equally_good(seed):
    """Two cuts of these cases have the same mean, but their running sums differ in the last bit."""
    rng = np.random.default_rng(seed)
    n, K = int(rng.integers(3, 12)), 5
    P = rng.permutation(n * K).reshape(n, K) / 64
    Y = (rng.random((n, K)) < 0.5).astype(float)
    results = list(every_cut(P, Y, (0, None), beta=1))
    best = max(result for result, _ in results)
    tied = [size for result, size in results if result > best - 1e-12]
    assert len(tied) > 1
    assert apply_threshold(P, best_global_threshold(P, Y, beta=1)[0]).nnz == min(tied)


# ------------------------------------------------------------------ the estimator


def test_limits_hold_for_new_scores():
    rng = np.random.default_rng(3)
    Y = rng.random((30, 12)) < 0.3
    P = rng.random((30, 12)) + 0.3 * Y
    for least, most in [(0, None), (1, None), (2, 4), (3, 3), (0, 1), (20, 20)]:
        rule = GlobalThreshold(min_labels=least, max_labels=most).fit(P, Y)
        for scale in (0, 1, 5):
            sizes = np.diff(rule.predict(scale * rng.random((50, 12))).indptr)
            assert sizes.min() >= min(least, 12)
            assert most is None or sizes.max() <= most


def test_long_matrices_are_cut_in_blocks(monkeypatch):
    P = np.round(np.random.default_rng(4).random((50, 6)), 1)
    whole = [
        apply_threshold(P, 0.6, *limits).toarray() for limits in [(0, None), (1, None), (1, 3)]
    ]
    monkeypatch.setattr(cuts, "_BLOCK", 20)
    for limits, expected in zip([(0, None), (1, None), (1, 3)], whole, strict=True):
        np.testing.assert_array_equal(apply_threshold(P, 0.6, *limits).toarray(), expected)
        np.testing.assert_array_equal(label_sets(P, 0.6, *limits), expected)
    assert apply_threshold(P[:0], 0.6).shape == (0, 6)


def test_scores_are_read_only_and_in_any_layout():
    rng = np.random.default_rng(5)
    Y = rng.random((20, 9)) < 0.3
    P = rng.random((20, 9))
    P.flags.writeable = False
    Y.flags.writeable = False
    expected = best_global_threshold(P, Y, min_labels=1)
    for same in (np.asfortranarray(P), np.repeat(P, 2, axis=1)[:, ::2], P[::-1].copy()[::-1]):
        assert best_global_threshold(same, Y, min_labels=1) == expected


def test_it_is_an_estimator():
    rule = GlobalThreshold(beta=1, min_labels=1, max_labels=5)
    assert clone(rule).get_params() == {"beta": 1, "min_labels": 1, "max_labels": 5}
    with pytest.raises(NotFittedError):
        rule.predict(np.zeros((2, 3)))
    P = np.random.default_rng(6).random((10, 3))
    assert rule.fit(P, P > 0.7) is rule
    assert rule.n_features_in_ == 3
    assert (rule.threshold_, rule.score_) == best_global_threshold(P, P > 0.7, 1, min_labels=1)


def test_integer_scores_are_accepted():
    threshold, score = best_global_threshold(np.array([[3, 1], [2, 0]]), np.array([[1, 0], [1, 0]]))
    assert (threshold, score) == (1.5, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_named(bad):
    P = np.zeros((4, 3))
    rule = GlobalThreshold().fit(P, P)
    P[2, 1] = bad
    for call in (lambda: GlobalThreshold().fit(P, np.zeros((4, 3))), lambda: rule.predict(P)):
        with pytest.raises(ValueError, match=f"P is {bad} at row 2, label 1"):
            call()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda P, Y: GlobalThreshold(beta=-1).fit(P, Y), "beta is -1"),
        (lambda P, Y: GlobalThreshold(beta="2").fit(P, Y), "beta is '2'"),
        (lambda P, Y: GlobalThreshold(beta=1e200).fit(P, Y), r"beta is 1e\+200"),
        (lambda P, Y: GlobalThreshold(min_labels=1.5).fit(P, Y), "min_labels is 1.5"),
        (lambda P, Y: GlobalThreshold(max_labels=2.5).fit(P, Y), "max_labels is 2.5"),
        (lambda P, Y: GlobalThreshold().fit(P, None), "Y is None"),
        (lambda P, Y: GlobalThreshold().fit(P, Y, missed=[1, 0, -1, 0]), "missed is -1.0 at row 2"),
        (lambda P, Y: GlobalThreshold(min_labels=-1).fit(P, Y), "min_labels is -1"),
        (lambda P, Y: GlobalThreshold(max_labels=0).fit(P, Y), "max_labels is 0"),
        (lambda P, Y: GlobalThreshold(min_labels=3, max_labels=2).fit(P, Y), "max_labels is 2"),
        (lambda P, Y: GlobalThreshold().fit(P, Y[:, 1:]), "Y has shape"),
        (lambda P, Y: GlobalThreshold().fit(P[:0], Y[:0]), "no rows"),
        (lambda P, Y: GlobalThreshold().fit(P, Y).predict(P[:, 1:]), "P has 2 labels"),
        (lambda P, Y: GlobalThreshold().fit(P[0], Y[0]), r"P has shape \(3,\)"),
    ],
)
def test_wrong_arguments_are_named(call, expected):
    P = np.random.default_rng(0).random((4, 3))
    with pytest.raises(ValueError, match=expected):
        call(P, (P > 0.5).astype(float))


def test_thresholds_of_their_own_are_compared_label_by_label():
    P = np.array([[0.5, 0.2, 0.9], [0.6, 0.1, 0.95]], dtype=np.float32)
    thresholds = np.array([0.55, 0.15, 0.93])
    assert apply_threshold(P, thresholds).toarray().tolist() == [
        [False, True, False],
        [True, False, True],
    ]
    # Above their own threshold by 0.05 and 0.02; below it by 0.03, 0.05.
    most = apply_threshold(P, thresholds, max_labels=1).toarray()
    assert most.tolist() == [[False, True, False], [True, False, False]]
    least = apply_threshold(P, thresholds, min_labels=2).toarray()
    assert least.tolist() == [[False, True, True], [True, False, True]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_scores_are_sorted_from_the_highest_down(dtype):
    rng = np.random.default_rng(9)
    scores = (1e3 * rng.normal(size=5000) ** 3).astype(dtype)
    scores[:4] = 0.0, -0.0, 65504, -65504
    ordered = scores[descending(scores)]
    np.testing.assert_array_equal(ordered, np.sort(scores)[::-1])


@pytest.mark.parametrize("n", [10, 1 << 16, 1 << 18])
def test_entries_are_grouped_by_image_in_their_order(n):
    image = np.random.default_rng(10).integers(n, size=3000)
    np.testing.assert_array_equal(grouped(image), np.argsort(image, kind="stable"))
