"""Pictures of one scene stay together from the fit of a head to the score of a blend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from featcache import FeatureCache
from heads import Blend, DropoutLogisticCV, TwoDomainCV, bootstrap_interval, commands
from heads.adapting import AdaptConfig, adapt
from heads.commands import BlendConfig, FitConfig
from heads.comparing import compare
from heads.grouping import numbered, united
from heads.members import join, open_members
from heads.metrics import paired_bootstrap_interval
from heads.nested import cross_val_fbeta
from heads.prediction import rule_of
from tests import synthetic

SCENES, K = 120, 6


def _pictures(seed: int) -> np.ndarray:
    """(SCENES, d): each scene looks alike wherever it is pictured."""
    scene = np.random.default_rng(0).normal(size=(SCENES, 40))
    return scene + 0.05 * np.random.default_rng(seed).normal(size=scene.shape)


def _labels() -> np.ndarray:
    """Of the scenes, and told by no feature."""
    return (np.random.default_rng(9).random((SCENES, K)) < 0.3).astype(np.float32)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scene is pictured once in the target and once in the source; groups.csv tells it."""
    root = tmp_path_factory.mktemp("scenes")
    for seed, name in enumerate(("target", "source")):
        FeatureCache.write(
            root / f"{name}.h5",
            _pictures(seed + 1),
            [f"{name}{i:03d}" for i in range(SCENES)],
            _labels(),
            weight=np.zeros((K, 40)),
            bias=np.full(K, -1.0),
            provenance={"network": "net"},
        )
    rows = [f"{name}{i:03d},scene{i}" for name in ("target", "source") for i in range(SCENES)]
    (root / "groups.csv").write_text("\n".join(["image_id,group", *rows]) + "\n")
    return root


def _auc(path: str) -> dict[str, float]:
    oof = synthetic.load_head(Path(path)).oof
    return {
        domain: float(roc_auc_score(part.Y.toarray().ravel(), part.proba.ravel()))
        for domain, part in oof.items()
    }


# --------------------------------------------------------------------- codes


@pytest.mark.parametrize("seed", range(20))
def test_one_coding_is_enough_to_join_two_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 15))
    codes: list[np.ndarray | None] = [rng.integers(-3, 12, n) for _ in range(rng.integers(1, 4))]
    if seed % 3 == 0:
        codes.append(None)
    found = united(codes)
    assert found is not None
    alike = np.eye(n, dtype=bool)
    for code in codes:
        if code is not None:
            alike |= code[:, None] == code
    for _ in range(n):  # paths of any length
        alike = alike @ alike
    np.testing.assert_array_equal(found[:, None] == found, alike)
    assert united([None, None]) is None


def test_values_of_two_domains_are_one_group_only_if_they_are_shared() -> None:
    a, b = np.array(["x", "y", "x"]), np.array(["y", "z"])
    first, second = numbered(a, b, 3, 2, shared=True)
    assert (first.tolist(), second.tolist()) == ([0, 1, 0], [1, 2])
    first, second = numbered(a, b, 3, 2, shared=False)
    assert (first.tolist(), second.tolist()) == ([0, 1, 0], [2, 3])
    first, second = numbered(None, b, 3, 2, shared=True)
    assert (first.tolist(), second.tolist()) == ([0, 1, 2], [3, 4])


def test_intervals_draw_whole_groups() -> None:
    rng = np.random.default_rng(0)
    of_group = rng.random(30)
    groups = np.repeat(np.arange(30), 20)
    low, high = bootstrap_interval(of_group[groups], groups=groups)
    assert (low, high) == pytest.approx(bootstrap_interval(of_group))
    alone = bootstrap_interval(of_group[groups])
    assert high - low > 3 * (alone[1] - alone[0])  # about sqrt(20) times as wide
    with pytest.raises(ValueError, match="groups has 29 rows, but values has 30"):
        bootstrap_interval(of_group, groups=np.arange(29))


