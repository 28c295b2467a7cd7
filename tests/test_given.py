"""Other people's scores take part in a blend, or are refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from heads import commands
from heads.cli import main
from heads.commands import BlendConfig, FitConfig
from heads.describing import describe
from heads.given import GivenScores, ScoreFile, named_files
from heads.prediction import Predictor
from tests import synthetic

TARGET, SOURCE, STAGE_2 = (synthetic.images(n, s) for s, n in enumerate((90, 60, 50)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches and a head."""
    root = tmp_path_factory.mktemp("data")
    cache = synthetic.write(root / "stage_1.h5", TARGET, shifted=True).path
    source = synthetic.write(root / "validation.h5", SOURCE).path
    synthetic.write(root / "stage_2.h5", STAGE_2, shifted=True, labelled=False)
    plain = {"dropout": "0.1", "cv": 3, "source": str(source), "source_weight": "0.1"}
    commands.fit(FitConfig(str(cache), str(root / "head.h5"), **plain))
    return root


def good_scores(some: synthetic.Images, seed: int = 0) -> np.ndarray:
    """Better than the head's."""
    noise = np.random.default_rng(seed).uniform(0, 0.5, some.Y.shape)
    return np.asarray(0.5 * some.Y + noise, np.float32)


def write(
    path: Path, ids: Any, classes: Any = synthetic.CLASSES, P: Any = None, **more: Any
) -> Path:
    """A file of scores, as its ending says."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".csv":
        lines = [",".join(["image_id", *classes])]
        lines += [
            ",".join([name, *map(repr, row)]) for name, row in zip(ids, P.tolist(), strict=True)
        ]
        path.write_text("\n".join(lines) + "\n")
    else:
        with h5py.File(path, "w") as file:
            file["ids"], file["classes"] = list(map(str, ids)), list(map(str, classes))
            file["scores"] = P
    return path


def blended(data: Path, theirs: Path, out: Path, **more: Any) -> Any:
    return commands.blend(BlendConfig([str(data / "head.h5"), str(theirs)], str(out), **more))


@pytest.mark.parametrize("ending", ["csv", "h5"])
def test_scores_are_blended_and_predicted_with(ending: str, data: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(90), rng.permutation(synthetic.K)
    ids, classes = np.array(TARGET.ids)[rows], np.array(synthetic.CLASSES)[columns]
    P = good_scores(TARGET)
    theirs = write(tmp_path / f"oof/bob.{ending}", ids, classes, P[rows][:, columns])
    out = tmp_path / "blend.h5"
    made = blended(data, theirs, out, method="uniform")
    head = synthetic.load_head(data / "head.h5")
    np.testing.assert_allclose(
        made.oof["target"].proba, (head.oof["target"].proba + P) / 2, atol=1e-6
    )
    assert made.provenance["heads"] == [str(data / "head.h5"), str(theirs)]
    assert [len(digest) for digest in made.provenance["sha256"]] == [64, 64]
    stored = synthetic.load_blend(out)
    assert isinstance(stored.models[1].estimator, GivenScores)
    assert stored.models[1].estimator.sha256 == made.provenance["sha256"][1]
    assert f"somebody else: {theirs}" in describe(str(out))

    new = good_scores(STAGE_2, 1)
    rows = rng.permutation(50)
    more_ids = [*np.array(STAGE_2.ids)[rows], "another"]
    more = np.concatenate([new[rows], np.zeros((1, synthetic.K), np.float32)])[:, columns]
    given = write(tmp_path / f"new/bob.{ending}", more_ids, classes, more)
    for text in (str(given), f"bob={given}"):
        predictor = Predictor.open(out, [data / "stage_2.h5"], scores=[text])
        alone = Predictor.open(data / "head.h5", [data / "stage_2.h5"]).predict_proba()
        np.testing.assert_allclose(predictor.predict_proba(), (alone + new) / 2, atol=1e-6)
    words = ["predict", out, "--caches", data / "stage_2.h5", "--scores", given]
    assert main([*map(str, words), "--out", str(tmp_path / "s.csv")]) == 0
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 51


def test_better_scores_get_weight_and_useless_ones_none(data: Path, tmp_path: Path) -> None:
    good = write(tmp_path / "good.h5", TARGET.ids, P=0.1 + 0.8 * TARGET.Y)
    bad = write(tmp_path / "bad.h5", TARGET.ids, P=0.9 - 0.8 * TARGET.Y)
    files = [str(data / "head.h5"), str(bad), str(good)]
    made = commands.blend(BlendConfig(files, str(tmp_path / "b.h5")))
    assert made.provenance["weights"][1] == 0
    assert made.provenance["weights"][2] > 0.3


def test_at_prediction_missing_scores_are_refused_by_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "blend.h5"
    blended(
        data, write(tmp_path / "bob.h5", TARGET.ids, P=good_scores(TARGET)), out, method="uniform"
    )
    few = write(tmp_path / "few.h5", STAGE_2.ids[1:], P=good_scores(STAGE_2)[1:])
    broken = good_scores(STAGE_2)
    broken[3, 2] = np.nan
    nan = write(tmp_path / "nan.h5", STAGE_2.ids, P=broken)
    words = ["predict", out, "--caches", data / "stage_2.h5", "--out", tmp_path / "s.csv"]
    for scores, part in (
        ([], "needs the scores of 'bob' for these images; pass --scores bob=FILE (none is given)"),
        ([few], "pass --scores bob=FILE (few)"),
        ([f"bob={few}"], f"{few}: has no scores of image {STAGE_2.ids[0]!r}"),
        (["bob=none.h5"], "none.h5: no such file"),
        ([f"bob={nan}"], f"image {STAGE_2.ids[3]!r}, class {synthetic.CLASSES[2]!r}: nan is no"),
    ):
        more = ["--scores", *scores] if scores else []
        assert main([str(word) for word in (*words, *more)]) == 2
        told = capsys.readouterr().err
        assert part in told
        assert told.count("\n") == 1
        assert not (tmp_path / "s.csv").exists()


P = good_scores(TARGET)


@pytest.mark.parametrize("ending", ["csv", "h5"])
@pytest.mark.parametrize(
    ("ids", "classes", "scores", "part"),
    [
        (TARGET.ids[1:], synthetic.CLASSES, P[1:], f"has no scores of image {TARGET.ids[0]!r}"),
        (
            [*TARGET.ids[1:], "odd"],
            synthetic.CLASSES,
            P,
            "has scores of image 'odd', which no head",
        ),
        ([*TARGET.ids[:-1], TARGET.ids[0]], synthetic.CLASSES, P, "image 's0_0000' is given twice"),
        (TARGET.ids, synthetic.CLASSES[1:], P[:, 1:], "has no scores of class '/m/00'"),
        (TARGET.ids, ["/m/x", *synthetic.CLASSES[1:]], P, "has scores of class '/m/x', which the"),
        (TARGET.ids, ["/m/01", *synthetic.CLASSES[1:]], P, "class '/m/01' is given twice"),
        (TARGET.ids, synthetic.CLASSES, P + np.where(P[4, 2] == P, np.nan, 0), "nan is no prob"),
        (TARGET.ids, synthetic.CLASSES, P - np.where(P[4, 2] == P, 2, 0), "class '/m/02': -"),
        (TARGET.ids, synthetic.CLASSES, P * np.float32(9), "is no probability"),
    ],
)
def test_wrong_scores_are_refused_by_name(
    ending: str, ids: Any, classes: Any, scores: Any, part: str, data: Path, tmp_path: Path
) -> None:
    theirs = write(tmp_path / f"bob.{ending}", ids, classes, scores.astype(np.float32))
    with pytest.raises(ValueError, match=re.escape(part)) as caught:
        blended(data, theirs, tmp_path / "b.h5")
    assert str(caught.value).startswith(str(theirs))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b.h5").exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "line 1: expected image_id,CLASS,CLASS,... but it begins with ''"),
        ("id,/m/00\na,1\n", "line 1: expected image_id,CLASS"),
        ("image_id\na\n", "line 1: expected image_id,CLASS"),
        ("image_id,/m/00,/m/01\na,0.5\n", "line 2: has 2 fields, the header 3"),
        ("image_id,/m/00\na,much\n", "line 2, class '/m/00': 'much' is no number"),
        ("image_id,/m/00\n\na,\n", "line 3, class '/m/00': '' is no number"),
    ],
)
def test_wrong_lines_are_told(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}, {part}")):
        ScoreFile(path)


def test_wrong_hdf5_is_told(tmp_path: Path) -> None:
    def refused(part: str, **parts: Any) -> None:
        path = tmp_path / "x.h5"
        with h5py.File(path, "w") as file:
            for name, values in parts.items():
                file[name] = values
        with pytest.raises(ValueError, match=re.escape(f"{path}: {part}")):
            ScoreFile(path)

    names: dict[str, Any] = {"ids": ["a", "b"], "classes": ["k"]}
    refused("has no /ids", scores=np.ones((2, 1)))
    refused("has no /classes", scores=np.ones((2, 1)), ids=["a", "b"])
    refused(
        "scores have shape (1, 2), but there are 2 ids and 1 classes",
        scores=np.ones((1, 2)),
        **names,
    )
    refused("/scores has type int64, not floats", scores=np.ones((2, 1), np.int64), **names)
    refused("/ids and /classes must be texts", scores=np.ones((2, 1)), ids=[1, 2], classes=["k"])
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        ScoreFile(tmp_path / "none.csv")
    (tmp_path / "picture.csv").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"picture\.csv"):
        ScoreFile(tmp_path / "picture.csv")


def test_scores_of_the_source_take_part_if_they_are_there(data: Path, tmp_path: Path) -> None:
    from heads.members import open_members

    both = np.concatenate([good_scores(TARGET), good_scores(SOURCE)])
    theirs = write(tmp_path / "bob.h5", [*TARGET.ids, *SOURCE.ids], P=both)
    _, member = open_members([str(data / "head.h5"), str(theirs)])
    assert set(member.oof) == {"target", "source"}
    np.testing.assert_array_equal(member.oof["source"].proba, good_scores(SOURCE))
    some = write(tmp_path / "some.h5", [*TARGET.ids, *SOURCE.ids[:5]], P=both[:95])
    with pytest.raises(ValueError, match=rf"some\.h5: has no scores of image {SOURCE.ids[5]!r}"):
        open_members([str(data / "head.h5"), str(some)])


def test_scores_alone_and_two_of_one_name_are_refused(data: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a/bob.h5", TARGET.ids, P=good_scores(TARGET))
    second = write(tmp_path / "b/bob.csv", TARGET.ids, P=good_scores(TARGET))
    with pytest.raises(ValueError, match=r"bob\.h5: holds scores alone; blend them with at least"):
        commands.blend(BlendConfig([str(first)], str(tmp_path / "b.h5")))
    files = [str(data / "head.h5"), str(first), str(second)]
    with pytest.raises(ValueError, match=r"bob\.csv and .*bob\.h5 are both called 'bob'"):
        commands.blend(BlendConfig(files, str(tmp_path / "b.h5")))
    with pytest.raises(ValueError, match="are both called 'bob'"):
        named_files([str(first), f"bob={second}"])


def test_half_precision_is_enough(tmp_path: Path) -> None:
    path = write(tmp_path / "bob.h5", TARGET.ids, P=good_scores(TARGET).astype(np.float16))
    file = ScoreFile(path)
    rows = file.rows(np.array(TARGET.ids[::-1]))
    found = file.scores(rows, file.columns(np.array(synthetic.CLASSES)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, good_scores(TARGET)[::-1], atol=1e-3)


def test_a_report_of_a_blend_with_scores(data: Path, tmp_path: Path) -> None:
    theirs = write(tmp_path / "bob.h5", TARGET.ids, P=good_scores(TARGET))
    blended(data, theirs, tmp_path / "b.h5", method="uniform")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "b.h5"), "--out", str(page)]) == 0
    assert ">bob<" in page.read_text()
