"""The development domains: nothing is on both sides, and targets shift as they are said to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import transfer, transfer_peers
from benchmarks.transfer import Job, _average, _group, summary
from benchmarks.transfer_domains import (
    FEW,
    KINDS,
    LABELLED,
    SOURCE,
    Case,
    Domain,
    Pools,
    Shift,
    make_case,
)
from benchmarks.transfer_methods import oracle, unadapted
from benchmarks.transfer_peers import Method, himalaya, plain, torch_adam
from examples.kanji.dataset import SOURCE_FONTS, TARGET_FONTS

K = 12


def pool(characters: np.ndarray, seed: int, copies: int = 1) -> Domain:
    """Random features; a character has the same components in every typeface."""
    rng = np.random.default_rng(seed)
    rates = np.linspace(0.02, 0.4, K)
    components = {c: np.random.default_rng(c).random(K) < rates for c in characters.tolist()}
    names = np.tile(characters, copies)
    Y = np.array([components[c] for c in names.tolist()])
    return Domain(rng.normal(size=(len(names), 2, 3)).astype(np.float16), Y, names)


@pytest.fixture(scope="module")
def pools() -> Pools:
    """As large as the real ones in rows."""
    characters, held = np.arange(3050), np.arange(4000, 4400)
    fonts = {font: pool(characters, i) for i, font in enumerate(TARGET_FONTS)}
    train = {"gyosho": pool(np.arange(5000, 5500), 77)}
    source = pool(held, 99, len(SOURCE_FONTS))
    return Pools(source, fonts, train, np.zeros((K, 3)), np.zeros(K))


@pytest.mark.parametrize("kind", KINDS)
def test_no_character_is_known_and_scored(pools: Pools, kind: str) -> None:
    case = make_case(pools, "soseki", Shift(kind), split=0)
    assert len(case.stage_1) == LABELLED if kind != "frequencies" else len(case.stage_1) > 500
    known = set(case.stage_1.character) | set(case.source.character)
    assert not set(case.stage_1.character) & set(case.source.character)
    assert set(case.tests) == {*TARGET_FONTS, SOURCE}
    for name, domain in case.tests.items():
        assert not known & set(domain.character.tolist()), name
        assert len(case.few[name]) == FEW
        if name != SOURCE:  # of a source character all typefaces are one draw
            assert not set(case.few[name].character) & set(domain.character)


def test_all_networks_and_runs_have_the_same_rows(pools: Pools) -> None:
    first, second = (make_case(pools, "seto", Shift("habits"), split=1) for _ in range(2))
    np.testing.assert_array_equal(first.stage_1.Y, second.stage_1.Y)
    for name in first.tests:
        np.testing.assert_array_equal(first.tests[name].Y, second.tests[name].Y)
        np.testing.assert_array_equal(first.tests[name].character, second.tests[name].character)
    other = make_case(pools, "seto", Shift("habits"), split=0)
    assert not np.array_equal(first.stage_1.character, other.stage_1.character)


def whole(domain: Domain) -> dict[int, np.ndarray]:
    """What is true of each character."""
    return dict(zip(domain.character.tolist(), domain.Y, strict=True))


def kept(labelled: Domain, truth: dict[int, np.ndarray]) -> np.ndarray:
    """Share of each component that the annotator has not left out; he adds none."""
    everything = np.array([truth[c] for c in labelled.character.tolist()])
    assert not (labelled.Y & ~everything).any()
    share: np.ndarray = labelled.Y.sum(0) / np.maximum(everything.sum(0), 1)
    return share


def test_habits_leave_out_labels_and_differ_between_domains(pools: Pools) -> None:
    case = make_case(pools, "seto", Shift("habits"), split=0)
    at_home = whole(pools.source)
    np.testing.assert_array_equal(kept(case.source, at_home), 1)
    shares = {
        name: kept(domain, at_home if name == SOURCE else whole(pools.fonts[name]))
        for name, domain in case.tests.items()
    }
    assert all(share.min() < 0.7 for share in shares.values())
    assert np.abs(shares["gyosho"] - shares["yozfont"]).max() > 0.2
    own = kept(case.stage_1, whole(pools.fonts["seto"]))
    np.testing.assert_allclose(own, shares["seto"], atol=0.2)  # one annotator for one domain


def test_frequencies_move_by_a_factor_and_labels_stay_true(pools: Pools) -> None:
    case = make_case(pools, "seto", Shift("frequencies"), split=0)
    rates = pools.fonts["seto"].Y.mean(0)
    ratio = case.tests["gyosho"].Y.mean(0) / rates
    assert ratio.max() / ratio.min() > 2
    np.testing.assert_array_equal(kept(case.tests["gyosho"], whole(pools.fonts["gyosho"])), 1)


def test_networks_are_averaged_and_cells_summed_up() -> None:
    parts = [Method("cut", np.full((2, 2), v), {"a": np.full((3, 2), v)}, v) for v in (0.2, 0.6)]
    blend = _average(parts)
    assert blend.known is not None
    np.testing.assert_allclose(blend.known, 0.4)
    np.testing.assert_allclose(blend.tests["a"], 0.4)
    assert _group("gyosho", "gyosho") == "Stage 1"
    assert _group("gyosho", SOURCE) == "mild"
    assert _group("seto", "gyosho") == "far from mild"
    cell = {"shift": "none", "group": "far", "model": "m", "seconds": 1.0, "against_low": -0.1}
    cells = [
        cell | {"F2": 0.3, "gap": 0.5, "against_unadapted": 0.01, "against_high": 0.1},
        cell | {"F2": 0.5, "gap": np.nan, "against_unadapted": -0.03, "against_high": -0.01},
    ]
    (row,) = summary(cells)
    assert row["F2"] == pytest.approx(0.4)
    assert (row["gap"], row["worst"]) == ("0.50", "-0.0300")
    assert (row["surely worse"], row["surely better"]) == (1, 0)


@pytest.fixture(scope="module")
def easy(pools: Pools) -> Pools:
    """Components can be seen in the features, which the network's head does not know."""
    seen = np.random.default_rng(1).normal(size=(K, 6))

    def show(domain: Domain) -> Domain:
        X = (2 * domain.Y @ seen)[:, None] + np.random.default_rng(2).normal(size=(1, 2, 6))
        return Domain(X.astype(np.float16), domain.Y, domain.character)

    fonts = {font: show(domain) for font, domain in pools.fonts.items()}
    train = {font: show(domain) for font, domain in pools.train.items()}
    bias = np.full(K, -2.0)
    return Pools(show(pools.source), fonts, train, np.zeros((K, 6)), bias)