# ---------------------------------------------------------------------- fits


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_held_out_scores_know_no_twin_of_the_other_domain(weight: float) -> None:
    X, X_val, Y = _pictures(1), _pictures(2), _labels()
    both = TwoDomainCV(DropoutLogisticCV((0.05,), cv=4), (weight,), max_source_loss=None)
    found = {}
    for shared in (False, True):
        code = np.arange(SCENES)
        both.fit(X, Y, source=(X_val, Y), groups=code, source_groups=code, shared_groups=shared)
        held = both.oof_predict_proba_, both.source_oof_predict_proba_
        found[shared] = [roc_auc_score(Y.ravel(), P.ravel()) for P in held]
    assert max(found[False]) > 0.7  # a twin tells its labels
    assert max(found[True]) < 0.6


@pytest.mark.parametrize("method", ["logistic", "ridge", "adapt"])
def test_a_file_of_groups_holds_across_caches(method: str, scenes: Path, tmp_path: Path) -> None:
    def made(groups: str) -> dict[str, float]:
        out = str(tmp_path / f"{bool(groups)}.h5")
        files = {"source": str(scenes / "source.h5"), "out": out, "groups": groups}
        if method == "adapt":
            adapt(AdaptConfig(str(scenes / "target.h5"), cv=4, source_weight=1.0, **files))
        else:
            more: dict[str, Any] = {"dropout": "0.05", "cv": 4, "source_weight": "1"}
            # Half of the scenes are left for a ridge head's start.
            more |= {"method": method, "source_rows": 60, "max_source_loss": 1.0}
            commands.fit(FitConfig(str(scenes / "target.h5"), **files, **more))
        return _auc(out)

    free, kept = made(""), made(str(scenes / "groups.csv"))
    assert free["target"] > 0.6
    # The source's scores of an adapted model are those of the network's own head.
    assert kept["target"] < 0.6
    assert kept["source"] < 0.6
    oof = synthetic.load_head(tmp_path / "True.h5").oof
    code = {int(i[-3:]): g for i, g in zip(oof["target"].ids, oof["target"].groups, strict=True)}
    for name, group in zip(oof["source"].ids, oof["source"].groups, strict=True):
        assert code[int(name[-3:])] == group
    assert synthetic.load_head(tmp_path / "False.h5").oof["target"].groups is None


