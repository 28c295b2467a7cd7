"""Blends of many heads give what their estimators give one by one, in few products."""

from __future__ import annotations

import itertools
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, logit

from featcache import FeatureCache
from heads import (
    Blend,
    DropoutLogistic,
    DropoutLogisticCV,
    DropoutRidge,
    DropoutRidgeCV,
    prediction,
)
from heads.exporting import tuned
from heads.platt import PlattScaling
from heads.prediction import Predictor
from heads.products import Affine, Noisy, Plain, Sum
from heads.storage import Head, StoredBlend, save
from tests import synthetic

N = 45
TRAIN, STAGE_2 = synthetic.images(100, 1), synthetic.images(N, 2)
KINDS = {
    "ridge": DropoutRidge(dropout=0.1),
    "ridge_cv": DropoutRidgeCV(dropouts=(0.1, 0.3), cv=3),
    "ridge_rare": DropoutRidgeCV(dropouts=(0.1,), cv=3, min_positives=20),
    "logistic": DropoutLogistic(dropout=0.3),
    "logistic_cv": DropoutLogisticCV(dropouts=(0.1, 0.3), cv=3),
    "logistic_rare": DropoutLogisticCV(dropouts=(0.1,), cv=3, min_positives=20),
    "logistic_labels": DropoutLogisticCV(
        dropouts=(0.1, 0.5), cv=3, scoring="log_loss", per_label=True
    ),
    "logistic_platt": DropoutLogisticCV(dropouts=(0.1, 0.3), cv=3, probability="platt"),
    "gaussian": DropoutLogistic(dropout=0.3, noise="gaussian", tol=1e-3),
}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> list[Head]:
    """One of every kind on each of two networks."""
    folder = tmp_path_factory.mktemp("train")
    found = []
    for network in (0, 1):
        cache = synthetic.write(folder / f"{network}.h5", TRAIN, network, shifted=True, views=2)
        rows = cache.training()
        plain = rows | {"coef_init": None, "intercept_init": None}
        for name, estimator in KINDS.items():
            own = name.startswith(("logistic", "ridge_rare", "gaussian"))
            fitted = type(estimator)(**estimator.get_params()).fit(**(rows if own else plain))
            found.append(
                Head(
                    fitted,
                    cache.classes,
                    cache.class_names,
                    cache.network_id,
                    by_reference=name.startswith("logistic"),
                )
            )
    return found


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage_2")
    for network in (0, 1):
        synthetic.write(
            folder / f"{network}.h5", STAGE_2, network, shifted=True, views=3, labelled=False
        )
    return folder


def probabilities(heads: list[Head], caches: Path) -> list[np.ndarray]:
    """One by one, by the estimators themselves."""
    features = {c.network_id: c.features for c in map(FeatureCache, sorted(caches.glob("*.h5")))}
    return [head.estimator.predict_proba(features[head.network_id]) for head in heads]


def stored(heads: list[Head], average: str, weights: np.ndarray, path: Path) -> Path:
    blend = Blend(average=average, method="uniform")
    Y = np.ones((N, synthetic.K))
    blend.fit(np.full((len(heads), N, synthetic.K), 0.5), Y)
    blend.weights_ = weights
    names = [f"head{m}.h5" for m in range(len(heads))]
    return save(path, StoredBlend(blend, heads, names), overwrite=True)


@pytest.mark.parametrize("average", ["probability", "logit"])
@pytest.mark.parametrize("rows", [7, 4096])
def test_every_kind_of_head_gives_what_its_estimator_gives(
    average: str,
    rows: int,
    heads: list[Head],
    caches: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prediction, "ROWS_AT_ONCE", rows)
    P = probabilities(heads, caches)
    for m, head in enumerate(heads):
        path = stored([head], average, np.ones(1), tmp_path / "blend.h5")
        found = Predictor.open(path, [caches]).predict_proba()
        np.testing.assert_allclose(found, P[m], atol=2e-6)


@pytest.mark.parametrize("average", ["probability", "logit"])
def test_a_blend_is_the_weighted_average(
    average: str, heads: list[Head], caches: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(len(heads)))
    path = stored(heads, average, weights, tmp_path / "blend.h5")
    predictor = Predictor.open(path, [caches])
    assert isinstance(predictor.content, StoredBlend)
    P = probabilities(heads, caches)
    expected = predictor.content.blend.predict_proba(P)
    np.testing.assert_allclose(predictor.predict_proba(), expected, atol=3e-6)
    by_hand = sum(
        w * (p if average == "probability" else logit(np.clip(p.astype(float), 1e-6, 1 - 1e-6)))
        for w, p in zip(weights, P, strict=True)
    )
    by_hand = by_hand if average == "probability" else expit(by_hand)
    np.testing.assert_allclose(expected, by_hand, atol=3e-6)


