"""Caches give back what was put in, aligned, and refuse what is no cache."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from featcache import FeatureCache, InputError, Labels, arrays, layout
from featcache.cli import main
from featcache.layout import read_contents
from featcache.merging import merge
from featcache.summary import summary
from featcache.writing import CacheContents, CacheWriter

IDS = ["a", "bé", "c", "d", "e"]
CLASSES = ["/m/0", "/m/1", "/m/2"]
NAMES = ["Dog", "Bœuf", "Car"]


def soft_labels() -> Labels:
    """Five images: soft, hard and negative labels, an unlabelled row, one outside label."""
    positives = csr_matrix(
        np.array([[0.5, 1, 0], [0, 0, 0.75], [0, 0, 0], [1e-12, 0, 0], [0, 1, 0]], np.float32)
    )
    negatives = csr_matrix(
        np.array([[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
    )
    return Labels(
        IDS,
        CLASSES,
        positives,
        negatives,
        unlisted="unknown",
        names=NAMES,
        known=np.array([True, True, False, True, True]),
        outside=np.array([0, 2, 0, 0, 0]),
    )


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 2, 4)).astype(np.float32)


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


@pytest.fixture
def cache(tmp_path: Path, features: np.ndarray, weight: np.ndarray) -> FeatureCache:
    return FeatureCache.write(
        tmp_path / "x.h5",
        features,
        IDS,
        labels=soft_labels(),
        weight=weight,
        bias=np.arange(3),
        views=["eval", "flip"],
        reasons=[None, None, None, None, "cannot\n  identify"],
        provenance={"network": "resnet", "crop": np.float32(0.5), "nested": {"seed": 1}},
    )


# ---------------------------------------------------------------- round trip


def test_everything_comes_back(
    cache: FeatureCache, features: np.ndarray, weight: np.ndarray, tmp_path: Path
) -> None:
    expected = features.astype(np.float16)
    expected[4] = 0
    np.testing.assert_array_equal(cache.features, expected)
    assert cache.features.dtype == np.float16
    np.testing.assert_array_equal(cache.x(), expected.astype(np.float32))
    np.testing.assert_array_equal(cache.x("flip"), expected[:, 1].astype(np.float32))
    assert cache.x("eval").dtype == np.float32
    assert (cache.shape, len(cache)) == ((5, 2, 4), 5)
    assert cache.ids.tolist() == IDS
    assert cache.views.tolist() == ["eval", "flip"]
    assert cache.classes.tolist() == CLASSES
    assert cache.class_names.tolist() == NAMES
    assert cache.valid.tolist() == [True] * 4 + [False]
    assert cache.skipped == {"e": "cannot identify"}
    np.testing.assert_array_equal(cache.weight, weight)
    np.testing.assert_array_equal(cache.bias, [0, 1, 2])
    assert cache.weight is not None
    assert cache.weight.dtype == np.float32
    assert cache.provenance["nested"] == {"seed": 1}
    assert cache.provenance["crop"] == 0.5
    assert cache.path == tmp_path / "x.h5"
    assert cache.verify() == []


def test_labels_come_back(cache: FeatureCache) -> None:
    labels, truth = cache.labels, soft_labels()
    assert labels is not None
    assert labels.negatives is not None
    assert truth.negatives is not None
    np.testing.assert_allclose(
        labels.positives.toarray(), truth.positives.toarray(), rtol=1e-3, atol=1e-7
    )
    # However small a confidence is, its label stays positive.
    assert (labels.positives.toarray() > 0).tolist() == (truth.positives.toarray() > 0).tolist()
    np.testing.assert_array_equal(labels.negatives.toarray(), truth.negatives.toarray())
    assert labels.names is not None
    assert labels.names.tolist() == NAMES
    assert labels.known.tolist() == truth.known.tolist()
    assert labels.outside.tolist() == truth.outside.tolist()
    assert labels.unlisted == "unknown"


def test_bare_cache_has_defaults(tmp_path: Path) -> None:
    cache = FeatureCache.write(tmp_path / "x.h5", np.ones((3, 2)), ["1", "2", "3"])
    assert cache.shape == (3, 1, 2)
    assert cache.views.tolist() == ["eval"]
    assert cache.labels is None
    assert cache.weight is None
    assert cache.bias is None
    assert cache.classes.tolist() == []
    assert cache.skipped == {}
    with pytest.raises(InputError, match="has no labels; extract it with --labels"):
        cache.training()
    head = FeatureCache.write(tmp_path / "y.h5", np.ones((3, 2)), cache.ids, weight=np.ones((2, 2)))
    assert head.classes.tolist() == head.class_names.tolist() == ["0", "1"]
    np.testing.assert_array_equal(head.bias, [0, 0])


def test_network_id_tells_networks_apart(tmp_path: Path) -> None:
    def network_id(name: str, **parts: Any) -> str | None:
        path = tmp_path / "x.h5"
        return FeatureCache.write(path, np.ones((1, 2)), ["a"], overwrite=True, **parts).network_id

    weight = np.ones((1, 2))
    same = network_id("a", weight=weight, provenance={"network": "net"})
    assert same == network_id("b", weight=weight, provenance={"network": "net", "seed": 3})
    others = [
        network_id("c", weight=2 * weight, provenance={"network": "net"}),
        network_id("d", weight=weight, bias=[1], provenance={"network": "net"}),
        network_id("e", weight=weight, provenance={"network": "other"}),
        network_id("f", provenance={"network": "net"}),
    ]
    assert len({same, *others}) == 5
    assert network_id("g", provenance={"network_id": "given"}) == "given"
    # Of features alone nothing is known, so that no two of them are said to be of one network.
    assert network_id("h") is None
    assert network_id("i", provenance={"seed": 3}) is None
    assert network_id("j", weight=weight) is not None


@pytest.mark.parametrize("kind", ["dense", "sparse", "bool"])
def test_matrices_are_labels(tmp_path: Path, kind: str) -> None:
    matrix = np.array([[0, 1], [1, 1], [0, 0]])
    given = {"dense": matrix, "sparse": csr_matrix(matrix), "bool": matrix.astype(bool)}[kind]
    cache = FeatureCache.write(tmp_path / "x.h5", np.ones((3, 2)), list("abc"), labels=given)
    assert cache.labels is not None
    np.testing.assert_array_equal(cache.labels.positives.toarray(), matrix)
    assert cache.labels.unlisted == "negative"
    assert cache.labels.known.all()
    assert cache.training()["mask"] is None
    with h5py.File(cache.path) as file:
        assert sorted(file["labels"]) == ["indices", "indptr", "known"]  # all are certain


def test_nan_is_unknown(tmp_path: Path) -> None:
    nan = np.nan
    matrix = np.array([[0, 1, nan], [nan, nan, nan], [0.5, 0, 0]])
    cache = FeatureCache.write(tmp_path / "x.h5", np.ones((3, 2)), list("abc"), labels=matrix)
    assert cache.labels is not None
    assert cache.labels.known.tolist() == [True, False, True]
    arguments = cache.training()
    np.testing.assert_array_equal(arguments["Y"].toarray(), [[0, 1, 0], [0.5, 0, 0]])
    np.testing.assert_array_equal(arguments["mask"], [[False, False, True], [False] * 3])


def test_labels_of_other_rows_and_classes_are_brought_in_line(tmp_path: Path) -> None:
    cache = FeatureCache.write(
        tmp_path / "x.h5",
        np.ones((3, 2)),
        ["e", "nobody", "a"],
        labels=soft_labels(),
        classes=["/m/2", "/m/1", "/m/9"],
    )
    assert cache.labels is not None
    np.testing.assert_array_equal(
        cache.labels.positives.toarray(), [[0, 1, 0], [0, 0, 0], [0, 1, 0]]
    )
    assert cache.labels.known.tolist() == [True, False, True]
    assert cache.labels.outside.tolist() == [0, 0, 1]


def test_features_may_come_from_a_file(tmp_path: Path, features: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", features)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with h5py.File(tmp_path / "source.h5", "w") as file:
        file["x"] = features
        cache = FeatureCache.write(tmp_path / "x.h5", file["x"], IDS)
    other = FeatureCache.write(tmp_path / "y.h5", mapped, IDS)
    np.testing.assert_array_equal(cache.features, features.astype(np.float16))
    np.testing.assert_array_equal(other.features, cache.features)
    # A file may even be written over by what is read from it.
    again = FeatureCache.write(tmp_path / "x.h5", cache.features[::-1], IDS[::-1], overwrite=True)
    np.testing.assert_array_equal(again.features, cache.features[::-1])


def test_features_and_head_may_be_tensors(tmp_path: Path, features: np.ndarray) -> None:
    torch = pytest.importorskip("torch", reason="torch is an extra")
    tensor = torch.tensor(features, requires_grad=True)
    layer = torch.nn.Linear(4, 3)
    for values in (tensor, tensor.double(), tensor.bfloat16()):
        cache = FeatureCache.write(
            tmp_path / "x.h5",
            values,
            IDS,
            labels=torch.ones((5, 3)),
            weight=layer.weight,
            bias=layer.bias,
            overwrite=True,
        )
        expected = values.detach().float().numpy().astype(np.float16)
        np.testing.assert_array_equal(cache.features, expected)
        np.testing.assert_array_equal(cache.weight, layer.weight.detach().numpy())
        np.testing.assert_array_equal(cache.bias, layer.bias.detach().numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.ones((2, 4))}, r"shape \(2, 4\) for 5 ids"),
        ({"features": np.ones(5)}, r"shape \(5,\) for 5 ids"),
        ({"features": np.full((5, 2), 1e5)}, "image a, view eval, dimension 0"),
        ({"features": np.ones((0, 4)), "ids": []}, "no images"),
        ({"views": ["eval", "flip"]}, "for features of 1 views"),
        ({"labels": np.ones((4, 2))}, r"labels of shape \(4, 2\) for 5 ids"),
        ({"labels": np.full((5, 2), 2)}, r"confidence 2.0, expected \(0, 1\]"),
        ({"labels": np.full((5, 2), -1)}, r"confidence -1.0, expected \(0, 1\]"),
        ({"labels": np.ones((5, 2)), "classes": ["k"]}, "expected"),
        ({"valid": [True] * 4}, "4 valid flags"),
        ({"valid": [True] * 5, "reasons": ["why"] + [None] * 4}, "row 0 is valid, yet"),
        ({"ids": ["a", "b", None, "d", "e"]}, "ids: number 2 is None, no name"),
        ({"ids": [1.0, 2.0, 3.0, np.nan, 5.0]}, "ids: number 3 is nan, no name"),
        ({"ids": ["a", "b", "c", np.nan, "e"]}, "ids: number 3 is nan, no name"),
        ({"ids": [["a"], ["b"], ["c"], ["d"], ["e"]]}, "ids: number 0 is .*, no name"),
        ({"ids": [b"a", b"b", b"c", b"d", b"\xff"]}, "ids: number 4 is .*, no UTF-8; decode it"),
        ({"ids": "abcde"}, r"ids has shape \(\); give a list of names"),
        ({"ids": ["a", "", "c", "d", "e"]}, "ids: number 1 is empty"),
        ({"provenance": ["resnet"]}, "provenance is list; give a dict"),
    ],
)
def test_parts_that_disagree_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    parts: dict[str, Any] = {"features": np.ones((5, 4)), "ids": IDS}
    with pytest.raises(InputError, match=message):
        FeatureCache.write(tmp_path / "x.h5", **parts | changes)
    assert list(tmp_path.iterdir()) == []


def test_invalid_rows_keep_their_place(tmp_path: Path) -> None:
    values = np.arange(1.0, 6)[:, None]
    values[1] = np.nan
    flags = [True, False, True, False, True]
    cache = FeatureCache.write(tmp_path / "x.h5", values, IDS, valid=np.array(flags))
    assert cache.x("eval")[:, 0].tolist() == [1, 0, 3, 0, 5]
    assert cache.valid.tolist() == flags
    assert cache.skipped == {"bé": "not valid", "d": "not valid"}
    with h5py.File(cache.path) as file:
        assert file["skipped/id"].asstr()[:].tolist() == ["bé", "d"]


@pytest.mark.parametrize("none", [None, "", " ", np.nan, np.float64("nan"), np.str_("")])
@pytest.mark.parametrize("flags", [None, [True, True, False]])
def test_no_reason_is_no_reason_however_it_is_written(
    tmp_path: Path, none: Any, flags: list[bool] | None
) -> None:
    """As a column of a table has it."""
    valid = None if flags is None else np.array(flags)
    reasons = [none, none, "broken"]
    cache = FeatureCache.write(
        tmp_path / "x.h5", np.ones((3, 1)), ["a", "b", "c"], valid=valid, reasons=reasons
    )
    assert cache.valid.tolist() == [True, True, False]
    assert cache.skipped == {"c": "broken"}


def test_reasons_that_are_no_texts_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reasons: number 1 is 404; give a text, or None"):
        FeatureCache.write(tmp_path / "x.h5", np.ones((2, 1)), ["a", "b"], reasons=[None, 404])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [list, np.array, lambda names: np.array(names, object)])
def test_names_may_be_utf8(tmp_path: Path, kind: Any) -> None:
    """As HDF5 gives them back."""
    raw = kind([name.encode() for name in IDS])
    classes = kind([name.encode() for name in NAMES])
    cache = FeatureCache.write(
        tmp_path / "x.h5", np.ones((5, 1)), raw, labels=np.eye(5)[:, :3], classes=classes
    )
    assert cache.ids.tolist() == IDS
    assert cache.classes.tolist() == NAMES
    labels = Labels(raw, classes, csr_matrix(np.eye(5)[:, :3]))
    assert labels.select(raw[:2]).ids.tolist() == IDS[:2]


def test_what_is_masked_is_no_value(tmp_path: Path) -> None:
    masked = np.ma.masked_greater(np.arange(6.0).reshape(3, 2), 4)
    path, ids = tmp_path / "x.h5", ["a", "b", "c"]
    with pytest.raises(InputError, match="1 features are masked; fill them, and mark such"):
        FeatureCache.write(path, masked, ids)
    with pytest.raises(InputError, match="1 labels are masked; NaN says that one is unknown"):
        FeatureCache.write(path, np.ones((3, 1)), ids, labels=masked / 5)
    whole = FeatureCache.write(path, np.ma.masked_greater(masked.data, 9), ids)
    np.testing.assert_array_equal(whole.x("eval"), masked.data)


def test_features_begin_on_a_page(tmp_path: Path) -> None:
    FeatureCache.write(tmp_path / "c.h5", np.zeros((3, 1000), np.float32), ["a", "b", "c"])
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["features"].id.get_offset() % 4096 == 0


def test_large_provenance_fits(tmp_path: Path) -> None:
    """HDF5 keeps at most 64 KiB of attributes inside an object header."""
    text = "π" * 200_000
    path = tmp_path / "x.h5"
    cache = FeatureCache.write(path, np.ones((1, 1)), ["a"], provenance={"text": text})
    assert cache.provenance["text"] == text


# -------------------------------------------------------------------- layout


def test_layout_is_as_promised(cache: FeatureCache) -> None:
    """Read with h5py alone, as other programs do."""
    with h5py.File(cache.path) as file:
        data = file["features"]
        assert (data.shape, data.dtype) == ((5, 2, 4), np.dtype("<f2"))
        assert data.chunks is None
        plist = data.id.get_create_plist()
        assert plist.get_layout() == h5py.h5d.CONTIGUOUS
        assert plist.get_nfilters() == 0
        for name, expected in {
            "ids": IDS,
            "views": ["eval", "flip"],
            "classes/id": CLASSES,
            "classes/name": NAMES,
            "skipped/id": ["e"],
            "skipped/reason": ["cannot identify"],
        }.items():
            info = h5py.check_string_dtype(file[name].dtype)
            assert info is not None
            assert info.encoding == "utf-8"
            assert [item.decode("utf-8") for item in file[name][:]] == expected
        for name, dtype in {
            "valid": bool,
            "labels/known": bool,
            "labels/data": np.float16,
            "head/weight": np.float32,
            "head/bias": np.float32,
        }.items():
            assert file[name].dtype == dtype
        positives = csr_matrix(
            (file["labels/data"][:], file["labels/indices"][:], file["labels/indptr"][:]), (5, 3)
        )
        assert positives[0, 0] == 0.5
        assert file["labels/negative/indptr"][:].tolist() == [0, 1, 2, 2, 3, 3]
        assert file["labels/negative/indices"][:].tolist() == [2, 0, 1]
        digest = hashlib.sha256(data[:].tobytes()).hexdigest()
        assert file["blocks/start"][:].tolist() == [0]
        assert file["blocks/sha256"].asstr()[:].tolist() == [digest]
        assert file.attrs["format"] == 1
        provenance = json.loads(file.attrs["provenance"])
        assert provenance["unlisted"] == "unknown"
        assert re.fullmatch("[0-9a-f]{64}", provenance["network_id"])


def test_features_are_mapped_and_read_only(cache: FeatureCache) -> None:
    assert isinstance(cache.features, np.memmap)
    assert np.shares_memory(cache.features, cache.features)
    for array in (cache.features, cache.weight):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    # No handle of HDF5 is left open: the file can be opened for writing.
    with h5py.File(cache.path, "r+"):
        pass


@pytest.mark.parametrize("cores", [1, 3, 64])
@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_x_is_the_same_on_any_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, block: int
) -> None:
    finite = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = np.append(finite[np.isfinite(finite)], np.zeros(2048, np.float16))  # 64 * 1024
    cache = FeatureCache.write(tmp_path / "x.h5", finite.reshape(64, 2, 512), range(64))
    expected = cache.features.astype(np.float32, subok=False)
    monkeypatch.setattr(arrays, "_cores", lambda: cores)
    monkeypatch.setattr(arrays, "_SMALL_BYTES", 1 if block < 2**22 else 2**24)
    monkeypatch.setattr(arrays, "_BLOCK_BYTES", block * 4096)
    some = np.array([63, 5, 5, 0])
    for x, wanted in [
        (cache.x(), expected),
        (cache.x("view1"), expected[:, 1]),
        (cache.select(some.astype(str)).x(), expected[some]),
        (cache.select(some.astype(str)).x("eval"), expected[some, 0]),
        (cache.select([]).x(), expected[:0]),
        (cache.select([]).x("eval"), expected[:0, 0]),
    ]:
        assert type(x) is np.ndarray
        assert (x.dtype, x.shape, x.flags.c_contiguous) == (np.float32, wanted.shape, True)
        assert x.flags.owndata
        assert x.flags.writeable
        assert x.tobytes() == wanted.tobytes()


def test_opening_reads_no_features(tmp_path: Path) -> None:
    """4 GB of features (holes in the file) take neither memory nor reading."""
    contents = CacheContents(np.arange(1000).astype(str), ["eval"], 2_000_000).checked()
    path = tmp_path / "x.h5"
    layout.create(path, contents)
    layout.complete(path, contents, {}, [(0, "0" * 64)], {})
    tracemalloc.start()
    try:
        cache = FeatureCache(path)
        assert cache.shape == (1000, 1, 2_000_000)
        assert "1,000 images" in repr(cache)
        assert summary(cache)
        assert cache.select(["7", "8"]).x("eval")[:, -3:].tolist() == [[0, 0, 0], [0, 0, 0]]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2 * 2_000_000 * (2 + 4)


def test_verify_names_the_rows(tmp_path: Path) -> None:
    contents = CacheContents(np.arange(10).astype(str), ["eval", "flip"], 4)
    path = tmp_path / "x.h5"
    with CacheWriter(path, contents, fingerprint={}, block_rows=3) as out:
        for start, stop in out.pending():
            out.write(start, np.ones((stop - start, 2, 4)), [None] * (stop - start))
        out.finish({})
    cache = FeatureCache(path)
    assert cache.verify() == []
    with h5py.File(path, "r+") as file:
        file["features"][4, 1, 3] = 2
        file["features"][9, 0, 0] = -1
    assert cache.verify() == [(3, 6), (9, 10)]
    assert cache.select(["0"]).verify() == [(3, 6), (9, 10)]
    with h5py.File(path, "r+") as file:
        file["blocks/start"][0] = 1
    assert FeatureCache(path).verify() == [(0, 10)]


@pytest.mark.parametrize(
    "part", ["ids", "valid", "labels/indices", "head/weight", "classes/id", "provenance"]
)
def test_a_flipped_bit_beside_the_features_is_found(
    cache: FeatureCache, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose labels would be learnt at the wrong class, or whose rows be those of another image."""
    assert cache.damaged() == []
    with h5py.File(cache.path, "r+") as file:
        if part == "provenance":
            file.attrs[part] = file.attrs[part].replace("resnet", "resmet")
        elif part in ("ids", "classes/id"):
            file[part][0] = b"z"
        else:
            file[part].write_direct(_flipped(file[part][()]))
    damaged = FeatureCache(cache.path)
    assert damaged.damaged() == [part]
    assert damaged.verify() == [(0, 5)]
    assert main(["verify", str(cache.path)]) == 1
    assert f"damaged in {part}, so in all rows 0 to 4; extract" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"x.h5: damaged in {part}"):
        merge([cache.path], cache.path.with_name("merged.h5"))