def test_a_ridge_head_of_both_domains_has_not_seen_the_source_rows_that_it_is_scored_on(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    for name, n in (("target", 100), ("source", 240)):
        FeatureCache.write(
            tmp_path / f"{name}.h5",
            rng.normal(size=(n, 60)),
            [f"{name}{i}" for i in range(n)],
            (rng.random((n, 8)) < 0.3).astype(np.float32),
            weight=np.zeros((8, 60)),
            bias=np.zeros(8),
        )
    for rows in (240, 120):  # half of the sample, or images beyond it, teach the start
        out = str(tmp_path / f"{rows}.h5")
        config = FitConfig(
            str(tmp_path / "target.h5"),
            out,
            source=str(tmp_path / "source.h5"),
            method="ridge",
            dropout="0.1",
            source_weight="0.1",
            source_rows=rows,
            max_source_loss=1.0,
        )
        commands.fit(config)
        assert len(synthetic.load_head(Path(out)).oof["source"].ids) == 120
        assert abs(_auc(out)["source"] - 0.5) < 0.06  # nothing can be learnt
        assert abs(_auc(out)["target"] - 0.5) < 0.08


# ----------------------------------------------------------- compare and blend


@pytest.fixture(scope="module")
def heads(scenes: Path) -> list[str]:
    """Two heads with the groups of a file, and one without."""
    paths = []
    pairs = scenes / "pairs.csv"
    rows = [f"target{i:03d},{i // 4}" for i in range(SCENES)]
    pairs.write_text("\n".join(["image_id,group", *rows]) + "\n")
    fit = FitConfig(str(scenes / "target.h5"), "", cv=3, decision="global")
    for rate, groups in (("0.1", str(pairs)), ("0.5", str(pairs)), ("0.8", "")):
        paths.append(str(scenes / f"head{rate}.h5"))
        commands.fit(replace(fit, out=paths[-1], dropout=rate, groups=groups))
    return paths


def test_heads_are_compared_by_groups(heads: list[str]) -> None:
    for second in heads[1:]:  # it is enough if one of both knows the groups
        (found,) = compare(heads[0], second)
        parts = [synthetic.load_head(Path(path)) for path in (heads[0], second)]
        groups = parts[0].oof["target"].groups
        assert groups is not None
        assert len(np.unique(groups)) == SCENES // 4
        values = [
            cross_val_fbeta(rule_of(p), p.oof["target"].proba, p.oof["target"].Y, 5, groups=groups)
            for p in parts
        ]
        expected = paired_bootstrap_interval(*(v.fbeta for v in values), groups=groups)
        assert (found.low, found.high) == pytest.approx(expected)


def test_a_blend_is_judged_by_groups(heads: list[str], scenes: Path) -> None:
    out = str(scenes / "blend.h5")
    made = commands.blend(BlendConfig(heads, out, cv=4, overwrite=True))
    (target,) = join(heads, open_members(heads))
    truth = target.truth
    expected = Blend(cv=4).fit(target.scores, truth.Y, groups=truth.groups)
    assert made.provenance["nested"]["low"] == expected.nested_["low"]
    assert made.provenance["nested"]["score"] == expected.nested_["score"]
    stored = synthetic.load_blend(Path(out)).oof["target"]
    np.testing.assert_array_equal(stored.groups, truth.groups)
    assert stored.units == SCENES // 4


@pytest.mark.parametrize("decision", ["expected", "per-class"])
def test_few_large_groups_and_many_small_ones(decision: str, tmp_path: Path) -> None:
    """All small groups may be in one fold: what is left has fewer groups than a rule has folds."""
    rng = np.random.default_rng(0)
    ids = [f"i{i:03d}" for i in range(300)]
    cache = FeatureCache.write(
        tmp_path / "c.h5",
        rng.normal(size=(300, 8)),
        ids,
        (rng.random((300, 4)) < 0.4).astype(np.float32),
    )
    rows = [f"{name},g{min(i // 60, 3)}" for i, name in enumerate(ids[:240])]
    (tmp_path / "g.csv").write_text("\n".join(["image_id,group", *rows]) + "\n")
    paths = [str(tmp_path / f"{rate}.h5") for rate in ("0.1", "0.5")]
    for path, rate in zip(paths, ("0.1", "0.5"), strict=True):
        fit = FitConfig(str(cache.path), path, dropout=rate, decision=decision)
        commands.fit(replace(fit, groups=str(tmp_path / "g.csv")))
    assert compare(*paths)[0].images == 300
    commands.blend(BlendConfig(paths, str(tmp_path / "b.h5"), decision=decision))


def test_a_ridge_head_keeps_its_start_and_its_source_rows_where_groups_are_large(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    for name, n in (("target", 60), ("source", 400)):
        FeatureCache.write(
            tmp_path / f"{name}.h5",
            rng.normal(size=(n, 10)),
            [f"{name}{i:03d}" for i in range(n)],
            (rng.random((n, 4)) < 0.4).astype(np.float32),
        )
    fit = FitConfig(
        str(tmp_path / "target.h5"),
        str(tmp_path / "h.h5"),
        source=str(tmp_path / "source.h5"),
        method="ridge",
        dropout="0.3",
        groups=str(tmp_path / "g.csv"),
        max_source_loss=1.0,
        overwrite=True,
    )

    def notes(rows: list[str], source_rows: int) -> tuple[list[str], int]:
        (tmp_path / "g.csv").write_text("\n".join(["image_id,group", *rows]) + "\n")
        made = commands.fit(replace(fit, source_rows=source_rows))
        told = [note for note in made.provenance["warnings"] if "shrinks towards zero" in note]
        return told, len(made.oof["source"].ids)

    scenes = [f"source{i:03d},{i // 20}" for i in range(400)]
    assert notes(scenes, 120) == ([], 60)  # every scene is in the sample: half of it teaches
    few = [f"source{i:03d},{i // 4}" for i in range(400)]
    assert notes(few, 60) == ([], 60)  # scenes beyond it teach
    shared = [f"{name}{i:03d},{i % 10}" for name in ("target", "source") for i in range(60)]
    everywhere = [*shared, *(f"source{i:03d},{i % 10}" for i in range(60, 400))]
    told, rows = notes(everywhere, 400)
    assert len(told) == 1
    assert rows == 400
