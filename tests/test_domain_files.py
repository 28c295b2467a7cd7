"""A head that was frozen for one domain is kept in a file, and used as any other head."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from featcache import FeatureCache
from heads import GlobalThreshold, cli, commands
from heads.adapting import AdaptConfig, adapt
from heads.catalogue import read_entry
from heads.commands import BlendConfig
from heads.domain_heads import AdaptedModel, DomainHead
from heads.prediction import Predictor
from heads.refitting import RefitConfig, refit
from heads.report import ReportConfig, report
from heads.storage import Head, load, save
from tests import synthetic

STAGE_1, SOURCE, STAGE_2 = (synthetic.images(n, seed) for seed, n in enumerate((200, 220, 240), 40))
LABELLED = 40  # of Stage 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of a network and a model that was adapted to them."""
    root = tmp_path_factory.mktemp("data")
    synthetic.write(root / "stage_1/net0.h5", STAGE_1, shifted=True, views=2)
    synthetic.write(root / "validation/net0.h5", SOURCE, views=2)
    synthetic.write(root / "stage_2/net0.h5", STAGE_2, shifted=True, views=2, labelled=False)
    adapt(
        AdaptConfig(
            cache=str(root / "stage_1/net0.h5"),
            source=str(root / "validation/net0.h5"),
            out=str(root / "adapted.h5"),
            dropout="0.2",
            cv=3,
        )
    )
    return root


def features(data: Path) -> np.ndarray:
    return np.asarray(FeatureCache(data / "stage_2/net0.h5").features)


@pytest.fixture(params=["own map", "domain", "labelled"])
def frozen(request: pytest.FixtureRequest, data: Path) -> DomainHead:
    """A head of Stage 1's own map, of a domain, and of one of which some labels are known."""
    X = features(data)
    labelled = X[:LABELLED], STAGE_2.Y[:LABELLED]
    model: AdaptedModel = synthetic.load_head(data / "adapted.h5").estimator
    if request.param == "own map":
        return model.for_domain()
    return model.for_domain(X, labelled if request.param == "labelled" else None)


def of_domain(data: Path, **more: Any) -> Head:
    """The stored model with a head for Stage 2 in its place."""
    stored = synthetic.load_head(data / "adapted.h5")
    labelled = features(data)[:LABELLED], STAGE_2.Y[:LABELLED]
    return replace(stored, estimator=stored.estimator.for_domain(features(data), labelled), **more)


def bare(head: DomainHead, network_id: str | None = None) -> Head:
    """All that a user of Python alone has."""
    classes = np.array(synthetic.CLASSES)
    return Head(head, classes, classes, network_id)


def test_a_frozen_head_comes_back_to_the_same_bits(
    frozen: DomainHead, data: Path, tmp_path: Path
) -> None:
    found = synthetic.load_head(save(tmp_path / "head.h5", bare(frozen))).estimator
    again = synthetic.load_head(save(tmp_path / "again.h5", bare(found))).estimator
    for X in (features(data), features(data)[:, 0].astype(np.float64)):
        for one in (found, again):
            assert isinstance(one, DomainHead)
            np.testing.assert_array_equal(one.predict_proba(X), frozen.predict_proba(X))
            assert (one.predict(X) != frozen.predict(X)).nnz == 0
    assert found.explain() == frozen.explain()
    assert found.signs == frozen.signs
    assert (found.gate_, found.share) == (frozen.gate_, frozen.share)
    assert (found.bias is None) == (frozen.bias is None)


def test_a_head_without_steps_and_with_another_rule_comes_back(data: Path, tmp_path: Path) -> None:
    head, X = of_domain(data).estimator, features(data)
    rule = GlobalThreshold().fit(head.predict_proba(X), STAGE_2.Y)
    head = replace(head, steps=(), decision=rule)
    found = synthetic.load_head(save(tmp_path / "head.h5", bare(head))).estimator
    chosen = head.predict_proba(X) >= rule.threshold_
    np.testing.assert_array_equal(found.predict(X).toarray(), chosen)
    assert found.explain() == head.explain() == ""


def test_only_files_with_frozen_heads_are_of_a_format_that_older_versions_refuse(
    data: Path, tmp_path: Path
) -> None:
    save(tmp_path / "head.h5", of_domain(data))
    words = {"cv": 0, "method": "uniform"}
    for name, files in (("old", ["adapted.h5"]), ("new", ["adapted.h5", "head.h5"])):
        places = [str(next(p for p in (data / f, tmp_path / f) if p.exists())) for f in files]
        commands.blend(BlendConfig(heads=places, out=str(tmp_path / f"{name}.h5"), **words))
    found = {}
    for path in (data / "adapted.h5", *sorted(tmp_path.glob("*.h5"))):
        with h5py.File(path) as file:
            found[path.name] = int(file.attrs["format"])
    assert found == {"adapted.h5": 2, "head.h5": 3, "new.h5": 3, "old.h5": 2}