def _flipped(values: np.ndarray) -> np.ndarray:
    """Another first value."""
    flat = values.reshape(-1)
    flat[0] = not flat[0] if values.dtype == bool else flat[0] + 1
    return values


def test_caches_without_hashes_of_the_rest_are_read(cache: FeatureCache) -> None:
    with h5py.File(cache.path, "r+") as file:
        del file.attrs["sha256"]
    old = FeatureCache(cache.path)
    assert old.damaged() == []
    assert old.verify() == []


def test_a_cache_that_is_replaced_meanwhile(cache: FeatureCache, features: np.ndarray) -> None:
    """What was opened stays what it was; what would look at the new file says so."""
    some = cache.select(["c"])
    sent = pickle.dumps(some)
    before = some.features.copy()
    FeatureCache.write(cache.path, features[::-1].copy(), IDS[::-1], overwrite=True)
    np.testing.assert_array_equal(some.features, before)
    assert cache.ids.tolist() == IDS
    for look in (cache.verify, lambda: pickle.loads(sent)):
        with pytest.raises(InputError, match=r"x\.h5: was replaced since .* open it again"):
            look()
    again = FeatureCache(cache.path)
    assert again.ids.tolist() == IDS[::-1]
    assert again.verify() == []


# ------------------------------------------------------------------- refusal


