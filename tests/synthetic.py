"""Caches of two networks that see images whose labels are known, at home and shifted.

An image is a latent vector; a label holds where a linear function of it is large.
A network sees the latent through a rotation of its own, with some noise, and its
last layer is right at home. In the target domain features are moved and mixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from featcache import FeatureCache
from heads.storage import Head, StoredBlend, load

D, K = 16, 10
CLASSES = [f"/m/{k:02d}" for k in range(K)]
_DIRECTIONS = 5 * np.linalg.qr(np.random.default_rng(100).normal(size=(D, K)))[0].T
_BIAS = -4.0


@dataclass(frozen=True)
class Images:
    """n images: ids, latents (n, D) and truth (n, K) of 0 and 1."""

    ids: list[str]
    latent: np.ndarray
    Y: np.ndarray


def images(n: int, seed: int) -> Images:
    """Other seeds give other images, with other ids."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, D))
    Y = (rng.random((n, K)) < expit(latent @ _DIRECTIONS.T + _BIAS)).astype(np.float32)
    return Images([f"s{seed}_{i:04d}" for i in range(n)], latent, Y)


def _rotation(network: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(200 + network).normal(size=(D, D)))[0]


def last_layer(network: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """W0 (K, D) and b0 (K,) of a network."""
    weight = _DIRECTIONS @ _rotation(network)
    return weight.astype(np.float32), np.full(K, _BIAS, np.float32)


def features(some: Images, network: int = 0, shifted: bool = False, views: int = 1) -> np.ndarray:
    """(n, views, D) as the network sees the images; each view has noise of its own."""
    rng = np.random.default_rng([network, shifted, len(some.ids)])
    X = some.latent
    if shifted:
        mixing = np.random.default_rng(300).normal(size=(D, D)) / np.sqrt(D)
        X = X + 0.8 * X @ mixing + 0.7
    seen = (X @ _rotation(network))[:, None, :]
    return seen + 0.25 * rng.normal(size=(len(X), views, D))


def write(
    path: Path,
    some: Images,
    network: int = 0,
    shifted: bool = False,
    views: int = 1,
    labelled: bool = True,
    **more: Any,
) -> FeatureCache:
    """A cache of the images; `more` goes to ``FeatureCache.write``."""
    weight, bias = last_layer(network)
    options: dict[str, Any] = {
        "labels": some.Y if labelled else None,
        "classes": CLASSES,
        "weight": weight,
        "bias": bias,
        "provenance": {"network": f"net{network}"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    return FeatureCache.write(
        path, features(some, network, shifted, views), some.ids, **(options | more)
    )


def load_head(path: Path) -> Head:
    """A stored head, not a blend."""
    content = load(path)
    assert isinstance(content, Head)
    return content


def load_blend(path: Path) -> StoredBlend:
    """A stored blend, not a head."""
    content = load(path)
    assert isinstance(content, StoredBlend)
    return content


def write_truth(path: Path, some: Images, outside: int = 0) -> Path:
    """The label file of the images; `outside` more labels that no network knows."""
    rows = ["image_id,labels"]
    for name, row in zip(some.ids, some.Y, strict=True):
        labels = [CLASSES[k] for k in np.flatnonzero(row)]
        labels += [f"/m/other{j}" for j in range(outside)]
        rows.append(f"{name},{' '.join(labels)}")
    path.write_text("\n".join(rows) + "\n")
    return path
