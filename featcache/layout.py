"""What is inside a cache file, and where?

One HDF5 file holds one network x one image set. With n images, v views, d
features and K classes:

=============================  ===================  =====================================
object                         shape, type          meaning
=============================  ===================  =====================================
``/features``                  (n, v, d) float16    contiguous, no filters
``/ids``, ``/views``           (n,), (v,) utf-8     names of rows and of views
``/valid``                     (n,) bool            False: unreadable image, row of zeros
``/skipped/id``, ``reason``    utf-8                one entry for each invalid row
``/labels/indptr, indices``    CSR                  positives; the group may be absent
``/labels/data``               float16              only where some confidence is < 1
``/labels/negative/...``       CSR                  verified negatives, if any are known
``/labels/known``              (n,) bool            False: no entry in any label file
``/labels/outside``            (n,) int32           true labels outside the classes, if any
``/classes/id``, ``name``      (K,) utf-8
``/blocks/start``, ``sha256``  int64, utf-8         hash of the bytes of each run of rows
``/head/weight``, ``bias``     (K, d), (K,)         float32, the network's last layer
``provenance``                 attribute            JSON
``format``                     attribute            version of this table
``sha256``                     attribute            JSON: hash of every object but the features
=============================  ===================  =====================================

Strings have a fixed length, and every dataset is contiguous: a reader maps the
file once and is done, whatever its size. `format` is written last, so that a
file without it is unfinished.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featcache.annotations import Labels
from featcache.contents import CacheContents, checksums, decoded, encoded, labels_from, plain
from featcache.disk import hash_ranges
from featcache.errors import InputError, damage, reason_of

FORMAT = 1
FEATURE_DTYPE = np.dtype("<f2")
REASON_LENGTH = 200
_PAGE = 4096  # bytes; arrays of so many begin on a page, where copies of a map are quickest

# What h5py raises where the structure of a file is damaged.
_OF_CLASSES = ("classes/id", "classes/name")
_DAMAGE = (OSError, LookupError, ValueError, RuntimeError, TypeError, AttributeError)

# The extent of each dataset: n images, v views, d features, K classes, others as they come.
_SHAPES = {
    "ids": "n",
    "views": "v",
    "valid": "n",
    "skipped/id": "s",
    "skipped/reason": "s",
    "classes/id": "K",
    "classes/name": "K",
    "head/weight": "Kd",
    "head/bias": "K",
    "labels/indptr": "m",
    "labels/indices": "p",
    "labels/data": "p",
    "labels/negative/indptr": "m",
    "labels/negative/indices": "q",
    "labels/known": "n",
    "labels/outside": "n",
    "blocks/start": "b",
    "blocks/sha256": "b",
}
_REQUIRED = (
    "ids",
    "views",
    "valid",
    "skipped/id",
    "skipped/reason",
    "blocks/start",
    "blocks/sha256",
)


# ------------------------------------------------------------------- writing


def create(path: Path, contents: CacheContents, rows: int | None = None) -> int:
    """Write an unfinished cache: all of `contents`, and room for the features of `rows` rows (all).

    Returns
    -------
    offset : int
        First byte of ``/features``, whose rows * v * d * 2 bytes can then be
        written without HDF5.
    """
    shape = (contents.shape[0] if rows is None else rows, *contents.shape[1:])
    page = {"alignment_threshold": _PAGE, "alignment_interval": _PAGE}
    with h5py.File(path, "w", **page) as file:
        file.attrs["provenance"] = json.dumps(contents.recorded())
        for name, value in contents.arrays().items():
            file.create_dataset(name, data=value)
        # Early allocation fixes the place; no fill, since every row is written anyway.
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.CONTIGUOUS)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        kind = h5py.h5t.py_create(FEATURE_DTYPE, logical=True)
        space = h5py.h5s.create_simple(shape)
        offset = h5py.h5d.create(file.id, b"features", kind, space, plist).get_offset()
    assert offset is not None  # contiguous and allocated
    return int(offset)


def complete(
    path: Path,
    contents: CacheContents,
    bad: Mapping[int, str],
    blocks: Sequence[tuple[int, str]],
    provenance: Mapping[str, Any],
) -> None:
    """Add what is known at the end: bad rows and why, (start, sha256) of blocks, provenance."""
    rows = sorted(bad)
    valid = np.ones(len(contents.ids), bool)
    valid[rows] = False
    reasons = np.array([_printable(bad[row]) for row in rows], dtype=np.str_)
    with h5py.File(path, "r+") as file:
        file["valid"] = valid
        file["skipped/id"] = encoded("image id", contents.ids[rows])
        file["skipped/reason"] = encoded("reason", reasons)
        file["blocks/start"] = np.array([start for start, _ in blocks], "<i8")
        file["blocks/sha256"] = encoded("hash", np.array([digest for _, digest in blocks]))
        told = plain(dict(provenance))
        file.attrs["provenance"] = json.dumps(told)
        found = {name: file[name][()] for name in _SHAPES if name in file}
        file.attrs["sha256"] = json.dumps(checksums(found, told))
        file.attrs["format"] = FORMAT


def _printable(reason: str) -> str:
    line = " ".join(reason.split())[:REASON_LENGTH] or "no reason given"
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


# ------------------------------------------------------------------- reading


def read_contents(path: str | os.PathLike[str]) -> CacheContents:
    """Everything but the features of a cache, which may be unfinished.

    Raises
    ------
    InputError
        If it is no such file or a damaged one.
    """
    try:
        with h5py.File(path, "r") as file:
            arrays = {name: file[name][()] for name in _SHAPES if name in file}
            provenance = json.loads(file.attrs["provenance"])
            dim = file["features"].shape[2]
        ids, views = decoded(arrays["ids"]), decoded(arrays["views"])
        texts = {name: decoded(arrays[name]) for name in _OF_CLASSES if name in arrays}
    except _DAMAGE as error:
        raise InputError(f"{path}: not a readable cache ({reason_of(error)})") from None
    classes = texts.get("classes/id", np.zeros(0, np.str_))
    unlisted = provenance.pop("unlisted", "negative")
    return CacheContents(
        ids=ids,
        views=views,
        dim=dim,
        labels=labels_from(path, arrays, ids, classes, unlisted),
        classes=classes,
        class_names=texts.get("classes/name"),
        weight=arrays.get("head/weight"),
        bias=arrays.get("head/bias"),
        provenance=provenance,
    )


@dataclass(frozen=True, eq=False)
class CacheFile:
    """A finished cache, mapped; parts are read when they are first asked for.

    Attributes
    ----------
    features : (n, v, d) float16 memmap
    offset : int
        First byte of the features in the file.
    arrays : dict
        The other datasets by path, read-only views of the same map; texts encoded.
    checksums : dict
        SHA-256 of each of those and of the provenance, when the file was made; empty of files
        that were made before these were kept.
    """

    path: Path
    features: np.ndarray
    offset: int
    arrays: Mapping[str, np.ndarray]
    provenance: Mapping[str, Any]
    checksums: Mapping[str, str]

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the ids and of the hashes of all features."""
        parts = (self.arrays["ids"].tobytes(), self.arrays["blocks/sha256"].tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of all arrays, from their hashes; not of the provenance, which tells dates."""
        sums = self.checksums or checksums(self.arrays, {})
        told = {name: value for name, value in sorted(sums.items()) if name != "provenance"}
        return hashlib.sha256(json.dumps([self.identity, told]).encode()).hexdigest()

    @cached_property
    def ids(self) -> np.ndarray:
        """(n,) str."""
        return self._texts("ids")

    @cached_property
    def views(self) -> np.ndarray:
        """(v,) str."""
        return self._texts("views")

    @cached_property
    def classes(self) -> np.ndarray:
        """(K,) str; empty where the file says nothing of classes."""
        return self._texts("classes/id")

    @cached_property
    def class_names(self) -> np.ndarray:
        """(K,) str; the ids where there are no names."""
        return self._texts("classes/name") if "classes/name" in self.arrays else self.classes

    @cached_property
    def reasons(self) -> dict[int, str]:
        """Why a row is not valid, by row."""
        rows, reasons = np.flatnonzero(~self.arrays["valid"]), self._texts("skipped/reason")
        if len(rows) != len(reasons):
            what = f"{len(rows):,} rows are invalid by /valid"
            raise damage(self.path, f"{what} and {len(reasons):,} by /skipped/reason")
        return dict(zip(rows.tolist(), reasons.tolist(), strict=True))

    @cached_property
    def labels(self) -> Labels | None:
        """None where nothing is known."""
        # They are read in full now, so hashing them costs little.
        changed = self.damaged("labels/")
        if changed:
            raise damage(self.path, f"/{changed[0]} is not what was written")
        unlisted = self.provenance.get("unlisted", "negative")
        return labels_from(self.path, self.arrays, self.ids, self.classes, unlisted)

    def blocks(self) -> list[tuple[int, str]]:
        """(first row, SHA-256 of the bytes) of each run of rows."""
        starts, hashes = self.arrays["blocks/start"], self._texts("blocks/sha256")
        return list(zip(starts.tolist(), hashes.tolist(), strict=True))

    def damaged(self, group: str = "") -> list[str]:
        """What beside the features is not what was written; of names that begin with `group`."""
        arrays = {name: value for name, value in self.arrays.items() if name.startswith(group)}
        now, then = checksums(arrays, self.provenance), self.checksums
        names = sorted(name for name in then.keys() | now.keys() if name.startswith(group))
        return [name for name in names if now.get(name) != then.get(name)] if then else []

    def bad_blocks(self) -> list[tuple[int, int]]:
        """Runs of rows [start, stop) whose bytes have another hash; O(1) memory."""
        blocks = self.blocks()
        starts = [start for start, _ in blocks]
        stops = [*starts[1:], len(self.features)]
        if starts[:1] != [0] or any(a >= b for a, b in zip(starts, stops, strict=True)):
            return [(0, len(self.features))]
        row_bytes = self.features[0].nbytes
        bad = []
        with open(self.path, "rb") as raw:
            for (start, digest), stop in zip(blocks, stops, strict=True):
                span = (self.offset + start * row_bytes, (stop - start) * row_bytes)
                if digest != hash_ranges(raw.fileno(), span):
                    bad.append((start, stop))
        return bad

    def _texts(self, name: str) -> np.ndarray:
        try:
            return decoded(self.arrays[name]) if name in self.arrays else np.zeros(0, np.str_)
        except UnicodeDecodeError:
            raise damage(self.path, f"/{name} is no UTF-8") from None


def read(path: str | os.PathLike[str]) -> CacheFile:
    """Map a cache file. O(number of datasets), whatever their sizes.

    Raises
    ------
    InputError
        If `path` is missing, unfinished, of a newer format, damaged or no cache.
    """
    path = Path(path)
    _refuse_missing(path)
    try:
        with h5py.File(path, "r") as file:
            _refuse_foreign(path, file)
            raw = np.memmap(path, np.uint8, "r")
            found = {name: file[name] for name in _SHAPES if name in file}
            arrays = {name: np.asarray(_mapped(raw, item)) for name, item in found.items()}
            features = _mapped(raw, file["features"])
            offset = file["features"].id.get_offset()
            provenance = dict(json.loads(file.attrs["provenance"]))
            checksums = json.loads(file.attrs.get("sha256", "{}"))
    except InputError:
        raise
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise InputError(
                f"{path}: too many open files, one of them for each cache; raise the limit "
                "(`ulimit -n 8192`) or open fewer caches at a time"
            ) from None
        raise InputError(
            f"{path}: not a readable cache ({reason_of(error)}); make or copy it again"
        ) from None
    _audit(path, features, arrays)
    return CacheFile(path, features, offset, arrays, provenance, checksums)


def _refuse_missing(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise InputError(f"{path}: is a folder; open a .h5 file in it, or all by CacheSet")
    partial = path.with_name(path.name + ".partial")
    if partial.exists():
        raise InputError(
            f"{path}: only the unfinished {partial.name} is there; "
            "run the command that makes it again, it goes on where it stopped"
        )
    raise InputError(f"{path}: no such file; make it with `featcache extract`")


def _refuse_foreign(path: Path, file: h5py.File) -> None:
    if "features" not in file or not isinstance(file["features"], h5py.Dataset):
        raise InputError(f"{path}: no cache of features; make one with `featcache extract`")
    if "format" not in file.attrs:
        raise InputError(
            f"{path}: an unfinished cache, or one of another program; "
            "run the command that makes it again"
        )
    version = file.attrs["format"]
    if version > FORMAT:
        raise InputError(
            f"{path}: cache format {version}, this featcache reads up to {FORMAT}; "
            "install a newer featcache"
        )
    features = file["features"]
    if features.ndim != 3 or features.dtype != FEATURE_DTYPE or features.id.get_offset() is None:
        raise InputError(
            f"{path}: features are {features.dtype} of shape {features.shape}, expected "
            "contiguous, uncompressed float16 (n, v, d); write it with FeatureCache.write"
        )


def _mapped(raw: np.memmap, dataset: h5py.Dataset) -> np.ndarray:
    texts = h5py.check_string_dtype(dataset.dtype)
    if texts is not None and texts.length is None:  # as h5py writes them by default
        return encoded(dataset.name, dataset.asstr()[()])
    offset = dataset.id.get_offset()
    if offset is None:  # empty, or stored otherwise by another program
        return dataset[()]
    stop = offset + dataset.size * dataset.dtype.itemsize
    if stop > len(raw):
        raise OSError(f"{len(raw)} bytes, {dataset.name} alone ends at {stop}")
    return raw[offset:stop].view(dataset.dtype).reshape(dataset.shape)


def _audit(path: Path, features: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing:
        raise damage(path, f"/{missing[0]} is missing")
    sizes = dict(zip("nvd", features.shape, strict=True)) | {"m": len(features) + 1}
    for name, value in arrays.items():
        symbols = _SHAPES[name]
        if len(symbols) == value.ndim:
            expected = tuple(
                sizes.setdefault(symbol, length)
                for symbol, length in zip(symbols, value.shape, strict=True)
            )
        else:
            expected = tuple(sizes.get(symbol, 0) for symbol in symbols)
        if value.shape != expected:
            raise damage(path, f"/{name} has shape {value.shape}, expected {expected}")