def test_affine_heads_of_a_network_become_one_term(
    heads: list[Head], caches: Path, tmp_path: Path
) -> None:
    ridges = [h for h in heads if getattr(h.estimator, "calibration_", None) is not None]
    assert len(ridges) == 6
    assert sum(isinstance(h.estimator, DropoutLogisticCV) for h in ridges) == 2
    uniform = np.full(6, 1 / 6)
    path = stored(ridges, "logit", uniform, tmp_path / "blend.h5")
    predictor = Predictor.open(path, [caches])
    assert [type(term) for term in predictor.terms] == [Sum, Sum]
    P = probabilities(ridges, caches)
    np.testing.assert_allclose(
        predictor.predict_proba(),
        predictor.content.blend.predict_proba(P),
        atol=2e-6,
    )
    # Averaged probabilities are no function of one margin.
    path = stored(ridges, "probability", uniform, tmp_path / "blend.h5")
    assert [type(t) for t in Predictor.open(path, [caches]).terms] == [Affine] * 6
    kinds = {
        type(t)
        for t in Predictor.open(stored(heads, "logit", np.full(18, 1 / 18), path), [caches]).terms
    }
    assert kinds == {Sum, Noisy, Plain}


@pytest.mark.parametrize("average", ["probability", "logit"])
def test_a_flat_head_gives_its_base_rate(
    average: str, heads: list[Head], caches: Path, tmp_path: Path
) -> None:
    ridge = next(h for h in heads if isinstance(h.estimator, DropoutRidgeCV))
    flat = replace(ridge, estimator=copy(ridge.estimator), provenance={"threshold": 0.5})
    flat.estimator.calibration_ = PlattScaling(0.0, -1.5)
    path = stored([flat], average, np.ones(1), tmp_path / "blend.h5")
    found = Predictor.open(path, [caches]).predict_proba()
    np.testing.assert_allclose(found, expit(-1.5), atol=1e-6)
    alone = save(tmp_path / "head.h5", flat)
    np.testing.assert_allclose(Predictor.open(alone, [caches]).predict_proba(), found, atol=1e-6)
    np.testing.assert_array_equal(probabilities([flat], caches)[0], found.dtype.type(expit(-1.5)))
    tuned_head = tuned(flat, 0.5)
    assert (tuned_head.slope, tuned_head.intercept) == (0.0, -1.5)


def test_heads_of_a_blend_are_not_completed(
    heads: list[Head], caches: Path, tmp_path: Path
) -> None:
    """300 heads of 7,178 labels, most of which they did not train, would take 18 GB."""
    chosen = [
        h for h, name in zip(heads, itertools.cycle(KINDS), strict=False) if name == "logistic_rare"
    ]
    path = stored(chosen, "probability", np.full(2, 0.5), tmp_path / "blend.h5")
    predictor = Predictor.open(path, [caches])
    predictor.predict_proba()
    for model in predictor.models:
        rows, values = model.changed()
        assert len(values) == len(rows) < synthetic.K
        assert not hasattr(model.estimator, "coef_")


def test_results_do_not_depend_on_the_size_of_chunks(
    heads: list[Head], caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(heads, "logit", np.full(18, 1 / 18), tmp_path / "blend.h5")
    at_once = Predictor.open(path, [caches]).predict_proba()
    monkeypatch.setattr(prediction, "ROWS_AT_ONCE", 4)
    predictor = Predictor.open(path, [caches])
    np.testing.assert_allclose(predictor.predict_proba(), at_once, atol=1e-6)
    later = list(predictor.chunks(start=8))
    np.testing.assert_allclose(np.concatenate(later), at_once[8:], atol=1e-6)


def test_many_labels_make_small_chunks(heads: list[Head], caches: Path, tmp_path: Path) -> None:
    path = stored(heads[:1], "logit", np.ones(1), tmp_path / "blend.h5")
    predictor = Predictor.open(path, [caches])
    assert predictor.rows_at_once == 4096
    predictor.models[0].classes = np.arange(7178).astype(str)
    assert predictor.rows_at_once * 7178 <= 1 << 23
    predictor.models[0].classes = np.zeros(10**7, "U1")
    assert predictor.rows_at_once == 64
