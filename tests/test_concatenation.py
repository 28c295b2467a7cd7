"""The features of several networks stand side by side; what does not fit together is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache import CacheSet, FeatureCache, InputError
from featcache.cli import main
from featcache.combined import combination, in_order
from featcache.concatenation import concatenate
from heads import DropoutLogistic
from heads.cli import main as heads_main

K = 3
IDS = [f"i{row:03d}" for row in range(40)]
LABELS = (np.arange(40)[:, None] + np.arange(K)) % 3 == 0


def make(path: Path, dim: int = 5, seed: int = 0, **changes: Any) -> FeatureCache:
    """Two views of every image, with labels and a last layer; the name tells the network."""
    rng = np.random.default_rng(seed)
    parts: dict[str, Any] = {
        "features": rng.normal(size=(len(IDS), 2, dim)),
        "ids": IDS,
        "labels": LABELS,
        "weight": np.random.default_rng(dim).normal(size=(K, dim)),
        "bias": np.arange(K) + dim,
        "provenance": {"network": path.stem},
    }
    return FeatureCache.write(path, **parts | changes)


def both(tmp_path: Path, **second: Any) -> list[Path]:
    """Two caches, the second with changes."""
    return [make(tmp_path / "a.h5").path, make(tmp_path / "b.h5", **{"dim": 7} | second).path]


def test_features_stand_side_by_side_in_one_order_whatever_that_of_the_files(
    tmp_path: Path,
) -> None:
    paths = both(tmp_path)
    a, b = (FeatureCache(path) for path in paths)
    whole = FeatureCache(concatenate(paths, tmp_path / "ab.h5"))
    turned = FeatureCache(concatenate(paths[::-1], tmp_path / "ba.h5"))
    first, second = sorted([a, b], key=lambda cache: str(cache.network_id))
    expected = np.concatenate([first.features, second.features], axis=2)
    assert whole.features.tobytes() == turned.features.tobytes() == expected.tobytes()
    assert whole.ids.tolist() == IDS
    assert whole.views.tolist() == a.views.tolist()
    assert whole.network_id == turned.network_id
    assert len({whole.network_id, a.network_id, b.network_id}) == 3
    assert whole.network_name == f"{first.network_name} + {second.network_name}"
    assert whole.labels is not None
    assert np.array_equal(whole.labels.positives.toarray() > 0, LABELS)
    assert whole.verify() == []
    widths = [part["features"] for part in whole.provenance["concatenated"]]
    assert widths == [first.shape[2], second.shape[2]]


def test_the_last_layer_gives_the_mean_of_the_margins(tmp_path: Path) -> None:
    caches = [make(tmp_path / f"{dim}.h5", dim) for dim in (3, 5, 8)]
    whole = FeatureCache(concatenate([c.path for c in caches], tmp_path / "all.h5"))

    def margins(cache: FeatureCache) -> np.ndarray:
        assert cache.weight is not None
        return cache.x("eval") @ cache.weight.T + cache.bias

    means = np.mean([margins(cache) for cache in caches], axis=0)
    np.testing.assert_allclose(margins(whole), means, atol=1e-5)


def test_two_image_sets_of_the_same_networks_are_of_one_network(tmp_path: Path) -> None:
    found = []
    for part in ("one", "two"):
        folder = tmp_path / part
        paths = [make(folder / "a.h5", 5, 1).path, make(folder / "b.h5", 7, 2).path]
        found.append(concatenate(paths, folder / "ab.h5"))
    caches = CacheSet(tmp_path)
    assert len(caches.networks) == 3
    assert len(caches.network(FeatureCache(found[0]).network_id)) == 2
    head = DropoutLogistic(0.5).fit(**FeatureCache(found[0]).training())
    assert head.predict_proba(FeatureCache(found[1]).x()).shape == (len(IDS), K)


def test_rows_are_valid_where_all_networks_have_read_them(tmp_path: Path) -> None:
    def reasons(bad: dict[int, str]) -> list[str | None]:
        return [bad.get(row) for row in range(len(IDS))]

    bad = (
        {3: "truncated", 5: "truncated"},
        {3: "truncated", 5: "truncated", 8: "too small"},
        {3: "odd", 5: "truncated"},
    )
    caches = [
        make(tmp_path / f"{name}.h5", 5, reasons=reasons(rows))
        for name, rows in zip("abc", bad, strict=True)
    ]
    whole = FeatureCache(concatenate([c.path for c in caches], tmp_path / "abc.h5"))
    assert list(whole.skipped) == ["i003", "i005", "i008"]
    told = [sorted(reason.split("; ")) for reason in whole.skipped.values()]
    assert told == [["a: truncated", "b: truncated", "c: odd"], ["truncated"], ["b: too small"]]
    assert not whole.features[[3, 5, 8]].any()
    assert whole.features[4].all()


def test_labels_come_from_whichever_cache_has_them(tmp_path: Path) -> None:
    paths = [make(tmp_path / "a.h5", labels=None).path, make(tmp_path / "b.h5", 7).path]
    whole = FeatureCache(concatenate(paths, tmp_path / "ab.h5"))
    assert whole.labels is not None
    assert whole.labels.positives.nnz == LABELS.sum()
    bare = [make(tmp_path / f"{n}.h5", d, labels=None).path for n, d in (("c", 5), ("d", 7))]
    assert FeatureCache(concatenate(bare, tmp_path / "cd.h5")).labels is None


def test_without_a_last_layer_there_is_none_of_the_whole(tmp_path: Path) -> None:
    paths = both(tmp_path, weight=None, bias=None)
    whole = FeatureCache(concatenate(paths, tmp_path / "ab.h5"))
    assert whole.weight is None
    assert whole.bias is None


def test_which_networks_make_one_side_by_side_is_found_from_their_ids(tmp_path: Path) -> None:
    caches = [make(tmp_path / f"{dim}.h5", dim) for dim in (3, 5, 8)]
    whole = FeatureCache(concatenate([caches[2].path, caches[0].path], tmp_path / "two.h5"))
    assert sorted(c.path.stem for c in combination(whole.network_id, caches)) == ["3", "8"]
    assert combination(whole.network_id, caches[:2]) == []
    assert combination(None, caches) == []


def test_prediction_without_the_cache_says_how_to_make_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in both(tmp_path / "set")]
    ordered = [str(c.path) for c in in_order(map(FeatureCache, paths))]
    whole, head = str(tmp_path / "ab.h5"), str(tmp_path / "head.h5")
    concatenate(paths, whole)
    assert heads_main(["fit", whole, "--dropout", "0.5", "--out", head]) == 0
    capsys.readouterr()
    out = str(tmp_path / "submission.csv")
    assert heads_main(["predict", head, "--caches", *paths, "--out", out]) == 2
    assert f"`featcache concat {' '.join(ordered)} --out CACHE.h5`" in capsys.readouterr().err
    assert heads_main(["predict", head, "--caches", *paths, whole, "--out", out]) == 0
    assert len(Path(out).read_text().splitlines()) == 1 + len(IDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": IDS[::-1]}, "its images are not those of"),
        ({"views": ["eval", "flip"]}, r"its views are \['eval', 'flip'\]"),
        ({"labels": ~LABELS}, r"its labels are not those of .*labels/ind"),
        ({"labels": np.where(LABELS, 1.0, np.nan)}, "its labels are not those of"),
        ({"classes": ["x", "y", "z"]}, "its classes are not those of"),
        ({"provenance": {}, "weight": None, "bias": None}, "its network has no id"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    paths = both(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        concatenate(paths, tmp_path / "ab.h5")
    assert not (tmp_path / "ab.h5").exists()


def test_one_network_twice_or_alone_is_refused(tmp_path: Path) -> None:
    paths = both(tmp_path)
    copy = tmp_path / "copy.h5"
    copy.write_bytes(paths[0].read_bytes())
    for given, message in (
        ([*paths, paths[0]], "is given twice"),
        ([*paths, copy], "are of one network"),
        (paths[:1], r"given is .*a\.h5; give caches of two"),
        ([], "given is nothing"),
        (str(paths[0]), "give a list"),
    ):
        with pytest.raises(InputError, match=message):
            concatenate(given, tmp_path / "ab.h5")


def test_what_is_side_by_side_already_is_no_part_of_another(tmp_path: Path) -> None:
    """Or the same list of files, by a pattern that finds the result, would double it."""
    paths = both(tmp_path)
    whole = concatenate(paths, tmp_path / "ab.h5")
    with pytest.raises(InputError, match="is of 2 networks side by side already"):
        concatenate([*paths, whole], tmp_path / "more.h5")
    for out in (whole, paths[1]):
        before = out.read_bytes()
        with pytest.raises(InputError, match="is one of the caches as well"):
            concatenate([*paths, whole], out, overwrite=True)
        assert out.read_bytes() == before


def test_damage_is_found_while_reading(tmp_path: Path) -> None:
    paths = both(tmp_path)
    features = FeatureCache(paths[1]).features
    raw = bytearray(paths[1].read_bytes())
    raw[raw.index(features[7].tobytes())] ^= 1
    paths[1].write_bytes(raw)
    with pytest.raises(InputError, match=r"b\.h5: rows 0 to 39 are not what was written"):
        concatenate(paths, tmp_path / "ab.h5")
    assert not (tmp_path / "ab.h5").exists()


def test_the_command_says_what_it_has_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in both(tmp_path)]
    out = str(tmp_path / "ab.h5")
    assert main(["concat", *paths, "--out", out]) == 0
    printed = capsys.readouterr().out
    assert " + " in printed
    assert "of 12, float16" in printed
    assert main(["concat", *paths, "--out", out]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["concat", *paths, "--out", out, "--overwrite"]) == 0
