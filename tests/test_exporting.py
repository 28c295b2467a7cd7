"""Heads that went back into their networks give the probabilities and labels of `predict`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from featcache import FeatureCache, runs
from featcache.exporting import TunedHead, put_back, write_program
from featcache.extraction import extract
from featcache.images import decode, find_images
from featcache.networks import NetworkSpec
from featcache.settings import ExtractionConfig
from featcache.views import Preprocessing, to_array
from heads import DropoutRidge, commands
from heads.adapting import AdaptConfig, adapt
from heads.cli import main
from heads.commands import FitConfig
from heads.exporting import cut_of, tuned
from heads.prediction import Predictor
from heads.storage import Head, load, save
from tests import tiny

FLOAT16 = 3e-3  # what rounding of cached features may do to a probability


class PooledNet(nn.Module):
    """Ends in a convolution of 1 x 1, as some timm models do."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Conv2d(6, num_classes, 1)

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.body(x)).flatten(1)


def pooled(num_classes):
    return PooledNet(num_classes)


def make_run(folder, arch, seed=0):
    """A run with untrained weights whose preprocessing has a size, a crop and channels."""
    torch.manual_seed(seed)
    classes = sorted(tiny.COLOURS)
    spec = NetworkSpec(arch, len(classes))
    network = spec.build().eval()
    folder.mkdir(parents=True)
    preprocessing = {
        "image_size": 12,
        "crop": 0.9,
        "interpolation": "bilinear",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.25],
    }
    config = {
        "format": runs.FORMAT,
        "network": {"arch": arch, "num_classes": len(classes), "kwargs": {}},
        "preprocessing": preprocessing,
    }
    rows = [("label_code", "description"), *((c, f"the colour {c}") for c in classes)]
    runs.write_rows(folder / runs.CLASSES, rows)
    runs.save_weights(folder / runs.WEIGHTS, network)
    runs.write_text(folder / runs.CONFIG, json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["tests.tiny:network", f"{__name__}:pooled"])
def data(request, tmp_path_factory):
    """Images, a run, a cache of the plain view."""
    folder = tmp_path_factory.mktemp("export")
    tiny.make_data(folder)
    run = make_run(folder / "run", request.param)
    cache = folder / "cache.h5"
    extract(
        ExtractionConfig(
            run=str(run),
            images=str(folder / "images"),
            labels=[str(folder / "labels.csv")],
            out=str(cache),
            device="cpu",
            workers=0,
            threads=1,
        )
    )
    return folder


def fit(data, out, **more):
    config = FitConfig(cache=str(data / "cache.h5"), out=str(out), dropout="0.2,0.5", cv=3, **more)
    commands.fit(config)
    return out


def pixels_of(data):
    found = find_images(data / "images")
    preprocessing = Preprocessing(image_size=12, crop=0.9)
    frames = [preprocessing.frame(decode(found.path(row))) for row in range(len(found))]
    return np.stack([to_array(frame) for frame in frames])


