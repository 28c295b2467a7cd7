"""The command ``heads``, from caches to a scored submission, and what it refuses."""

from __future__ import annotations

import configparser
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import expit, logit

from featcache import FeatureCache, Labels
from featcache.annotations import read_submission
from heads import (
    CalibratedDecision,
    ExpectedFBeta,
    GlobalThreshold,
    PerClassThreshold,
    PlattCalibration,
    cli,
    commands,
    cross_val_fbeta,
)
from heads.__main__ import main as command
from heads.cacherows import sampled
from heads.commands import FitConfig
from heads.decisions import best_global_threshold
from heads.metrics import fbeta_per_image, mean_fbeta
from heads.prediction import Predictor
from heads.storage import load, save
from tests import synthetic

TARGET, SOURCE, STAGE_2 = (synthetic.images(n, seed) for seed, n in enumerate((150, 160, 200)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders stage_1, validation and stage_2 with a cache of each network; truth.csv."""
    root = tmp_path_factory.mktemp("data")
    for network in (0, 1):
        name = f"net{network}.h5"
        synthetic.write(root / "stage_1" / name, TARGET, network, shifted=True, views=2)
        synthetic.write(root / "validation" / name, SOURCE, network, views=2)
        synthetic.write(
            root / "stage_2" / name, STAGE_2, network, shifted=True, views=2, labelled=False
        )
    synthetic.write_truth(root / "truth.csv", STAGE_2)
    return root


@pytest.fixture(scope="module")
def head(data: Path) -> Path:
    """A quickly fitted head of network 0."""
    out = data / "heads" / "net0.h5"
    commands.fit(FitConfig(str(data / "stage_1" / "net0.h5"), str(out), dropout="0.05", cv=3))
    return out


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a verb in this process."""

    def call(*words: object) -> Result:
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Result(status, *capsys.readouterr())

    return call


def refused(result: Result, *parts: object) -> None:
    """Exit status 2, nothing on stdout, and one line on stderr with all the parts."""
    assert result.status == 2
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert result.err.startswith("heads")
    for part in parts:
        assert str(part) in result.err


def score_of(text: str) -> tuple[float, float, float]:
    """Mean, low and high of what ``heads score`` printed."""
    found = re.match(r"mean F2 (\d\.\d{4})  \[(\d\.\d{4}), (\d\.\d{4})\] \(95 % bootstrap\)", text)
    assert found is not None, text
    mean, low, high = map(float, found.groups())
    return mean, low, high


def unadapted_score(data: Path, network: int) -> float:
    """What the network's own head reaches on Stage 2, cut as is best at home."""

    def proba(folder: str) -> np.ndarray:
        cache = FeatureCache(data / folder / f"net{network}.h5")
        weight, bias = synthetic.last_layer(network)
        probability: np.ndarray = expit(cache.x().mean(1) @ weight.T + bias)
        return probability

    cut, _ = best_global_threshold(proba("validation"), SOURCE.Y)
    return mean_fbeta(STAGE_2.Y, proba("stage_2") >= cut)


# ---------------------------------------------------------------- end to end


def test_from_caches_to_a_score(data: Path, tmp_path: Path, run: Run) -> None:
    fits = {
        "logistic0": [data / "stage_1/net0.h5", "--dropout", "0.02,0.1,0.5"],
        "logistic1": [data / "stage_1/net1.h5", "--dropout", "0.05"],
        "ridge0": [data / "stage_1/net0.h5", "--method", "ridge", "--dropout", "0.05"],
        "both1": [
            *(data / "stage_1/net1.h5", "--source", data / "validation/net1.h5"),
            *("--dropout", "0.05", "--source-weight", "0.03,0.1"),
        ],
    }
    files = {name: tmp_path / "heads" / f"{name}.h5" for name in fits}
    for name, words in fits.items():
        fitted = run("fit", *words, "--out", files[name], "--cv", "3")
        assert (fitted.status, fitted.err) == (0, "")
        assert fitted.out.count("<- chosen") == (2 if name == "both1" else 1)
        head = load(files[name])
        assert f"out-of-fold F2 {head.provenance['score']:.4f}" in fitted.out.splitlines()[-1]

    blend = tmp_path / "blend.h5"
    blended = run("blend", *files.values(), "--out", blend)
    assert (blended.status, blended.err) == (0, "")
    stored = synthetic.load_blend(blend)
    weights = {line.split()[-1]: float(line.split()[0]) for line in blended.out.splitlines()[:-1]}
    assert weights.keys() == set(stored.model_names) <= set(map(str, files.values()))
    assert sum(weights.values()) == pytest.approx(1, abs=0.005)
    assert stored.blend.score_ >= max(load(path).provenance["score"] for path in files.values())

    scores = {}
    for name, content in {**files, "blend": blend}.items():
        submission = tmp_path / "submissions" / f"{name}.csv"
        predicted = run("predict", content, "--caches", data / "stage_2", "--out", submission)
        assert (predicted.status, predicted.err) == (0, "")
        assert f"{submission}: 200 images" in predicted.out
        scored = run("score", submission, "--labels", data / "truth.csv")
        assert (scored.status, scored.err) == (0, "")
        assert "200 images" in scored.out
        mean, low, high = score_of(scored.out)
        assert mean - 0.08 < low < mean < high < mean + 0.08
        scores[name] = mean
    unadapted = max(unadapted_score(data, network) for network in (0, 1))
    assert min(scores.values()) > unadapted + 0.05
    assert scores["blend"] > unadapted + 0.12
    assert scores["blend"] > np.mean([scores[name] for name in files])


def best_sets(P: np.ndarray, beta: float) -> np.ndarray:
    """The set of the highest expected F-beta of each image, among all sets."""
    every = (np.arange(2**synthetic.K)[:, None] >> np.arange(synthetic.K) & 1).astype(float)
    below = beta**2 * every.sum(1) + every.sum(1)[:, None]
    F = np.where(below > 0, (1 + beta**2) * (every @ every.T) / np.maximum(below, 1), 1.0)
    chance = np.exp(np.log(P) @ every.T + np.log1p(-P) @ (1 - every).T)
    return every[(chance @ F.T).argmax(axis=1)] > 0


@pytest.mark.parametrize("decision", ["expected", "global", "per-class"])
def test_the_submission_is_what_the_head_says(
    decision: str, data: Path, tmp_path: Path, run: Run
) -> None:
    head = tmp_path / "head.h5"
    words = [data / "stage_1/net0.h5", "--dropout", "0.05", "--cv", 3, "--out", head]
    told = run("fit", *words, "--decision", decision)
    ways = {"expected": "highest expected", "global": "cut ", "per-class": "cut for each"}
    assert re.search(rf"; decides by (the|a) {ways[decision]}", told.out.splitlines()[-1])
    run("predict", head, "--caches", data / "stage_2/net0.h5", "--out", tmp_path / "s.csv")
    stored = synthetic.load_head(head)
    cache = FeatureCache(data / "stage_2/net0.h5")
    stored.complete(cache.weight)
    P, rule = stored.estimator.predict_proba(cache.features), stored.decision
    if decision == "expected":
        assert isinstance(rule, CalibratedDecision)
        slope, intercept = rule.calibration_.slope_, rule.calibration_.intercept_
        chosen = best_sets(expit(slope * logit(P.astype(float)) + intercept), 2)
    elif decision == "global":
        chosen = stored.provenance["threshold"] <= P
    else:
        assert isinstance(rule, PerClassThreshold)
        chosen = rule.thresholds_ <= P
    lines = ["image_id,labels"]
    for name, row in zip(STAGE_2.ids, chosen, strict=True):
        lines.append(f"{name},{' '.join(synthetic.CLASSES[k] for k in np.flatnonzero(row))}")
    assert (tmp_path / "s.csv").read_text().splitlines() == lines
    values = fbeta_per_image(STAGE_2.Y, chosen)
    assert commands.score_submission(str(tmp_path / "s.csv"), [str(data / "truth.csv")]) == (
        pytest.approx(values)
    )


def test_a_head_decides_by_what_its_own_images_taught(data: Path, head: Path) -> None:
    stored = synthetic.load_head(head)
    oof = stored.oof["target"]
    expected = CalibratedDecision(calibration=PlattCalibration(cv=3)).fit(oof.proba, oof.Y)
    assert isinstance(stored.decision, CalibratedDecision)
    for key in ("slope_", "intercept_"):
        np.testing.assert_array_equal(
            getattr(stored.decision.calibration_, key), getattr(expected.calibration_, key)
        )


def test_what_a_decision_is_worth_is_told_by_images_that_it_has_not_seen(
    data: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "head.h5"
    words = [data / "stage_1/net0.h5", "--dropout", "0.05", "--cv", 3, "--out", out]
    told = run("fit", *words, "--decision", "per-class").out.splitlines()[-1]
    stored = synthetic.load_head(out)
    oof, found = stored.oof["target"], stored.provenance["decision"]
    truth = cross_val_fbeta(PerClassThreshold(cv=3), oof.proba, oof.Y, cv=3)
    assert found == {"score": truth.score, "low": truth.low, "high": truth.high}
    assert told.endswith(f": {truth.score:.4f} [{truth.low:.4f}, {truth.high:.4f}] cross-validated")
    assert truth.score < stored.provenance["score"] + 0.02


def test_few_images_are_enough_to_decide(tmp_path: Path, run: Run) -> None:
    few = synthetic.images(5, 3)
    cache = synthetic.write(tmp_path / "few.h5", few, shifted=True)
    out = tmp_path / "head.h5"
    told = run("fit", cache.path, "--dropout", "0.05", "--cv", 3, "--out", out)
    assert (told.status, told.err) == (0, "")
    assert "cross-validated" not in told.out
    assert run("blend", out, "--out", tmp_path / "blend.h5").status == 0
    for content in (out, tmp_path / "blend.h5"):
        assert load(content).provenance["decision"] == {}


def test_a_blend_decides_by_its_own_scores(
    data: Path, head: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "blend.h5"
    told = run("blend", head, "--out", out, "--beta", 1, "--max-labels", 2)
    assert ", 2 or fewer labels an image: 0." in told.out.splitlines()[-1]
    stored = synthetic.load_blend(out)
    oof = stored.oof["target"]
    assert isinstance(stored.decision, CalibratedDecision)
    expected = CalibratedDecision(ExpectedFBeta(1, 0, 2), beta=1).fit(oof.proba, oof.Y)
    np.testing.assert_array_equal(stored.decision.calibration_.slope_, expected.calibration_.slope_)
    assert stored.models[0].decision is None
    caches = data / "stage_2"
    run("predict", out, "--caches", caches, "--out", tmp_path / "s.csv")
    P = Predictor.open(out, [caches]).predict_proba()
    sets = read_submission(tmp_path / "s.csv").restrict(synthetic.CLASSES).positives
    np.testing.assert_array_equal(sets.toarray() > 0, expected.predict(P).toarray())
    # An old head, or another choice: a blend of one head, without a new fit.
    again = tmp_path / "cut.h5"
    assert run("blend", head, "--out", again, "--decision", "global").status == 0
    cut = synthetic.load_blend(again)
    assert isinstance(cut.decision, GlobalThreshold)
    assert cut.decision.threshold_ == cut.blend.threshold_
    assert cut.blend.threshold_ == synthetic.load_head(head).provenance["threshold"]


def test_labels_outside_the_classes_lower_the_cut(tmp_path: Path, run: Run) -> None:
    """The more is missed anyway, the less a wrong label costs."""
    cuts = []
    for outside in (0, 5):
        labels = Labels(
            TARGET.ids,
            synthetic.CLASSES,
            csr_matrix(TARGET.Y),
            outside=np.full(len(TARGET.ids), outside),
        )
        cache = synthetic.write(tmp_path / f"{outside}.h5", TARGET, shifted=True, labels=labels)
        out = tmp_path / f"head{outside}.h5"
        words = ["--dropout", "0.05", "--cv", 3, "--decision", "global", "--out", out]
        assert run("fit", cache.path, *words).status == 0
        rule = synthetic.load_head(out).decision
        assert isinstance(rule, GlobalThreshold)
        cuts.append(rule.threshold_)
    assert cuts[1] < cuts[0]


def test_what_is_printed_counts_labels_outside_the_classes(tmp_path: Path, run: Run) -> None:
    paths = []
    for some, shifted in ((TARGET, True), (SOURCE, False)):
        n = len(some.ids)
        outside = np.arange(n) % 4
        labels = Labels(some.ids, synthetic.CLASSES, csr_matrix(some.Y), outside=outside)
        name = tmp_path / f"{shifted}.h5"
        paths.append(synthetic.write(name, some, shifted=shifted, labels=labels).path)
    for source in ([], ["--source", paths[1], "--source-weight", "1", "--max-source-loss", "1"]):
        out = tmp_path / f"head{len(source)}.h5"
        told = run("fit", paths[0], *source, "--dropout", "0.05", "--cv", 3, "--out", out)
        stored = synthetic.load_head(out)
        facts, oof = stored.provenance, stored.oof
        if not source:  # the table of rates and the line below it say the same
            assert told.out.count(f"{facts['score']:.4f}") >= 2
            continue
        assert facts["pareto"]["target_score"] == [pytest.approx(facts["score"])]
        part = oof["source"]
        known = best_global_threshold(part.proba, part.Y, 2, missed=part.missed)[1]
        assert facts["source_score"] == pytest.approx(known)


def test_an_image_without_labels_has_an_empty_field(
    data: Path, head: Path, tmp_path: Path, run: Run
) -> None:
    stored = synthetic.load_head(head)
    stored.decision = GlobalThreshold().fit(np.zeros((2, synthetic.K)), np.zeros((2, synthetic.K)))
    assert stored.decision.threshold_ == np.inf
    save(tmp_path / "silent.h5", stored)
    out = tmp_path / "s.csv"
    predicted = run("predict", tmp_path / "silent.h5", "--caches", data / "stage_2", "--out", out)
    assert "200 images, 200 of them without a label" in predicted.out
    assert out.read_text() == "image_id,labels\n" + "".join(f"{i},\n" for i in STAGE_2.ids)
    # Nothing is right but for the images that show nothing.
    empty = float(np.mean(STAGE_2.Y.sum(1) == 0))
    assert score_of(run("score", out, "--labels", data / "truth.csv").out)[0] == pytest.approx(
        empty, abs=1e-4
    )


def test_files_that_have_a_threshold_alone_cut_there(
    data: Path, head: Path, tmp_path: Path, run: Run
) -> None:
    """As files of format 1 are: heads and blends."""
    blend = tmp_path / "blend.h5"
    run("blend", head, "--out", blend)
    old_head, old_blend = tmp_path / "old_head.h5", tmp_path / "old_blend.h5"
    for new, old in ((head, old_head), (blend, old_blend)):
        old.write_bytes(new.read_bytes())
        with h5py.File(old, "r+") as file:
            del file["decision"]
            file.attrs["format"] = 1
    cut = synthetic.load_head(old_head).provenance["threshold"]
    P = Predictor.open(old_head, [data / "stage_2"]).predict_proba()
    for old in (old_head, old_blend):
        out = tmp_path / f"{old.stem}.csv"
        assert run("predict", old, "--caches", data / "stage_2", "--out", out).status == 0
        sets = read_submission(out).restrict(synthetic.CLASSES).positives.toarray() > 0
        np.testing.assert_array_equal(sets, cut <= P)
    # Blended again, an old head decides as new ones do.
    renewed = tmp_path / "renewed.h5"
    assert run("blend", old_head, "--out", renewed).status == 0
    assert isinstance(synthetic.load_blend(renewed).decision, CalibratedDecision)


def process(*words: object) -> Result:
    """``python -m heads`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "heads", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_a_process_fits_the_same_head(data: Path, head: Path, tmp_path: Path) -> None:
    out = tmp_path / "head.h5"
    words = [data / "stage_1/net0.h5", "--out", out, "--dropout", "0.05", "--cv", 3]
    done = process("fit", *words)
    assert (done.status, done.err) == (0, "")
    found, expected = synthetic.load_head(out), synthetic.load_head(head)
    np.testing.assert_allclose(found.changed()[1], expected.changed()[1], rtol=1e-3, atol=1e-4)
    assert found.provenance["command"] == shlex.join(["heads", "fit", *map(str, words)])


def test_a_process_fails_with_a_line_and_a_status(tmp_path: Path) -> None:
    missing = tmp_path / "no.h5"
    done = process("fit", missing, "--out", tmp_path / "head.h5")
    refused(done, f"heads: {missing}: no such file")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("fit", "--out --source --method --dropout --cv --beta --source-rows --min-positives"),
        ("fit", "--decision --min-labels --max-labels"),
        (
            "blend",
            "--out --beta --method --average --decision --min-labels --max-labels --overwrite",
        ),
        ("predict", "--caches --out --overwrite --strict --scores"),
        ("fit", "--noise --probability --views"),
        ("sweep", "--grid --out --source --jobs --scheduler --dry-run"),
        ("list", "--sort"),
        ("info", "--help"),
        ("compare", "--help"),
        ("refit", "--caches --out --overwrite --jobs --scheduler"),
        ("score", "--labels --beta"),
    ],
)
def test_every_verb_explains_its_flags(verb: str, flags: str, run: Run) -> None:
    told = run(verb, "--help")
    assert (told.status, told.err) == (0, "")
    for flag in [*flags.split(), "--debug"]:
        assert re.search(rf"{flag}\b", told.out)
    assert verb in run("--help").out


# --------------------------------------------------------------- provenance


def test_the_recorded_command_makes_the_head_again(data: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "a head.h5"
    words = [data / "stage_1/net0.h5", "--source", data / "validation/net0.h5", "--out", out]
    words += ["--dropout=0.1", "--seed", 3, "--source-rows", 60, "--source-weight", "0.1"]
    assert run("fit", *words).status == 0
    first = synthetic.load_head(out)
    command = shlex.split(first.provenance["command"])
    assert command[:2] == ["heads", "fit"]
    out.unlink()
    assert run(*command[1:]).status == 0
    again = synthetic.load_head(out)
    np.testing.assert_array_equal(again.changed()[1], first.changed()[1])
    assert again.oof["source"].ids.tolist() == first.oof["source"].ids.tolist()
    assert again.provenance == first.provenance


def test_a_blend_knows_its_heads_and_their_weights(
    data: Path, head: Path, tmp_path: Path, run: Run
) -> None:
    # Two heads of one name in two folders.
    other = tmp_path / head.name
    run("fit", data / "stage_1/net1.h5", "--dropout", "0.1", "--cv", 3, "--out", other)
    out = tmp_path / "blend.h5"
    told = run("blend", head, other, "--method", "uniform", "--out", out).out
    assert told.splitlines()[:2] == [f"  0.500  {head}", f"  0.500  {other}"]
    stored = load(out)
    assert stored.provenance["heads"] == [str(head), str(other)]
    assert stored.provenance["weights"] == [0.5, 0.5]
    command = shlex.split(stored.provenance["command"])
    assert run(*command[1:], "--overwrite").status == 0
    again = load(out)
    assert again.provenance == stored.provenance | {"command": again.provenance["command"]}
    assert again.oof["target"].ids.tolist() == TARGET.ids


# -------------------------------------------------------------------- heads fit


def test_what_a_head_keeps_of_its_images(tmp_path: Path, run: Run) -> None:
    n = len(TARGET.ids)
    rng = np.random.default_rng(0)
    soft = csr_matrix(TARGET.Y * np.where(rng.random(TARGET.Y.shape) < 0.2, 0.3, 0.8))
    known, valid = np.arange(n) % 10 != 1, np.arange(n) % 10 != 2
    outside = np.arange(n) % 3
    labels = Labels(TARGET.ids, synthetic.CLASSES, soft, known=known, outside=outside)
    synthetic.write(tmp_path / "s.h5", TARGET, shifted=True, labels=labels, valid=valid)
    out = tmp_path / "head.h5"
    assert run("fit", tmp_path / "s.h5", "--dropout", "0.1", "--cv", 3, "--out", out).status == 0
    stored = synthetic.load_head(out)
    oof, used = stored.oof["target"], known & valid
    assert oof.ids.tolist() == [name for name, use in zip(TARGET.ids, used, strict=True) if use]
    np.testing.assert_array_equal(oof.Y.toarray(), soft.toarray()[used] >= 0.5)
    np.testing.assert_array_equal(oof.missed, outside[used])
    assert oof.mask is None
    chosen = oof.proba >= stored.provenance["threshold"]
    assert mean_fbeta(oof.Y, chosen, missed=oof.missed) == pytest.approx(
        stored.provenance["score"], abs=1e-9
    )


@pytest.mark.parametrize("method", ["logistic", "ridge"])
def test_soft_and_unknown_labels_of_both_domains(method: str, tmp_path: Path, run: Run) -> None:
    rng = np.random.default_rng(0)
    files = []
    for some, shifted in ((TARGET, True), (SOURCE, False)):
        soft = some.Y * np.where(rng.random(some.Y.shape) < 0.3, 0.7, 1)
        soft[::5, 4] = np.nan
        files.append(
            synthetic.write(tmp_path / f"{shifted}.h5", some, shifted=shifted, labels=soft)
        )
    out = tmp_path / "head.h5"
    words = ["fit", files[0].path, "--source", files[1].path, "--method", method, "--out", out]
    told = run(*words, "--dropout", "0.1", "--cv", 3, "--source-weight", "0,0.1")
    assert (told.status, told.err) == (0, "")
    stored = synthetic.load_head(out)
    for domain, some in (("target", TARGET), ("source", SOURCE)):
        oof = stored.oof[domain]
        assert oof.mask is not None
        unknown = np.isin(oof.ids, some.ids[::5])
        assert unknown.any()
        np.testing.assert_array_equal(oof.mask[:, 4], unknown)
        assert oof.mask.sum() == unknown.sum()


def test_labels_that_are_too_rare_keep_the_weights_of_the_network(
    data: Path, tmp_path: Path, run: Run
) -> None:
    counts = TARGET.Y.sum(0)
    least = int(np.median(counts)) + 1
    words = ["--dropout", "0.1", "--cv", 3, "--min-positives", least]
    assert run("fit", data / "stage_1/net0.h5", *words, "--out", tmp_path / "h.h5").status == 0
    # Fewer than `least` in training rows of a fold; the last fit is on all rows.
    with h5py.File(tmp_path / "h.h5") as file:
        assert file["coef/rows"][()].tolist() == np.flatnonzero(counts >= least).tolist()
        assert "coef_init" not in file


@pytest.mark.parametrize(
    ("verb", "flag"), [("fit", "--seed"), ("fit", "--min-positives"), ("adapt", "--seed")]
)
def test_numbers_below_zero_are_refused_by_flag_and_value(
    verb: str, flag: str, data: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "h.h5"
    words = [data / "stage_1/net0.h5", "--source", data / "validation/net0.h5", "--out", out]
    refused(run(verb, *words, flag, -3), f"heads: {flag} -3: expected at least 0")
    assert not out.exists()


def test_source_rows_are_chosen_by_the_seed(data: Path, tmp_path: Path) -> None:
    cache = FeatureCache(data / "validation/net0.h5")
    chosen = sampled(cache, 50, 0).ids.tolist()
    assert chosen == sampled(cache, 50, 0).ids.tolist() == sorted(chosen)
    assert len(set(chosen)) == 50
    assert chosen != sampled(cache, 50, 1).ids.tolist()
    assert sampled(cache, 160, 0).ids.tolist() == SOURCE.ids
    labels = Labels(
        SOURCE.ids, synthetic.CLASSES, csr_matrix(SOURCE.Y), known=np.arange(160) % 2 == 0
    )
    partly = synthetic.write(
        tmp_path / "partly.h5", SOURCE, labels=labels, valid=np.arange(160) % 4 != 2
    )
    assert sampled(partly, 1000, 0).ids.tolist() == SOURCE.ids[::4]
    assert set(sampled(partly, 30, 0).ids.tolist()) < set(SOURCE.ids[::4])


def test_a_source_that_does_not_fit_is_refused(data: Path, tmp_path: Path, run: Run) -> None:
    stage_1, out = data / "stage_1/net0.h5", tmp_path / "head.h5"

    def fit(source: Path) -> Result:
        return run("fit", stage_1, "--source", source, "--out", out)

    other = data / "validation/net1.h5"
    refused(fit(other), f"{other}: is of network", "both must be of one network")
    plain = synthetic.write(tmp_path / "plain.h5", SOURCE).path
    refused(fit(plain), f"{plain}: has the views ['eval']", "same --views")
    turned = synthetic.write(
        tmp_path / "turned.h5", SOURCE, views=2, classes=synthetic.CLASSES[::-1]
    ).path
    refused(fit(turned), f"{turned}: its 10 classes are not the 10 of {stage_1}")
    refused(fit(data / "stage_2/net0.h5"), data / "stage_2/net0.h5", "has no labels")
    refused(fit(tmp_path / "none.h5"), f"{tmp_path / 'none.h5'}: no such file")
    assert not out.exists()


# ------------------------------------------------------------------- heads blend


def test_heads_are_joined_by_image_id(data: Path, head: Path, tmp_path: Path, run: Run) -> None:
    order = np.random.default_rng(0).permutation(len(TARGET.ids))
    mixed = synthetic.Images([TARGET.ids[i] for i in order], TARGET.latent[order], TARGET.Y[order])
    cache = synthetic.write(tmp_path / "mixed.h5", mixed, 1, shifted=True).path
    other, out = tmp_path / "mixed_head.h5", tmp_path / "blend.h5"
    assert run("fit", cache, "--dropout", "0.05", "--cv", 3, "--out", other).status == 0
    assert run("blend", head, other, "--method", "uniform", "--out", out).status == 0
    stored = synthetic.load_blend(out)
    first, second = synthetic.load_head(head), synthetic.load_head(other)
    assert stored.oof["target"].ids.tolist() == TARGET.ids
    back = np.argsort(order)
    np.testing.assert_allclose(
        stored.oof["target"].proba,
        (first.oof["target"].proba + second.oof["target"].proba[back]) / 2,
        rtol=1e-6,
    )
    assert stored.blend.score_ > max(first.provenance["score"], second.provenance["score"])


@pytest.mark.parametrize("first", [True, False])
def test_heads_of_other_images_are_refused_in_any_order(
    first: bool, head: Path, tmp_path: Path, run: Run
) -> None:
    fewer = synthetic.Images(TARGET.ids[1:], TARGET.latent[1:], TARGET.Y[1:])
    cache = synthetic.write(tmp_path / "fewer.h5", fewer, shifted=True).path
    short, out = tmp_path / "short.h5", tmp_path / "blend.h5"
    run("fit", cache, "--dropout", "0.05", "--cv", 3, "--out", short)
    result = run("blend", *((short, head) if first else (head, short)), "--out", out)
    refused(result, f"{short}: has no out-of-fold score of {TARGET.ids[0]!r}, which {head} has")
    assert not out.exists()


def test_a_head_of_weight_zero_is_left_out(
    data: Path, head: Path, tmp_path: Path, run: Run
) -> None:
    stored = synthetic.load_head(head)
    stored.oof["target"].proba = 1 - stored.oof["target"].proba
    stored.network_id = "of which there is no cache"
    useless, out = save(tmp_path / "useless.h5", stored), tmp_path / "blend.h5"
    told = run("blend", useless, head, "--out", out)
    assert "1 of 2 heads" in told.out
    left = synthetic.load_blend(out)
    assert left.model_names == [str(head)]
    assert left.provenance["weights"] == [0, 1]
    predicted = run("predict", out, "--caches", data / "stage_2", "--out", tmp_path / "s.csv")
    assert predicted.status == 0


def test_what_cannot_be_blended_is_refused(
    data: Path, head: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "blend.h5"
    assert run("blend", head, "--out", out).status == 0

    def blend(*files: Path) -> Result:
        return run("blend", *files, "--out", tmp_path / "new.h5")

    refused(blend(head, out), f"{out}: is a blend; give heads")
    many = synthetic.K + 1
    result = run("blend", head, "--min-labels", many, "--out", tmp_path / "new.h5")
    refused(result, f"--min-labels {many}: {head} has only {synthetic.K} classes; give at most")
    refused(blend(head, tmp_path / "none.h5"), f"{tmp_path / 'none.h5'}: no such file")
    cache = data / "stage_1/net0.h5"
    refused(blend(cache), f"{cache}: no head or blend")
    other = synthetic.load_head(head)
    other.classes = other.classes[::-1]
    turned = save(tmp_path / "turned.h5", other)
    refused(blend(head, turned), f"{turned}: its classes are not those of {head}")
    refused(blend(head, turned), "the same ones in another order; fit both on caches of the same")
    other.classes = np.append(other.classes[1:], "none")
    strange = save(tmp_path / "strange.h5", other)
    refused(blend(head, strange), f"those of {head}; fit both on caches of the same classes")
    other.oof = {}
    silent = save(tmp_path / "silent.h5", other)
    refused(blend(silent, head), f"{silent}: has no out-of-fold scores")
    assert not (tmp_path / "new.h5").exists()


# ------------------------------------------------------------------- heads score


def _submit(path: Path, rows: dict[str, str]) -> Path:
    lines = ["image_id,labels", *(f"{name},{labels}" for name, labels in rows.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_labels_that_nobody_predicts_are_misses(tmp_path: Path, run: Run) -> None:
    submission = _submit(tmp_path / "s.csv", {"a": "/m/1", "b": "/m/1 /m/2", "c": "", "d": "/m/9"})
    truth = _submit(
        tmp_path / "t.csv", {"c": "", "a": "/m/1 /m/other /m/more", "b": "/m/1 /m/2", "d": ""}
    )
    values = commands.score_submission(str(submission), [str(truth)])
    # In the order of the truth: nothing of nothing; 5 / (4 * 3 + 1); all; one too many.
    np.testing.assert_allclose(values, [1, 5 / 13, 1, 0])
    mean, low, high = score_of(run("score", submission, "--labels", truth).out)
    assert mean == pytest.approx(np.mean(values), abs=1e-4)
    assert low < mean < high
    # With beta 1: 2 / (3 + 1) for image a.
    told = run("score", submission, "--labels", truth, "--beta", 1).out
    assert told.startswith(f"mean F1 {(1 + 0.5 + 1 + 0) / 4:.4f}")


def test_outside_labels_cost_what_they_should(
    data: Path, head: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "s.csv"
    run("predict", head, "--caches", data / "stage_2/net0.h5", "--out", out)
    harder = synthetic.write_truth(tmp_path / "harder.csv", STAGE_2, outside=2)
    plain = commands.score_submission(str(out), [str(data / "truth.csv")])
    hard = commands.score_submission(str(out), [str(harder)])
    predicted = np.array(
        [len(line.split(",")[1].split()) for line in out.read_text().splitlines()[1:]]
    )
    below = 4 * STAGE_2.Y.sum(1) + predicted
    np.testing.assert_allclose(hard * (below + 8), np.where(below > 0, plain * below, 0), atol=1e-9)


def test_labels_of_several_files_and_verified_negatives(tmp_path: Path, run: Run) -> None:
    human = tmp_path / "human.csv"
    human.write_text("ImageID,Source,LabelName,Confidence\na,v,/m/1,1\na,v,/m/2,0\n")
    machine = tmp_path / "machine.csv"
    machine.write_text(
        "ImageID,Source,LabelName,Confidence\na,m,/m/2,0.9\nb,m,/m/3,0.8\nb,m,/m/4,0.3\n"
    )
    submission = _submit(tmp_path / "s.csv", {"a": "/m/1", "b": "/m/3"})
    told = run("score", submission, "--labels", human, "--labels", machine)
    assert score_of(told.out) == (1, 1, 1)


def test_only_images_of_the_truth_count(tmp_path: Path, run: Run) -> None:
    submission = _submit(tmp_path / "s.csv", {"a": "/m/1", "b": "/m/2", "c": "/m/3"})
    truth = _submit(tmp_path / "t.csv", {"b": "/m/2"})
    told = run("score", submission, "--labels", truth)
    assert score_of(told.out)[0] == 1
    assert told.out.rstrip().endswith("1 images")


def test_a_submission_that_lacks_images_is_refused(tmp_path: Path, run: Run) -> None:
    submission = _submit(tmp_path / "s.csv", {"b": "/m/1"})
    truth = _submit(tmp_path / "t.csv", {"b": "/m/1", "zz": "/m/1", "a": ""})
    refused(
        run("score", submission, "--labels", truth),
        f"{submission}: has no row for 2 of the 3 images of {truth}",
        "the first is 'zz'",
    )


@pytest.mark.parametrize("header", ["id,labels", "a,/m/1", "image_id;labels"])
def test_another_header_is_refused(header: str, tmp_path: Path, run: Run) -> None:
    truth = _submit(tmp_path / "t.csv", {"a": "/m/1"})
    wrong = tmp_path / "wrong.csv"
    wrong.write_text(f"{header}\na,/m/1\n")
    refused(run("score", wrong, "--labels", truth), f"{wrong}, line 1: expected", header)


# ------------------------------------------------------------------- wrong use


def test_nothing_replaces_what_it_is_made_of(
    data: Path, head: Path, tmp_path: Path, run: Run
) -> None:
    cache, source, own = (tmp_path / name for name in ("cache.h5", "source.h5", "head.h5"))
    link = tmp_path / "link.h5"
    for path, of in ((cache, "stage_1/net0.h5"), (source, "validation/net0.h5"), (own, head)):
        path.write_bytes((data / of).read_bytes())
    link.hardlink_to(cache)
    both = [cache, "--source", source, "--overwrite", "--out"]
    for words, out in (
        (["fit", *both], cache),
        (["fit", *both], link),
        (["adapt", *both], source),
        (["blend", own, "--overwrite", "--out"], own),
        (["predict", own, "--caches", cache, "--overwrite", "--out"], cache),
        (["report", own, "--overwrite", "--out"], own),
    ):
        before = out.read_bytes()
        refused(run(*words, out), f"{out}: is what the result is to be made of")
        assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("ids", "classes", "told"),
    [
        (None, ["red fox", "b", "c"], "a class id without spaces, got 'red fox'; fit on caches"),
        (None, ["k" * 256, "b", "c"], "a class id of at most 255 printable characters without"),
        ([" a", "b"], ["a", "b", "c"], "got ' a'; write the cache with such ids"),
    ],
)
def test_ids_that_a_submission_cannot_hold_are_refused_before_anything_is_predicted(
    ids: list[str] | None,
    classes: list[str],
    told: str,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(30, 4)), (rng.random((30, 3)) < 0.5).astype(float)
    cache, head, out = (tmp_path / name for name in ("c.h5", "head.h5", "s.csv"))
    rows = [f"i{k}" for k in range(30)]
    FeatureCache.write(cache, X, rows, labels=Y, classes=classes)
    assert run("fit", cache, "--cv", "3", "--dropout", "0.1", "--out", head).status == 0
    if ids is not None:
        FeatureCache.write(cache, X[:2], ids, classes=classes, overwrite=True)
    monkeypatch.setattr(Predictor, "sets", lambda *_, **__: pytest.fail("something is predicted"))
    named = head if ids is None else cache
    refused(run("predict", head, "--caches", cache, "--out", out), f"{named}: expected", told)
    assert {path.name for path in tmp_path.iterdir()} == {"c.h5", "head.h5"}


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_prediction_does_not_replace_a_cache_that_it_reads(
    named: str, head: Path, data: Path, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "stage_2"
    cache = synthetic.write(folder / "net0.h5", STAGE_2, shifted=True, views=2, labelled=False)
    before = cache.path.read_bytes()
    caches = folder if named == "folder" else cache.path
    told = run("predict", head, "--caches", caches, "--out", cache.path, "--overwrite")
    refused(told, cache.path)
    assert cache.path.read_bytes() == before


def test_existing_files_are_left_without_overwrite(
    data: Path, head: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "precious"
    fit = ["fit", data / "stage_1/net0.h5", "--dropout", "0.1", "--cv", 3, "--out", out]
    predict = ["predict", head, "--caches", data / "stage_2", "--out", out]
    for words in (fit, ["blend", head, "--out", out], predict):
        out.write_text("mine")
        refused(run(*words), f"{out}: exists already; pass --overwrite")
        assert out.read_text() == "mine"
        assert run(*words, "--overwrite").status == 0
        assert out.read_bytes() != b"mine"


def test_a_refused_overwrite_keeps_the_old_file(data: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "head.h5"
    out.write_text("mine")
    words = ["fit", data / "stage_1/net0.h5", "--dropout", "7", "--out", out, "--overwrite"]
    refused(run(*words), "dropout is 7.0; expected a rate in [0, 1)")
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--dropout", "0.1,x"], ["--dropout '0.1,x': expected numbers separated by commas"]),
        (["--dropout", "0.1,"], ["--dropout '0.1,': expected numbers"]),
        (["--dropout", "1"], ["dropout is 1.0; expected a rate in [0, 1)"]),
        (["--method", "forest"], ["heads fit: argument --method: invalid choice: 'forest'"]),
        (["--cv", "1"], ["--cv 1"]),
        (["--cv", "many"], ["heads fit: argument --cv: invalid int value: 'many'"]),
        (["--beta", "0"], ["beta is 0.0"]),
        (["--decision", "best"], ["argument --decision: invalid choice: 'best'"]),
        (
            ["--min-labels", "3", "--max-labels", "2"],
            ["max_labels is 2; expected None, or at least"],
        ),
        (["--epochs", "3"], ["unrecognized arguments: --epochs 3"]),
        (["--source", "{source}", "--source-rows", "0"], ["--source-rows 0: expected at least 1"]),
        (["--source", "{source}", "--source-weight", "a"], ["--source-weight 'a': expected"]),
        (["--source", "{source}", "--source-weight=-1"], ["source_weights is [-1.0]"]),
    ],
)
def test_wrong_options_of_a_fit_are_refused(
    words: list[str], parts: list[str], data: Path, tmp_path: Path, run: Run
) -> None:
    words = [word.format(source=data / "validation/net0.h5") for word in words]
    out = tmp_path / "head.h5"
    refused(run("fit", data / "stage_1/net0.h5", *words, "--out", out), *parts)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--source-rows", 7], "--source-rows has no effect without --source"),
        (["--max-source-loss", "0.2"], "--max-source-loss has no effect without --source"),
        (["--method", "ridge", "--noise", "gaussian"], "--noise has no effect on ridge heads"),
        (["--method", "ridge", "--probability", "platt"], "--probability has no effect on ridge"),
        (
            ["--source", "SOURCE", "--source-rows", 9, "--seed", -3],
            "--seed -3: expected at least 0",
        ),
        (["--source", "SOURCE", "--max-source-loss", "-1"], "--max-source-loss -1: expected"),
    ],
)
def test_options_without_effect_are_refused(
    words: list[object], part: str, data: Path, tmp_path: Path, run: Run
) -> None:
    given = [data / "validation/net0.h5" if word == "SOURCE" else word for word in words]
    out = tmp_path / "h.h5"
    refused(run("fit", data / "stage_1/net0.h5", *given, "--out", out), part)


def test_wrong_files_are_refused(data: Path, head: Path, tmp_path: Path, run: Run) -> None:
    out, missing = tmp_path / "out", tmp_path / "missing"
    unlabelled = data / "stage_2/net0.h5"
    refused(run("fit", missing, "--out", out), f"heads: {missing}: no such file")
    refused(run("fit", unlabelled, "--out", out), f"{unlabelled}: has no labels", "--labels")
    refused(run("fit", head, "--out", out), f"{head}: no cache of features")
    refused(run("predict", missing, "--caches", unlabelled, "--out", out), missing, "no such file")
    refused(run("predict", head, "--caches", missing, "--out", out), missing, "no such file")
    refused(
        run("predict", head, "--caches", data / "stage_2/net1.h5", "--out", out),
        f"{head}: needs a cache of network",
    )
    refused(run("score", missing, "--labels", data / "truth.csv"), f"{missing}: no such file")
    submission = _submit(tmp_path / "s.csv", {"a": ""})
    refused(run("score", submission, "--labels", missing), f"{missing}: no such file")
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "heads: the following arguments are required: VERB; see heads --help"),
        (["paint"], "invalid choice: 'paint'"),
        (["fit", "x.h5"], "heads fit: the following arguments are required: --out"),
        (["blend", "--out", "x.h5"], "required: HEAD.h5"),
        (["predict", "x.h5", "--out", "s.csv"], "required: --caches"),
        (["score", "s.csv"], "required: --labels"),
        (["blend", "x.h5", "--out", "y.h5", "--average", "rank"], "invalid choice: 'rank'"),
    ],
)
def test_an_incomplete_command_is_refused(words: list[str], part: str, run: Run) -> None:
    refused(run(*words), part, "--help")


def test_debug_shows_the_traceback(tmp_path: Path, run: Run) -> None:
    words: list[Any] = ["fit", tmp_path / "none.h5", "--out", tmp_path / "x.h5"]
    result = run(*words, "--debug")
    assert result.status == 2
    assert result.err.startswith("Traceback")
    assert result.err.splitlines()[-1].startswith(f"heads: {tmp_path / 'none.h5'}: no such file")


def test_heads_of_other_labels_are_refused_in_any_order(
    data: Path, head: Path, tmp_path: Path, run: Run
) -> None:
    content = load(head)
    content.oof["target"].Y = csr_matrix(content.oof["target"].Y.shape, dtype=np.float32)
    other = save(tmp_path / "other.h5", content)
    for words in ([head, other], [other, head]):
        result = run("blend", *words, "--out", tmp_path / "blend.h5")
        refused(result, words[1], "was fitted on other labels of these images than", words[0])


def test_a_source_that_shares_images_with_the_target_is_refused(
    data: Path, tmp_path: Path, run: Run
) -> None:
    cache = data / "stage_1" / "net0.h5"
    result = run("fit", cache, "--source", cache, "--out", tmp_path / "head.h5")
    refused(result, cache, "--source must be of other images")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--source-weight", "0.3"], "--source-weight has no effect without --source"),
        (["--cv", "1"], "150 labelled images, --cv 1"),
        (["--cv", "151"], "150 labelled images, --cv 151"),
        (["--min-labels", str(synthetic.K + 1)], f"net0.h5 has only {synthetic.K} classes; give"),
    ],
)
def test_options_that_cannot_work_are_refused(
    words: list[str], part: str, data: Path, tmp_path: Path, run: Run
) -> None:
    cache = data / "stage_1" / "net0.h5"
    refused(run("fit", cache, *words, "--out", tmp_path / "head.h5"), part)
    refused(run("fit", cache, "--out", tmp_path), tmp_path, "is a folder; give the name of a file")


def test_too_few_images_or_groups_for_folds_are_counted(tmp_path: Path, run: Run) -> None:
    cache, groups = tmp_path / "c.h5", tmp_path / "g.csv"
    fit = ["fit", cache, "--out", tmp_path / "head.h5"]

    def written(labelled: int, rows: list[str]) -> None:
        some = synthetic.images(30, 0)
        known = np.arange(30) < labelled
        Y = csr_matrix(some.Y * known[:, None])
        labels = Labels(some.ids, synthetic.CLASSES, Y, known=known)
        FeatureCache.write(cache, synthetic.features(some), some.ids, labels, overwrite=True)
        lines = [f"{name},{group}" for name, group in zip(some.ids, rows, strict=True)]
        groups.write_text("\n".join(["image_id,group", *lines]) + "\n")

    written(20, ["all"] * 30)
    told = f"{groups}: 1 group of 20 labelled images of {cache}; folds need at least 2 groups"
    refused(run(*fit, "--groups", groups), told)
    written(20, [*"abc"] * 10)
    told = f"{groups}: 3 groups of 20 labelled images of {cache}, --cv 5; give 2 folds at least"
    refused(run(*fit, "--groups", groups), told, "no more than groups")
    written(1, [*"abc"] * 10)
    told = f"{cache}: 1 labelled image; folds need at least 2 images"
    refused(run(*fit), told)
    refused(run(*fit, "--cv", "2"), told)


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "CACHE"],
        ["adapt", "CACHE", "--source", "CACHE"],
        ["blend", "HEAD"],
        ["predict", "HEAD", "--caches", "CACHE"],
        ["export", "HEAD", "--run", "RUN"],
        ["report", "HEAD"],
        ["sweep", "CACHE", "--grid", "GRID"],
        ["refit", ".", "--caches", "CACHE"],
    ],
)
def test_every_verb_tries_its_out_before_anything_else(
    words: list[str], tmp_path: Path, run: Run
) -> None:
    """What it would be made of is not even there."""
    file = tmp_path / "truth.csv"
    file.write_text("mine")
    out = file / "x.h5"
    refused(run(*words, "--out", out), f"{out}: cannot be written ({file} is no folder)", "--out")


def test_a_cut_that_says_nothing_is_told(tmp_path: Path, run: Run) -> None:
    rng = np.random.default_rng(0)
    cache = tmp_path / "none.h5"
    FeatureCache.write(
        cache, rng.normal(size=(30, 4)), [f"i{k}" for k in range(30)], labels=np.zeros((30, 3))
    )
    result = run("fit", cache, "--cv", "3", "--dropout", "0.1", "--out", tmp_path / "head.h5")
    assert result.status == 0
    assert "note: the best cut gives every image no label" in result.out


# ----------------------------------------------------------------------- Ctrl-C


# Ctrl-C when the module of that name is asked for.
INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.meta_path.insert(0, Finder())
sys.argv = ["heads", "list", "nowhere"]
{start}
"""
STARTS = {
    "python -m heads": 'runpy.run_module("heads", run_name="__main__", alter_sys=True)',
    "the command": "from heads.__main__ import main; sys.exit(main())",
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["numpy", "sklearn.base", "heads.catalogue"])
def test_an_interrupt_while_modules_are_loaded_is_one_line(name: str, start: str) -> None:
    code = INTERRUPTED.format(name=name, start=STARTS[start])
    root = Path(cli.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "heads: interrupted\n")


def test_the_installed_command_is_the_one_that_can_be_interrupted() -> None:
    settings = configparser.ConfigParser()
    settings.read(Path(cli.__file__).parent.parent / "setup.cfg")
    scripts = settings["options.entry_points"]["console_scripts"].split("\n")
    assert "heads = heads.__main__:main" in scripts


def test_a_command_leaves_the_handling_of_interrupts_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["heads", "list", "nowhere"])
    assert command() == 1
    assert "nowhere" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