def test_what_is_no_cache_is_refused(tmp_path: Path, cache: FeatureCache) -> None:
    def refused(message: str, path: Path = tmp_path / "bad.h5") -> None:
        with pytest.raises(InputError, match=message) as caught:
            FeatureCache(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)

    bad, whole = tmp_path / "bad.h5", cache.path.read_bytes()
    refused("no such file; make it with")
    refused("is a folder; open a .h5 file in it", tmp_path)
    bad.write_bytes(b"")
    refused("not a readable cache")
    bad.write_bytes(b"image_id,labels\n" * 1000)
    refused("not a readable cache")
    bad.write_bytes(whole[:-200])
    refused("not a readable cache")
    bad.write_bytes(whole[: len(whole) // 2])
    refused("not a readable cache")
    with h5py.File(bad, "w") as file:
        file["x"] = [1]
    refused("no cache of features")
    with h5py.File(bad, "w") as file:
        file["features"] = np.ones((1, 1, 1), np.float16)
    refused("unfinished cache, or one of another program")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", np.array([b"a", b"b"]), r"/ids has shape \(2,\), expected \(5,\)"),
        ("valid", None, "/valid is missing"),
        ("blocks/sha256", None, "/blocks/sha256 is missing"),
        ("views", np.array([b"eval"]), r"/views has shape \(1,\), expected \(2,\)"),
        ("labels/indptr", np.zeros(3, int), r"/labels/indptr has shape \(3,\), expected \(6,\)"),
        ("head/bias", np.zeros(2), r"/head/bias has shape \(2,\), expected \(3,\)"),
        ("head/weight", np.zeros(3), "/head/weight has shape"),
        ("skipped/reason", np.array([b"x", b"y"]), "/skipped/reason has shape"),
        ("features", np.zeros((5, 2, 4)), "features are float64"),
        ("features", np.zeros((5, 4), np.float16), r"of shape \(5, 4\)"),
    ],
)
def test_damaged_parts_are_named(
    cache: FeatureCache, name: str, value: np.ndarray | None, message: str
) -> None:
    with h5py.File(cache.path, "r+") as file:
        del file[name]
        if value is not None:
            file[name] = value
    with pytest.raises(InputError, match=message):
        FeatureCache(cache.path)


