"""Merged caches have the rows of all, sound and in order; strangers are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from featcache import FeatureCache, InputError, Labels
from featcache.cli import main
from featcache.merging import merge
from featcache.shares import Share
from featcache.writing import CacheContents, CacheWriter

K, D = 3, 5
FACTS = {
    "network": {"arch": "net"},
    "network_id": "abc",
    "preprocessing": {"crop": 1.0},
    "views": {"recipe": "tta"},
    "versions": {"torch": "2"},
    "device": "cpu",
    "dtype": "float32",
    "threads": 2,
}


def make(path: Path, first: int, n: int, **changes: Any) -> FeatureCache:
    """Rows first to first + n - 1 of an image set; every seventh is not valid."""
    rows = np.arange(first, first + n)
    ids = [f"i{row:05d}" for row in rows]
    dense = (rows[:, None] + np.arange(K)) % 3 == 0
    parts: dict[str, Any] = {
        "features": np.sin(rows[:, None, None] + np.arange(2)[:, None] + np.arange(D)),
        "ids": ids,
        "labels": Labels(
            ids,
            list("abc"),
            csr_matrix(dense, dtype=np.float32),
            known=rows % 5 > 0,
            outside=rows % 2,
            names=["A", "B", "C"],
        ),
        "weight": np.ones((K, D), np.float32),
        "bias": np.zeros(K, np.float32),
        "views": ["eval", "flip"],
        "reasons": [f"bad {row}" if row % 7 == 0 else None for row in rows],
        "provenance": FACTS | {"images": f"folder {first}"},
    }
    return FeatureCache.write(path, **parts | changes)


def assert_rows(merged: FeatureCache, whole: FeatureCache) -> None:
    assert merged.ids.tolist() == whole.ids.tolist()
    assert merged.features.tobytes() == whole.features.tobytes()
    assert merged.skipped == whole.skipped
    assert merged.views.tolist() == whole.views.tolist()
    assert merged.class_names.tolist() == whole.class_names.tolist()
    assert merged.network_id == whole.network_id
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))
    assert merged.verify() == []


@pytest.mark.parametrize("block_bytes", [2**24, 200])
def test_rows_of_all_in_the_order_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """Whatever the blocks: of the parts, of the whole."""
    monkeypatch.setattr("featcache.writing._BLOCK_BYTES", block_bytes)
    parts = [make(tmp_path / f"{i}.h5", i, n) for i, n in ((20, 13), (0, 20), (33, 1))]
    monkeypatch.setattr("featcache.writing._BLOCK_BYTES", 300)
    path = merge([part.path for part in parts], tmp_path / "all.h5")
    order = [*range(20, 33), *range(20), 33]
    whole = make(tmp_path / "whole.h5", 0, 34).select([f"i{row:05d}" for row in order])
    merged = FeatureCache(path)
    assert_rows(merged, whole)
    left, right = merged.labels, whole.labels
    assert left is not None
    assert right is not None
    assert (left.positives != right.positives).nnz == 0
    assert left.known.tolist() == right.known.tolist()
    assert left.outside.tolist() == right.outside.tolist()
    assert {key: merged.provenance[key] for key in FACTS} == FACTS
    told = [(part["rows"], part["images"]) for part in merged.provenance["merged"]]
    assert told == [(13, "folder 20"), (20, "folder 0"), (1, "folder 33")]


def test_rows_without_labels_are_not_known(tmp_path: Path) -> None:
    parts = [
        make(tmp_path / "a.h5", 0, 4),
        make(
            tmp_path / "b.h5", 4, 3, labels=None, classes=list("abc"), class_names=["A", "B", "C"]
        ),
    ]
    merged = FeatureCache(merge([part.path for part in parts], tmp_path / "all.h5"))
    assert merged.labels is not None
    assert merged.labels.known.tolist() == [False, True, True, True, False, False, False]
    bare = [make(tmp_path / f"{i}.h5", i, 1, labels=None, classes=list("abc")) for i in (8, 9)]
    assert FeatureCache(merge([part.path for part in bare], tmp_path / "c.h5")).labels is None


def test_verified_negatives_are_kept(tmp_path: Path) -> None:
    matrix = np.array([[1, 0, np.nan], [np.nan, 0, 1]])
    parts = [
        make(tmp_path / f"{i}.h5", i, 2, labels=matrix, classes=list("abc"), reasons=None)
        for i in (0, 2)
    ]
    rows = FeatureCache(merge([part.path for part in parts], tmp_path / "all.h5")).training()
    assert rows["Y"].toarray().tolist() == [[1, 0, 0], [0, 0, 1]] * 2
    assert rows["mask"].tolist() == np.isnan(np.vstack([matrix, matrix])).tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"provenance": FACTS | {"network_id": "xyz"}}, ["network_id", "abc", "xyz"]),
        ({"provenance": FACTS | {"views": {"recipe": "strong"}}}, ["views.recipe", "tta"]),
        ({"provenance": FACTS | {"dtype": "bf16"}}, ["dtype", "float32", "bf16"]),
        ({"views": ["eval", "close"]}, ["view names", "eval flip", "eval close"]),
        ({"bias": np.ones(K)}, ["head/bias"]),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_other_networks_and_views_are_refused_side_by_side(
    tmp_path: Path, changes: dict[str, Any], words: list[str], mixed: bool
) -> None:
    make(tmp_path / "a.h5", 0, 4)
    make(tmp_path / "b.h5", 4, 4, **changes)
    with pytest.raises(InputError, match=r"b\.h5: not of the network and views of .*a\.h5") as told:
        merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "all.h5", mixed=mixed)
    _, titles, *table = str(told.value).splitlines()
    assert "a.h5" in titles
    assert "b.h5" in titles
    assert len(table) == 1
    for word in words:
        assert word in table[0]
    assert not list(tmp_path.glob("all.h5*"))


def test_other_machines_are_joined_on_demand(tmp_path: Path) -> None:
    make(tmp_path / "a.h5", 0, 4)
    make(tmp_path / "b.h5", 4, 4, provenance=FACTS | {"versions": {"torch": "3"}})
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    with pytest.raises(InputError, match=r"--mixed.*\n.*\n +versions\.torch +2 +3$"):
        merge(paths, tmp_path / "all.h5")
    merged = FeatureCache(merge(paths, tmp_path / "all.h5", mixed=True))
    assert len(merged) == 8
    assert "versions" not in merged.provenance
    versions = [part["versions"]["torch"] for part in merged.provenance["merged"]]
    assert versions == ["2", "3"]


def test_an_image_may_be_in_one_cache_only(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 9), ("c", 3)):
        make(tmp_path / f"{name}.h5", first, 4)
    paths = [tmp_path / f"{name}.h5" for name in "abc"]
    with pytest.raises(InputError, match=r"c\.h5: the id 'i00003' is in .*a\.h5 too"):
        merge(paths, tmp_path / "all.h5")
    with pytest.raises(InputError, match=r"a\.h5: is given twice"):
        merge([paths[0], tmp_path / "x" / ".." / "a.h5"], tmp_path / "all.h5")


def test_damage_is_found_while_copying(tmp_path: Path) -> None:
    paths = [make(tmp_path / f"{i}.h5", i, 40).path for i in (0, 40)]
    value = np.float16(np.sin(60 + 1 + 2)).tobytes()
    data = bytearray(paths[1].read_bytes())
    data[data.index(value)] ^= 1
    paths[1].write_bytes(data)
    with pytest.raises(InputError, match=r"40\.h5: rows 0 to 39 are not what was written"):
        merge(paths, tmp_path / "all.h5")
    assert not (tmp_path / "all.h5").exists()


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(make(tmp_path / f"{i}.h5", i, 5).path) for i in (0, 5)]
    out = tmp_path / "all.h5"
    assert main(["merge", *paths, "--out", str(out)]) == 0
    assert "10, 8 valid, 2 skipped; i00000 to i00009" in capsys.readouterr().out
    assert main(["merge", *paths, "--out", str(out)]) == 2
    assert "all.h5: exists already; pass --overwrite" in capsys.readouterr().err
    assert main(["merge", *paths, "--out", str(out), "--overwrite"]) == 0
    assert main(["merge", *paths[:1], str(tmp_path / "no.h5"), "--out", str(out)]) == 2
    assert "no.h5: no such file" in capsys.readouterr().err


# ---------------------------------------------------------------------- parts

N, ROWS = 23, 4


def contents() -> CacheContents:
    ids = [f"i{row}" for row in range(N)]
    labels = Labels(ids, list("abc"), csr_matrix((N, K)), unlisted="unknown")
    return CacheContents(np.array(ids), ["eval"], D, labels, provenance={"network": "n"})


def begin(path: Path, rank: int, world: int, fingerprint: str = "f", count: int = 9) -> None:
    share = Share(rank, world)
    with CacheWriter(
        path, contents(), fingerprint={"net": fingerprint}, block_rows=ROWS, share=share
    ) as out:
        for start, stop in out.pending()[:count]:
            reasons = ["bad" if row == 9 else None for row in range(start, stop)]
            out.write(start, np.cos(np.arange(start, stop)[:, None, None] + np.zeros(D)), reasons)
        if world == 1:
            out.finish()


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """What three processes have left, each on a machine of its own."""
    found = []
    for rank in range(3):
        target = tmp_path / f"machine{rank}" / "x.h5"
        begin(target, rank, 3)
        found.append(Share(rank, 3).beside(target, ".partial"))
    return found


def assert_whole(path: Path, tmp_path: Path) -> None:
    begin(tmp_path / "whole" / "x.h5", 0, 1)
    whole, cache = FeatureCache(tmp_path / "whole" / "x.h5"), FeatureCache(path)
    assert cache.features.tobytes() == whole.features.tobytes()
    assert cache.skipped == whole.skipped == {"i9": "bad"}
    assert dict(cache.provenance) == dict(whole.provenance)
    assert cache.verify() == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_from_several_machines(
    parts: list[Path], tmp_path: Path, order: tuple[int, ...]
) -> None:
    path = merge([parts[i] for i in order], tmp_path / "y.h5")
    assert_whole(path, tmp_path)
    assert not list(tmp_path.glob("y.h5.*"))
    assert all(part.exists() for part in parts)  # they are the user's to delete


def test_parts_in_their_own_place(parts: list[Path], tmp_path: Path) -> None:
    for part in parts[1:]:
        for suffix in (".partial", ".journal"):
            shutil.copy(part.with_suffix(suffix), parts[0].parent)
    here = sorted(parts[0].parent.glob("*.partial"))
    assert len(here) == 3
    assert_whole(merge(here, parts[0].parent / "x.h5"), tmp_path)
    assert [item.name for item in parts[0].parent.iterdir()] == ["x.h5"]


def test_parts_that_do_not_belong_together_or_lack_rows(parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "y.h5"
    with pytest.raises(InputError, match=r"8 of 23 rows are in none of them, the first is 'i4'"):
        merge([parts[0], parts[2]], out)
    other = tmp_path / "other" / "x.h5"
    begin(other, 1, 3, fingerprint="g")
    with pytest.raises(InputError, match=r"not a part of the cache .*\n.*\n +run\.net +f +g"):
        merge([parts[0], Share(1, 3).beside(other, ".partial"), parts[2]], out)
    with pytest.raises(InputError, match=r"is unfinished, .*finished\.h5 is not"):
        merge([parts[0], make(tmp_path / "finished.h5", 0, 2).path], out)
    parts[1].with_suffix(".journal").unlink()
    with pytest.raises(InputError, match=r"rank1of3\.journal: no such file; a part is"):
        merge(parts, out)
    assert not list(tmp_path.glob("y.h5*"))


def test_damaged_parts_are_named_or_mended(parts: list[Path], tmp_path: Path) -> None:
    data = bytearray(parts[1].read_bytes())
    data[: data.index(b"i0")] = b"\0" * data.index(
        b"i0"
    )  # HDF5 cannot read it; its blocks are there
    parts[1].write_bytes(data)
    assert_whole(merge([parts[1], parts[0], parts[2]], tmp_path / "y.h5"), tmp_path)
    data[data.rindex(np.float16(np.cos(17)).tobytes())] ^= 1
    parts[1].write_bytes(data)
    with pytest.raises(InputError, match=r"z\.h5: 1 blocks are damaged"):
        merge(parts, tmp_path / "z.h5")
    assert not (tmp_path / "z.h5").exists()