def test_a_file_predicts_with_its_own_rule_and_says_why(
    frozen: DomainHead, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = FeatureCache(data / "stage_2/net0.h5")
    path = save(tmp_path / "head.h5", bare(frozen, cache.network_id))
    out = tmp_path / "submission.csv"
    assert cli.main(["predict", str(path), "--caches", str(cache.path), "--out", str(out)]) == 0
    assert frozen.explain() in capsys.readouterr().out
    predictor = Predictor.open(path, [cache.path])
    np.testing.assert_array_equal(
        predictor.predict_proba(), frozen.predict_proba(cache.features[:])
    )
    assert (predictor.predict() != frozen.predict(cache.features[:])).nnz == 0
    in_memory = Predictor.of(bare(frozen, cache.network_id), [cache])
    assert (in_memory.predict() != predictor.predict()).nnz == 0


def test_it_does_not_change_with_the_images_that_it_predicts(data: Path, tmp_path: Path) -> None:
    cache = FeatureCache(data / "stage_2/net0.h5")
    path = save(tmp_path / "head.h5", of_domain(data))
    few = cache.select(cache.ids[:20])
    P = [Predictor.of(load(path), [c]).predict_proba()[:20] for c in (cache, few)]
    np.testing.assert_allclose(P[0], P[1], atol=1e-6)


def test_a_cache_of_another_width_is_refused(data: Path, tmp_path: Path) -> None:
    other = FeatureCache.write(tmp_path / "other.h5", np.ones((4, 1, 6), np.float16), list("abcd"))
    head = bare(of_domain(data).estimator, other.network_id)
    with pytest.raises(ValueError, match=r"has 6 features, but a head of .* was fitted on 16"):
        Predictor.of(head, [other])


def test_it_is_listed_and_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = of_domain(data)
    folder = tmp_path / "heads"
    folder.mkdir()
    save(folder / "whole.h5", whole)
    save(folder / "bare.h5", bare(whole.estimator))
    for name in ("whole", "bare"):
        entry = read_entry(folder / f"{name}.h5")
        assert (entry.kind, entry.method, entry.rate) == ("domain head", "domain head", None)
        assert cli.main(["info", str(folder / f"{name}.h5")]) == 0
        text = capsys.readouterr().out
        assert "adapted head of one domain, 10 classes" in text
        for line in whole.estimator.explain().splitlines():
            assert line in text
        assert "expected F2" in text
        assert "nan" not in text
        assert ("# then frozen for one domain" in text) == (name == "whole")
    assert cli.main(["list", str(folder)]) == 0
    assert capsys.readouterr().out.count("domain head") == 2


def test_it_blends_and_is_reported_if_it_has_out_of_fold_scores(data: Path, tmp_path: Path) -> None:
    head = of_domain(data)
    path = str(save(tmp_path / "head.h5", head))
    out = tmp_path / "blend.h5"
    stored = commands.blend(BlendConfig([path, str(data / "adapted.h5")], str(out), cv=0))
    predictor = Predictor.open(out, [data / "stage_2"])
    X = features(data)
    model: AdaptedModel = synthetic.load_head(data / "adapted.h5").estimator
    each = {path: head.estimator, str(data / "adapted.h5"): model.for_domain(X)}
    wanted: Any = sum(
        w * each[name].predict_proba(X)
        for w, name in zip(stored.blend.weights_, stored.model_names, strict=True)
    )
    np.testing.assert_allclose(predictor.predict_proba(), wanted, atol=1e-6)
    page = report(ReportConfig(content=path, out=str(tmp_path / "page.html")))
    text = html.unescape(page.read_text("utf-8"))
    assert "domain head" in text
    assert head.estimator.explain() in text
    lonely = str(save(tmp_path / "bare.h5", bare(head.estimator)))
    with pytest.raises(ValueError, match=r"bare\.h5: has no out-of-fold scores"):
        commands.blend(BlendConfig([lonely], str(tmp_path / "none.h5")))
    with pytest.raises(ValueError, match=r"bare\.h5: has no out-of-fold scores"):
        report(ReportConfig(content=lonely, out=str(tmp_path / "none.html")))


def test_it_is_no_head_that_could_be_fitted_again(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "heads"
    folder.mkdir()
    save(folder / "head.h5", of_domain(data))
    (folder / "adapted.h5").write_bytes((data / "adapted.h5").read_bytes())
    new = [str(data / "stage_1"), str(data / "validation")]
    done = refit(RefitConfig(str(folder), new, out=str(tmp_path / "again")))
    assert done.left == ["head.h5"]
    assert [path.name for path in (tmp_path / "again").glob("*.h5")] == ["adapted.h5"]


def _shorter(name: str) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        values = file[name][()]
        del file[name]
        file[name] = values[:-1]

    return damage


def _narrower(file: h5py.File) -> None:
    values = file["adapted/source/W"][()]
    del file["adapted/source/W"]
    file["adapted/source/W"] = values[:, :-1]


@pytest.mark.parametrize(
    "damage",
    [
        _shorter("adapted/source/W"),
        _shorter("adapted/adapted/b"),
        _shorter("adapted/bias"),
        _narrower,
        lambda file: file.__delitem__("adapted/decision"),
        lambda file: file["adapted"].attrs.__setitem__("frozen", "{}"),
        lambda file: file["adapted"].attrs.__setitem__("frozen", "{"),
    ],
)
def test_damaged_files_are_refused_in_one_line(
    damage: Callable[[h5py.File], None], data: Path, tmp_path: Path
) -> None:
    path = save(tmp_path / "head.h5", of_domain(data))
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(ValueError, match=r"head\.h5: damaged") as caught:
        load(path)
    assert "\n" not in str(caught.value)
