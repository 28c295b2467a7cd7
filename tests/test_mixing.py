"""``heads blend`` on the target alone and on both domains."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from featcache import Labels
from heads import Blend, commands
from heads.catalogue import read_entry
from heads.cli import main
from heads.commands import BlendConfig, FitConfig
from heads.comparing import compare
from heads.cuts import best_global_threshold
from heads.describing import describe
from heads.members import join, open_members
from heads.mixing import MAX_SOURCE_LOSS
from heads.storage import save
from tests import synthetic

TARGET, SOURCE = synthetic.images(120, 0), synthetic.images(100, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads on two networks, most of them on both domains."""
    root = tmp_path_factory.mktemp("data")
    for network in (0, 1):
        cache = synthetic.write(root / f"stage_1/net{network}.h5", TARGET, network, shifted=True)
        source = synthetic.write(root / f"validation/net{network}.h5", SOURCE, network)
        fit = FitConfig(str(cache.path), "", dropout="0.1", cv=3, decision="global")
        commands.fit(replace(fit, out=str(root / f"alone{network}.h5")))
        fit = replace(fit, source=str(source.path), source_rows=80, seed=network)
        for weight in ("0", "1"):
            out = str(root / f"both{network}_{weight}.h5")
            commands.fit(replace(fit, out=out, source_weight=weight))
    return root


def both(data: Path) -> list[str]:
    return [str(path) for path in sorted(data.glob("both*.h5"))]


def test_images_of_the_source_are_those_that_all_have_scored(data: Path) -> None:
    paths = both(data)
    members = open_members(paths)
    target, source = join(paths, members)
    assert (target.name, source.name) == ("target", "source")
    assert target.truth.ids.tolist() == TARGET.ids
    sampled = [set(member.oof["source"].ids.tolist()) for member in members]
    common = set.intersection(*sampled)
    assert set(source.truth.ids.tolist()) == common
    assert len(common) < 80
    row = {name: at for at, name in enumerate(SOURCE.ids)}
    for member, scores in zip(members, source.scores, strict=True):
        own = member.oof["source"]
        for name, P in zip(source.truth.ids, scores, strict=True):
            np.testing.assert_array_equal(P, own.proba[own.ids.tolist().index(name)])
    order = [row[name] for name in source.truth.ids]
    np.testing.assert_array_equal(source.truth.Y.toarray(), SOURCE.Y[order])


def test_a_blend_of_both_domains_is_that_of_the_arrays(data: Path, tmp_path: Path) -> None:
    paths, out = both(data), tmp_path / "blend.h5"
    made = commands.blend(BlendConfig(paths, str(out), max_source_loss=0.02, cv=0))
    target, source = join(paths, open_members(paths))
    expected = Blend(max_source_loss=0.02).fit(
        [np.concatenate(pair) for pair in zip(target.scores, source.scores, strict=True)],
        np.concatenate([target.truth.Y.toarray(), source.truth.Y.toarray()]),
        domains=["target"] * 120 + ["source"] * len(source.truth.ids),
    )
    assert made.provenance["weights"] == pytest.approx(expected.weights_.tolist())
    assert made.provenance["chosen_on"] == {"target": 120, "source": len(source.truth.ids)}
    assert set(made.oof) == {"target", "source"}
    np.testing.assert_allclose(
        made.oof["source"].proba, expected.predict_proba(source.scores), atol=1e-6
    )

    def source_score(P: np.ndarray) -> float:
        return best_global_threshold(P, source.truth.Y, 2)[1]

    best = max(source_score(P) for P in source.scores)
    assert source_score(made.oof["source"].proba) >= best - 0.02 - 1e-6
    stored = synthetic.load_blend(out)
    assert stored.blend.domains_ == ["target", "source"]
    assert stored.blend.max_source_loss == 0.02
    for key, values in expected.pareto_.items():
        np.testing.assert_allclose(stored.blend.pareto_[key], values)


def test_the_source_constrains_unless_the_target_is_to_decide_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = [path for path in both(data) if "both0" in path]

    def weights(heads: list[str] = one, **options: Any) -> list[float]:
        out = str(tmp_path / "b.h5")
        made = commands.blend(BlendConfig(heads, out, cv=0, overwrite=True, **options))
        chosen: list[float] = made.provenance["weights"]
        assert ("source" in made.provenance["chosen_on"]) == bool(made.blend.max_source_loss)
        return chosen

    alone = weights(max_source_loss=np.inf)
    target = join(one, open_members(one))[0]
    expected = Blend().fit(target.scores, target.truth.Y)
    assert alone == pytest.approx(expected.weights_.tolist())
    assert weights() == alone  # 80 images of the source are too few
    monkeypatch.setattr("heads.mixing.ENOUGH", 80)
    constrained = commands.blend(BlendConfig(one, str(tmp_path / "c.h5"), cv=0))
    assert constrained.provenance["chosen_on"] == {"target": 120, "source": 80}
    assert constrained.provenance["weights"] == weights(max_source_loss=MAX_SOURCE_LOSS)
    assert weights(method="simplex") == weights(method="simplex", max_source_loss=np.inf)


def test_weights_of_the_source_trade_scores(data: Path, tmp_path: Path) -> None:
    scores = []
    for weight in (0.0, 20.0):
        out = str(tmp_path / f"{weight}.h5")
        loss = None if weight else np.inf
        made = commands.blend(
            BlendConfig(both(data), out, max_source_loss=loss, source_weight=weight, cv=0)
        )
        assert ("source" in made.provenance["chosen_on"]) == (weight > 0)
        scores.append([best_global_threshold(o.proba, o.Y, 2)[1] for o in made.oof.values()])
    (target_alone, source_alone), (target_both, source_both) = scores
    assert source_both >= source_alone
    assert target_both <= target_alone + 1e-9


