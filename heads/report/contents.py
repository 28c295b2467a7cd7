"""What is known of a stored head or blend, and of the caches that it was made of?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit

from featcache import CacheSet, FeatureCache
from featcache.cacheset import short
from heads.blending import Blend
from heads.cuts import apply_threshold, best_global_threshold
from heads.decisions import Decision
from heads.metrics import fbeta_per_image
from heads.nested import CrossValidated, cross_val_fbeta, images_needed
from heads.prediction import rule_of
from heads.storage import Head, OutOfFold, StoredBlend, load

TARGET, SOURCE = "labelled images of the new place", "validation images"
_SOURCE_ROWS = 5000  # at most, of the validation images


@dataclass
class Used:
    """A cache that heads were fitted on.

    Attributes
    ----------
    path : str
    role : str
        :data:`TARGET`, :data:`SOURCE`, or empty where that is not known.
    models : list of str
        That were fitted on it.
    cache : FeatureCache or None
        None if it is not to be found.
    """

    path: str
    role: str
    models: list[str] = field(default_factory=list)
    cache: FeatureCache | None = None


@dataclass
class Unadapted:
    """The networks' own last layers on the labelled images, averaged over the networks.

    Attributes
    ----------
    proba : (n, K)
    fbeta : (n,)
        Of each image, at `cut`.
    cut : float
        The best one on the validation images, or on these ones where there are no others.
    from_source : bool
    """

    proba: np.ndarray
    fbeta: np.ndarray
    cut: float
    from_source: bool


@dataclass
class Contents:
    """All that the page tells.

    Attributes
    ----------
    path : str
    content : Head or StoredBlend
    models : list of Head
    names : list of str
        Of the models.
    weights : (M,)
    oof : OutOfFold
        Of the labelled images of the target.
    rule : Decision
    score : CrossValidated or None
        The rule fitted anew in folds; None of too few images.
    used : list of Used
    source_Y : (m, K) CSR or None
        Labels of the validation images.
    unadapted : Unadapted or None
    """

    path: str
    content: Head | StoredBlend
    models: list[Head]
    names: list[str]
    weights: np.ndarray
    oof: OutOfFold
    rule: Decision
    score: CrossValidated | None
    used: list[Used] = field(default_factory=list)
    source_Y: csr_matrix | None = None
    unadapted: Unadapted | None = None

    @property
    def blend(self) -> Blend | None:
        """The blend, unless this is a head alone."""
        return self.content.blend if isinstance(self.content, StoredBlend) else None

    @property
    def beta(self) -> float:
        """Of F-beta."""
        beta: float = getattr(self.rule, "beta", 2.0)
        return beta

    @property
    def sets(self) -> csr_matrix:
        """(n, K) label sets, by the rule of the other folds where there are enough images."""
        chosen: csr_matrix = self.score.sets if self.score else self.rule.predict(self.oof.proba)
        return chosen

    @property
    def class_names(self) -> np.ndarray:
        """(K,) names, or ids where classes have no names."""
        names, ids = self.models[0].names, self.models[0].classes
        named: np.ndarray = np.where(names == "", ids, names)
        return named

    def network(self, model: Head) -> str:
        """Name of a model's network where a cache of it was found, else the start of its id."""
        for used in self.used:
            if used.cache is not None and used.cache.network_id == model.network_id:
                return used.cache.network_name
        return short(model.network_id)


def gather(path: str, caches: Sequence[str] = ()) -> Contents:
    """Read a head or blend and, where they are to be found, its caches.

    Raises
    ------
    ValueError
        If the file is neither, or has no out-of-fold scores.
    """
    content = load(path)
    if "target" not in content.oof:
        raise ValueError(f"{path}: has no out-of-fold scores; make it with `heads fit` or `blend`")
    if isinstance(content, StoredBlend):
        models, weights = content.models, content.blend.weights_
        names = _distinct(content.model_names)
    else:
        models, names, weights = [content], [Path(path).stem], np.ones(1)
    oof, rule = content.oof["target"], rule_of(content)
    if len(oof.ids) < 2:
        raise ValueError(f"{path}: has one labelled image; a report needs at least two")
    score = None
    if oof.units >= images_needed(rule):
        score = cross_val_fbeta(rule, oof.proba, oof.Y, cv=5, **oof.known())
    found = Contents(path, content, models, names, weights, oof, rule, score)
    found.used = _given(caches, oof, models, names) if caches else _recorded(models, names)
    found.source_Y = _source_labels(found)
    found.unadapted = _unadapted(found)
    return found


