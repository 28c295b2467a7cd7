"""Properties of the maps between domains."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heads import DomainAlignment
from heads.alignment import FeatureMap, Moments


def rows(seed: int, n: int = 40, shape: tuple[int, ...] = (5,)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, *shape)) * rng.uniform(0.5, 2, shape[-1]) + rng.normal(
        size=shape[-1]
    )


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("moments", ["mean", "mean_std"])
def test_mapped_rows_have_the_moments_of_the_reference(
    shape: tuple[int, ...], moments: str
) -> None:
    reference, domain = rows(0, shape=shape), rows(1, shape=shape)
    mapped = DomainAlignment(moments).fit(reference).transform(domain)
    axes = tuple(range(reference.ndim - 1))
    np.testing.assert_allclose(mapped.mean(axes), reference.mean(axes))
    wanted = reference if moments == "mean_std" else domain
    np.testing.assert_allclose(mapped.std(axes), wanted.std(axes))


@given(seed=st.integers(0, 99), scaled=st.booleans())
@settings(derandomize=True, deadline=None, database=None, max_examples=20)
def test_what_the_map_takes_away_does_not_matter(seed: int, scaled: bool) -> None:
    """Moving a domain's features (and, with spreads, scaling them) changes no mapped row."""
    rng = np.random.default_rng(seed)
    align = DomainAlignment("mean_std" if scaled else "mean").fit(rows(seed))
    domain = rows(seed + 1000)
    factor = rng.uniform(0.5, 2, 5) if scaled else 1.0
    moved = domain * factor + 10 * rng.normal(size=5)
    np.testing.assert_allclose(align.transform(moved), align.transform(domain), atol=1e-9)


def test_a_domain_like_the_reference_stays_as_it_is() -> None:
    reference = rows(3)
    for moments in ("mean", "mean_std"):
        align = DomainAlignment(moments).fit(reference)
        np.testing.assert_allclose(align.transform(reference), reference)


def test_the_order_of_rows_does_not_matter() -> None:
    domain, order = rows(1), np.random.default_rng(0).permutation(40)
    align = DomainAlignment("mean_std").fit(rows(0))
    np.testing.assert_allclose(align.transform(domain[order]), align.transform(domain)[order])


def test_pseudo_count_is_as_many_more_rows_of_the_reference() -> None:
    """Adding the reference's own rows to the domain gives the shrunk mean."""
    reference, domain = rows(0, n=20), rows(1, n=30)
    mapped = DomainAlignment("mean", pseudo_count=20).fit(reference).feature_map(domain)
    together = np.concatenate([domain, reference])
    np.testing.assert_allclose(mapped.shift, reference.mean(0) - together.mean(0))


def test_few_rows_are_matched_less() -> None:
    reference, domain = rows(0), rows(1)
    moved = [
        np.abs(
            DomainAlignment("mean", pseudo_count=c).fit(reference).feature_map(domain).shift
        ).sum()
        for c in (0.0, 10.0, 1000.0)
    ]
    assert moved[0] > moved[1] > moved[2]


def test_features_that_never_fire_are_only_moved() -> None:
    reference, domain = rows(0), rows(1)
    reference[:, 0], domain[:, 1] = 3.0, -1.0
    found = DomainAlignment("mean_std").fit(reference).feature_map(domain)
    np.testing.assert_array_equal(found.scale[:2], 1)
    assert np.isfinite(found.shift).all()
    domain[:, 2] *= 1e-6
    found = DomainAlignment("mean_std", max_scale=4).fit(reference).feature_map(domain)
    assert found.scale[2] == 4


def test_moments_of_float16_are_those_of_float64() -> None:
    """Sums in half precision would overflow or stick."""
    X = (rows(0, n=3000) + 50).astype(np.float16)
    moments = Moments.of(X)
    np.testing.assert_allclose(moments.mean, X.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.std, X.astype(np.float64).std(0), rtol=1e-9)


def test_a_head_after_a_map_is_a_head_on_raw_features() -> None:
    rng = np.random.default_rng(0)
    W, b = rng.normal(size=(4, 5)), rng.normal(size=4)
    found = FeatureMap(rng.uniform(0.5, 2, 5), rng.normal(size=5))
    X = rows(2)
    W_raw, b_raw = found.head(W, b)
    np.testing.assert_allclose(X @ W_raw.T + b_raw, found.transform(X) @ W.T + b)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"moments": "median"}, "moments is 'median'"),
        ({"pseudo_count": -1.0}, "pseudo_count is -1"),
        ({"max_scale": 0.5}, "max_scale is 0.5"),
    ],
)
def test_wrong_parameters_are_named(parameters: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DomainAlignment().set_params(**parameters).fit(rows(0))


def test_domains_that_cannot_be_mapped_are_refused() -> None:
    align = DomainAlignment().fit(rows(0))
    with pytest.raises(ValueError, match=r"1 unlabelled row; .* 2 at least"):
        align.transform(rows(1, n=1))
    with pytest.raises(ValueError, match="X has 4 features"):
        align.transform(rows(1, shape=(4,)))
