"""Which labels do stored heads give to the images of a set of caches?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from featcache import CacheSet, FeatureCache
from featcache.cacheset import refuse_other_images, short
from heads.decisions import Decision, GlobalThreshold
from heads.domain_heads import AdaptedModel, DomainHead
from heads.storage import Head, StoredBlend, load

ROWS_AT_ONCE = 4096
IMAGE_SET = "--caches"  # all caches that are given, whatever their folders


@dataclass
class Predictor:
    """A stored head or blend, with the caches of one image set that it needs.

    Attributes
    ----------
    models : list of Head
    caches : list of FeatureCache
        For each model the cache of its network.
    content : Head or StoredBlend
    heads : list of estimators
        What predicts: an adapted model's head of the domain that its cache is, else the estimator.
    """

    models: list[Head]
    caches: list[FeatureCache]
    content: Head | StoredBlend
    heads: list[Any]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        caches: Sequence[str | os.PathLike[str]],
        strict: bool = False,
    ) -> Predictor:
        """Read the file and match its heads with caches by ``network_id``.

        A cache is one domain: adapted models look at all its readable images, and at no label,
        before anything is predicted; unless `strict`, which leaves them at Stage 1's own map.

        Raises
        ------
        ValueError
            If a network has no cache or two, or the caches are of different images.
        """
        found = CacheSet(caches, image_set=lambda cache: IMAGE_SET, recursive=False)
        content = load(path)
        models = content.models if isinstance(content, StoredBlend) else [content]
        matched = [_matching(path, found, model.network_id) for model in models]
        cut = content.decision is not None or isinstance(content, StoredBlend)
        if not cut and "threshold" not in content.provenance:
            raise ValueError(f"{path}: has no threshold to cut at; make it with `heads fit`")
        for model, cache in zip(models, matched, strict=True):
            _refuse_other_width(path, model, cache)
            try:
                model.complete(cache.weight)
            except ValueError as error:
                raise ValueError(f"{cache.path}: {error}") from None
        refuse_other_images(matched)
        pairs = zip(models, matched, strict=True)
        return cls(models, matched, content, [_for_domain(m, c, strict) for m, c in pairs])

    @property
    def ids(self) -> np.ndarray:
        """(n,) of the image set."""
        return self.caches[0].ids

    @property
    def classes(self) -> np.ndarray:
        """(K,) class ids."""
        return self.models[0].classes

    def explanations(self) -> dict[str, str]:
        """By network, what an adapted model did to this domain and why."""
        return {
            cache.network_name: head.explain()
            for head, cache in zip(self.heads, self.caches, strict=True)
            if isinstance(head, DomainHead)
        }

    @property
    def readable(self) -> np.ndarray:
        """(n,) bool: rows whose image could be read for every model."""
        return np.logical_and.reduce([cache.valid for cache in self.caches])

    def chunks(self) -> Iterator[np.ndarray]:
        """Probabilities (rows, K) in the order of ``ids``, some thousand rows at a time."""
        for start in range(0, len(self.ids), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            scores = [
                head.predict_proba(cache.features[rows])
                for head, cache in zip(self.heads, self.caches, strict=True)
            ]
            if isinstance(self.content, StoredBlend):
                yield self.content.blend.predict_proba(scores)
            else:
                yield scores[0]

    def rule(self) -> Decision:
        """The rule that goes with the content."""
        return rule_of(self.content)

    def predict_proba(self) -> np.ndarray:
        """(n, K) probabilities."""
        return np.concatenate(list(self.chunks()))

    def predict(self) -> csr_matrix:
        """(n, K) bool: label sets; nothing for an image that could not be read."""
        rule, readable, start = self.rule(), self.readable, 0
        parts = []
        for P in self.chunks():
            chosen = rule.predict(P)
            keep = csr_matrix(readable[start : start + len(P), None])
            parts.append(csr_matrix(chosen.multiply(keep)))
            start += len(P)
        together = csr_matrix(vstack(parts))
        together.sort_indices()  # a product with a column leaves them in any order
        return together

    def label_sets(self) -> list[list[str]]:
        """Class ids of each image."""
        chosen = self.predict()
        return [
            self.classes[chosen.indices[a:b]].tolist()
            for a, b in zip(chosen.indptr, chosen.indptr[1:], strict=False)
        ]


def rule_of(content: Head | StoredBlend) -> Decision:
    """The rule that a head or blend decides by; files of old have a global threshold alone."""
    if content.decision is not None:
        return content.decision
    if isinstance(content, StoredBlend):
        return GlobalThreshold.at(content.blend.threshold_, content.blend.n_features_in_)
    return GlobalThreshold.at(content.provenance["threshold"], len(content.classes))


def _for_domain(model: Head, cache: FeatureCache, strict: bool) -> Any:
    """The estimator, or what an adapted model makes of the domain that the cache is."""
    if not isinstance(model.estimator, AdaptedModel):
        return model.estimator
    if strict:
        return model.estimator.for_domain()
    features, valid = cache.features, cache.valid
    try:
        return model.estimator.for_domain(features if valid.all() else features[valid])
    except ValueError as error:
        raise ValueError(f"{cache.path}: {error}") from None


def _refuse_other_width(path: str | os.PathLike[str], model: Head, cache: FeatureCache) -> None:
    """Features that were written without a name may be of any network."""
    wanted = model.estimator.n_features_in_
    if wanted != cache.shape[2]:
        raise ValueError(
            f"{cache.path}: has {cache.shape[2]} features, but a head of {path} was fitted on "
            f"{wanted}; give the features of the network that it was fitted on"
        )


def _matching(
    path: str | os.PathLike[str], caches: CacheSet, network_id: str | None
) -> FeatureCache:
    if network_id in caches.networks:
        return caches[network_id, IMAGE_SET]
    raise ValueError(
        f"{path}: needs a cache of network {short(network_id)}; --caches has only {caches.listing}"
    )