def _distinct(paths: Sequence[str]) -> list[str]:
    """File names without ending; with their folder where that tells two apart."""
    stems = [Path(path).stem for path in paths]
    return [
        stem if stems.count(stem) == 1 else f"{Path(path).parent.name}/{stem}"
        for stem, path in zip(stems, paths, strict=True)
    ]


# -------------------------------------------------------------------------- caches


def _recorded(models: Sequence[Head], names: Sequence[str]) -> list[Used]:
    """The caches that the heads name, opened where they still are."""
    used: dict[str, Used] = {}
    for model, name in zip(models, names, strict=True):
        for key, role in (("cache", TARGET), ("source", SOURCE)):
            path = str(model.provenance.get(key) or "")
            if path:
                used.setdefault(path, Used(path, role)).models.append(name)
    for entry in used.values():
        if Path(entry.path).is_file():
            entry.cache = FeatureCache(entry.path)
    return list(used.values())


def _given(
    places: Sequence[str], oof: OutOfFold, models: Sequence[Head], names: Sequence[str]
) -> list[Used]:
    """Caches that were named: of the labelled images those that hold all of them."""
    used = []
    for cache in CacheSet(places):
        role = SOURCE if cache.labels is not None else ""
        if np.isin(oof.ids, cache.ids).all():
            role = TARGET
        of_network = zip(names, models, strict=True)
        fitted = [name for name, model in of_network if model.network_id == cache.network_id]
        used.append(Used(str(cache.path), role, fitted, cache))
    return used


def _open(found: Contents, role: str) -> dict[str | None, FeatureCache]:
    """One cache of each network in a role, with the classes of the heads."""
    classes = found.models[0].classes
    return {
        used.cache.network_id: used.cache
        for used in found.used
        if used.role == role
        and used.cache is not None
        and np.array_equal(used.cache.classes, classes)
    }


def _source_labels(found: Contents) -> csr_matrix | None:
    if "source" in found.content.oof:
        return found.content.oof["source"].Y
    for cache in _open(found, SOURCE).values():
        if cache.labels is not None:
            positives = cache.labels.positives[cache.valid & cache.labels.known]
            return csr_matrix(positives >= 0.5, dtype=np.float32)
    return None


# ----------------------------------------------------------------------- unadapted


def _unadapted(found: Contents) -> Unadapted | None:
    """None unless every network has a cache of the labelled images with its last layer."""
    oof, target = found.oof, _open(found, TARGET)
    wanted = {model.network_id for model in found.models}
    own = {network: cache for network, cache in target.items() if network in wanted}
    if own.keys() != wanted or any(cache.weight is None for cache in own.values()):
        return None
    if not all(np.isin(oof.ids, cache.ids).all() for cache in own.values()):
        return None
    P = np.mean([_own_proba(cache.select(oof.ids)) for cache in own.values()], axis=0)
    cut, from_source = _source_cut(found, wanted), True
    if cut is None:
        cut = best_global_threshold(P, oof.Y, found.beta, oof.mask, missed=oof.missed)[0]
        from_source = False
    values = fbeta_per_image(oof.Y, apply_threshold(P, cut), found.beta, oof.mask, oof.missed)
    return Unadapted(P, values, float(cut), from_source)


def _own_proba(cache: FeatureCache) -> np.ndarray:
    """Probabilities of the network's own last layer on the plain view."""
    assert cache.weight is not None
    bias = 0 if cache.bias is None else cache.bias
    proba: np.ndarray = expit(cache.x(str(cache.views[0])) @ cache.weight.T + bias)
    return proba


def _source_cut(found: Contents, networks: set[str | None]) -> float | None:
    """The best cut of the same average on validation images that all networks have seen."""
    caches = _open(found, SOURCE)
    first = next((caches[n] for n in networks if n in caches), None)
    if first is None or first.labels is None:
        return None
    used = first.valid & first.labels.known
    ids = first.ids[used][:_SOURCE_ROWS]
    if not len(ids):
        return None
    parts = []
    for network in networks:
        cache = caches.get(network)
        if cache is None or cache.weight is None or not np.isin(ids, cache.ids[cache.valid]).all():
            return None
        parts.append(_own_proba(cache.select(ids)))
    labels: Any = first.select(ids).labels
    Y = csr_matrix(labels.positives >= 0.5, dtype=np.float32)
    mean = np.mean(parts, axis=0)
    return best_global_threshold(mean, Y, found.beta, missed=labels.outside)[0]
