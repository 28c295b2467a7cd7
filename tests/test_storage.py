"""Heads and blends come back from their files to the same bits, or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.base import clone

from heads import Blend, DropoutLogistic, DropoutLogisticCV, DropoutRidge, DropoutRidgeCV
from heads.given import GivenScores
from heads.storage import Head, OutOfFold, StoredBlend, load, refuse_existing, save
from tests import synthetic

W0, B0 = synthetic.last_layer()
IMAGES = synthetic.images(80, 1)
X = synthetic.features(IMAGES, shifted=True, views=2).astype(np.float16)
UNSEEN = synthetic.features(synthetic.images(30, 2), shifted=True).astype(np.float16)

ESTIMATORS = {
    "logistic": DropoutLogistic(dropout=0.2),
    "logistic gaussian": DropoutLogistic(dropout=0.2, noise="gaussian", l2=0.1),
    "logistic cv": DropoutLogisticCV(dropouts=(0.1, 0.3, 0.6), cv=3, scoring="log_loss"),
    "logistic per label": DropoutLogisticCV(
        dropouts=(0.2,), cv=3, scoring="log_loss", per_label=True
    ),
    "ridge": DropoutRidge(dropout=0.2, l2=0.5),
    "ridge cv": DropoutRidgeCV(dropouts=(0.2,), cv=3),
    "ridge per label": DropoutRidgeCV(dropouts=(0.2,), cv="loo", scoring="mse", per_label=True),
}


def fitted_head(estimator: Any, w0: str = "reference", **more: Any) -> Head:
    """A head whose W0 is kept by `reference`, in `full`, or that has `none`."""
    start = {} if w0 == "none" else {"coef_init": W0, "intercept_init": B0}
    return Head(
        estimator=clone(estimator).fit(X, IMAGES.Y, **start),
        classes=np.array(synthetic.CLASSES),
        names=np.array([f"näme {k}" for k in range(synthetic.K)]),
        network_id="abc123",
        by_reference=w0 == "reference",
        **more,
    )


@pytest.fixture(scope="module")
def simple() -> Head:
    rng = np.random.default_rng(0)
    Y = csr_matrix(IMAGES.Y)
    oof = {
        "target": OutOfFold(
            np.array(IMAGES.ids),
            rng.random(IMAGES.Y.shape).astype(np.float32),
            Y,
            rng.integers(0, 3, len(IMAGES.ids)),
            rng.random(IMAGES.Y.shape) < 0.2,
        ),
        "source": OutOfFold(
            np.array(["é", "b"]), np.ones((2, 10), np.float32), Y[:2], np.zeros(2, int)
        ),
    }
    return fitted_head(
        DropoutLogisticCV(dropouts=(0.2,), cv=3),
        oof=oof,
        provenance={"command": "heads fit 'a b.h5'", "threshold": 0.25, "nested": {"a": [1, 2.5]}},
    )


@pytest.fixture
def path(tmp_path: Path, simple: Head) -> Path:
    return save(tmp_path / "head.h5", simple)


def assert_oof_equal(one: dict[str, OutOfFold], other: dict[str, OutOfFold]) -> None:
    assert one.keys() == other.keys()
    for domain, expected in one.items():
        found = other[domain]
        assert found.ids.tolist() == expected.ids.tolist()
        np.testing.assert_array_equal(found.proba, expected.proba)
        np.testing.assert_array_equal(found.Y.toarray(), expected.Y.toarray())
        np.testing.assert_array_equal(found.missed, expected.missed)
        assert (found.mask is None) == (expected.mask is None)
        if expected.mask is not None:
            np.testing.assert_array_equal(found.mask, expected.mask)


# --------------------------------------------------------------- round trips


@pytest.mark.parametrize("w0", ["reference", "full", "none"])
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_a_head_predicts_the_same_bits(name: str, w0: str, tmp_path: Path) -> None:
    expected = fitted_head(ESTIMATORS[name], w0)
    read = synthetic.load_head(save(tmp_path / "head.h5", expected))
    # What was read can be written, before it has its W0 again.
    found = synthetic.load_head(save(tmp_path / "copy.h5", read))
    if w0 == "reference":
        with pytest.raises(ValueError, match=r"what differs from the last layer of network abc123"):
            found.complete(None)
        with pytest.raises(ValueError, match=r"shape \(10, 16\); got shape \(16, 10\)"):
            found.complete(W0.T)
        found.complete(W0)
    for method in ("predict_proba", "decision_function", "predict"):
        np.testing.assert_array_equal(
            getattr(found.estimator, method)(UNSEEN), getattr(expected.estimator, method)(UNSEEN)
        )
    old, new = vars(expected.estimator), vars(found.estimator)
    kept = {key for key in old if key.endswith("_") and not key.startswith("oof_")}
    assert kept <= set(new)
    for key in kept - {"cv_results_", "calibration_"}:
        np.testing.assert_array_equal(new[key], old[key])
    assert old.get("calibration_") == new.get("calibration_")
    for key, values in old.get("cv_results_", {}).items():
        np.testing.assert_array_equal(new["cv_results_"][key], values)
    found.complete(None)  # nothing is left to do


def test_a_head_of_one_label_comes_back(tmp_path: Path) -> None:
    estimator = DropoutLogistic(dropout=0.2).fit(X, IMAGES.Y[:, :1])
    one = np.array(synthetic.CLASSES[:1])
    found = synthetic.load_head(save(tmp_path / "one.h5", Head(estimator, one, one))).estimator
    np.testing.assert_array_equal(found.classes_, estimator.classes_)
    np.testing.assert_array_equal(found.predict(UNSEEN), estimator.predict(UNSEEN))


def test_names_of_features_come_back(tmp_path: Path) -> None:
    head = fitted_head(DropoutRidge())
    names = np.array([f"ü{j}" for j in range(synthetic.D)], dtype=object)
    head.estimator.feature_names_in_ = names  # as of a table of pandas
    read = synthetic.load_head(save(tmp_path / "named.h5", head))
    found = synthetic.load_head(save(tmp_path / "copy.h5", read)).estimator.feature_names_in_
    assert found.dtype == object
    assert found.tolist() == names.tolist()


def test_parameters_of_numpys_types_come_back_as_numbers(tmp_path: Path) -> None:
    given = {
        "dropouts": np.array([0.2]),
        "cv": np.int64(3),
        "min_positives": np.int32(1),
        "random_state": np.uint8(4),
        "beta": np.float32(1),
        "l2": np.float64(0.5),
    }
    path = save(tmp_path / "head.h5", fitted_head(DropoutRidgeCV(**given)))
    found = synthetic.load_head(path).estimator
    assert {key: found.get_params()[key] for key in given} == given | {"dropouts": [0.2]}
    assert type(found.cv) is int


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"classes": np.array(["a", "b"])}, "there are 2 classes for 10 labels; give one each"),
        ({"names": np.array(["a", "b"])}, "there are 2 names for 10 labels; give one each"),
        ({"estimator": DropoutRidge()}, "the DropoutRidge is not fitted; fit it before"),
        (
            {"estimator": DropoutRidge().fit(X, IMAGES.Y[:, 0])},
            r"cannot store a DropoutRidge of a 1-D target; fit it with Y\[:, None\]",
        ),
        ({"estimator": GivenScores("a", "0"), "names": np.array(["a"])}, "there are 1 names for"),
    ],
)
def test_heads_that_cannot_be_read_again_are_refused(
    changed: dict[str, Any], words: str, tmp_path: Path, simple: Head
) -> None:
    with pytest.raises(ValueError, match=words):
        save(tmp_path / "bad.h5", replace(simple, **changed))
    assert not list(tmp_path.iterdir())


def test_parameters_fit_the_same_head_again(path: Path, simple: Head) -> None:
    found = synthetic.load_head(path)
    again = clone(found.estimator).fit(X, IMAGES.Y, coef_init=W0, intercept_init=B0)
    np.testing.assert_array_equal(again.coef_, simple.estimator.coef_)


def test_what_is_known_of_a_head_comes_back(path: Path, simple: Head) -> None:
    found = synthetic.load_head(path)
    assert found.classes.tolist() == simple.classes.tolist()
    assert found.names.tolist() == simple.names.tolist()
    assert found.network_id == "abc123"
    assert found.by_reference
    assert found.provenance == simple.provenance
    assert_oof_equal(simple.oof, found.oof)


def test_only_changed_rows_are_stored(tmp_path: Path) -> None:
    Y = IMAGES.Y.copy()
    Y[:, [2, 7]] = 0
    Y[:3, 7] = 1
    estimator = DropoutLogistic(dropout=0.2, min_positives=4).fit(
        X, Y, coef_init=W0, intercept_init=B0
    )
    head = Head(estimator, np.array(synthetic.CLASSES), np.array(synthetic.CLASSES), "abc", True)
    with h5py.File(save(tmp_path / "rare.h5", head)) as file:
        trained = [k for k in range(10) if k not in (2, 7)]
        assert file["coef/rows"][()].tolist() == trained
        np.testing.assert_array_equal(file["coef/values"][()], estimator.coef_[trained])
        assert "coef_init" not in file
    found = synthetic.load_head(tmp_path / "rare.h5")
    found.complete(W0)
    np.testing.assert_array_equal(found.estimator.coef_, estimator.coef_)
    np.testing.assert_array_equal(
        found.estimator.predict_proba(UNSEEN), estimator.predict_proba(UNSEEN)
    )


def test_a_row_of_which_some_weights_are_unchanged_is_stored(tmp_path: Path) -> None:
    silent = X.copy()
    silent[:, :, 3] = 0
    estimator = DropoutRidge(dropout=0.2).fit(silent, IMAGES.Y, coef_init=W0, intercept_init=B0)
    np.testing.assert_array_equal(estimator.coef_[:, 3], W0[:, 3])
    labels = np.array(synthetic.CLASSES)
    path = save(tmp_path / "silent.h5", Head(estimator, labels, labels, "abc", True))
    found = synthetic.load_head(path)
    found.complete(W0)
    np.testing.assert_array_equal(found.estimator.coef_, estimator.coef_)


def test_unchanged_weights_take_no_rows(tmp_path: Path) -> None:
    head = fitted_head(DropoutLogistic(min_positives=1000))
    with h5py.File(save(tmp_path / "same.h5", head)) as file:
        assert file["coef/values"].shape == (0, synthetic.D)
    found = synthetic.load_head(tmp_path / "same.h5")
    found.complete(W0)
    np.testing.assert_array_equal(found.estimator.coef_, W0)


def stored_blend() -> StoredBlend:
    models = [fitted_head(ESTIMATORS[name]) for name in ("logistic cv", "ridge cv")]
    scores = [model.estimator.oof_predict_proba_ for model in models]
    blend = Blend(beta=1, method="simplex", average="logit").fit(scores, IMAGES.Y)
    oof = OutOfFold(
        np.array(IMAGES.ids),
        blend.predict_proba(scores),
        csr_matrix(IMAGES.Y),
        np.zeros(len(IMAGES.ids), int),
    )
    names = ["heads/a.h5", "heads/ü.h5"]
    return StoredBlend(blend, models, names, {"target": oof}, {"command": "heads blend"})


def test_a_blend_comes_back(tmp_path: Path) -> None:
    stored = stored_blend()
    found = synthetic.load_blend(save(tmp_path / "blend.h5", stored))
    assert found.blend.get_params() == stored.blend.get_params()
    np.testing.assert_array_equal(found.blend.weights_, stored.blend.weights_)
    assert found.blend.threshold_ == stored.blend.threshold_
    assert found.blend.score_ == stored.blend.score_
    for key, values in stored.blend.path_.items():
        np.testing.assert_array_equal(found.blend.path_[key], values)
    assert found.model_names == stored.model_names
    assert found.provenance == stored.provenance
    assert_oof_equal(stored.oof, found.oof)
    for model in found.models:
        model.complete(W0)
    scores = [
        [model.estimator.predict_proba(UNSEEN) for model in some.models] for some in (stored, found)
    ]
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(
        found.blend.predict(scores[1]).toarray(), stored.blend.predict(scores[0]).toarray()
    )


@pytest.mark.parametrize("threshold", [np.inf, -np.inf, np.float32(0.1)])
def test_any_threshold_comes_back(threshold: float, tmp_path: Path) -> None:
    stored = stored_blend()
    stored.blend.threshold_ = threshold
    found = synthetic.load_blend(save(tmp_path / "blend.h5", stored))
    assert found.blend.threshold_ == threshold


def test_a_long_history_is_no_trouble(tmp_path: Path, simple: Head) -> None:
    # Attributes of HDF5 are often held to be limited to 64 KiB.
    names = [f"heads/of/some/network/number/{m}/of/very/many/networks.h5" for m in range(3000)]
    head = Head(simple.estimator, simple.classes, simple.names, provenance={"heads": names})
    found = load(save(tmp_path / "long.h5", head))
    assert found.provenance["heads"] == names


def test_nothing_in_the_file_is_pickled(path: Path, tmp_path: Path) -> None:
    for file_path in (path, save(tmp_path / "blend.h5", stored_blend())):
        with h5py.File(file_path) as file:
            checked: list[str] = []

            def plain(name: str, item: Any, checked: list[str] = checked) -> None:
                if isinstance(item, h5py.Dataset):
                    text = h5py.check_string_dtype(item.dtype)
                    assert item.dtype.kind in "biuf" or text is not None, name
                    assert text is None or text.encoding == "utf-8"
                    checked.append(name)
                for key, value in item.attrs.items():
                    assert isinstance(value, (str, np.integer, np.bool_)), (name, key)

            file.visititems(plain)
            plain("/", file)
            assert len(checked) > 8
            json.loads(file.attrs["provenance"])
        assert b"\x80\x04\x95" not in file_path.read_bytes()  # how a pickle begins


# ------------------------------------------------------------------- faults


def test_an_existing_file_is_refused_and_left(path: Path, simple: Head) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"head\.h5: exists already; pass --overwrite"):
        save(path, simple)
    assert path.read_bytes() == before
    save(path, Head(simple.estimator, simple.classes, simple.names), overwrite=True)
    assert load(path).provenance == {}


def test_a_failure_leaves_no_file_and_keeps_the_old_one(
    path: Path, simple: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    broken = Head(simple.estimator, simple.classes, simple.names, provenance={"what": object()})
    with pytest.raises(TypeError):
        save(tmp_path / "new.h5", broken)
    with pytest.raises(TypeError):
        save(path, broken, overwrite=True)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("heads.storage.write_oof", full)
    with pytest.raises(ValueError, match=r"head\.h5.*space") as caught:
        save(path, simple, overwrite=True)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["head.h5"]


def _denied(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied", "/there/.x.h5.a1b2c3d4")


@pytest.mark.parametrize(
    ("module", "name", "early"),
    [(tempfile, "TemporaryFile", True), (tempfile, "mkstemp", False), (os, "replace", False)],
)
def test_a_place_that_takes_no_file_is_told_by_the_name_asked_for(
    module: Any,
    name: str,
    early: bool,
    simple: Head,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "there" / "x.h5"
    out.parent.mkdir()
    monkeypatch.setattr(module, name, _denied)
    with pytest.raises(ValueError, match="cannot be written") as error:
        refuse_existing(out, False) if early else save(out, simple)
    told = f"{out}: cannot be written (Permission denied); choose another --out"
    assert str(error.value) == told
    assert list(out.parent.iterdir()) == []


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "new" / "folder" / "x.h5", False)
    refuse_existing(tmp_path / "x.h5", False)
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file.csv"
    file.write_text("mine")
    told = rf"file\.csv/new/x\.h5: cannot be written \({file} is no folder\); choose another --out"
    with pytest.raises(ValueError, match=told):
        refuse_existing(file / "new" / "x.h5", False)
    assert file.read_text() == "mine"


def test_only_heads_are_stored(tmp_path: Path) -> None:
    labels = np.array(["a"])
    with pytest.raises(ValueError, match="cannot store a Blend; only DropoutRidge, "):
        save(tmp_path / "x.h5", Head(Blend(), labels, labels))
    assert list(tmp_path.iterdir()) == []


def _text(path: Path) -> None:
    path.write_text("image_id,labels\n")


def _nothing(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def _cache(path: Path) -> None:
    path.unlink()
    synthetic.write(path, IMAGES)


def _inside(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return damage


def _replace(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return change


def _attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(name, value)


def _without(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.__delitem__(name)


def _without_attribute(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__delitem__(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_nothing, "no such file"),
        (_text, "not an HDF5 file"),
        (_cut_off, "not an HDF5 file"),
        (_cache, "no head or blend"),
        (_inside(_without_attribute("kind")), "no head or blend"),
        (_inside(_without_attribute("format")), "no head or blend"),
        (_folder, "is a folder; give a file made by `heads fit` or `blend`"),
        (_inside(_attribute("format", "two")), "no head or blend"),
        (_inside(_attribute("format", [1, 2])), "no head or blend"),
        (_inside(_attribute("kind", ["head", "blend"])), "no head or blend"),
        (_inside(_attribute("format", 4)), "format 4, this version reads up to 3; upgrade"),
        (_inside(_without("coef")), "damaged"),
        (_inside(_without("coef/values")), "damaged"),
        (_inside(_without("classes/id")), "damaged"),
        (_inside(_without("oof/target/proba")), "damaged"),
        (_inside(_without_attribute("estimator")), "damaged"),
        (_inside(_without_attribute("provenance")), "damaged"),
        (_inside(_attribute("estimator", "{")), "damaged"),
        (_inside(_attribute("estimator", '{"class": "Forest"}')), "damaged"),
        (
            _inside(_attribute("estimator", '{"class": "DropoutRidge", "params": {"depth": 3}}')),
            "damaged",
        ),
        (_inside(_replace("oof/target/indptr", [0, 5])), "damaged"),
        (_inside(_replace("oof/target/indices", np.full(3, 99))), "damaged"),
        (_inside(_replace("classes/id", [1, 2])), "damaged"),
    ],
)
def test_other_files_are_refused_in_one_line(
    damage: Callable[[Path], None], message: str, path: Path
) -> None:
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weights", "path", "model_names", "models/1"])
def test_a_damaged_blend_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "blend.h5", stored_blend())
    _inside(_without(name))(path)
    with pytest.raises(ValueError, match=r"blend\.h5: damaged") as caught:
        load(path)
    assert "\n" not in str(caught.value)
