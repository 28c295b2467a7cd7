"""What stored heads and blends say of themselves, and how two of them compare."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from heads import catalogue, commands
from heads.adapting import AdaptConfig, adapt
from heads.cli import main
from heads.commands import BlendConfig, FitConfig
from heads.comparing import compare
from heads.describing import describe
from heads.metrics import paired_bootstrap_interval
from heads.nested import cross_val_fbeta
from heads.prediction import rule_of
from heads.storage import save
from tests import synthetic

TARGET, SOURCE = synthetic.images(120, 0), synthetic.images(100, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of a network, and a folder heads with each kind of content."""
    root = tmp_path_factory.mktemp("data")
    cache = synthetic.write(root / "stage_1" / "net0.h5", TARGET, shifted=True, views=2).path
    source = synthetic.write(root / "validation" / "net0.h5", SOURCE, views=2).path
    plain = FitConfig(str(cache), str(root / "heads/ridge.h5"), method="ridge", cv=3)
    commands.fit(plain)
    both = replace(plain, out=str(root / "heads/both.h5"), source=str(source), method="logistic")
    commands.fit(replace(both, dropout="0.05", source_weight="0.1,0.3"))
    names = ("ridge", "both")
    commands.blend(
        BlendConfig([str(root / f"heads/{name}.h5") for name in names], str(root / "heads/mix.h5"))
    )
    adapted = AdaptConfig(str(cache), str(source), str(root / "heads/adapted.h5"))
    adapt(replace(adapted, dropout="0.3", cv=3))
    return root


def test_entries_are_what_the_files_hold(data: Path) -> None:
    entries = {e.name: e for e in catalogue.list_entries([str(data / "heads")]).entries}
    assert set(entries) == {"ridge", "both", "mix", "adapted"}
    for name in ("ridge", "both"):
        head = synthetic.load_head(data / f"heads/{name}.h5")
        entry = entries[name]
        assert entry.kind == "head"
        assert entry.rate == head.estimator.dropout_
        assert entry.score == head.provenance["score"]
        assert entry.network == "net0"
        assert entry.network_id == head.network_id
        assert entry.domains == {key: len(oof.ids) for key, oof in head.oof.items()}
        assert entry.command == head.provenance["command"]
    assert entries["both"].source_score == pytest.approx(entries["both"].provenance["source_score"])
    assert np.isnan(entries["ridge"].source_score)
    assert entries["mix"].method.startswith("greedy blend of ")
    assert entries["mix"].rate is entries["adapted"].rate is None
    assert entries["adapted"].kind == "adapted"


@pytest.mark.parametrize("sort", catalogue.SORTS)
def test_tables_are_sorted(sort: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(data / "heads"), "--sort", sort]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = catalogue.list_entries([str(data / "heads")], sort).entries
    assert [line.split()[0] for line in lines] == ["name", *(e.name for e in entries)]
    scores = [entry.score for entry in entries]
    rates = [entry.rate for entry in entries]
    if sort == "f2":
        assert scores == sorted(scores, reverse=True)
    elif sort == "rate":  # those without one come last
        assert rates[2:] == [None, None]
        assert rates[:2] == sorted(rates[:2])
    elif sort == "source":
        assert entries[0].name == "both"
    else:
        keys = [getattr(entry, sort) for entry in entries]
        assert keys == sorted(keys)