def run_file(path, pixels):
    """Probabilities, chosen labels and what the file says of itself."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        about = json.loads(session.get_modelmeta().custom_metadata_map["about"])
        return *session.run(None, {"pixels": pixels}), about
    extra = {"about.json": ""}
    with open(path, "rb") as file:
        program = torch.export.load(file, extra_files=extra)
    p, chosen = program.module()(torch.from_numpy(pixels))
    return p.numpy(), chosen.numpy(), json.loads(extra["about.json"])


@pytest.mark.parametrize("ending", ["pt", "onnx"])
@pytest.mark.parametrize(("method", "decision"), [("logistic", "global"), ("ridge", "per-class")])
def test_the_file_predicts_what_the_head_predicts(data, tmp_path, method, decision, ending, capsys):
    head = fit(data, tmp_path / "head.h5", method=method, decision=decision)
    out = tmp_path / f"model.{ending}"
    words = ["export", str(head), "--run", str(data / "run"), "--out", str(out)]
    assert main(words) == 0
    assert "note:" not in capsys.readouterr().out
    pixels = pixels_of(data)
    p, chosen, about = run_file(out, pixels)
    predictor = Predictor.open(head, [data / "cache.h5"])
    expected, sets = predictor.predict_proba(), predictor.predict().toarray()
    np.testing.assert_allclose(p, expected, atol=FLOAT16)
    threshold = np.asarray(about["threshold"])
    sure = np.abs(expected - threshold) > FLOAT16
    assert sure.mean() > 0.9
    assert 0 < sets[sure].sum() < sure.sum()
    np.testing.assert_array_equal(chosen[sure], sets[sure])
    assert about["classes"] == sorted(tiny.COLOURS)
    assert about["names"] == [f"the colour {c}" for c in sorted(tiny.COLOURS)]
    assert about["preprocessing"]["image_size"] == 12
    assert about["network_id"] == FeatureCache(data / "cache.h5").network_id
    assert about["chosen as the head does"]
    # Any number of images, and images do not touch each other.
    np.testing.assert_allclose(run_file(out, pixels[:1])[0], p[:1], atol=1e-6)
    np.testing.assert_allclose(run_file(out, pixels[4:9])[0], p[4:9], atol=1e-6)


def test_a_rule_that_is_no_cut_is_replaced_by_the_best_cut_and_that_is_said(data, tmp_path, capsys):
    head = fit(data, tmp_path / "head.h5")
    out = tmp_path / "model.pt"
    assert main(["export", str(head), "--run", str(data / "run"), "--out", str(out)]) == 0
    assert "--decision global" in capsys.readouterr().out
    p, chosen, about = run_file(out, pixels_of(data))
    stored = load(head)
    np.testing.assert_allclose(about["threshold"], stored.provenance["threshold"], rtol=1e-6)
    assert not about["chosen as the head does"]
    np.testing.assert_array_equal(chosen, p >= np.float32(about["threshold"]))


def test_limits_of_labels_are_no_cut(data, tmp_path):
    stored = load(fit(data, tmp_path / "head.h5", decision="global", min_labels=1))
    threshold, exact = cut_of(stored)
    assert threshold == stored.decision.threshold_
    assert not exact


def test_clipped_scores_of_a_ridge_without_calibration(data, tmp_path):
    cache = FeatureCache(data / "cache.h5")
    rows = cache.training()
    estimator = DropoutRidge(0.3).fit(rows["X"], rows["Y"])
    head = Head(estimator, cache.classes, cache.class_names, provenance={"threshold": 0.4})
    run = runs.Run.open(data / "run")
    exported = put_back(run, run.load_network(), tuned(head, cut_of(head)[0]))
    out = write_program(exported, tmp_path / "model.pt2", {}, head.names)
    p, _, _ = run_file(out, pixels_of(data))
    np.testing.assert_allclose(p, estimator.predict_proba(cache.features), atol=FLOAT16)


# ------------------------------------------------------------------------ refused


def test_wrong_use_is_a_line_and_leaves_nothing(data, tmp_path, capsys):
    head = fit(data, tmp_path / "head.h5")
    run, out = str(data / "run"), tmp_path / "model.onnx"

    def refused(*words):
        assert main(["export", *map(str, words)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert not out.exists()
        return message

    other = make_run(tmp_path / "other", "tests.tiny:network", seed=1)
    assert "fitted on network" in refused(head, "--run", other, "--out", out)
    assert ".pt or .onnx" in refused(head, "--run", run, "--out", tmp_path / "model.bin")
    blend = tmp_path / "blend.h5"
    assert main(["blend", str(head), "--out", str(blend)]) == 0
    capsys.readouterr()
    assert "one by one" in refused(blend, "--run", run, "--out", out)
    assert "no config.json" in refused(head, "--run", tmp_path, "--out", out)
    (tmp_path / "there.pt").write_text("mine")
    assert "--overwrite" in refused(head, "--run", run, "--out", tmp_path / "there.pt")
    stored = load(head)
    stored.decision, stored.provenance = None, {}
    bare = save(tmp_path / "bare.h5", stored)
    assert "no threshold" in refused(bare, "--run", run, "--out", out)


def test_other_classes_and_features_are_refused(data):
    run = runs.Run.open(data / "run")
    network = run.load_network()
    fitting = {"weight": np.zeros((4, 3)), "bias": np.zeros(4), "threshold": 0.5}
    with pytest.raises(ValueError, match="classes are not"):
        put_back(run, network, TunedHead(**fitting, classes=run.classes[::-1]))
    with pytest.raises(ValueError, match="fitted on 3"):
        put_back(run, network, TunedHead(**fitting, classes=run.classes))


@pytest.mark.parametrize(
    ("package", "ending", "extra"), [("onnxscript", "onnx", "onnx"), ("torch", "pt", "extract")]
)
def test_a_missing_extra_is_named(data, tmp_path, capsys, monkeypatch, package, ending, extra):
    head = fit(data, tmp_path / "head.h5")
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / f"model.{ending}"
    assert main(["export", str(head), "--run", str(data / "run"), "--out", str(out)]) == 2
    assert f"featcache-heads[{extra}]" in capsys.readouterr().err
    assert not out.exists()


def test_a_program_that_computes_something_else_is_not_written(data, tmp_path, monkeypatch):
    run = runs.Run.open(data / "run")
    head = load(fit(data, tmp_path / "head.h5"))
    head.complete(FeatureCache(data / "cache.h5").weight)
    exported = put_back(run, run.load_network(), tuned(head, 0.5))
    traced = torch.export.export

    def other(module, *args, **kwargs):
        program = traced(module, *args, **kwargs)
        module.network.register_forward_hook(lambda *_: torch.zeros(2, 4))
        return program

    monkeypatch.setattr(torch.export, "export", other)
    with pytest.raises(ValueError, match="not written"):
        write_program(exported, tmp_path / "model.pt", {}, head.names)
    assert not (tmp_path / "model.pt").exists()


# ------------------------------------------------------------------ adapted models


@pytest.fixture(scope="module")
def adapted(data, tmp_path_factory):
    """An adapted model of half of the images, the other half being the source."""
    folder = tmp_path_factory.mktemp("adapted")
    ids = FeatureCache(data / "cache.h5").ids
    for name, some in (("target", ids[::2]), ("source", ids[1::2])):
        (folder / f"{name}.txt").write_text("".join(f"{i}\n" for i in some))
        extract(
            ExtractionConfig(
                run=str(data / "run"),
                images=str(data / "images"),
                labels=[str(data / "labels.csv")],
                ids=str(folder / f"{name}.txt"),
                out=str(folder / f"{name}.h5"),
                device="cpu",
                workers=0,
                threads=1,
            )
        )
    adapt(
        AdaptConfig(
            cache=str(folder / "target.h5"),
            source=str(folder / "source.h5"),
            out=str(folder / "adapted.h5"),
            dropout="0.2,0.5",
            cv=3,
        )
    )
    return folder


@pytest.mark.parametrize("ending", ["pt", "onnx"])
@pytest.mark.parametrize("own", [True, False])
def test_an_adapted_model_is_frozen_for_its_domain(data, adapted, tmp_path, own, ending, capsys):
    out = tmp_path / f"model.{ending}"
    words = ["export", adapted / "adapted.h5", "--run", data / "run", "--out", out]
    words += [] if own else ["--domain", data / "cache.h5"]
    assert main([str(word) for word in words]) == 0
    assert "expected F2" in capsys.readouterr().out  # what it decides by is no threshold
    p, chosen, about = run_file(out, pixels_of(data))
    features = FeatureCache(data / "cache.h5").features
    model = load(adapted / "adapted.h5").estimator
    heads = {name: model.for_domain(X) for name, X in (("own", None), ("domain", features))}
    wanted = heads["own" if own else "domain"].predict_proba(features)
    np.testing.assert_allclose(p, wanted, atol=FLOAT16)
    np.testing.assert_array_equal(chosen, p >= np.float32(about["threshold"]))
    assert 0 < chosen.mean() < 1


@pytest.fixture(scope="module")
def of_domain(data, adapted):
    """The model with a head in its place that some labelled rows have moved, a threshold kept."""
    cache, stored = FeatureCache(data / "cache.h5"), load(adapted / "adapted.h5")
    rows = cache.training()
    Y = np.maximum(rows["Y"].toarray(), np.arange(4) == 2)  # one label is everywhere here
    head = stored.estimator.for_domain(cache.features, (rows["X"], Y))
    assert np.abs(head.bias).max() > 0.05
    return replace(stored, estimator=head)


@pytest.mark.parametrize("ending", ["pt", "onnx"])
def test_a_stored_head_of_a_domain_is_exported_with_its_bias(
    data, of_domain, tmp_path, ending, capsys
):
    out = tmp_path / f"model.{ending}"
    path = save(tmp_path / "head.h5", of_domain)
    assert main(["export", str(path), "--run", str(data / "run"), "--out", str(out)]) == 0
    assert "expected F2" in capsys.readouterr().out
    pixels = pixels_of(data)
    p, chosen, about = run_file(out, pixels)
    head, features = of_domain.estimator, FeatureCache(data / "cache.h5").features
    wanted = Predictor.open(path, [data / "cache.h5"]).predict_proba()
    np.testing.assert_allclose(p, wanted, atol=FLOAT16)
    unmoved = replace(head, bias=None).predict_proba(features)
    assert np.abs(p - unmoved).max() > 3 * FLOAT16
    np.testing.assert_array_equal(chosen, p >= np.float32(about["threshold"]))
    np.testing.assert_allclose(run_file(out, pixels[4:9])[0], p[4:9], atol=1e-6)


def test_a_bias_of_any_size_leaves_probabilities(data, of_domain, tmp_path):
    """The same as predict_proba gives, also where logits are far from zero."""
    bias = np.array([-30.0, 30.0, 0.0, 2.0])
    head = replace(of_domain, estimator=replace(of_domain.estimator, bias=bias))
    run = runs.Run.open(data / "run")
    exported = put_back(run, run.load_network(), tuned(head, 0.5))
    p, _, _ = run_file(
        write_program(exported, tmp_path / "model.pt", {}, head.names), pixels_of(data)
    )
    wanted = head.estimator.predict_proba(FeatureCache(data / "cache.h5").features)
    np.testing.assert_allclose(p, wanted, atol=FLOAT16)


def test_a_head_of_a_domain_needs_a_cut_and_no_domain(data, of_domain, tmp_path, capsys):
    whole = save(tmp_path / "whole.h5", of_domain)
    bare = save(tmp_path / "bare.h5", replace(of_domain, oof={}, decision=None))
    cut = replace(of_domain, oof={}, decision=None, provenance={"threshold": 0.25})
    words = ["--run", str(data / "run"), "--out", str(tmp_path / "model.pt")]
    cache = str(data / "cache.h5")
    assert main(["export", str(whole), *words, "--domain", cache]) == 2
    assert "is the same in all domains" in capsys.readouterr().err
    assert main(["export", str(bare), *words]) == 2
    assert "keep out-of-fold scores or a threshold" in capsys.readouterr().err
    path = save(tmp_path / "cut.h5", cut)
    assert main(["export", str(path), *words]) == 0
    assert "note:" not in capsys.readouterr().out
    _, chosen, about = run_file(tmp_path / "model.pt", pixels_of(data))
    assert about["threshold"] == 0.25
    assert about["chosen as the head does"]
    predictor = Predictor.open(path, [cache])
    sure = np.abs(predictor.predict_proba() - 0.25) > FLOAT16
    np.testing.assert_array_equal(chosen[sure], predictor.predict().toarray()[sure])


def test_a_domain_is_for_adapted_models_of_that_network(data, adapted, tmp_path, capsys):
    head, cache = fit(data, tmp_path / "head.h5"), data / "cache.h5"
    other = tmp_path / "other.h5"
    FeatureCache.write(other, np.ones((4, 1, 6), np.float16), list("abcd"), labels=None)
    for content, domain, message in (
        (head, cache, "is the same in all domains"),
        (adapted / "adapted.h5", other, "is of network"),
    ):
        words = ["export", content, "--run", data / "run", "--out", tmp_path / "model.pt"]
        assert main([str(word) for word in [*words, "--domain", domain]]) == 2
        assert message in capsys.readouterr().err
