"""Put the features of several networks on the same images side by side, as one more network.

A head on all features at once weighs each feature against those of the other networks,
which averages of heads cannot. The last layer of the whole is

    W0 = [W_1, ..., W_M] / M,    b0 = (b_1 + ... + b_M) / M,

whose margins are the means of the networks' margins.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcache import layout
from featcache.annotations import Labels
from featcache.cache import FeatureCache
from featcache.cacheset import refuse_other_classes, refuse_other_images
from featcache.combined import combined_id, in_order, parts
from featcache.contents import CacheContents
from featcache.errors import InputError
from featcache.layout import CacheFile
from featcache.rereading import blocks_of, refuse_damaged
from featcache.writing import CacheWriter, default_block_rows


def concatenate(
    caches: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    overwrite: bool = False,
) -> Path:
    """Write a cache of the features of all `caches`, one beside the other.

    Parameters
    ----------
    caches : sequence of path
        Finished caches of different networks on the same images. Their order does not matter:
        features come in the order of the networks' ids, so that the results of two image sets fit
        each other. Views are put side by side by their names; if they were drawn by other seeds,
        a row shows an image in other crops to each network.
    out : path
    overwrite : bool
        Replace an existing file.

    Returns
    -------
    path : Path
        `out`. Its `network_id` follows from those of the networks. A row is valid where it is in
        all of them. It has a last layer if all of them have.

    Raises
    ------
    InputError
        If images, views, classes or labels differ, a network is given twice, has no id or is
        itself several side by side, `out` is one of the caches, or a block is damaged.

    Notes
    -----
    Combination of features before the classifier ("early fusion"; Snoek, Worring, Smeulders 2005).
    O(n v d) for d features in all; memory: a block. A killed run is gone on with.
    """
    _refuse_list(caches, Path(out))
    opened = in_order(FeatureCache(path) for path in caches)
    _refuse_networks(opened)
    refuse_other_images(opened)
    refuse_other_classes(opened)
    files = [layout.read(cache.path) for cache in opened]
    refuse_damaged(files)
    _refuse_other_views(files)
    first = next((file for file in files if len(file.classes)), files[0])
    contents = CacheContents(
        ids=first.ids,
        views=first.views,
        dim=sum(file.features.shape[2] for file in files),
        labels=_labels(files),
        classes=first.classes,
        class_names=first.class_names if "classes/name" in first.arrays else None,
        **_last_layer(opened),
        provenance=_provenance(opened),
    )
    _, v, d = contents.shape
    with CacheWriter(
        out,
        contents,
        fingerprint={"concatenated": [file.identity for file in files]},
        block_rows=default_block_rows(v, d),
        overwrite=overwrite,
    ) as writer:
        pending = dict(writer.pending())
        for blocks in zip(*(blocks_of([f], writer.block_rows) for f in files), strict=True):
            start = blocks[0][0]
            if start in pending:
                rows = np.concatenate([rows for _, rows, _ in blocks], axis=2)
                writer.write(start, rows, _reasons(opened, [whys for _, _, whys in blocks]))
        return writer.finish()


def _refuse_list(caches: Sequence[str | os.PathLike[str]], out: Path) -> None:
    if isinstance(caches, str | os.PathLike):
        raise InputError(f"{caches}: give a list of caches, one a network")
    if len(caches) < 2:
        given = ", ".join(map(str, caches)) or "nothing"
        raise InputError(f"given is {given}; give caches of two networks or more")
    places = [Path(path).resolve() for path in caches]
    twice = [path for path, count in Counter(places).items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]}: is given twice; give each cache once")
    if out.resolve() in places:
        raise InputError(
            f"{out}: is to be written and is one of the caches as well; leave it out of the list, "
            "or choose another --out"
        )


def _refuse_networks(caches: Sequence[FeatureCache]) -> None:
    seen: dict[str, FeatureCache] = {}
    for cache in caches:
        if parts(cache):
            raise InputError(
                f"{cache.path}: is of {len(parts(cache))} networks side by side already; give the "
                "caches of those networks themselves"
            )
        if cache.network_id is None:
            raise InputError(
                f"{cache.path}: its network has no id; write it with "
                "provenance={'network': NAME}, or heads could not be matched with the result"
            )
        other = seen.setdefault(cache.network_id, cache)
        if other is not cache:
            raise InputError(
                f"{cache.path} and {other.path} are of one network; give one cache a network"
            )


def _refuse_other_views(files: Sequence[CacheFile]) -> None:
    for file in files[1:]:
        if not np.array_equal(file.views, files[0].views):
            raise InputError(
                f"{file.path}: its views are {file.views.tolist()}, those of {files[0].path} "
                f"{files[0].views.tolist()}; extract both with the same --views and "
                "--view-count"
            )


def _labels(files: Sequence[CacheFile]) -> Labels | None:
    """Of the caches that have any, which must have the same."""
    first: tuple[CacheFile, Labels] | None = None
    for file in files:
        labels = file.labels
        if labels is None:
            continue
        if first is None:
            first = file, labels
            continue
        names = sorted({n for f in (file, first[0]) for n in f.arrays if n.startswith("labels/")})
        differing = [n for n in names if not _equal(file, first[0], n)]
        if labels.unlisted != first[1].unlisted:
            differing.append("the meaning of what is not listed")
        if differing:
            raise InputError(
                f"{file.path}: its labels are not those of {first[0].path} "
                f"({', '.join(differing)} differ); extract both with the same --labels"
            )
    return None if first is None else first[1]


def _equal(one: CacheFile, other: CacheFile, name: str) -> bool:
    both = name in one.arrays and name in other.arrays
    return both and np.array_equal(one.arrays[name], other.arrays[name])


def _last_layer(caches: Sequence[FeatureCache]) -> dict[str, np.ndarray]:
    """W0 and b0, if all networks have a last layer."""
    weights = [cache.weight for cache in caches if cache.weight is not None]
    biases = [cache.bias for cache in caches if cache.bias is not None]
    if len(weights) < len(caches):
        return {}
    whole = np.concatenate(weights, axis=1) / np.float32(len(caches))
    return {"weight": whole, "bias": np.mean(biases, axis=0)}


def _provenance(caches: Sequence[FeatureCache]) -> dict[str, Any]:
    """A name, an id, and what is said of each."""
    return {
        "network": " + ".join(cache.network_name for cache in caches),
        "network_id": combined_id(caches),
        "concatenated": [
            {"path": str(cache.path), "features": cache.shape[2], **cache.provenance}
            for cache in caches
        ],
    }


def _reasons(caches: Sequence[FeatureCache], whys: list[list[str | None]]) -> list[str | None]:
    """Why a row is not valid: of every network that could not read it."""
    names = [cache.network_name for cache in caches]
    found: list[str | None] = []
    for row in zip(*whys, strict=True):
        if len(set(row)) == 1:
            found.append(row[0])  # of the image itself, or None
        else:
            told = [f"{name}: {why}" for name, why in zip(names, row, strict=True) if why]
            found.append("; ".join(told))
    return found