def test_heads_without_the_source_are_refused_by_name(data: Path, tmp_path: Path) -> None:
    paths = [*both(data), str(data / "alone0.h5")]
    with pytest.raises(ValueError, match=r"alone0\.h5: has no scores of validation images"):
        commands.blend(BlendConfig(paths, str(tmp_path / "b.h5"), max_source_loss=0.01))
    made = commands.blend(BlendConfig(paths, str(tmp_path / "b.h5"), cv=0))
    assert set(made.oof) == {"target"}


def test_an_honest_score_is_told_and_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.h5"
    assert main(["blend", *both(data), "--out", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    blend = synthetic.load_blend(out).blend
    assert f"({blend.nested_['score']:.4f} [{blend.nested_['low']:.4f}, " in told
    assert f"(optimism {blend.optimism_:+.4f})" in told
    assert blend.optimism_ == pytest.approx(blend.score_ - blend.nested_score_)
    assert f"left out     {blend.nested_['score']:.4f} [" in describe(str(out))
    for words in (["--cv", "0"], ["--method", "uniform"]):
        out = tmp_path / f"{words[1]}.h5"
        assert main(["blend", *both(data), "--out", str(out), *words]) == 0
        assert "so an optimistic figure" in capsys.readouterr().out
        assert not hasattr(synthetic.load_blend(out).blend, "nested_")


def test_a_broken_head_is_refused_by_its_file(data: Path, tmp_path: Path) -> None:
    head = synthetic.load_head(data / "alone0.h5")
    head.oof["target"].proba[3, 4] = np.nan
    broken = str(save(tmp_path / "broken.h5", head))
    with pytest.raises(ValueError, match=r"broken\.h5"):
        commands.blend(BlendConfig([str(data / "alone1.h5"), broken], str(tmp_path / "b.h5")))
    assert not (tmp_path / "b.h5").exists()


def test_a_file_that_is_given_twice_is_refused(data: Path, tmp_path: Path) -> None:
    """It would count twice, whatever it is called."""
    head, other, link = data / "alone0.h5", data / "alone1.h5", tmp_path / "link.h5"
    link.symlink_to(head)
    for twice, told in ((head, "is given twice;"), (link, f"is given twice, also as {head};")):
        paths = [str(path) for path in (head, other, twice)]
        with pytest.raises(ValueError, match=re.escape(f"{twice}: {told} give each file once")):
            commands.blend(BlendConfig(paths, str(tmp_path / "b.h5")))


@pytest.mark.parametrize("what", ["mask", "outside"])
def test_heads_that_were_taught_another_truth_are_refused(what: str, tmp_path: Path) -> None:
    known = np.where(np.random.default_rng(0).random(TARGET.Y.shape) < 0.3, np.nan, 1)
    labels = {
        "mask": np.where(TARGET.Y > 0, 1, known - 1),
        "outside": Labels(
            np.array(TARGET.ids),
            np.array(synthetic.CLASSES),
            csr_matrix(TARGET.Y),
            known=np.ones(120, bool),
            outside=np.full(120, 3),
        ),
    }[what]
    paths = []
    for name, its in (("plain", TARGET.Y), (what, labels)):
        cache = synthetic.write(tmp_path / f"{name}.h5", TARGET, shifted=True, labels=its)
        paths.append(str(tmp_path / f"{name}_head.h5"))
        commands.fit(FitConfig(str(cache.path), paths[-1], dropout="0.1", cv=3))
    for pair in (paths, paths[::-1]):
        with pytest.raises(ValueError, match=f"{pair[1]}: was fitted on other labels"):
            join(pair, open_members(pair))
        with pytest.raises(ValueError, match=f"{pair[1]}: was fitted on other labels"):
            compare(*pair)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cv": 1}, "--cv 1: expected 0, or 2 and more"),
        ({"cv": -3}, "--cv -3"),
        ({"stop_folds": 1}, "--stop-folds 1"),
        ({"source_weight": -1.0}, "--source-weight -1: expected a number >= 0"),
        ({"source_weight": np.nan}, "--source-weight nan"),
        ({"source_weight": 1.0, "max_source_loss": 0.1}, "no effect beside --max-source-loss"),
        ({"trade_offs": "0,0.5", "max_source_loss": np.inf}, "--trade-offs has no effect with"),
        ({"trade_offs": "0.5", "source_weight": 1.0, "method": "simplex"}, "greedy method"),
    ],
)
def test_options_without_effect_are_refused(
    options: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        commands.blend(BlendConfig(both(data), str(tmp_path / "blend.h5"), **options))


def test_scores_are_called_what_they_are(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "blend.h5")
    assert main(["blend", *both(data), "--out", out, "--source-weight", "3", "--beta", "1"]) == 0
    stored = synthetic.load_blend(Path(out))
    source = stored.oof["source"]
    assert f"on the 120 target and {len(source.ids)} source images" in capsys.readouterr().out
    entry = read_entry(out)
    assert entry.beta == 1
    for domain, told in (("target", entry.score), ("source", entry.source_score)):
        part = stored.oof[domain]
        assert told == best_global_threshold(part.proba, part.Y, 1)[1]
    assert entry.score != stored.blend.score_
    assert re.search(
        rf"  F1 +{entry.score:.4f} on the target; {entry.source_score:.4f}", describe(out)
    )
