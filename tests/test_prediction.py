"""Heads meet the caches of their networks, and label every readable image."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from featcache import FeatureCache
from heads import Blend, DropoutLogistic, DropoutRidge, prediction
from heads.prediction import Predictor
from heads.storage import Head, StoredBlend, save
from tests import synthetic

N = 40
TRAIN, STAGE_2 = synthetic.images(100, 1), synthetic.images(N, 2)


def head(network: int, folder: Path, by_reference: bool = True, **provenance: Any) -> Head:
    """A head of a network, which knows it from a cache."""
    cache = synthetic.write(folder / f"{network}.h5", TRAIN, network, shifted=True)
    rows = cache.training()
    kind = DropoutLogistic if by_reference else DropoutRidge
    return Head(
        kind(dropout=0.1).fit(**rows),
        cache.classes,
        cache.class_names,
        cache.network_id,
        by_reference,
        provenance=provenance,
    )


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> list[Head]:
    folder = tmp_path_factory.mktemp("train")
    return [head(network, folder, threshold=0.25) for network in (0, 1)]


@pytest.fixture(scope="module")
def contents(heads: list[Head], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files head0.h5, head1.h5 and blend.h5 of both."""
    folder = tmp_path_factory.mktemp("contents")
    for network, one in enumerate(heads):
        save(folder / f"head{network}.h5", one)
    P = [
        one.estimator.predict_proba(synthetic.features(TRAIN, network, shifted=True))
        for network, one in enumerate(heads)
    ]
    blend = Blend(method="uniform").fit(P, TRAIN.Y)
    save(folder / "blend.h5", StoredBlend(blend, heads, ["head0.h5", "head1.h5"]))
    return folder


@pytest.fixture
def caches(tmp_path: Path) -> Path:
    for network in (0, 1):
        synthetic.write(tmp_path / f"{network}.h5", STAGE_2, network, shifted=True, labelled=False)
    return tmp_path


def refused(content: Path, caches: list[Path], *parts: str) -> None:
    """Opening fails with one line that has all the parts."""
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        Predictor.open(content, caches)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ matching


def test_each_head_gets_the_features_of_its_network(
    contents: Path, caches: Path, heads: list[Head]
) -> None:
    for network in (0, 1):
        predictor = Predictor.open(contents / f"head{network}.h5", [caches])
        X = FeatureCache(caches / f"{network}.h5").features
        np.testing.assert_array_equal(
            predictor.predict_proba(), heads[network].estimator.predict_proba(X)
        )
        assert predictor.ids.tolist() == STAGE_2.ids
        assert predictor.classes.tolist() == synthetic.CLASSES
    P = [
        one.estimator.predict_proba(FeatureCache(caches / f"{network}.h5").features)
        for network, one in enumerate(heads)
    ]
    both = Predictor.open(contents / "blend.h5", [caches]).predict_proba()
    # A small probability is as exact as its float32 margin, which is of the order of 10.
    least = min(float(p.min()) for p in P)
    rounding = 4 * float(np.spacing(np.float32(np.log(least))))
    np.testing.assert_allclose(both, (P[0] + P[1]) / 2, rtol=abs(rounding))
    # The two networks are not alike, so that a mix-up would show.
    assert np.abs(P[0] - P[1]).max() > 0.1


def test_how_caches_are_named_does_not_matter(contents: Path, caches: Path) -> None:
    expected = Predictor.open(contents / "blend.h5", [caches]).predict_proba()
    other = synthetic.write(caches / "elsewhere" / "x.h5", STAGE_2, 2, shifted=True)
    shutil.move(caches / "0.h5", caches / "elsewhere" / "z.h5")
    for places in (
        [caches / "1.h5", caches / "elsewhere" / "z.h5"],
        [caches / "elsewhere", caches],
        [caches, other.path, caches / "elsewhere" / "z.h5"],  # one that nobody needs
    ):
        found = Predictor.open(contents / "blend.h5", [str(place) for place in places])
        np.testing.assert_array_equal(found.predict_proba(), expected)