def test_damaged_files_are_named_and_the_others_listed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = data / "heads/ridge.h5"
    (tmp_path / "good.h5").write_bytes(good.read_bytes())
    (tmp_path / "half.h5").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "text.h5").write_text("no head")
    with h5py.File(tmp_path / "good.h5") as old, h5py.File(tmp_path / "bare.h5", "w") as new:
        new.attrs.update(dict(old.attrs))
    assert main(["list", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert [line.split()[0] for line in told.out.splitlines()] == ["name", "good"]
    for name in ("half", "text", "bare"):
        assert f"heads: {tmp_path / name}.h5: " in told.err
    assert told.err.count("\n") == 3


def test_folders_without_heads_and_missing_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", str(tmp_path)]) == 2
    assert f"{tmp_path}: no .h5 file there" in capsys.readouterr().err
    for words in (["info", "none.h5"], ["compare", "none.h5", "none.h5"]):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith("heads: none.h5: no such file")


# -------------------------------------------------------------------------- info


@pytest.mark.parametrize("name", ["ridge", "both", "mix", "adapted"])
def test_info_tells_scores_and_the_command(name: str, data: Path) -> None:
    path = data / f"heads/{name}.h5"
    text = describe(str(path))
    entry = catalogue.read_entry(path)
    assert text.splitlines()[0].startswith(f"{path}: ")
    assert f"{entry.score:.4f} on the target" in text
    lines = [line.strip() for line in text.splitlines()]
    command = lines[lines.index("made by") + 1]
    assert command == entry.command
    assert shlex.split(command)[:1] == ["heads"]
    assert max(map(len, (line for line in lines if "heads " not in line))) < 140
    if name == "both":
        told = " ".join(text.split())
        assert re.search(r"source weight 0\.\d+, of \d+ pairs of weight and dropout; F on", told)
        assert re.search(r"beats: 0\.\d+ at 0\.\d+ \(0\.\d{4}, 0\.\d{4}", told)
        assert told.count(", chosen)") == 1
    if name == "mix":
        stored = synthetic.load_blend(path)
        for model, weight in zip(stored.model_names, stored.blend.weights_, strict=True):
            assert re.search(rf"^ +{weight:.3f} +{Path(model).stem} ", text, re.MULTILINE)
        for model in stored.models:
            assert model.provenance["command"] in text
    if name == "adapted":
        assert entry.provenance["explanation"].splitlines()[0] in text


# ----------------------------------------------------------------------- compare


def test_a_comparison_is_a_paired_bootstrap_of_held_out_scores(data: Path) -> None:
    first, second = data / "heads/ridge.h5", data / "heads/both.h5"
    (found,) = compare(str(first), str(second))
    assert (found.domain, found.images, found.beta) == ("target", 120, 2.0)
    values = []
    for path in (first, second):
        head = synthetic.load_head(path)
        oof = head.oof["target"]
        values.append(cross_val_fbeta(rule_of(head), oof.proba, oof.Y, 5).fbeta)
    assert found.first == pytest.approx(values[0].mean())
    assert found.second == pytest.approx(values[1].mean())
    assert (found.low, found.high) == paired_bootstrap_interval(*values)
    assert found.low < found.difference < found.high
    (back,) = compare(str(second), str(first))
    assert back.difference == pytest.approx(-found.difference)
    assert back.images == 120


def test_a_head_is_no_better_than_itself(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(data / "heads/both.h5")
    assert main(["compare", path, path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(",")[0] for line in lines} == {"target", "source"}
    for line in lines:
        assert "difference +0.0000 [+0.0000, +0.0000]" in line
        assert line.endswith("no difference can be told")
    assert main(["compare", path, str(data / "heads/mix.h5")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "note: the weights of a blend were chosen on these images, which favours it"


def test_rows_are_paired_by_id_and_only_common_ones_count(data: Path, tmp_path: Path) -> None:
    head = synthetic.load_head(data / "heads/ridge.h5")
    oof = head.oof["target"]
    rng = np.random.default_rng(0)
    order = rng.permutation(len(oof.ids))[:80]
    worse = replace(
        oof,
        ids=oof.ids[order],
        proba=rng.permutation(oof.proba[order]),
        Y=oof.Y[order],
        missed=oof.missed[order],
    )
    head.oof = {"target": worse}
    other = save(tmp_path / "other.h5", head)
    (found,) = compare(str(data / "heads/ridge.h5"), str(other))
    assert found.images == 80
    assert found.low > 0
    assert found.verdict("A", "B") == "A is better"
    # The same rows in another order: nothing between them.
    head.oof = {"target": replace(worse, proba=oof.proba[order])}
    again = save(tmp_path / "again.h5", head)
    (found,) = compare(str(data / "heads/ridge.h5"), str(again))
    assert found.difference == 0


@pytest.mark.parametrize(("images", "cv", "least"), [(3, 3, 10), (9, 3, 10), (12, 7, 14)])
def test_few_images_are_not_compared(images: int, cv: int, least: int, tmp_path: Path) -> None:
    """The rule itself has folds, of the images that a fold leaves."""
    synthetic.write(tmp_path / "few.h5", synthetic.images(images, 3), shifted=True)
    config = FitConfig(str(tmp_path / "few.h5"), str(tmp_path / "a.h5"), dropout="0.1", cv=cv)
    commands.fit(config)
    path = str(tmp_path / "a.h5")
    expected = rf"^{path}: {images} held-out images .* too few to compare; {least} or more are"
    with pytest.raises(ValueError, match=expected):
        compare(path, path)


def test_ten_images_are_enough_to_compare(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "few.h5", synthetic.images(10, 3), shifted=True)
    path = str(tmp_path / "a.h5")
    commands.fit(FitConfig(str(tmp_path / "few.h5"), path, dropout="0.1", cv=5))
    assert [(found.images, found.difference) for found in compare(path, path)] == [(10, 0.0)]


def test_what_cannot_be_compared_is_refused(data: Path, tmp_path: Path) -> None:
    first = str(data / "heads/ridge.h5")

    def refused(part: str, **changes: object) -> None:
        head = synthetic.load_head(data / "heads/ridge.h5")
        for key, value in changes.items():
            setattr(head, key, value)
        path = save(tmp_path / "other.h5", head, overwrite=True)
        with pytest.raises(ValueError, match=re.escape(part)) as caught:
            compare(first, str(path))
        assert str(caught.value).startswith(str(path))
        assert first in str(caught.value)

    head = synthetic.load_head(data / "heads/ridge.h5")
    oof = head.oof["target"]
    refused("its 10 classes are not the 10 of", classes=head.classes[::-1])
    none = csr_matrix(oof.Y.shape, dtype=np.float32)
    refused("other labels of these target images", oof={"target": replace(oof, Y=none)})
    refused("no out-of-fold scores of the images", oof={})
    strange = replace(oof, ids=np.array([f"x{i}" for i in range(len(oof.ids))]))
    refused("no out-of-fold scores of the images", oof={"target": strange})
    rule = head.decision
    assert rule is not None
    rule.beta = 1
    refused("decides for F1, but", decision=rule)
