"""``heads adapt`` and what is predicted with its files: no leak, same bits, blends, faults."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from featcache import FeatureCache
from heads import cli, commands
from heads.adapting import AdaptConfig, adapt
from heads.commands import BlendConfig
from heads.domain_heads import AdaptedModel
from heads.metrics import mean_fbeta
from heads.prediction import Predictor
from heads.report import ReportConfig, report
from heads.storage import load, save
from tests import synthetic

STAGE_1, SOURCE, STAGE_2 = (synthetic.images(n, seed) for seed, n in enumerate((200, 220, 240), 20))
Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of two networks: stage_1, validation, stage_2; an adapted model of each."""
    root = tmp_path_factory.mktemp("data")
    for network in (0, 1):
        name = f"net{network}.h5"
        synthetic.write(root / "stage_1" / name, STAGE_1, network, shifted=True, views=2)
        synthetic.write(root / "validation" / name, SOURCE, network, views=2)
        synthetic.write(
            root / "stage_2" / name, STAGE_2, network, shifted=True, views=2, labelled=False
        )
        adapt(config(root, network))
    return root


def config(root: Path, network: int = 0, out: str = "adapted") -> AdaptConfig:
    name = f"net{network}.h5"
    return AdaptConfig(
        cache=str(root / "stage_1" / name),
        source=str(root / "validation" / name),
        out=str(root / out / name),
        dropout="0.2",
        cv=3,
    )


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Verb:
    """Run a verb in this process: exit status, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return call


def test_from_caches_to_a_submission(data: Path, tmp_path: Path, run: Verb) -> None:
    out = tmp_path / "adapted.h5"
    words = ("--dropout", "0.2", "--cv", "3")
    source = data / "validation/net0.h5"
    status, text, errors = run(
        "adapt", data / "stage_1/net0.h5", "--source", source, "--out", out, *words
    )
    assert (status, errors) == (0, "")
    assert "share" in text
    assert "out-of-fold F2" in text
    submission = tmp_path / "submission.csv"
    status, text, errors = run(
        "predict", out, "--caches", data / "stage_2/net0.h5", "--out", submission
    )
    assert (status, errors) == (0, "")
    assert "gate" in text
    truth = synthetic.write_truth(tmp_path / "truth.csv", STAGE_2)
    adapted = commands.score(str(submission), [str(truth)])["fbeta"]
    cache = FeatureCache(data / "stage_2/net0.h5")
    model = synthetic.load_head(out).estimator
    at_home = mean_fbeta(
        STAGE_2.Y, model.decision.predict(1 / (1 + np.exp(-model.source.margins(cache.features))))
    )
    assert adapted > at_home + 0.05


def test_labels_of_the_new_domain_change_nothing_but_the_score(data: Path, tmp_path: Path) -> None:
    """The same images without labels, with true and with shuffled ones: the same submission."""
    shuffled = replace(STAGE_2, Y=np.random.default_rng(0).permutation(STAGE_2.Y))
    for name, some, labelled in (
        ("none", STAGE_2, False),
        ("true", STAGE_2, True),
        ("shuffled", shuffled, True),
    ):
        cache = tmp_path / name / "net0.h5"
        synthetic.write(cache, some, shifted=True, views=2, labelled=labelled)
        commands.predict(str(data / "adapted/net0.h5"), [str(cache)], str(tmp_path / f"{name}.csv"))
    written = [(tmp_path / f"{name}.csv").read_bytes() for name in ("none", "true", "shuffled")]
    assert written[0] == written[1] == written[2]
    truth, wrong = (
        synthetic.write_truth(tmp_path / f"truth{i}.csv", some)
        for i, some in enumerate((STAGE_2, shuffled))
    )
    scores = [commands.score(str(tmp_path / "none.csv"), [str(t)])["fbeta"] for t in (truth, wrong)]
    assert scores[0] > scores[1]


def test_files_give_back_the_same_bits(data: Path, tmp_path: Path) -> None:
    made = adapt(replace(config(data), out=str(tmp_path / "again.h5")))
    stored = synthetic.load_head(tmp_path / "again.h5")
    assert isinstance(stored.estimator, AdaptedModel)
    X = FeatureCache(data / "stage_2/net0.h5").features
    first, second = made.estimator.for_domain(X), stored.estimator.for_domain(X)
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    assert first.explain() == second.explain()
    assert stored.estimator.config == made.estimator.config
    for domain, scores in made.oof.items():
        np.testing.assert_array_equal(stored.oof[domain].proba, scores.proba.astype(np.float32))
    copy = save(tmp_path / "copy.h5", stored)
    third = synthetic.load_head(copy).estimator.for_domain(X)
    np.testing.assert_array_equal(third.predict_proba(X), first.predict_proba(X))


def test_adapted_models_blend_like_heads(data: Path, tmp_path: Path) -> None:
    files = [str(data / f"adapted/net{n}.h5") for n in (0, 1)]
    stored = commands.blend(BlendConfig(heads=files, out=str(tmp_path / "blend.h5")))
    assert all(model.oof == {} for model in stored.models)
    predictor = Predictor.open(tmp_path / "blend.h5", [data / "stage_2"])
    P = predictor.predict_proba()
    single = {}
    for n in (0, 1):
        cache = FeatureCache(data / f"stage_2/net{n}.h5")
        head = synthetic.load_head(data / f"adapted/net{n}.h5").estimator.for_domain(cache.features)
        single[files[n]] = head.predict_proba(cache.features)
    expected = sum(
        w * single[name] for w, name in zip(stored.blend.weights_, stored.model_names, strict=True)
    )
    np.testing.assert_allclose(P, expected, atol=1e-6)
    assert len(predictor.explanations()) == len(stored.models)


def test_the_report_tells_how_models_were_adapted(data: Path, tmp_path: Path) -> None:
    path = data / "adapted/net0.h5"
    page = report(ReportConfig(content=str(path), out=str(tmp_path / "a.html")))
    first, *_ = str(load(path).provenance["explanation"]).splitlines()
    text = html.unescape(page.read_text("utf-8"))
    assert "was adapted" in text
    assert first in text


def test_strict_looks_at_no_image_of_the_set(data: Path, tmp_path: Path) -> None:
    """Then an image is predicted alike, whatever the others; else their moments count."""
    cache = FeatureCache(data / "stage_2/net0.h5")
    few = tmp_path / "net0.h5"
    FeatureCache.write(
        few,
        cache.features[:20],
        cache.ids[:20],
        classes=synthetic.CLASSES,
        weight=cache.weight,
        bias=cache.bias,
        provenance={"network": "net0"},
    )
    adapted = data / "adapted/net0.h5"
    for strict in (True, False):
        P = [
            Predictor.open(adapted, [path], strict=strict).predict_proba()[:20]
            for path in (data / "stage_2/net0.h5", few)
        ]
        assert np.allclose(*P, atol=1e-6) == strict


def test_a_stage_1_without_positive_labels_is_refused_by_its_file(
    data: Path, tmp_path: Path, run: Verb
) -> None:
    cache = FeatureCache(data / "stage_1/net0.h5")
    path = tmp_path / "none.h5"
    FeatureCache.write(
        path,
        np.asarray(cache.features),
        cache.ids,
        labels=np.zeros((len(cache.ids), len(synthetic.CLASSES))),
        classes=synthetic.CLASSES,
        weight=cache.weight,
        bias=cache.bias,
        provenance={"network": "net0"},
    )
    out = tmp_path / "adapted.h5"
    status, _, error = run(
        "adapt", path, "--source", data / "validation/net0.h5", "--out", out, "--cv", 3
    )
    assert status == 2
    assert f"{path}: no label is positive" in error
    assert not out.exists()


def test_images_that_cannot_be_read_have_no_say(data: Path, tmp_path: Path) -> None:
    cache = FeatureCache(data / "stage_2/net0.h5")
    features = np.array(cache.features, np.float32)
    valid = np.ones(len(features), bool)
    valid[5:9] = False
    features[~valid] = 0
    more = {"classes": synthetic.CLASSES, "weight": cache.weight, "bias": cache.bias}
    FeatureCache.write(
        tmp_path / "some/net0.h5",
        features,
        cache.ids,
        valid=valid,
        provenance={"network": "net0"},
        **more,
    )
    FeatureCache.write(
        tmp_path / "rest/net0.h5",
        features[valid],
        cache.ids[valid],
        provenance={"network": "net0"},
        **more,
    )
    adapted = data / "adapted/net0.h5"
    some, rest = (Predictor.open(adapted, [tmp_path / name]) for name in ("some", "rest"))
    # Margins of single precision, up to 8 or so, are rounded otherwise in products of other
    # shapes: a few of 8 * 6e-8 there are as much of a small probability.
    np.testing.assert_allclose(some.predict_proba()[valid], rest.predict_proba(), rtol=5e-6)
    assert some.predict()[~valid].nnz == 0


def test_a_set_of_one_image_is_refused_by_name(data: Path, tmp_path: Path, run: Verb) -> None:
    one = synthetic.images(1, 99)
    cache = tmp_path / "one/net0.h5"
    synthetic.write(cache, one, shifted=True, views=2, labelled=False)
    words = ("--caches", cache, "--out", tmp_path / "out.csv")
    status, _, errors = run("predict", data / "adapted/net0.h5", *words)
    assert status == 2
    assert str(cache) in errors
    assert "1 unlabelled row" in errors
    assert run("predict", data / "adapted/net0.h5", *words, "--strict")[0] == 0


def test_caches_that_do_not_fit_are_refused(data: Path, tmp_path: Path, run: Verb) -> None:
    stage_1, out = data / "stage_1/net0.h5", tmp_path / "out.h5"
    for source, part in ((data / "validation/net1.h5", "network"), (stage_1, "holds image")):
        status, text, errors = run("adapt", stage_1, "--source", source, "--out", out)
        assert (status, text) == (2, "")
        assert part in errors
        assert errors.count("\n") == 1
    bare = tmp_path / "bare.h5"
    synthetic.write(bare, STAGE_1, shifted=True, views=2, weight=None, bias=None)
    status, _, errors = run("adapt", bare, "--source", data / "validation/net0.h5", "--out", out)
    assert status == 2
    assert "no last layer" in errors
    assert not out.exists()


@pytest.mark.parametrize("name", ["adapted/network/W", "adapted/source_moments/every"])
def test_damaged_files_are_refused(data: Path, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "broken.h5"
    broken.write_bytes((data / "adapted/net0.h5").read_bytes())
    with h5py.File(broken, "a") as file:
        values = file[name][()]
        del file[name]
        file[name] = values[:, :-1] if name.endswith("every") else values[:-1]
    with pytest.raises(ValueError, match="damaged"):
        load(broken)
