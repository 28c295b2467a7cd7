"""What does a cache look like on one screen?"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from featcache.cache import FeatureCache

_WIDTH = 88
_REASONS = 3
_VIEWS = 4
_FACTS = 16
_ELSEWHERE = ("network", "network_id", "unlisted", "fingerprint")


def summary(cache: FeatureCache) -> str:
    """Path, network, images, features, labels, head and provenance; at most some 35 lines."""
    _, v, d = cache.shape
    lines = [
        f"{cache.path}  ({_size(cache.path.stat().st_size)})",
        _line("network", cache.network_name),
        _line("", f"id {cache.network_id}" if cache.network_id else "without an id"),
        _line("images", _images(cache)),
    ]
    some = list(cache.skipped.items())[:_REASONS]
    lines += [_line("", f"{name}: {reason}") for name, reason in some]
    if len(cache.skipped) > len(some):
        lines.append(_line("", f"... and {len(cache.skipped) - len(some):,} more in .skipped"))
    views = ", ".join([*cache.views[:_VIEWS].tolist(), *["..."] * (v > _VIEWS)])
    lines.append(_line("features", f"{v} view{'s' * (v > 1)} ({views}) of {d:,}, float16"))
    lines += [_line("labels", text) if i == 0 else _line("", text) for i, text in _labels(cache)]
    lines.append(_line("head", "none" if cache.weight is None else f"{cache.weight.shape} W0, b0"))
    facts = [f for f in cache.provenance.items() if f[0] not in _ELSEWHERE and f[1] != ""]
    lines += [_line(key, _value(value)) for key, value in facts[:_FACTS]]
    if len(facts) > _FACTS:
        lines.append(_line("", f"... and {len(facts) - _FACTS} more in .provenance"))
    return "\n".join([*lines, "", _hint(cache)])


def facts(cache: FeatureCache) -> dict[str, Any]:
    """The same for programs: plain values and lists of them."""
    n, _, d = cache.shape
    labels = cache.labels
    found = {
        "path": str(cache.path),
        "bytes": cache.path.stat().st_size,
        "network": cache.network_name,
        "network_id": cache.network_id,
        "images": n,
        "valid": int(np.count_nonzero(cache.valid)),
        "skipped": cache.skipped,
        "views": cache.views,
        "features": d,
        "classes": len(cache.classes),
        "head": cache.weight is not None,
        "labels": None,
        "provenance": dict(cache.provenance),
    }
    if labels is not None:
        found["labels"] = {
            "images": int(np.count_nonzero(labels.known)),
            "positives": int(labels.positives[labels.known].nnz),
            "outside": int(labels.outside.sum()),
            "unlisted": labels.unlisted,
        }
    return found


def _line(name: str, text: str) -> str:
    line = f"{name:17} {' '.join(text.split())}".rstrip()
    return line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..."


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _size(nbytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} GB"


def _images(cache: FeatureCache) -> str:
    n, bad = len(cache), int(np.count_nonzero(~cache.valid))
    ends = f"{cache.ids[0]} to {cache.ids[-1]}" if n else "none"
    return f"{n:,}, {n - bad:,} valid, {bad:,} skipped; {ends}"


def _labels(cache: FeatureCache) -> list[tuple[int, str]]:
    labels = cache.labels
    if labels is None:
        return [(0, f"none; {len(cache.classes):,} classes")]
    a_row = np.diff(labels.positives.indptr)[labels.known]
    used = len(np.unique(labels.positives.indices))
    texts = [f"{len(cache.classes):,} classes, {used:,} of them positive somewhere"]
    if len(a_row):
        texts.append(f"{a_row.mean():.3g} positives a row, {a_row.min()} to {a_row.max()}")
    if not labels.known.all():
        unknown = int(np.count_nonzero(~labels.known))
        texts.append(f"{unknown:,} row{'s' * (unknown != 1)} without an entry in a label file")
    if labels.outside.any():
        texts.append(f"{labels.outside.sum():,} true labels outside the classes")
    texts.append(f"what is not listed is {labels.unlisted}")
    return list(enumerate(texts))


def _hint(cache: FeatureCache) -> str:
    if cache.labels is None:
        next_step = f"heads predict HEAD.h5 --caches {cache.path} --out submission.csv"
    else:
        next_step = f"heads fit {cache.path} --out HEAD.h5"
    return f"next: {next_step}    (is the file sound? featcache verify {cache.path})"