def test_weights_in_full_need_no_last_layer_in_the_cache(tmp_path: Path) -> None:
    ridge = head(0, tmp_path / "train", by_reference=False, threshold=0.4)
    save(tmp_path / "ridge.h5", ridge)
    X = synthetic.features(STAGE_2, shifted=True)
    cache = FeatureCache.write(
        tmp_path / "bare.h5", X, STAGE_2.ids, provenance={"network_id": ridge.network_id}
    )
    predictor = Predictor.open(tmp_path / "ridge.h5", [cache.path])
    expected = ridge.estimator.predict_proba(cache.features) >= 0.4
    np.testing.assert_array_equal(predictor.predict().toarray(), expected)
    names = [[synthetic.CLASSES[k] for k in np.flatnonzero(row)] for row in expected]
    assert predictor.label_sets() == names


def test_the_number_of_views_may_differ(contents: Path, tmp_path: Path, heads: list[Head]) -> None:
    cache = synthetic.write(tmp_path / "tta.h5", STAGE_2, shifted=True, views=3)
    predictor = Predictor.open(contents / "head0.h5", [cache.path])
    np.testing.assert_allclose(
        predictor.predict_proba(),
        heads[0].estimator.predict_proba(cache.x().mean(1)),
        atol=1e-6,
    )


# ------------------------------------------------------------- label sets


