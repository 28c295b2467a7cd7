"""Make one cache of several: of other images each, or of the parts that processes have left.

Finished caches of one network are joined row by row in the order in which they are given.
Unfinished parts (``*.partial``, each with its ``*.journal`` beside it) are those of one
extraction by several processes, brought together from the machines that made them.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from featcache import layout
from featcache.annotations import Labels
from featcache.contents import CacheContents
from featcache.errors import InputError
from featcache.journal import Journal, difference
from featcache.layout import CacheFile
from featcache.rereading import blocks_of, refuse_damaged
from featcache.writing import CacheWriter, default_block_rows

# What makes features comparable at all, and what may change their last bits.
_WHAT = ("network", "network_id", "preprocessing", "views", "dtype")
_HOW = ("own_code", "device", "versions", "threads", "batch_size")
_PARTIAL = ".partial"


def merge(
    parts: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    mixed: bool = False,
    overwrite: bool = False,
) -> Path:
    """Join caches, or the parts of one cache, to `out`.

    Parameters
    ----------
    parts : sequence of path
        Finished caches of different images, or all parts of an unfinished one.
    out : path
    mixed : bool
        Join caches of one network although package versions, device, threads or batch
        sizes differ, which changes features by rounding; the result says so.
    overwrite : bool
        Replace an existing file.

    Returns
    -------
    path : Path
        `out`.

    Raises
    ------
    InputError
        If they are not of one network and recipe of views (with what differs, side by
        side), an id is in two of them, a block is damaged or rows are missing.
    """
    paths = [Path(part) for part in parts]
    twice = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]}: is given twice; give each part once")
    unfinished = [path for path in paths if path.name.endswith(_PARTIAL)]
    if not unfinished:
        return _merge_caches([layout.read(path) for path in paths], Path(out), mixed, overwrite)
    if len(unfinished) < len(paths):
        finished = next(path for path in paths if path not in unfinished)
        raise InputError(
            f"{unfinished[0]} is unfinished, {finished} is not; finish it first by the command "
            "that began it, or merge parts of one cache"
        )
    return _merge_parts(paths, Path(out), overwrite)


# ------------------------------------------------------------ finished caches


def _merge_caches(files: list[CacheFile], out: Path, mixed: bool, overwrite: bool) -> Path:
    first = files[0]
    refuse_damaged(files)
    for other in files[1:]:
        _refuse_differing(first, other, mixed)
    ids = np.concatenate([file.ids for file in files])
    _refuse_shared_ids(files)
    contents = CacheContents(
        ids=ids,
        views=first.views,
        dim=first.features.shape[2],
        labels=_joined_labels(files, ids),
        classes=first.classes,
        class_names=first.class_names if "classes/name" in first.arrays else None,
        weight=first.arrays.get("head/weight"),
        bias=first.arrays.get("head/bias"),
        provenance=_joined_provenance(files),
    )
    _, v, d = contents.shape
    with CacheWriter(
        out,
        contents,
        fingerprint={"merged": [_digest(file.blocks()) for file in files]},
        block_rows=default_block_rows(v, d),
        overwrite=overwrite,
    ) as writer:
        pending = dict(writer.pending())
        for start, rows, reasons in blocks_of(files, writer.block_rows):
            if start in pending:
                writer.write(start, rows, reasons)
        return writer.finish()


def _refuse_differing(first: CacheFile, other: CacheFile, mixed: bool) -> None:
    titles = str(first.path), str(other.path)
    if share := other.provenance.get("domain_statistics"):
        raise InputError(
            f"{other.path}: features take {share} of the statistics of its own images, those of "
            f"{first.path} of others; extract all images at once (several processes may share "
            "them, and parts that are not finished can be merged)"
        )
    left, right = _identity(first), _identity(other)
    if left != right:
        raise InputError(
            f"{other.path}: not of the network and views of {first.path}; extract both from one "
            f"run with the same options\n{difference(left, right, titles)}"
        )
    left, right = ({key: f.provenance.get(key) for key in _HOW} for f in (first, other))
    if left != right and not mixed:
        raise InputError(
            f"{other.path}: was made in another way than {first.path}, which changes features by "
            "rounding; pass --mixed (mixed=True) to join them, or extract one of them again\n"
            + difference(left, right, titles)
        )


def _identity(file: CacheFile) -> dict[str, Any]:
    found = {key: file.provenance.get(key) for key in _WHAT}
    found["view names"] = " ".join(file.views)
    found["dim"] = file.features.shape[2]
    found["classes/name"] = _digest(file.class_names.tolist())  # the ids where there are none
    for name in ("classes/id", "head/weight", "head/bias"):
        value = file.arrays.get(name)
        found[name] = None if value is None else f"{len(value)} {_digest(value.tolist())}"
    return found


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _refuse_shared_ids(files: list[CacheFile]) -> None:
    """Within a cache equal ids are rows of one group."""
    found, counts = np.unique(
        np.concatenate([np.unique(file.ids) for file in files]), return_counts=True
    )
    shared = found[counts > 1]
    if len(shared):
        having = [str(file.path) for file in files if shared[0] in file.ids]
        raise InputError(
            f"{having[1]}: the id {str(shared[0])!r} is in {having[0]} too, as {len(shared):,} "
            "ids are in several caches; an image may be in one of them only"
        )


def _joined_labels(files: list[CacheFile], ids: np.ndarray) -> Labels | None:
    """Rows of a cache without labels become rows without an entry in a label file."""
    known = [file.labels for file in files]
    if all(labels is None for labels in known):
        return None
    meanings = {labels.unlisted: file for labels, file in zip(known, files, strict=True) if labels}
    if len(meanings) > 1:
        told = "; ".join(f"{file.path}: {unlisted}" for unlisted, file in meanings.items())
        raise InputError(f"what is not listed means different things: {told}; extract one again")
    (unlisted,) = meanings
    K = len(files[0].classes)
    blank = [csr_matrix((len(file.ids), K), dtype=np.float32) for file in files]
    verified = any(labels is not None and labels.negatives is not None for labels in known)
    negatives = [
        nothing if labels is None or labels.negatives is None else labels.negatives
        for labels, nothing in zip(known, blank, strict=True)
    ]
    return Labels(
        ids,
        files[0].classes,
        vstack(
            [
                nothing if labels is None else labels.positives
                for labels, nothing in zip(known, blank, strict=True)
            ],
            format="csr",
        ),
        vstack(negatives, format="csr") if verified else None,
        unlisted=unlisted,
        known=np.concatenate(
            [
                np.zeros(len(file.ids), bool) if labels is None else labels.known
                for labels, file in zip(known, files, strict=True)
            ]
        ),
        outside=np.concatenate(
            [
                np.zeros(len(file.ids), np.int32) if labels is None else labels.outside
                for labels, file in zip(known, files, strict=True)
            ]
        ),
    )


def _joined_provenance(files: list[CacheFile]) -> dict[str, Any]:
    """What all say alike, and of each what the others do not."""
    first = files[0].provenance
    alike = {k: v for k, v in first.items() if all(f.provenance.get(k) == v for f in files)}
    alike.pop("fingerprint", None)
    alike["merged"] = [
        {"path": str(file.path), "rows": len(file.ids)}
        | {key: value for key, value in file.provenance.items() if key not in alike}
        for file in files
    ]
    return alike


# ----------------------------------------------------------- unfinished parts


def _merge_parts(paths: list[Path], out: Path, overwrite: bool) -> Path:
    journals = [_journal(path) for path in paths]
    first = journals[0].fingerprint
    for path, journal in zip(paths, journals, strict=True):
        if journal.fingerprint != first:
            titles = str(paths[0]), str(path)
            raise InputError(
                f"{path}: not a part of the cache that {paths[0]} belongs to\n"
                + difference(first, journal.fingerprint, titles)
            )
    contents = _contents(paths, first["contents"])
    _refuse_missing_rows(paths, contents, journals)
    with CacheWriter(
        out,
        contents,
        fingerprint=first["run"],
        block_rows=first["contents"]["block_rows"],
        overwrite=overwrite,
    ) as writer:
        for path, journal in zip(paths, journals, strict=True):
            if path.resolve().parent != out.resolve().parent or not path.name.startswith(out.name):
                writer.take(path, journal)
        if not writer.pending():
            writer.finish()
        if not writer.finished:
            raise InputError(
                f"{out}: {len(writer.pending())} blocks are damaged or at work; run the "
                "`featcache extract` that began it again"
            )
    return out


def _journal(path: Path) -> Journal:
    journal_path = path.with_name(path.name.removesuffix(_PARTIAL) + ".journal")
    if not path.is_file() or not journal_path.is_file():
        absent = journal_path if path.is_file() else path
        raise InputError(f"{absent}: no such file; a part is a .partial with its .journal beside")
    journal = Journal(journal_path, frozen=True)
    if not journal.skeletons:
        raise InputError(f"{journal_path}: is damaged; run `featcache extract` of it again")
    return journal


def _contents(paths: list[Path], expected: Mapping[str, Any]) -> CacheContents:
    """Everything but the features, of the first part that has it undamaged."""
    for path in paths:
        try:
            contents = layout.read_contents(path).checked()
        except InputError:
            continue
        if contents.fingerprint() | {"block_rows": expected["block_rows"]} == expected:
            return contents
    raise InputError(
        f"{paths[0]}: damaged, and no other part is sound; run `featcache extract` of it again"
    )


def _refuse_missing_rows(
    paths: list[Path], contents: CacheContents, journals: list[Journal]
) -> None:
    there = np.zeros(len(contents.ids), bool)
    for journal in journals:
        for block in journal.blocks.values():
            there[block.start : block.stop] = True
    if not there.all():
        row = int(np.argmin(there))
        raise InputError(
            f"{', '.join(path.name for path in paths)}: {int((~there).sum()):,} of "
            f"{len(there):,} rows are in none of them, the first is {str(contents.ids[row])!r}; "
            "give the parts of all processes, or run `featcache extract` of it on"
        )