def test_a_damaged_structure_is_one_line(
    cache: FeatureCache, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bytes by which HDF5 tells what follows."""
    raw, path = cache.path.read_bytes(), cache.path.with_name("bad.h5")
    for mark in (b"HEAP", b"TREE", b"SNOD"):
        path.write_bytes(raw.replace(mark, b"XXXX"))
        for look in (FeatureCache, layout.read_contents):
            with pytest.raises(InputError, match=r"bad\.h5: .*not a readable cache|no cache of"):
                look(path)
        assert main(["verify", str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError, ValueError, KeyError])
def test_whatever_h5py_raises_is_damage(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*arguments: Any) -> None:
        raise error("broken\nhere")

    monkeypatch.setattr(h5py, "File", fail)
    for look in (FeatureCache, layout.read_contents):
        with pytest.raises(InputError, match=r"x\.h5: not a readable cache \('?broken") as caught:
            look(cache.path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize(
    ("part", "at", "value"),
    [
        ("labels/indptr", 0, 1),
        ("labels/indptr", 2, 2**40),
        ("labels/indptr", 2, -5),
        ("labels/indptr", 5, 3),
        ("labels/indices", 1, 2**30),
        ("labels/indices", 1, 3),
        ("labels/indices", 1, -1),
        ("labels/negative/indptr", 1, 99),
        ("labels/negative/indices", 0, 2**30),
        ("labels/data", 1, np.nan),
    ],
)
def test_damaged_labels_are_refused_before_they_are_used(
    cache: FeatureCache,
    capsys: pytest.CaptureFixture[str],
    part: str,
    at: int,
    value: float,
    hashed: bool,
) -> None:
    """Also in files from before there were hashes: SciPy would read whatever lies in memory."""
    with h5py.File(cache.path, "r+") as file:
        file[part][at] = value
        if not hashed:
            del file.attrs["sha256"]
    named = f"/{part}" if hashed or "data" not in part else "a positive has confidence nan"
    for look in (
        lambda: FeatureCache(cache.path).labels,
        lambda: FeatureCache(cache.path).select(["a"]).training(),
        lambda: layout.read_contents(cache.path) if not hashed else FeatureCache(cache.path).labels,
    ):
        with pytest.raises(InputError, match=rf"x\.h5: damaged.*{named}.*; make or copy it again"):
            look()
    assert main(["info", str(cache.path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_labels_that_are_other_ones_are_refused(cache: FeatureCache) -> None:
    """A class number within bounds tells nothing by itself: only its hash does."""
    with h5py.File(cache.path, "r+") as file:
        file["labels/indices"][0] = 1 - file["labels/indices"][0]
    damaged = FeatureCache(cache.path)
    with pytest.raises(InputError, match=r"x\.h5: damaged, /labels/indices is not what was"):
        damaged.training()
    assert damaged.damaged() == ["labels/indices"]


def test_reasons_that_are_too_few_and_texts_that_are_none(cache: FeatureCache) -> None:
    with h5py.File(cache.path, "r+") as file:
        file["valid"][0] = False
    with pytest.raises(InputError, match=r"x\.h5: damaged, 2 rows are invalid by /valid and 1 by"):
        FeatureCache(cache.path).skipped  # noqa: B018
    raw = cache.path.read_bytes()
    cache.path.write_bytes(raw.replace("bé".encode(), b"b\xff\xff"))
    with pytest.raises(InputError, match=r"x\.h5: damaged, /ids is no UTF-8"):
        FeatureCache(cache.path).ids  # noqa: B018


def test_texts_of_any_length_are_read_as_h5py_writes_them(
    cache: FeatureCache, tmp_path: Path
) -> None:
    """Another program need not know how long the longest text is."""
    other = tmp_path / "other.h5"
    with h5py.File(cache.path) as file, h5py.File(other, "w") as into:
        into.attrs["format"], into.attrs["provenance"] = 1, file.attrs["provenance"]

        def copied(name: str, item: object) -> None:
            if not isinstance(item, h5py.Dataset):
                return
            if h5py.check_string_dtype(item.dtype):
                into.create_dataset(name, data=item.asstr()[()], dtype=h5py.string_dtype())
            else:
                into[name] = item[()]

        file.visititems(copied)
    read = FeatureCache(other)
    for name in ("ids", "views", "classes", "class_names"):
        np.testing.assert_array_equal(getattr(read, name), getattr(cache, name))
    assert read.skipped == cache.skipped
    np.testing.assert_array_equal(read.select(cache.ids[2:4]).features, cache.features[2:4])
    assert (read.labels is None) == (cache.labels is None)


def test_compressed_features_are_refused(cache: FeatureCache) -> None:
    with h5py.File(cache.path, "r+") as file:
        data = file["features"][:]
        del file["features"]
        file.create_dataset("features", data=data, compression="gzip")
    with pytest.raises(InputError, match=r"expected contiguous, uncompressed float16"):
        FeatureCache(cache.path)


def test_the_limit_of_open_files_is_no_damage(cache: FeatureCache) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[FeatureCache] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
        with pytest.raises(InputError, match=r"x\.h5: too many open files.*ulimit -n"):
            opened.extend(FeatureCache(cache.path) for _ in range(200))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert FeatureCache(cache.path).ids.tolist() == IDS


def test_newer_formats_and_damaged_provenance_are_refused(cache: FeatureCache) -> None:
    with h5py.File(cache.path, "r+") as file:
        file.attrs["format"] = 2
    with pytest.raises(InputError, match="cache format 2, this featcache reads up to 1"):
        FeatureCache(cache.path)
    with h5py.File(cache.path, "r+") as file:
        file.attrs["format"] = 1
        file.attrs["provenance"] = "{"
    with pytest.raises(InputError, match="not a readable cache"):
        FeatureCache(cache.path)


# ----------------------------------------------------------------- selection


def test_select_keeps_everything_in_step(cache: FeatureCache) -> None:
    part = cache.select(["e", "a", "c", "a"])
    rows = [4, 0, 2, 0]
    np.testing.assert_array_equal(part.features, cache.features[rows])
    np.testing.assert_array_equal(part.x(), cache.x()[rows])
    np.testing.assert_array_equal(part.x("flip"), cache.x("flip")[rows])
    assert part.ids.tolist() == ["e", "a", "c", "a"]
    assert part.valid.tolist() == [False, True, True, True]
    assert part.skipped == {"e": "cannot identify"}
    assert part.labels is not None
    assert cache.labels is not None
    np.testing.assert_array_equal(
        part.labels.positives.toarray(), cache.labels.positives.toarray()[rows]
    )
    assert part.labels.ids.tolist() == part.ids.tolist()
    assert part.labels.known.tolist() == [True, True, False, True]
    assert part.shape == (4, 2, 4)
    again = part.select(["a", "e"])
    np.testing.assert_array_equal(again.features, cache.features[[0, 4]])
    assert len(cache.select([])) == 0
    assert cache.select([]).x("eval").shape == (0, 4)


NAMES_OF_IMAGES = st.text(st.sampled_from("ab0Zé名"), min_size=1, max_size=4)


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(
    ids=st.lists(NAMES_OF_IMAGES, min_size=1, max_size=12),
    part=st.lists(st.integers(0, 11), max_size=8),
    wanted=st.lists(NAMES_OF_IMAGES, max_size=5),
)
def test_select_is_what_a_search_from_the_start_finds(
    ids: list[str],
    part: list[int],
    wanted: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("select") / "x.h5"
    whole = FeatureCache.write(path, np.arange(len(ids))[:, None], ids)
    once = [name for name in dict.fromkeys(ids) if ids.count(name) == 1]
    some = [once[k % len(once)] for k in part] if once else []  # a row may stand there twice
    for cache, has in ((whole, ids), (whole.select(some), list(dict.fromkeys(some)))):
        wrong = [name for name in wanted if has.count(name) != 1]
        if wrong:
            trouble = "names several rows here" if has.count(wrong[0]) else "is not here"
            with pytest.raises(InputError, match=f"id '{wrong[0]}' {trouble}"):
                cache.select(wanted)
        else:
            found = cache.select(wanted)
            assert found.ids.tolist() == wanted
            assert found.x("eval")[:, 0].tolist() == [ids.index(name) for name in wanted]


def test_select_refuses_what_is_not_there(cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.h5: id 'zz' is not here"):
        cache.select(["a", "zz"])
    with pytest.raises(InputError, match="id 'bé' is not here"):
        cache.select(["a"]).select(["bé"])
    with pytest.raises(InputError, match="id 'a longer name' is not here"):
        cache.select(np.array(["a longer name"]))
    twice = FeatureCache.write(tmp_path / "twice.h5", np.ones((3, 1)), ["a", "b", "a"])
    assert twice.select(["b"]).ids.tolist() == ["b"]
    with pytest.raises(InputError, match="id 'a' names several rows"):
        twice.select(["a"])
    with pytest.raises(InputError, match=r"no view 'zoom'; choose from \['eval', 'flip'\]"):
        cache.x("zoom")


def test_a_pickled_cache_is_small_and_the_same(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(500, 100))
    cache = FeatureCache.write(tmp_path / "x.h5", values, np.arange(500).astype(str))
    for item in (cache, cache.select(["7", "3"])):
        sent = pickle.dumps(item)
        assert len(sent) < 1000
        np.testing.assert_array_equal(pickle.loads(sent).features, item.features)


# ------------------------------------------------------------------ training


def test_training_maps_when_all_rows_are_used(tmp_path: Path) -> None:
    cache = FeatureCache.write(
        tmp_path / "x.h5", np.ones((4, 3)), list("abab"), labels=np.eye(4), weight=np.ones((4, 3))
    )
    arguments = cache.training()
    assert np.shares_memory(arguments["X"], cache.features)
    assert arguments["mask"] is None
    assert arguments["groups"].tolist() == [0, 1, 0, 1]
    assert arguments["Y"].dtype == np.float32
    np.testing.assert_array_equal(arguments["coef_init"], np.ones((4, 3)))


def test_training_refuses_what_cannot_train(cache: FeatureCache) -> None:
    with pytest.raises(InputError, match="class '/m/7' is not among its 3 classes"):
        cache.training(classes=["/m/1", "/m/7"])
    with pytest.raises(InputError, match="none of its 2 rows is both readable and labelled"):
        cache.select(["c", "e"]).training()  # no entry; no image
    nothing = cache.training(min_positives=99)
    assert nothing["Y"].shape == (3, 0)
    assert nothing["coef_init"].shape == (0, 4)


@st.composite
def images(draw: st.DrawFn) -> dict[str, Any]:
    """What is known of a few images, plainly: {image: {class: confidence, or 0 for negative}}."""
    ids = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True))
    classes = draw(st.lists(st.sampled_from("KLMNO"), min_size=1, max_size=5, unique=True))
    known = st.dictionaries(st.sampled_from(classes), st.sampled_from([0.0, 0.25, 1.0]))
    return {
        "classes": classes,
        "unlisted": draw(st.sampled_from(["negative", "unknown"])),
        "labels": {name: draw(known) for name in ids},
        "labelled": {name: draw(st.booleans()) for name in ids},
        "valid": {name: draw(st.booleans()) for name in ids},
        "wanted": draw(st.lists(st.sampled_from(ids), max_size=9)),
        "wanted_classes": draw(st.one_of(st.none(), st.permutations(classes))),
        "min_positives": draw(st.integers(0, 3)),
        "has_head": draw(st.booleans()),
    }


@settings(derandomize=True, deadline=None, database=None, max_examples=80)
@given(case=images())
def test_training_is_what_dictionaries_say(
    case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    ids, classes, truth = list(case["labels"]), case["classes"], case["labels"]
    number = {name: row + 1.0 for row, name in enumerate(ids)}
    head = {name: 10.0 * column for column, name in enumerate(classes)}

    def matrix(wanted: Any) -> csr_matrix:
        return csr_matrix([[wanted(truth[i].get(k)) for k in classes] for i in ids], dtype="f4")

    labels = Labels(
        ids,
        classes,
        matrix(lambda value: value or 0),
        matrix(lambda value: value == 0 and value is not None),
        unlisted=case["unlisted"],
        known=np.array([case["labelled"][i] for i in ids]),
    )
    path = tmp_path_factory.mktemp("training") / "x.h5"
    cache = FeatureCache.write(
        path,
        np.array([[number[i]] for i in ids]),
        ids,
        labels=labels,
        weight=np.array([[head[k]] for k in classes]) if case["has_head"] else None,
        bias=-np.array([head[k] for k in classes]) if case["has_head"] else None,
        valid=np.array([case["valid"][i] for i in ids]),
    ).select(case["wanted"])

    rows = [i for i in case["wanted"] if case["valid"][i] and case["labelled"][i]]
    options = {"classes": case["wanted_classes"], "min_positives": case["min_positives"]}
    if not rows:
        with pytest.raises(InputError, match="readable and labelled"):
            cache.training(**options)
        return
    columns = [
        k
        for k in (case["wanted_classes"] or classes)
        if sum(truth[i].get(k, 0) > 0 for i in rows) >= case["min_positives"]
    ]
    arguments = cache.training(**options)
    assert cache.frequent(case["min_positives"], case["wanted_classes"]).tolist() == columns
    assert arguments["X"][:, 0, 0].tolist() == [number[i] for i in rows]
    expected = [[truth[i].get(k, 0) for k in columns] for i in rows]
    np.testing.assert_array_equal(
        arguments["Y"].toarray(), np.reshape(expected, (len(rows), len(columns)))
    )
    assert arguments["Y"].has_canonical_format
    if case["unlisted"] == "negative":
        assert arguments["mask"] is None
    else:
        assert arguments["mask"].tolist() == [[k not in truth[i] for k in columns] for i in rows]
    groups = arguments["groups"].tolist()
    assert [a == b for a in groups for b in groups] == [a == b for a in rows for b in rows]
    if case["has_head"]:
        assert arguments["coef_init"].tolist() == [[head[k]] for k in columns]
        assert arguments["intercept_init"].tolist() == [-head[k] for k in columns]
    else:
        assert arguments["coef_init"] is None
        assert arguments["intercept_init"] is None


# ------------------------------------------------------------------- summary


def test_summary_says_what_is_inside(cache: FeatureCache) -> None:
    text = summary(cache)
    for part in (
        str(cache.path),
        "resnet",
        str(cache.network_id),
        "5, 4 valid, 1 skipped; a to e",
        "e: cannot identify",
        "2 views (eval, flip) of 4",
        "3 classes, 3 of them positive somewhere",
        "1.25 positives a row, 1 to 2",
        "1 row without an entry",
        "2 true labels outside the classes",
        "what is not listed is unknown",
        '{"seed": 1}',
        "heads fit",
        "featcache verify",
    ):
        assert part in text, part
    assert len(text.splitlines()) <= 40
    assert "no labels" not in repr(cache)
    assert "1 skipped" in repr(cache)


def test_summary_of_a_bare_cache_fits_a_screen(tmp_path: Path) -> None:
    n = 50
    cache = FeatureCache.write(
        tmp_path / "x.h5",
        np.ones((n, 2)),
        [f"{row:024x}" for row in range(n)],
        reasons=[None if row % 2 else "truncated " * 50 for row in range(n)],
        provenance={f"key{i}": list(range(100)) for i in range(60)},
    )
    lines = summary(cache).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines[1:-1])) <= 100
    assert "25 valid, 25 skipped" in summary(cache)
    assert "heads predict" in lines[-1]
    assert "no labels" in repr(cache)
    assert os.sep in lines[0]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"features": np.eye(2) * 1j}, "features of type complex128; give real numbers"),
        ({"features": [["a"], ["b"]]}, "features of type <U1; give real numbers"),
        ({"labels": [["a"], ["b"]]}, "labels are no matrix of numbers .*'a'"),
        ({"weight": [[np.nan, 1]]}, "weight or bias has a NaN or an infinity"),
        ({"weight": [[1, 1]], "bias": [np.inf]}, "weight or bias has a NaN or an infinity"),
    ],
)
def test_parts_that_are_no_numbers_are_refused(
    tmp_path: Path, part: dict[str, Any], message: str
) -> None:
    plain = {"features": np.eye(2), "ids": ["a", "b"]}
    with pytest.raises(InputError, match=message):
        FeatureCache.write(tmp_path / "x.h5", **plain | part)
    assert list(tmp_path.iterdir()) == []


def test_one_class_that_is_no_list_is_refused(cache: FeatureCache) -> None:
    with pytest.raises(InputError, match="classes='/m/0': give a list of class ids"):
        cache.training(classes="/m/0")


def test_every_class_has_a_name_in_the_file(tmp_path: Path) -> None:
    given = {"labels": np.eye(3), "classes": ["x", "y", "z"]}
    cache = FeatureCache.write(tmp_path / "a.h5", np.ones((3, 2)), ["a", "b", "c"], **given)
    with h5py.File(cache.path) as file:
        assert file["classes/name"].asstr()[()].tolist() == ["x", "y", "z"]
    # A cache of before, without names, is of the same network.
    other = FeatureCache.write(tmp_path / "b.h5", np.ones((3, 2)), ["d", "e", "f"], **given)
    with h5py.File(other.path, "r+") as file:
        del file["classes/name"], file.attrs["sha256"]
    joined = FeatureCache(merge([cache.path, other.path], tmp_path / "both.h5"))
    assert joined.class_names.tolist() == ["x", "y", "z"]


@pytest.mark.parametrize("ids", [{"a", "b"}, frozenset("ab"), {"a": 0, "b": 1}])
def test_ids_without_an_order_are_refused(ids: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ids has shape"):
        FeatureCache.write(tmp_path / "x.h5", np.ones((2, 2)), ids)


def test_ids_may_be_numbers_of_a_tensor_or_a_dataset(tmp_path: Path) -> None:
    cache = FeatureCache.write(tmp_path / "t.h5", np.ones((3, 2)), torch.arange(3))
    assert cache.ids.tolist() == ["0", "1", "2"]
    with h5py.File(tmp_path / "ids.h5", "w") as file:
        file["ids"] = ["é", "b", "c"]
        again = FeatureCache.write(tmp_path / "d.h5", np.ones((3, 2)), file["ids"])
    assert again.ids.tolist() == ["é", "b", "c"]


def test_a_name_of_a_class_that_is_no_text_is_damage(cache: FeatureCache) -> None:
    with h5py.File(cache.path, "r+") as file:
        raw = file["classes/name"][()]
        raw[0] = b"\xff" + raw[0][1:]
        file["classes/name"][...] = raw
    with pytest.raises(InputError, match=f"{cache.path.name}: "):
        FeatureCache(cache.path).labels  # noqa: B018 - read here
    with pytest.raises(InputError, match=f"{cache.path.name}: "):
        read_contents(cache.path)