@pytest.mark.parametrize("content", ["head0.h5", "blend.h5"])
def test_rows_are_predicted_a_few_at_a_time(
    content: str, contents: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor.open(contents / content, [caches])
    at_once, sets = predictor.predict_proba(), predictor.label_sets()
    assert len(list(predictor.chunks())) == 1
    monkeypatch.setattr(prediction, "ROWS_AT_ONCE", 7)
    assert [len(chunk) for chunk in predictor.chunks()] == [7, 7, 7, 7, 7, 5]
    np.testing.assert_allclose(predictor.predict_proba(), at_once, rtol=1e-5)
    assert predictor.label_sets() == sets
    assert 0 < sum(map(len, sets)) < N * synthetic.K


def test_the_stored_cut_decides(contents: Path, caches: Path) -> None:
    one = Predictor.open(contents / "head0.h5", [caches])
    np.testing.assert_array_equal(one.predict().toarray(), one.predict_proba() >= 0.25)
    both = Predictor.open(contents / "blend.h5", [caches])
    assert isinstance(both.content, StoredBlend)
    cut = both.content.blend.threshold_
    np.testing.assert_array_equal(both.predict().toarray(), both.predict_proba() >= cut)


@pytest.mark.parametrize("rows", [7, 4096])
def test_unreadable_images_get_no_labels(
    rows: int, contents: Path, tmp_path: Path, heads: list[Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "ROWS_AT_ONCE", rows)
    bad = [{3, 20}, {20, 39}]
    for network in (0, 1):
        valid = np.array([row not in bad[network] for row in range(N)])
        synthetic.write(tmp_path / f"{network}.h5", STAGE_2, network, shifted=True, valid=valid)
    everything = Blend(method="uniform").fit(np.zeros((2, N, 10)), np.ones((N, 10)))
    assert everything.threshold_ == -np.inf
    save(tmp_path / "all" / "blend.h5", StoredBlend(everything, heads, ["a", "b"]))
    predictor = Predictor.open(tmp_path / "all" / "blend.h5", [tmp_path])
    readable = np.array([row not in {3, 20, 39} for row in range(N)])
    np.testing.assert_array_equal(predictor.readable, readable)
    chosen = predictor.predict()
    assert isinstance(chosen, csr_matrix)
    assert chosen.dtype == bool
    np.testing.assert_array_equal(chosen.toarray(), np.repeat(readable[:, None], 10, axis=1))
    sets = predictor.label_sets()
    assert [sets[row] for row in (3, 20, 39)] == [[], [], []]
    assert sets[4] == synthetic.CLASSES


# ------------------------------------------------------------------- faults


def test_a_missing_cache_is_named_by_its_network(
    contents: Path, caches: Path, heads: list[Head]
) -> None:
    (caches / "0.h5").unlink()
    wanted, have = str(heads[0].network_id)[:12], str(heads[1].network_id)[:12]
    for content in ("head0.h5", "blend.h5"):
        path = contents / content
        refused(
            path,
            [caches],
            f"{path}: needs a cache of network {wanted}",
            f"{caches / '1.h5'} ({have})",
        )


def test_features_without_a_name_are_matched_as_far_as_they_can_be(tmp_path: Path) -> None:
    """One such cache is taken for that of the head; of two nobody knows which it is."""
    X = synthetic.features(TRAIN)[:, 0]
    bare = FeatureCache.write(tmp_path / "train.h5", X, TRAIN.ids, labels=TRAIN.Y)
    fitted = DropoutRidge(dropout=0.1).fit(X, TRAIN.Y)
    stored = Head(fitted, bare.classes, bare.class_names, bare.network_id)
    stored.provenance["threshold"] = 0.3
    path = save(tmp_path / "stored" / "head.h5", stored)
    one = FeatureCache.write(tmp_path / "1.h5", synthetic.features(STAGE_2)[:, 0], STAGE_2.ids)
    expected = fitted.predict_proba(one.features)
    np.testing.assert_array_equal(Predictor.open(path, [one.path]).predict_proba(), expected)
    two = FeatureCache.write(tmp_path / "2.h5", synthetic.features(STAGE_2)[:, 0], STAGE_2.ids)
    refused(path, [one.path, two.path], f"{two.path} and {one.path} are of", "{'network': NAME}")
    wide = FeatureCache.write(tmp_path / "w.h5", np.ones((N, 9)), STAGE_2.ids)
    refused(path, [wide.path], f"{wide.path}: has 9 features", f"{path} was fitted on 16")
    named = synthetic.write(tmp_path / "named.h5", STAGE_2)
    refused(path, [named.path], f"{path}: needs a cache of network without id", str(named.path))


def test_two_caches_of_one_network_are_refused(contents: Path, caches: Path) -> None:
    shutil.copy(caches / "0.h5", caches / "copy.h5")
    refused(
        contents / "head0.h5",
        [caches],
        f"{caches / 'copy.h5'} and {caches / '0.h5'} are of one network",
    )


@pytest.mark.parametrize("how", ["other", "order", "fewer"])
def test_caches_of_different_images_are_refused(how: str, contents: Path, caches: Path) -> None:
    others = {
        "other": synthetic.images(N, 3),
        "order": synthetic.Images(STAGE_2.ids[::-1], STAGE_2.latent, STAGE_2.Y),
        "fewer": synthetic.Images(STAGE_2.ids[1:], STAGE_2.latent[1:], STAGE_2.Y[1:]),
    }
    synthetic.write(caches / "1.h5", others[how], 1, labelled=False, overwrite=True)
    refused(
        contents / "blend.h5",
        [caches],
        f"{caches / '1.h5'}: its images are not those of {caches / '0.h5'}",
    )
    # A head alone asks for nothing of the other cache.
    Predictor.open(contents / "head0.h5", [caches])


def test_a_cache_without_the_last_layer_is_named(
    contents: Path, tmp_path: Path, heads: list[Head]
) -> None:
    X = synthetic.features(STAGE_2)
    bare = {"network_id": heads[0].network_id}
    path = FeatureCache.write(tmp_path / "bare.h5", X, STAGE_2.ids, provenance=bare).path
    refused(contents / "head0.h5", [path], f"{path}: ", "got nothing")


def test_a_head_without_a_cut_is_refused(tmp_path: Path, caches: Path) -> None:
    path = save(tmp_path / "no" / "cut.h5", head(0, tmp_path / "train"))
    refused(path, [caches], f"{path}: has no threshold")


def test_folders_without_caches_are_refused(contents: Path, tmp_path: Path) -> None:
    refused(contents / "head0.h5", [tmp_path], f"{tmp_path}: no .h5 file there; check the folder")
    missing = tmp_path / "missing.h5"
    refused(contents / "head0.h5", [missing], f"{missing}: no such file")
    refused(contents / "head0.h5", [contents], f"{contents / 'blend.h5'}: no cache")