@pytest.mark.parametrize("step", [himalaya, torch_adam])
def test_peers_learn_from_stage_1_and_repeat(
    easy: Pools, step: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_peers, "EPOCHS", 25)
    if step is himalaya:
        pytest.importorskip("himalaya", reason="a peer that only benchmarks need")
    case = make_case(easy, "gyosho", Shift("none"), split=0)
    ((name, method),) = step(case, easy)
    ((_, again),) = step(case, easy)
    assert method.known is not None
    assert method.known.shape == case.stage_1.Y.shape
    scores = transfer._scores(method, case)
    before = transfer._scores(dict(unadapted(case, easy))["unadapted, source cut"], case)
    for domain, P in method.tests.items():
        np.testing.assert_array_equal(P, again.tests[domain])
        assert np.mean(scores[domain]) > np.mean(before[domain]) + 0.1, (name, domain)


@pytest.mark.parametrize("step", [himalaya, torch_adam])
def test_a_peer_that_is_missing_is_named(
    pools: Pools, step: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for module in ("himalaya.ridge", "torch"):
        monkeypatch.setitem(sys.modules, module, None)
    case = make_case(pools, "gyosho", Shift("none"), split=0)
    assert list(step(case, pools)) == []
    assert step.__name__.split("_")[0] in capsys.readouterr().err


def test_networks_side_by_side_are_one_with_their_mean_margins(easy: Pools) -> None:
    rng = np.random.default_rng(0)
    parts = []
    for width in (3, 4):
        own = [rng.normal(size=(len(easy.source), 2, width)) for _ in range(3)]
        domains = [replace(easy.source, X=X.astype(np.float16)) for X in own]
        fonts, train = {"gyosho": domains[1]}, {"gyosho": domains[2]}
        parts.append(Pools(domains[0], fonts, train, rng.normal(size=(K, width)), np.arange(K)))
    whole = Pools.side_by_side(parts)
    for get in (lambda p: p.source, lambda p: p.fonts["gyosho"], lambda p: p.train["gyosho"]):
        X = plain(get(whole))
        assert X.shape[1] == 7
        means = np.mean([plain(get(p)) @ p.weight.T + p.bias for p in parts], axis=0)
        np.testing.assert_allclose(X @ whole.weight.T + whole.bias, means, atol=1e-4)


def test_side_by_side_counts_as_much_as_the_average(
    easy: Pools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fixed(name: str, p: float) -> Callable:
        def rows(case, pools):
            tests = {name: np.full(d.Y.shape, p) for name, d in case.tests.items()}
            yield name, Method("expected", None, tests, 6.0)

        return rows

    kept: list[Method] = []

    def keep(method: Method, case: Case) -> dict[str, list[float]]:
        kept.append(method)
        return {}

    monkeypatch.setattr(transfer.Pools, "read", lambda *_: easy)
    monkeypatch.setattr(transfer, "STEPS", {"ours": fixed(transfer.OURS, 0.2)})
    monkeypatch.setattr(transfer, "WHOLE", {"ours": fixed(transfer.SIDE_BY_SIDE, 0.6)})
    monkeypatch.setattr(transfer, "_scores", keep)
    Job(tmp_path, tmp_path, ("net", "other", "third"), "gyosho", "none", 0)._measure(["ours"])
    ours, side_by_side, both = kept
    for method, p, seconds in ((ours, 0.2, 6), (side_by_side, 0.6, 2), (both, 0.4, 8)):
        assert method.seconds == pytest.approx(seconds)
        for P in method.tests.values():
            np.testing.assert_allclose(P, p)


def test_a_new_step_leaves_the_others_alone(
    easy: Pools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def step(name: str, rows: Callable) -> Callable:
        def run(case, pools):
            calls.append(name)
            return rows(case, pools)

        return run

    def calibrated(case, pools):
        yield transfer.UNADAPTED[1], next(unadapted(case, pools))[1]

    steps = {
        "a": step("a", unadapted),
        "b": step("b", calibrated),
        "missing": step("missing", lambda case, pools: iter(())),
        "c": step("c", oracle),
    }
    monkeypatch.setattr(transfer.Pools, "read", lambda *_: easy)
    monkeypatch.setattr(transfer, "STEPS", steps)
    job = Job(tmp_path, tmp_path, ("net", "other"), "gyosho", "none", 0)
    rows = job.run()
    assert {row["model"] for row in rows} > {*transfer.UNADAPTED}
    assert calls == [name for name in steps for _ in range(2)]
    assert not job.file("missing").exists()
    assert json.dumps(job.run()) == json.dumps(rows)
    calls.clear()

    def new(case, pools):
        yield "new", next(unadapted(case, pools))[1]

    monkeypatch.setattr(transfer, "STEPS", {**steps, "new": step("new", new)})
    more = job.run()
    assert calls == ["missing", "missing", "new", "new"]
    assert json.dumps([r for r in more if r["model"] != "new"]) == json.dumps(rows)
    assert {row["domain"] for row in more if row["model"] == "new"} == {*TARGET_FONTS, SOURCE}
